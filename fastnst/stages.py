"""The network as a flat list of stages for inference, the exact rewrites folded in. Numpy only.

A stage is a convolution (perhaps transposed, or followed by a pixel shuffle), an instance norm, a ReLU and the sum with a
block's input, each but the first optional. Engines build what they run from this list; the model file is never changed.

The rewrites, each the same function of the same weights:

- nearest upsampling x2 + padding 1 + 3x3 convolution = padding 1 on the small grid + 4x4 transposed convolution of stride
  2 with summed kernels: 4 multiplications an output instead of 9, and no upsampled tensor;
- the last 9x9 convolution to 3 channels = 10x10 of stride 2 to 12 channels + pixel shuffle, which fills the machine;
- batch norm goes into its convolution; an instance norm makes its convolution's bias, and any constant added to that
  one's input, free: pixels come in as whole numbers -128..127, which bfloat16 holds exactly.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from fastnst.model import ModelInfo

EPSILON = 1e-5  # of torch's norms
# A share of the variance that a stage would give of unrelated inputs, which is rounding alone from the second norm on: 9e-7 or more where one pixel of 3 megapixels
# is a level off, 9e-9 or less where all are of one color, or stripes or squares of a pixel, of which strides leave one color (the shipped styles in float32, which round
# from pixel to pixel in another way). Norms would divide that rounding by the root of their epsilon, one after the other.
_ROUNDING = 2e-8
PIXEL_SHIFT = 128.0  # what is subtracted from pixels of 0..255
ARRAYS = ("weight", "bias", "norm_weight", "norm_bias")
# How much of small row i - 1 + a there is, of what kernel row k of large row 2i + p sees: [p, a, k]. Bilinear: large row 2j is 1/4 of small row j - 1 and 3/4 of
# j, row 2j + 1 is 3/4 of j and 1/4 of j + 1. Transposed: small row s reaches large row r through kernel row r - 2s + 1.
UPSAMPLINGS = {
    "nearest": np.array([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], float),
    "bilinear": np.array([[[3, 1, 0], [1, 3, 3], [0, 0, 1]], [[1, 0, 0], [3, 3, 1], [0, 1, 3]]], float) / 4,
    "transposed": np.array([[[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]], float),
}


@dataclass(frozen=True)
class Stage:
    """One stage; ``x`` is ``(N, C, H, W)``.

    ``padding`` pixels of ``padding_mode`` on all sides (``value``: what ``constant`` puts there), then the convolution
    with ``weight`` (``(O, I, k, k)``; ``(I, O, 4, 4)`` when ``transposed``: stride 2, 3 pixels cropped from each side, so that with
    padding 1 the size doubles), ``bias``, pixel shuffle by ``shuffle``, instance norm, ReLU; ``skip`` adds the input of the
    stage before, less ``shave`` pixels on each side.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None
    norm_weight: np.ndarray | None = None
    norm_bias: np.ndarray | None = None
    padding: int = 0
    padding_mode: Literal["reflect", "replicate", "constant"] = "constant"
    value: float = 0.0
    stride: int = 1
    transposed: bool = False
    shuffle: int = 1
    relu: bool = False
    skip: bool = False
    shave: int = 0

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.weight.shape[1] if self.transposed else self.weight.shape[0] // self.shuffle**2

    def size(self, side: int) -> int:
        """The output's height or width for an input's."""
        padded = side + 2 * self.padding
        if self.transposed:
            return 2 * (padded - 1) + self.weight.shape[2] - 6
        return ((padded - self.weight.shape[2]) // self.stride + 1) * self.shuffle


    @property
    def shuffled(self) -> "Stage":
        """The same, a transposed convolution as a 3x3 one on the small grid to four times the channels and their shuffle: 9 multiplications of an output instead of 4."""
        if not self.transposed:
            return self
        rows = UPSAMPLINGS["transposed"].astype(self.weight.dtype)
        split = np.einsum("pax,qby,ioxy->opqiab", rows, rows, self.weight)
        weight, bias = split.reshape(-1, *split.shape[3:]), None if self.bias is None else self.bias.repeat(4)
        return replace(self, weight=weight, bias=bias, transposed=False, shuffle=2)


@dataclass(frozen=True)
class StagedNetwork:
    """A network ready for inference: its stages and what its file says of it.

    Sides shorter than ``info.network.smallest_side``, or no multiple of ``info.network.multiple``, are padded by replication, then all by ``info.network.start_padding`` by
    reflection; the first stage takes pixels of 0..255 less ``PIXEL_SHIFT``; ``info.network.output`` follows the last one, which
    is then cropped to the size that came in.
    """

    stages: tuple[Stage, ...]
    info: ModelInfo


def fold(weights: dict[str, np.ndarray], info: ModelInfo) -> StagedNetwork:
    """The stages of ``TransformNetwork`` with these weights, rewritten. Raises ``KeyError`` or ``ValueError`` where they do not fit."""
    config = info.network
    mode = "constant" if config.padding in ("zeros", "start") else config.padding
    block = {"padding": 0} if config.padding == "start" else {"padding": 1, "padding_mode": mode}
    start = 1 if config.padding == "start" else 0  # TransformNetwork.layers begins with that padding

    def stage(conv: str, norm: str, **options: Any) -> Stage:
        kernel, bias = weights[f"layers.{conv}.weight"], weights[f"layers.{conv}.bias"]
        scale, shift = weights[f"layers.{norm}.weight"], weights[f"layers.{norm}.bias"]
        shuffled = options.get("shuffle", 1) ** 2
        if config.norm == "batch":
            gain = scale / np.sqrt(weights[f"layers.{norm}.running_var"] + EPSILON)
            shift = shift - weights[f"layers.{norm}.running_mean"] * gain
            axis = (None, slice(None), None, None) if config.upsampling == "transposed" and options.get("transposed") else (slice(None), None, None, None)
            kernel, bias = kernel * gain.repeat(shuffled)[axis], bias * gain.repeat(shuffled) + shift.repeat(shuffled)
            return Stage(kernel, bias, **options)
        return Stage(kernel, bias if shuffled > 1 else None, scale, shift, **options)

    widths = [1] if config.stem == "half" else [1, 1]  # how often the stem halves the resolution, and the last layers double it
    stages = [_take_pixels(stage(f"{start}", f"{start + 1}", padding=4, padding_mode=mode, relu=True, stride=3 - len(widths)))]
    at = start + 3
    for _ in widths:
        stages.append(stage(f"{at}", f"{at + 1}", padding=1, padding_mode=mode, stride=2, relu=True))
        at += 3
    for index in range(at, at + config.residual_blocks):
        stages.append(stage(f"{index}.layers.0", f"{index}.layers.1", relu=True, **block))
        stages.append(stage(f"{index}.layers.3", f"{index}.layers.4", skip=True, shave=2 if start else 0, **block))
    at += config.residual_blocks
    for _ in widths:
        if config.upsampling == "nearest":
            # on the small grid, padding by reflection or replication of 1 px on the large one is replication
            small = stage(f"{at + 1}", f"{at + 2}", padding=1, padding_mode="constant" if mode == "constant" else "replicate", transposed=True, relu=True)
            stages.append(replace(small, weight=_summed_kernels(small.weight)))
            at += 4
        elif config.upsampling == "bilinear":  # on the small grid each of the four sub-pixels sees 3x3, through kernels of its own
            small = stage(f"{at + 1}", f"{at + 2}", padding=1, padding_mode="replicate", relu=True)
            weight, bias = _interpolated_kernels(small.weight), None if small.bias is None else small.bias.repeat(4)
            stages.append(replace(small, weight=weight, bias=bias, shuffle=2))
            at += 4
        elif config.upsampling == "transposed":  # 3x3, padding 1, output padding 1: a 4x4 one whose last row and column are 0
            small = stage(f"{at}", f"{at + 1}", padding=1, transposed=True, relu=True)
            stages.append(replace(small, weight=np.pad(small.weight, ((0, 0), (0, 0), (0, 1), (0, 1)))))
            at += 3
        else:
            stages.append(stage(f"{at}", f"{at + 2}", padding=1, padding_mode=mode, shuffle=2, relu=True))
            at += 4
    weight, bias = (weights[f"layers.{at}.{part}"] * config.output_scale for part in ("weight", "bias"))
    if config.stem == "half":
        stages.append(Stage(weight, bias, padding=2, padding_mode=mode, shuffle=2))
    else:
        stages.append(Stage(_split_stride(weight), bias.repeat(4), padding=4, padding_mode=mode, stride=2, shuffle=2))
    return StagedNetwork(_checked((_contiguous(one) for one in stages), info), info)


def _checked(stages: Iterable[Stage], info: ModelInfo) -> tuple[Stage, ...]:
    """The stages, once it is sure that they fit together: engines do not ask again, and one in C would read what lies beside an array. Raises ``ValueError``."""
    stages, config = tuple(stages), info.network
    smallest = config.smallest_side + -config.smallest_side % config.multiple
    for side in (smallest, 64 * smallest):
        channels, sides = [3], [side + 2 * config.start_padding]  # of what each stage takes, and the last one gives
        for index, stage in enumerate(stages):
            for demand, is_met in _demands(stage, channels, sides):
                if not is_met:
                    raise ValueError(f"stage {index}: {demand}")
            if stage.skip and index and stages[index - 1].skip:
                raise ValueError(f"stage {index}: it adds what has been added to")
            channels.append(stage.channels)
            sides.append(stage.size(sides[-1]))
        if not stages or stages[-1].norm_weight is not None or stages[-1].relu or stages[-1].skip or channels[-1] != 3 or sides[-1] < side:
            raise ValueError(f"{len(stages)} stages give {channels[-1]} channels of {sides[-1]} px for a picture of {side}, need 3 of as many, with nothing behind the last convolution")
    return stages


def _demands(stage: Stage, channels: list[int], sides: list[int]) -> Iterator[tuple[str, bool]]:
    """What is asked of a stage behind others, of which each took, and the last gave, so many ``channels`` and pixels a side, and whether it is met. Each relies on those before."""
    weight, numbers = stage.weight, (stage.padding, stage.stride, stage.shuffle, stage.shave)
    for name in ARRAYS:
        array = getattr(stage, name)
        yield f"its {name} holds what is no number", array is None or bool(np.isfinite(array).all())
    yield f"its kernels are {weight.shape}, need four dimensions, the last two alike", weight.ndim == 4 and weight.size > 0 and weight.shape[2] == weight.shape[3]
    yield f"need whole numbers, got {numbers}", all(type(number) is int for number in numbers)
    yield f"need a number to pad with, got {stage.value!r}", type(stage.value) in (int, float) and bool(np.isfinite(stage.value))
    yield "need true or false", all(type(flag) is bool for flag in (stage.transposed, stage.relu, stage.skip))
    yield f"padding by {stage.padding}, {stage.padding_mode!r}", stage.padding_mode in ("reflect", "replicate", "constant") and 0 <= stage.padding < min(sides[-1], weight.shape[2])
    yield f"stride {stage.stride}, shuffle {stage.shuffle}", stage.stride in (1, 2) and stage.shuffle in (1, 2)
    yield "transposed kernels are 4x4, without stride and shuffle", not stage.transposed or (weight.shape[2], stage.stride, stage.shuffle) == (4, 1, 1)
    inputs, outputs = weight.shape[:2] if stage.transposed else weight.shape[1::-1]
    yield f"it takes {inputs} channels, and gets {channels[-1]}", inputs == channels[-1]
    yield f"{outputs} channels cannot be shuffled by {stage.shuffle}", outputs % stage.shuffle**2 == 0
    yield f"need a bias of {outputs} numbers", stage.bias is None or stage.bias.shape == (outputs,)
    norm = [None if array is None else array.shape for array in (stage.norm_weight, stage.norm_bias)]
    yield f"need a norm of {stage.channels} numbers", norm in ([None, None], [(stage.channels,)] * 2)
    side = stage.size(sides[-1])
    yield f"nothing is left of {sides[-1]} px", side > 0
    if stage.skip:
        added = (*channels[-2:-1], *(before - 2 * stage.shave for before in sides[-2:-1]))
        yield f"it adds {added} channels and px to {(stage.channels, side)}", stage.shave >= 0 and added == (stage.channels, side)


def _take_pixels(first: Stage) -> Stage:
    """The same for pixels of 0..255 less the shift, instead of [0, 1]."""
    weight = first.weight / 255
    bias = None if first.bias is None else first.bias + PIXEL_SHIFT * weight.sum(axis=(1, 2, 3))
    return replace(first, weight=weight, bias=bias, value=-PIXEL_SHIFT)


def _summed_kernels(weight: np.ndarray) -> np.ndarray:
    """3x3 kernels on a grid upsampled by nearest, ``(O, I, 3, 3)``, as ``(I, O, 4, 4)`` of a transposed convolution.

    Row 2i + p of the large grid sees rows i - 1 + p and i + p of the small one: for p = 0 through kernel rows {0} and {1, 2},
    for p = 1 through {0, 1} and {2}. Small row s reaches large row r through row r - 2s + 1 of the transposed kernel.
    """
    rows = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], weight.dtype)  # transposed kernel row <- kernel rows
    return np.einsum("xk,yl,oikl->ioxy", rows, rows, weight)


