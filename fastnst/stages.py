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
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from fastnst.model import ModelInfo, NetworkConfig

EPSILON = 1e-5  # of torch's norms
# A share of the variance that a stage would give of unrelated inputs, which is rounding alone from the second norm on: 9e-7 or more where one pixel of 3 megapixels
# is a level off, 9e-9 or less where all are of one color, or stripes or squares of a pixel, of which strides leave one color (the shipped styles in float32, which round
# from pixel to pixel in another way). Norms would divide that rounding by the root of their epsilon, one after the other.
_ROUNDING = 2e-8
PIXEL_SHIFT = 128.0  # what is subtracted from pixels of 0..255
Arrays = dict[str, np.ndarray]  # of a stage, by the names of its fields
PAD_MODES = {"reflect": "reflect", "replicate": "edge", "constant": "constant"}  # by those of stages those of NumPy and ONNX
ARRAYS = ("weight", "bias", "norm_weight", "norm_bias")
# [p, a, k]: the share of small row i - 1 + a in what kernel row k sees at large row 2i + p. Bilinear: large row 2j is 1/4 of small row j - 1 and 3/4 of
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
        weight, bias = _on_small_grid(self.weight.swapaxes(0, 1), "transposed"), None if self.bias is None else self.bias.repeat(4)
        return replace(self, weight=weight, bias=bias, transposed=False, shuffle=2)

    @property
    def by_pixel(self) -> "Stage":
        """The same, of a last stage that makes 2x2 pixels at once the convolution of each that ``_split_stride`` made it of."""
        if (self.stride, self.shuffle) != (2, 2):
            return self
        return replace(self, weight=self.weight[::4, :, :-1, :-1], bias=self.bias[::4], stride=1, shuffle=1)


@dataclass(frozen=True)
class StagedNetwork:
    """A network ready for inference: its stages and what its file says of it.

    Sides are padded by replication by what they are ``info.network.missing``, then all by ``info.network.start_padding`` by
    reflection; the first stage takes pixels of 0..255 less ``PIXEL_SHIFT``; ``info.network.output`` follows the last one, which
    is then cropped to the size that came in.
    """

    stages: tuple[Stage, ...]
    info: ModelInfo


def fold(weights: dict[str, np.ndarray], info: ModelInfo) -> StagedNetwork:
    """The stages of ``TransformNetwork`` with these weights, rewritten. Raises ``KeyError`` or ``ValueError`` where they do not fit."""
    config = info.network
    start = 1 if config.padding == "start" else 0  # TransformNetwork.layers begins with that padding

    def layer(conv: str, norm: str, shuffle: int = 1, transposed: bool = False) -> Arrays:
        kernel, bias = weights[f"layers.{conv}.weight"], weights[f"layers.{conv}.bias"]
        scale, shift = weights[f"layers.{norm}.weight"], weights[f"layers.{norm}.bias"]
        if config.norm == "batch":
            mean, variance = weights[f"layers.{norm}.running_mean"], weights[f"layers.{norm}.running_var"]
            if {each.shape for each in (scale, shift, mean, variance)} != {(scale.size,)}:  # else they might be spread over each other, to any size
                raise ValueError(f"the arrays of layers.{norm} are not of one length")
            gain = scale / np.sqrt(variance + EPSILON)
            shift, gain = (shift - mean * gain).repeat(shuffle**2), gain.repeat(shuffle**2)
            return {"weight": kernel * gain[(None, slice(None), None, None) if transposed else (slice(None), None, None, None)], "bias": bias * gain + shift}
        return {"weight": kernel, "norm_weight": scale, "norm_bias": shift} | ({"bias": bias} if shuffle > 1 else {})

    halvings = range(1 if config.stem == "half" else 2)  # of the resolution by strides, which as many doublings undo
    found = [_takes_pixels(layer(f"{start}", f"{start + 1}"))]
    at = start + 3
    for _ in halvings:
        found.append(layer(f"{at}", f"{at + 1}"))
        at += 3
    for index in range(at, at + config.residual_blocks):
        found += [layer(f"{index}.layers.0", f"{index}.layers.1"), layer(f"{index}.layers.3", f"{index}.layers.4")]
    at += config.residual_blocks
    for _ in halvings:
        if config.upsampling == "nearest":
            arrays = layer(f"{at + 1}", f"{at + 2}")
            found.append(arrays | {"weight": _summed_kernels(arrays["weight"])})
        elif config.upsampling == "bilinear":  # on the small grid each of the four sub-pixels sees 3x3, through kernels of its own
            arrays = layer(f"{at + 1}", f"{at + 2}")
            found.append(arrays | {"weight": _on_small_grid(arrays["weight"], "bilinear")} | ({"bias": arrays["bias"].repeat(4)} if "bias" in arrays else {}))
        elif config.upsampling == "transposed":  # 3x3, padding 1, output padding 1: a 4x4 one whose last row and column are 0
            arrays = layer(f"{at}", f"{at + 1}", transposed=True)
            found.append(arrays | {"weight": np.pad(arrays["weight"], ((0, 0), (0, 0), (0, 1), (0, 1)))})
        else:
            found.append(layer(f"{at}", f"{at + 2}", shuffle=2))
        at += 3 if config.upsampling == "transposed" else 4
    weight, bias = (weights[f"layers.{at}.{part}"] * config.output_scale for part in ("weight", "bias"))
    found.append({"weight": weight, "bias": bias} if config.stem == "half" else {"weight": _split_stride(weight), "bias": bias.repeat(4)})
    return StagedNetwork(_put_together(found, info), info)


