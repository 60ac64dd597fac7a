"""Pictures larger than memory: the network strip by strip, exactly.

An instance norm looks at the whole picture, so tiles stylized one by one disagree. Here each norm's statistics are gathered
over all strips before any strip goes through it: one pass over the picture for each norm. What lies at the lowest resolution is
kept between passes; what lies above is computed anew from it (or from the pixels), with the rows around a strip that its
convolutions see. The result is that of the whole picture, but for the rounding of sums.
"""

from collections.abc import Callable
from itertools import accumulate
from operator import mul

import numpy as np

from fastnst.engine import Engine
from fastnst.moments import Moments
from fastnst.runtime import is_out_of_memory
from fastnst.stages import EPSILON, Stage, StagedNetwork, ground, rounding

_STRIP_BYTES = 128 * 2**20
_SMALLEST_STRIP = 16
_LARGEST_IN_FLOAT32 = 2**30  # bytes kept between passes; 100 megapixels then take 3.2 GB in float16


def plan_rows(network: StagedNetwork, width: int) -> int:
    """Rows of a strip of pictures so wide: what its first layer takes is some 128 MiB, and it has 16 rows at least."""
    return max(_SMALLEST_STRIP, _STRIP_BYTES // (3 * 4 * network.stages[0].channels * width) // 4 * 4)


def stylize_tiled(
    engine: Engine,
    pixels: np.ndarray,
    rows: int,
    memory: int,
    report: Callable[[float], None] = lambda done: None,
    in_place: bool = False,
    notice: Callable[[str], None] = lambda message: None,
) -> np.ndarray:
    """Stylize ``(H, W, 3)``, uint8 or float32 of 0..255, in strips of ``rows``; the result is of the same kind.

    ``in_place`` lets it take the place of ``pixels``, which halves their memory.
    Between passes the lowest resolution is kept in float32 where that takes at most 1 GiB and half of ``memory`` bytes, else in float16.
    A strip that does not fit into memory is tried again with half the rows, as are those behind it; ``notice`` is told. Raises ``MemoryError``, or the engine's
    own kind, where 16 rows do not fit. ``report`` gets the share of the work that is done.
    """
    return _Strips(engine, pixels, max(_SMALLEST_STRIP, rows), memory, report, notice).run(pixels if in_place else np.empty_like(pixels))


class _Strips:
    """One picture on its way through the network."""

    def __init__(self, engine: Engine, pixels: np.ndarray, rows: int, memory: int, report: Callable[[float], None], notice: Callable[[str], None]) -> None:
        network = engine.network
        self.engine, self.stages, self.report, self.notice = engine, network.stages, report, notice
        self.output = network.info.network.output
        config = network.info.network
        missing = [config.missing(side) for side in pixels.shape[:2]]
        self.shape = pixels.shape[:2]
        self.pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels
        if start := config.start_padding:
            self.pixels = np.pad(self.pixels, ((start, start), (start, start), (0, 0)), mode="reflect")
        self.ground, self.rounding = ground(network, pixels), rounding(network)
        self.sizes = [self.pixels.shape[:2]]  # (height, width) of what goes into each stage, and out of the last
        for stage in self.stages:
            self.sizes.append(tuple(stage.size(side) for side in self.sizes[-1]))
        self.rows = min(rows, self.sizes[0][0])
        scales = list(accumulate((stage.stride / stage.shuffle / (1 + stage.transposed) for stage in self.stages), mul))
        self.is_kept = [scale == max(scales) for scale in scales]
        kept = [stage.channels * height * width for stage, is_kept, (height, width) in zip(self.stages, self.is_kept, self.sizes[1:]) if is_kept]
        self.dtype = np.float32 if 2 * 4 * max(kept) <= min(memory / 2, _LARGEST_IN_FLOAT32) else np.float16
        self.kept: dict[int, np.ndarray] = {}  # stage -> (C, h, w)
        self.pending: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # stage -> gain and shift that its norm, then its ReLU, still owe
        self.above: tuple[int, np.ndarray] | None = None  # a row, and what lay there before a pass in place wrote over it
        work = [stage.weight.size * height * width / stage.shuffle**2 for stage, (height, width) in zip(self.stages, self.sizes[1:])]
        self.work, self.done = work, 0.0
        self.total = sum(sum(work[first] for first in self._computed_for(index)) for index in range(len(work)))

    def _computed_for(self, index: int) -> list[int]:
        """The stages that a pass for stage ``index`` computes: itself, and those before it that are not kept."""
        needed = [index]
        while needed[-1] > 0 and not self.is_kept[needed[-1] - 1]:
            needed.append(needed[-1] - 1)
        return needed

    def run(self, result: np.ndarray) -> np.ndarray:
        """All passes, in order; the last one writes ``result``."""
        for index, stage in enumerate(self.stages[:-1]):
            self._pass(index, stage)
        last = len(self.stages) - 1

        def strip(begin: int, end: int) -> None:
            if begin < self.shape[0]:
                raw = self._raw(last, begin, end)[0, :, : self.shape[0] - begin, : self.shape[1]]
                result[begin:end] = _to_pixels(raw, self.output, result.dtype)
            self._advance(last, begin, end)

        self._in_strips(last, strip)
        return result

    def _pass(self, index: int, stage: Stage) -> None:
        """Gather the statistics of a stage's norm, and keep its output where that is to be kept."""
        keeps = self.is_kept[index]
        in_place = keeps and stage.skip  # a block's second convolution takes the place of its first
        if in_place:
            target = self.kept[index - 1][:, : self.sizes[index + 1][0], : self.sizes[index + 1][1]]
        elif keeps:
            target = np.empty((stage.channels, *self.sizes[index + 1]), self.dtype)
        moments = Moments()

        def strip(begin: int, end: int) -> None:
            raw, mean, variance = self._convolve(index, begin, end, statistics=True)
            halo = end - stage.padding
            above = (halo, self.kept[index - 1][:, halo:end].copy()) if in_place else None
            moments.add((end - begin) * raw.shape[3], mean, variance)
            if keeps:
                self.above = above
                target[:, begin:end] = raw[0]
            self._advance(index, begin, end)

        self._in_strips(index, strip)
        self.above = None
        if stage.norm_weight is None:
            gain, shift = np.ones(stage.channels, np.float32), np.zeros(stage.channels, np.float32)
        else:
            gain = stage.norm_weight / np.sqrt(moments.variance + EPSILON)
            gain = np.where(moments.variance < self.rounding[index], 0, gain)
            shift = stage.norm_bias - moments.mean * gain
        self.pending[index] = (gain.astype(np.float32), shift.astype(np.float32))
        if keeps:
            self.kept[index] = target
        if keeps and stage.skip:
            s = stage.shave
            block_input = self.kept.pop(index - 2)
            block_input = block_input[:, s:-s, s:-s] if s else block_input
            self._finish(index, block_input)
            self.kept[index] = block_input
            del self.kept[index - 1]
        elif keeps and index + 2 < len(self.stages) and self.stages[index + 2].skip:
            self._finish(index, None)

    def _finish(self, index: int, block_input: np.ndarray | None) -> None:
        """Apply a kept stage's norm and ReLU where it lies, or add the result to its block's input where that lies."""
        gain, shift = (array[:, None, None] for array in self.pending.pop(index))
        stage, kept = self.stages[index], self.kept[index]

        def strip(begin: int, end: int) -> None:
            rows = kept[:, begin:end] * gain + shift
            rows = np.maximum(rows, 0, out=rows) if stage.relu else rows
            if block_input is None:
                kept[:, begin:end] = rows
            else:
                block_input[:, begin:end] += rows

        self._in_strips(index, strip)

    def _in_strips(self, index: int, strip: Callable[[int, int], None]) -> None:
        """Do all rows of a stage's output, from one row to another, of even number but for the last; ``strip`` changes nothing before all that needs memory is done."""
        begin, height = 0, self.sizes[index + 1][0]
        while begin < height:
            end = min(height, begin + max(4, self.rows * height // self.sizes[0][0] // 4 * 4))
            try:
                strip(begin, end)
            except Exception as error:  # ONNX Runtime has kinds of its own
                if not is_out_of_memory(error) or self.rows <= _SMALLEST_STRIP:
                    raise
                self.rows = max(_SMALLEST_STRIP, self.rows // 2)
                self.notice(f"a strip did not fit into memory; going on with {self.rows} rows each")
            else:
                begin = end

    def _advance(self, index: int, begin: int, end: int) -> None:
        self.done += sum(self.work[stage] for stage in self._computed_for(index)) * (end - begin) / self.sizes[index + 1][0]
        self.report(min(1.0, self.done / self.total))

    def _raw(self, index: int, begin: int, end: int) -> np.ndarray:
        """Rows of what goes out of a stage's convolution: ``(1, C, end - begin, W)`` float32."""
        if index < 0:
            return self.pixels[begin:end].transpose(2, 0, 1)[None].astype(np.float32) - self.ground[:, None, None]
        if index not in self.kept:
            return self._convolve(index, begin, end, statistics=False)[0]
        rows = self.kept[index][:, begin:end].astype(np.float32)
        if self.above is not None:
            first, saved = self.above
            count = min(end, first + saved.shape[1]) - begin
            if count > 0:
                rows[:, :count] = saved[:, begin - first : begin - first + count]
        return rows[None]

    def _convolve(self, index: int, begin: int, end: int, statistics: bool) -> tuple[np.ndarray, ...]:
        """Those rows computed anew, and for ``statistics`` their means and variances."""
        stage, height = self.stages[index], self.sizes[index][0]
        if stage.transposed:
            first, last = begin // 2 - 1, (end + 1) // 2 + 1
        else:
            low, high = begin // stage.shuffle, -(-end // stage.shuffle)
            first, last = low * stage.stride - stage.padding, (high - 1) * stage.stride - stage.padding + stage.weight.shape[2]
        above, below = max(0, -first), max(0, last - height)
        rows = self._raw(index - 1, first + above, last - below)
        gain, shift = self.pending.get(index - 1, (None, None))
        raw, *moments = self.engine.stage(index, rows, gain, shift, above, below, statistics)
        offset = begin % (2 if stage.transposed else stage.shuffle)
        return raw[:, :, offset : offset + end - begin], *moments  # strips of passes are even: what statistics are of is never cut


def _to_pixels(raw: np.ndarray, output: str, kind: np.dtype) -> np.ndarray:
    """``(3, h, W)`` of the last convolution -> ``(h, W, 3)``."""
    if output == "tanh":
        raw = 127.5 + 150 * np.tanh(raw)
    elif output == "sigmoid":
        raw = 255 / (1 + np.exp(-raw))
    raw = np.clip(raw, 0, 255)
    return (raw.round() if kind == np.uint8 else raw).astype(kind).transpose(1, 2, 0)
