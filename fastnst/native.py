"""The project's own engine for CPUs, in C compiled when the package is installed. Numpy only."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fastnst.moments import Moments
from fastnst.native_library import Activation, Packed, add, aligned, finish, from_planes, join_threads, sources, to_planes, whole_vectors
from fastnst.runtime import cpu_threads, free_memory
from fastnst.stages import EPSILON, Stage, StagedNetwork, flat_values, ground, rounding

_BAND = 64  # rows
_LARGE = 256 * 2**20  # bytes: activations so large are computed twice, band by band, rather than kept


@dataclass(frozen=True)
class _Band:
    """An activation that is not kept: ``stage`` makes any rows of it, ``(H, W)`` in all, from its own input. ``owed``: what norm and ReLU still owe."""

    stage: int
    given: Activation
    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]
    owed: Activation


class _Spare:
    """Memory of activations that nobody needs any more, for the next ones: fresh memory the kernel fills with zeros first, which took a sixth of the time.

    What is here and what was taken are never more than ``most`` bytes together, but for what is needed at once.
    """

    def __init__(self) -> None:
        self.most = 0
        self.taken = 0  # bytes that are not given back yet
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Of anything."""
        size = math.prod(shape)
        self.taken += 4 * size
        for index, array in enumerate(self._arrays):
            if array.size == size:
                return self._arrays.pop(index).reshape(shape)
        while self._arrays and self.taken + self.bytes > self.most:
            self._arrays.pop(max(range(len(self._arrays)), key=lambda index: self._arrays[index].size))
        return aligned(shape)

    def give(self, array: np.ndarray) -> None:
        self.taken -= array.nbytes
        self._arrays.append(array.reshape(-1))

    def clear(self) -> None:
        self._arrays.clear()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)