def _interpolated_kernels(weight: np.ndarray) -> np.ndarray:
    """3x3 kernels on a grid upsampled by bilinear interpolation, ``(O, I, 3, 3)``, as ``(4 O, I, 3, 3)`` on the small grid, to be shuffled by 2."""
    rows = UPSAMPLINGS["bilinear"].astype(weight.dtype)
    split = np.einsum("pak,qbl,oikl->opqiab", rows, rows, weight)
    return split.reshape(-1, *split.shape[3:])


def _split_stride(weight: np.ndarray) -> np.ndarray:
    """``(O, I, k, k)`` of stride 1 as ``(4 O, I, k + 1, k + 1)`` of stride 2, to be shuffled by 2."""
    outputs, inputs, height, width = weight.shape
    split = np.zeros((outputs, 2, 2, inputs, height + 1, width + 1), weight.dtype)
    for row in range(2):
        for column in range(2):
            split[:, row, column, :, row : row + height, column : column + width] = weight
    return split.reshape(outputs * 4, inputs, height + 1, width + 1)


def _contiguous(stage: Stage) -> Stage:
    arrays = {name: getattr(stage, name) for name in ARRAYS}
    return replace(stage, **{name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items() if array is not None})


def minds_ground(network: StagedNetwork) -> bool:
    """Whether a constant that is added to all pixels changes what becomes of them."""
    first = network.stages[0]
    return first.norm_weight is None or first.padding_mode == "constant"