def _plan(config: NetworkConfig) -> list[tuple[int, int, dict[str, Any]]]:
    """Of each stage the side of its kernels, the channels that come out of it, and all of it that is no array."""
    mode = "constant" if config.padding in ("zeros", "start") else config.padding
    shaves, full, w = config.padding == "start", config.stem == "full", config.width
    block = {} if shaves else {"padding": 1, "padding_mode": mode}
    # on the small grid, padding by reflection or replication of 1 px on the large one is replication
    small = {"padding": 1, "padding_mode": {"nearest": "constant" if mode == "constant" else "replicate", "bilinear": "replicate", "transposed": "constant", "subpixel": mode}[config.upsampling]}
    up = (4, small | {"transposed": True, "relu": True}) if config.upsampling in ("nearest", "transposed") else (3, small | {"shuffle": 2, "relu": True})
    return [
        (9 if full else 10, w if full else 2 * w, {"padding": 4, "padding_mode": mode, "value": -PIXEL_SHIFT, "relu": True, "stride": 1 if full else 2}),
        *((3, channels, {"padding": 1, "padding_mode": mode, "stride": 2, "relu": True}) for channels in ((2 * w, 4 * w) if full else (4 * w,))),
        *[(3, 4 * w, block | {"relu": True}), (3, 4 * w, block | {"skip": True, "shave": 2 if shaves else 0})] * config.residual_blocks,
        *((up[0], channels, up[1]) for channels in ((2 * w, w) if full else (2 * w,))),
        (10, 3, {"padding": 4, "padding_mode": mode, "stride": 2, "shuffle": 2}) if full else (5, 3, {"padding": 2, "padding_mode": mode, "shuffle": 2}),
    ]


def _put_together(found: list[Arrays], info: ModelInfo) -> tuple[Stage, ...]:
    """The stages of such a network with these arrays, once it is sure that they fit: engines do not ask again, and one in C would read what lies beside an array.
    Raises ``ValueError``."""
    plan, stages, inputs = _plan(info.network), [], 3
    if len(found) != len(plan):
        raise ValueError(f"got {len(found)} stages, need {len(plan)}")
    for index, (arrays, (side, outputs, options)) in enumerate(zip(found, plan)):
        with np.errstate(over="ignore"):  # what is too large for float32 is told below
            arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        made, last = outputs * options.get("shuffle", 1) ** 2, index == len(plan) - 1
        kernels = (inputs, outputs, side, side) if options.get("transposed") else (made, inputs, side, side)
        norm = (outputs,) if info.network.norm == "instance" and not last else None
        needed = {"weight": kernels, "bias": (made,) if last or "bias" in arrays else None, "norm_weight": norm, "norm_bias": norm}
        for name in ARRAYS:
            shape = arrays[name].shape if name in arrays else None
            if shape != needed[name]:
                raise ValueError(f"stage {index}: its {name} is {shape}, need {needed[name]}")
            if shape and not np.isfinite(arrays[name]).all():
                raise ValueError(f"stage {index}: its {name} holds what is no number")
        stages.append(Stage(**arrays, **options))
        inputs = outputs
    return tuple(stages)


def _takes_pixels(first: Arrays) -> Arrays:
    """The same for pixels of 0..255 less the shift, instead of [0, 1]."""
    weight = first["weight"] / 255
    return first | {"weight": weight} | ({"bias": first["bias"] + PIXEL_SHIFT * weight.sum(axis=(1, 2, 3))} if "bias" in first else {})


def _summed_kernels(weight: np.ndarray) -> np.ndarray:
    """3x3 kernels on a grid upsampled by nearest, ``(O, I, 3, 3)``, as ``(I, O, 4, 4)`` of a transposed convolution.

    Row 2i + p of the large grid sees rows i - 1 + p and i + p of the small one: for p = 0 through kernel rows {0} and {1, 2},
    for p = 1 through {0, 1} and {2}. Small row s reaches large row r through row r - 2s + 1 of the transposed kernel.
    """
    rows = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], weight.dtype)  # transposed kernel row <- kernel rows
    return np.einsum("xk,yl,oikl->ioxy", rows, rows, weight)


def _on_small_grid(weight: np.ndarray, mode: str) -> np.ndarray:
    """Kernels on a grid upsampled by one of ``UPSAMPLINGS``, ``(O, I, k, k)``, as ``(4 O, I, 3, 3)`` on the small grid, to be shuffled by 2."""
    rows = UPSAMPLINGS[mode].astype(weight.dtype)
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
    return {name: array for name, array in arrays.items() if array is not None}, json.dumps([_not_arrays(stage) for stage in network.stages])


def restore_stages(arrays: dict[str, np.ndarray], rest: str, info: ModelInfo) -> StagedNetwork:
    """What ``describe`` took apart. Raises ``ValueError`` where it is not what it was."""
    told = json.loads(rest)
    found = [{name: arrays[f"stage.{index}.{name}"].copy() for name in ARRAYS if f"stage.{index}.{name}" in arrays} for index in range(len(told))]
    stages = _put_together(found, info)
    for index, (one, stage) in enumerate(zip(told, stages)):
        if one != _not_arrays(stage):
            raise ValueError(f"stage {index} is {one}, need {_not_arrays(stage)}")
    return StagedNetwork(stages, info)


def _not_arrays(stage: Stage) -> dict[str, Any]:
    return {field.name: getattr(stage, field.name) for field in fields(Stage) if field.name not in ARRAYS}