class NativeEngine:
    """On a CPU, without torch or any other runtime. In bfloat16 this is what convolutions multiply; sums, norms and activations are float32."""

    name, device, batch = "native", "cpu", 1

    def __init__(self, network: StagedNetwork, precision: str = "float32") -> None:
        self.network, self.precision = network, precision
        self._threads = cpu_threads()
        last = len(network.stages) - 1
        self._packed = [Packed.of(stage, index == 0, index == last, precision == "bfloat16") for index, stage in enumerate(network.stages)]
        self._spare, self._last_shape, self._rounding = _Spare(), (), rounding(network)
        self._flat = [self._flat_value(stage, value) for stage, value in zip(network.stages, flat_values(network)[0])]

    def free_memory(self) -> int:
        return free_memory() + self._spare.bytes

    def needed_memory(self, count, height, width):
        first = height * width * self.network.stages[0].channels  # numbers of the largest activation; pictures are stylized one by one
        return first * (4 if 4 * first >= _LARGE else 7)

    def run(self, pictures: np.ndarray, pixels: str = "uint8") -> np.ndarray:
        stylized = np.empty_like(pictures, order="C")
        height, width = pictures.shape[1:3] if pixels == "uint8" else pictures.shape[2:]
        in_a_row, self._last_shape = (height, width) == self._last_shape, (height, width)
        needed = self.needed_memory(1, height, width)
        self._spare.most, self._spare.taken = (needed * (2 if self.free_memory() > 8 * needed else 1) if in_a_row else 0), 0
        join_threads()
        for picture, target in zip(pictures, stylized):
            levels = picture if pixels == "uint8" else picture.transpose(1, 2, 0) * np.float32(255)
            raw = self._run(np.subtract(levels, ground(self.network, levels), out=self._spare.take(levels.shape), dtype=np.float32))
            finish(raw, self._packed[-1].left, self.network.info.network.output, target, self._threads)
            self._spare.give(raw)
        if not in_a_row:
            self._spare.clear()
        return stylized

    def stage(self, index, rows, gain, shift, above, below, statistics):
        self._spare.clear()
        stage, channels = self.network.stages[index], rows.shape[1]
        x = from_planes(rows[0], channels if index == 0 else whole_vectors(channels), self._threads)
        given = Activation.of(x, index > 0 and self.network.stages[index - 1].relu)
        if gain is not None:
            given.gain[:channels], given.shift[:channels] = gain, shift
        down, across = (sources(np.arange(side), padding, stage.padding_mode) for side, padding in zip(x.shape, ((above, below), stage.padding)))
        raw = aligned((*self._packed[index].size(down, across), self._packed[index].channels))
        moments = self._convolve(index, given, down, across, raw, statistics) or ()
        if (r := self._packed[index].left) > 1:
            height, width = raw.shape[:2]
            raw = np.ascontiguousarray(raw[..., : 3 * r * r].reshape(height, width, 3, r, r).transpose(0, 3, 1, 4, 2).reshape(height * r, width * r, 3))
        return to_planes(raw, stage.channels, self._threads)[None], *(array[: stage.channels].astype(np.float32) for array in moments)

    def operations(self, height: int, width: int) -> int:
        """Floating-point operations of the convolutions of one picture, two for each multiplication; those of Winograd's transforms are not counted."""
        total = 0
        for stage, packed in zip(self.network.stages, self._packed):
            height, width = stage.size(height), stage.size(width)
            total += packed.operations(height // packed.left, width // packed.left)
        return total

    def _run(self, x: np.ndarray) -> np.ndarray:
        """``(H, W, 3)``, pixels less the ground, -> what the last convolution gives."""
        config, stages = self.network.info.network, self.network.stages
        indices = []
        for side in x.shape[:2]:
            indices.append(np.pad(np.pad(np.arange(side), (0, config.missing(side)), mode="edge"), config.start_padding, mode="reflect"))
        value: Activation | _Band = Activation.of(x)
        del x  # is freed when no stage needs it any more
        block: Activation | None = None
        for index, stage in enumerate(stages):
            begins_block = index + 1 < len(stages) and stages[index + 1].skip
            block = value if begins_block else block
            rows, columns = (sources(side, stage.padding, stage.padding_mode) for side in indices)
            height, width = self._packed[index].size(rows, columns)
            in_block = begins_block or stage.skip or (index + 2 < len(stages) and stages[index + 2].skip)
            keep = in_block or isinstance(value, _Band) or not self._is_worth_making_twice(index, height, width)
            raw, moments = self._bands(index, value, rows, columns, keep)
            if isinstance(value, Activation) and value is not block and keep:
                self._spare.give(value.x)
            if index == len(stages) - 1:
                return raw
            owed = self._owed(index, raw, moments)
            if stage.skip:
                value = add(owed, block, stage.shave, self._threads)
                self._spare.give(block.x)
                block = None
            else:
                value = owed if keep else _Band(index, value, rows, columns, (height, width), owed)
            indices = [np.arange(height), np.arange(width)]
        raise AssertionError("a network has stages")

    def _is_worth_making_twice(self, index: int, height: int, width: int) -> bool:
        """Whether a stage gives more than it should take in memory, and more than the next one does, which has to be kept then."""
        if index == len(self.network.stages) - 1:
            return False
        following = self.network.stages[index + 1]
        size, next_size = height * width * self._packed[index].channels, following.size(height) * following.size(width) * self._packed[index + 1].channels
        return 4 * size >= _LARGE and size >= next_size

    def _bands(self, index: int, given: "Activation | _Band", rows: np.ndarray, columns: np.ndarray, keep: bool) -> tuple[np.ndarray, Moments | None]:
        """A stage's convolution in one go, or, where its input or its output is not kept, band by band: its output, or one band of it, and its channels' moments."""
        packed, statistics = self._packed[index], self.network.stages[index].norm_weight is not None
        height, width = packed.size(rows, columns)
        in_one = keep and isinstance(given, Activation)
        step = height if in_one else _BAND
        raw = self._spare.take((height if keep else min(step, height), width, packed.channels))
        moments = Moments() if statistics else None
        for begin in range(0, height, step) if keep or statistics else ():
            end = min(height, begin + step)
            band = raw[begin:end] if keep else raw[: end - begin]
            needed = rows[begin // packed.shuffle * packed.stride : (end // packed.shuffle - 1) * packed.stride + packed.kernel]
            source, found = (given, needed) if isinstance(given, Activation) else self._rows(given, needed)
            parts = self._convolve(index, source, found, columns, band, statistics)
            if moments is not None:
                moments.add((end - begin) * width, *parts)
        return raw, moments

    def _rows(self, band: _Band, needed: np.ndarray) -> tuple[Activation, np.ndarray]:
        """Of what is not kept, the rows that are needed, made anew, and where each of them is found there."""
        packed = self._packed[band.stage]
        begin = needed[needed >= 0].min() // packed.shuffle * packed.shuffle
        end = -(-(needed.max() + 1) // packed.shuffle) * packed.shuffle
        rows = band.rows[begin // packed.shuffle * packed.stride : (end // packed.shuffle - 1) * packed.stride + packed.kernel]
        x = aligned((end - begin, band.shape[1], packed.channels))
        self._convolve(band.stage, band.given, rows, band.columns, x, statistics=False)
        return replace(band.owed, x=x), np.where(needed < 0, -1, needed - begin)

    def _convolve(self, index: int, given: Activation, rows: np.ndarray, columns: np.ndarray, output: np.ndarray, statistics: bool) -> tuple[np.ndarray, np.ndarray] | None:
        flat = self._flat[index]
        return self._packed[index].convolve(given.less(flat), rows, columns, self.network.stages[index].value - flat, output, statistics, self._threads)

    def _owed(self, index: int, raw: np.ndarray, moments: Moments | None) -> Activation:
        """What a stage's convolution gave, with what its norm and ReLU still owe."""
        stage = self.network.stages[index]
        value = Activation.of(raw, stage.relu)
        if moments is not None:
            mean, variance = moments.mean[: stage.channels], moments.variance[: stage.channels]
            gain = np.where(variance < self._rounding[index], 0, stage.norm_weight / np.sqrt(variance + EPSILON))
            value.gain[: stage.channels], value.shift[: stage.channels] = gain, stage.norm_bias - mean * gain
        return value

    def _flat_value(self, stage: Stage, value: np.ndarray) -> np.ndarray:
        """What to take off a stage's input, ``(C,)``, where a norm follows, which does not mind: flat parts of a picture, 0 then, leave the digits to the others."""
        kernels_differ = self.network.info.network.upsampling in ("transposed", "subpixel") and (stage.transposed or stage.shuffle > 1)  # from pixel to pixel
        value = 0 * value if stage.norm_weight is None or kernels_differ else value
        return np.pad(value, (0, whole_vectors(value.size) - value.size)).astype(np.float32)