def ground(network: StagedNetwork, pixels: np.ndarray) -> np.ndarray:
    """What to take off pixels of 0..255, ``(H, W, 3)``, a whole number for each channel: ``PIXEL_SHIFT``, or where the first stage does not mind, the
    picture's mean, so that one of a single color is 0."""
    if minds_ground(network):
        return np.full(3, PIXEL_SHIFT, np.float32)
    return np.round(pixels[::8, ::8].mean(axis=(0, 1), dtype=np.float64)).astype(np.float32)  # which of them does not matter


def flat_values(network: StagedNetwork) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each stage's convolution takes, ``(I,)``, and makes, ``(O,)``, of a picture of one color, 0: norms leave their biases of it."""
    values, found = [np.zeros(3)], []
    for stage in network.stages:
        kernels = stage.weight.sum(axis=(2, 3))
        value = values[-1] @ kernels / 4 if stage.transposed else kernels @ values[-1]
        value = value + (0 if stage.bias is None else stage.bias)
        value = value.reshape(-1, stage.shuffle**2).mean(axis=1)
        found.append(value)
        value = value if stage.norm_bias is None else stage.norm_bias
        value = np.maximum(value, 0) if stage.relu else value
        values.append(value + values[-2] if stage.skip else value)
    return values[:-1], found


def rounding(network: StagedNetwork) -> list[np.ndarray]:
    """For each stage, ``(O,)``, the variance of what its convolution gives that is rounding alone, if it is not more; 0 for the first."""
    found = [np.zeros(network.stages[0].channels)]
    for before, stage in zip(network.stages, network.stages[1:]):
        squares = (stage.weight.astype(np.float64) ** 2).sum(axis=(2, 3))
        spread = np.ones(squares.shape[0 if stage.transposed else 1]) if before.norm_weight is None else before.norm_weight.astype(np.float64) ** 2
        variance = spread @ squares / 4 if stage.transposed else squares @ spread
        found.append(_ROUNDING * variance.reshape(-1, stage.shuffle**2).mean(axis=1))
    return found


def less_flat(network: StagedNetwork) -> list[Stage]:
    """The stages, whose convolutions give 0 where a picture is flat, if a norm follows, which does not mind: few digits are then those of what stands out."""
    stages = []
    for stage, value in zip(network.stages, flat_values(network)[1]):
        if stage.norm_weight is not None:
            bias = -value.repeat(stage.shuffle**2) + (0 if stage.bias is None else stage.bias)
            stage = replace(stage, bias=bias.astype(np.float32))
        stages.append(stage)
    return stages


def describe(network: StagedNetwork) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of all stages by name, and everything else of them as JSON; ``restore_stages`` reads both."""
    arrays = {f"stage.{index}.{name}": getattr(stage, name) for index, stage in enumerate(network.stages) for name in ARRAYS}
    rest = [{field.name: getattr(stage, field.name) for field in fields(Stage) if field.name not in ARRAYS} for stage in network.stages]
    return {name: array for name, array in arrays.items() if array is not None}, json.dumps(rest)


def restore_stages(arrays: dict[str, np.ndarray], rest: str, info: ModelInfo) -> StagedNetwork:
    """What ``describe`` took apart. Raises ``KeyError``, ``TypeError`` or ``ValueError`` where a part is missing or does not fit."""
    stages = []
    for index, options in enumerate(json.loads(rest)):
        found = {name: arrays[f"stage.{index}.{name}"].copy() for name in ARRAYS if f"stage.{index}.{name}" in arrays}
        stages.append(_contiguous(Stage(**found, **options)))
    return StagedNetwork(_checked(stages, info), info)
