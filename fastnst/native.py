"""The project's own engine for CPUs: float32 through `native.c`, compiled when the package is installed. Numpy only."""

import ctypes
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from fastnst.runtime import cpu_threads, free_memory
from fastnst.stages import EPSILON, Stage, StagedNetwork, flat_values, ground

_WINOGRAD, _DIRECT, _NESTED = range(3)
# A kernel g becomes G g G^T (Lavin and Gray 2016): for F(4x4, 3x3), of points 0, 1, -1, 2, -2, and F(3x3, 3x3), of 0, 1, -1, 1/2, both and infinity.
_G3 = np.array([[2, 0, 0], [1, 1, 1], [-1 / 3, 1 / 3, -1 / 3], [-8 / 3, -4 / 3, -2 / 3], [0, 0, 1]])
_G4 = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
_OUTPUTS = ("linear", "tanh", "sigmoid")

_floats = ctypes.POINTER(ctypes.c_float)
_integers = ctypes.POINTER(ctypes.c_int32)
_doubles = ctypes.POINTER(ctypes.c_double)


def _struct(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _int32s(names: str) -> dict[str, type]:
    return {name: ctypes.c_int32 for name in names.split()}


# As in native.c.
_Input = _struct("_Input", **dict.fromkeys(("x", "gain", "shift", "floor", "value"), _floats), rows=_integers, columns=_integers, **_int32s("width channels"))
_Convolution = _struct("_Convolution", weight=_floats, bias=_floats, output=_floats, mean=_doubles, squares=_doubles, **_int32s("kernel stride outputs shuffle height width channels threads"))
_Sum = _struct("_Sum", x=ctypes.POINTER(_Input), gain=_floats, shift=_floats, y=_floats, **_int32s("height width inset threads"))
_Picture = _struct("_Picture", x=_floats, bytes=ctypes.POINTER(ctypes.c_uint8), floats=_floats, **_int32s("x_width channels shuffle height width kind threads"))


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled code that suits this CPU best; None where none was compiled."""
    for name in ("_native_avx2", "_native"):
        for path in (Path(__file__).with_name(name + suffix) for suffix in EXTENSION_SUFFIXES):
            if path.is_file():
                with suppress(OSError, AttributeError):  # of another system, or an older fastnst's
                    library = ctypes.CDLL(str(path))
                    if library.fastnst_runs_here():
                        return library
    return None


@dataclass(frozen=True)
class _Packed:
    """A stage as ``native.c`` takes it."""

    kind: int
    weight: np.ndarray
    bias: np.ndarray | None
    kernel: int
    stride: int
    outputs: int
    shuffle: int
    channels: int  # of the output, as they lie in memory


@dataclass(frozen=True)
class _Activation:
    """``(H, W, C)`` with C rounded up to whole vectors; gain, shift and the ReLU (a floor of 0) are still to come."""

    x: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    floor: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, relu: bool = False) -> "_Activation":
        """``x`` as it is, but for the ReLU."""
        count = _whole(x.shape[2])
        return cls(x, np.ones(count, np.float32), np.zeros(count, np.float32), np.full(count, 0 if relu else -np.inf, np.float32))

    def less(self, amount: np.ndarray) -> "_Activation":
        return replace(self, shift=self.shift - amount, floor=self.floor - amount)

    def input(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None, value: np.ndarray | None = None) -> _Input:
        """``value``: what lies where a row or column is -1."""
        return _Input(_at(self.x), _at(self.gain), _at(self.shift), _at(self.floor), _at(value), _at(rows, _integers), _at(columns, _integers), *self.x.shape[1:])


def _aligned(shape: tuple[int, ...], array: np.ndarray | None = None) -> np.ndarray:
    """float32 that begins with a line of the cache; vectors that cross two lines take longer to load. Up to 16 more can be read. Filled with ``array``, or not at all."""
    size = math.prod(shape)
    memory = np.empty(size + 32, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    found = memory[begin : begin + size].reshape(shape)
    if array is not None:
        found[:] = array
    return found


def _at(array: np.ndarray | None, kind: type = _floats):
    return None if array is None else array.ctypes.data_as(kind)


class NativeEngine:
    """float32 on a CPU, without torch or any other runtime."""

    name, device, precision, batch = "native", "cpu", "float32", 1
    free_memory = staticmethod(free_memory)

    def __init__(self, network: StagedNetwork) -> None:
        library = native_library()
        self.network = network
        self._library = library
        self._lanes = library.fastnst_lanes()
        self._packed = [self._pack(index) for index in range(len(network.stages))]
        self._flat = [self._flat_value(stage, value) for stage, value in zip(network.stages, flat_values(network)[0])]
        self.bytes_per_pixel = network.stages[0].channels * 7

    def run(self, pictures: np.ndarray, pixels: str = "uint8") -> np.ndarray:
        stylized = np.empty_like(pictures, order="C")
        for picture, target in zip(pictures, stylized):
            levels = picture if pixels == "uint8" else picture.transpose(1, 2, 0) * np.float32(255)
            self._run(np.subtract(levels, ground(self.network, levels), dtype=np.float32, order="C"), target, pixels)
        return stylized

    def stage(self, index, rows, gain, shift, above, below, statistics):
        stage, channels = self.network.stages[index], rows.shape[1]
        x = _aligned((*rows.shape[2:], channels if index == 0 else _whole(channels)))
        x[..., :channels] = rows[0].transpose(1, 2, 0)
        x[..., channels:] = 0
        given = _Activation.of(x, index > 0 and self.network.stages[index - 1].relu)
        if gain is not None:
            given.gain[:channels], given.shift[:channels] = gain, shift
        down, across = _padded(np.arange(x.shape[0]), stage, above, below), _padded(np.arange(x.shape[1]), stage, stage.padding, stage.padding)
        raw, moments = self._convolve(index, given, down, across, statistics)
        moments = tuple(array[: stage.channels].astype(np.float32) for array in moments) if moments else ()
        if index == len(self.network.stages) - 1 and self._packed[index].outputs > 3 and stage.shuffle > 1:
            r, (height, width) = stage.shuffle, raw.shape[:2]
            raw = raw[..., : 3 * r * r].reshape(height, width, 3, r, r).transpose(0, 3, 1, 4, 2).reshape(height * r, width * r, 3)
        return np.ascontiguousarray(raw[..., : stage.channels].transpose(2, 0, 1))[None], *moments

    def _run(self, x: np.ndarray, target: np.ndarray, pixels: str) -> None:
        config = self.network.info.network
        height, width = x.shape[:2]
        indices = []
        for side in (height, width):
            missing = max(config.smallest_side - side, -side % config.multiple)
            indices.append(np.pad(np.pad(np.arange(side), (0, missing), mode="edge"), config.start_padding, mode="reflect"))
        value, block = _Activation.of(x), None
        for index, stage in enumerate(self.network.stages):
            if index + 1 < len(self.network.stages) and self.network.stages[index + 1].skip:
                block = value
            rows, columns = (_padded(side, stage, stage.padding, stage.padding) for side in indices)
            raw, moments = self._convolve(index, value, rows, columns, stage.norm_weight is not None)
            if index == len(self.network.stages) - 1:
                break
            value = self._owed(stage, raw, moments)
            if stage.skip:
                self._add(value, block, stage.shave)
                value = _Activation.of(raw)
            indices = [np.arange(side) for side in raw.shape[:2]]
        packed = self._packed[-1]
        shuffle = 1 if packed.outputs == 3 else stage.shuffle
        bytes_, floats = (_at(target, ctypes.POINTER(ctypes.c_uint8)), None) if pixels == "uint8" else (None, _at(target))
        self._library.fastnst_finish(ctypes.byref(_Picture(_at(raw), bytes_, floats, raw.shape[1], raw.shape[2], shuffle, height, width, _OUTPUTS.index(config.output), cpu_threads())))

    def _convolve(self, index: int, given: _Activation, rows: np.ndarray, columns: np.ndarray, statistics: bool) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """``(H, W, C)``, and for ``statistics`` its channels' means and variances. ``rows`` and ``columns``: where the input's, padded, are found."""
        packed, threads = self._packed[index], cpu_threads()
        height, width = (((len(side) - packed.kernel) // packed.stride + 1) * packed.shuffle for side in (rows, columns))
        raw = _aligned((height, width, packed.channels))
        mean, squares = np.zeros((2, packed.channels)) if statistics else (None, None)
        rows, columns = (np.pad(side, (0, 4), mode="edge").astype(np.int32) for side in (rows, columns))  # tiles of 4 may stick out
        given, value = given.less(self._flat[index]), self.network.stages[index].value - self._flat[index]
        source = given.input(rows, columns, value)
        c = _Convolution(
            _at(packed.weight), _at(packed.bias), _at(raw), _at(mean, _doubles), _at(squares, _doubles),
            packed.kernel, packed.stride, packed.outputs, packed.shuffle, height, width, packed.channels, threads,
        )  # fmt: skip
        if self._library.fastnst_convolve(ctypes.byref(source), ctypes.byref(c), packed.kind):
            raise MemoryError(f"{width}x{height} positions of {packed.channels} channels do not fit into memory")
        return raw, (mean, squares / (height * width)) if statistics else None

    def _owed(self, stage: Stage, raw: np.ndarray, moments: tuple[np.ndarray, np.ndarray] | None) -> _Activation:
        """What a stage's convolution gave, with what its norm and ReLU still owe."""
        value = _Activation.of(raw, stage.relu)
        if moments is not None:
            mean, variance = (array[: stage.channels] for array in moments)
            gain = stage.norm_weight / np.sqrt(variance + EPSILON)
            value.gain[: stage.channels], value.shift[: stage.channels] = gain, stage.norm_bias - mean * gain
        return value

    def _add(self, value: _Activation, block: _Activation, inset: int) -> None:
        """``value``, normalized, plus the block's input, where ``value`` lies."""
        source = block.input()
        height, width = value.x.shape[:2]
        self._library.fastnst_add(ctypes.byref(_Sum(ctypes.pointer(source), _at(value.gain), _at(value.shift), _at(value.x), height, width, inset, cpu_threads())))

    def _flat_value(self, stage: Stage, value: np.ndarray) -> np.ndarray:
        """What to take off a stage's input, ``(C,)``, where a norm follows, which does not mind: flat parts of a picture, 0 then, leave the digits to the others."""
        kernels_differ = self.network.info.network.upsampling in ("transposed", "subpixel") and (stage.transposed or stage.shuffle > 1)  # from pixel to pixel
        value = 0 * value if stage.norm_weight is None or kernels_differ else value
        return np.pad(value, (0, _whole(value.size) - value.size)).astype(np.float32)

    def _pack(self, index: int) -> _Packed:
        stage, is_last = self.network.stages[index], index == len(self.network.stages) - 1
        weight, bias, shuffle, stride = stage.weight, stage.bias, stage.shuffle, stage.stride
        if stage.transposed:
            weight, bias, shuffle = _as_convolution(weight), None if bias is None else bias.repeat(4), 2
        inputs = weight.shape[1] if index == 0 else _whole(weight.shape[1])
        weight = np.pad(weight, ((0, 0), (0, inputs - weight.shape[1]), (0, 0), (0, 0)))
        if is_last and stride == 2 and shuffle == 2:  # four pixels at once are one pixel alone, four times
            weight, bias = weight[::4, :, :-1, :-1], None if bias is None else bias[::4]
            packed = np.einsum("xu,yv,oiaubv->xyaobi", _G3, _G3, weight.reshape(3, inputs, 3, 3, 3, 3), optimize=True)
            return _Packed(_NESTED, _aligned(packed.shape, packed), np.zeros(3, np.float32) if bias is None else np.ascontiguousarray(bias), 9, 1, 3, 1, 3)
        if is_last:
            shuffle = 1  # done with the pixels
        # outputs in the order of native.c: first all channels of the first place among the shuffled
        places, count = shuffle**2, len(weight) // shuffle**2
        channels = _whole(count)
        outputs = -(-places * channels // (2 * self._lanes)) * 2 * self._lanes
        order = np.arange(places * count).reshape(count, places)
        ordered, biases = np.zeros((outputs, *weight.shape[1:])), np.zeros(outputs, np.float32)
        for place in range(places):
            here = slice(place * channels, place * channels + count)
            ordered[here] = weight[order[:, place]]
            if bias is not None:
                biases[here] = bias[order[:, place]]
        kernel = weight.shape[2]
        blocks = ordered.reshape(-1, 2 * self._lanes, *weight.shape[1:])  # (B, WIDE, I, k, k)
        if kernel == 3 and stride == 1:
            transformed = np.einsum("xk,yl,bwikl->bxyiw", _G4, _G4, blocks, optimize=True)
            kind, packed = _WINOGRAD, transformed
        elif kernel == 9 and stride == 1:
            kind, packed = _NESTED, np.einsum("xu,yv,Bwiaubv->Bxyabiw", _G3, _G3, blocks.reshape(*blocks.shape[:3], 3, 3, 3, 3), optimize=True)
        else:
            kind, packed = _DIRECT, blocks.transpose(0, 3, 4, 2, 1)
        return _Packed(kind, _aligned(packed.shape, packed), None if bias is None else biases, kernel, stride, outputs, shuffle, channels)



def _whole(channels: int) -> int:
    """As many channels as lie in memory: whole vectors of any CPU that ``native.c`` is for."""
    return -(-channels // 8) * 8


def _as_convolution(weight: np.ndarray) -> np.ndarray:
    """A transposed convolution of stride 2, ``(I, O, 4, 4)``, as ``(4 O, I, 3, 3)`` on the small grid, to be shuffled by 2.

    Large row 2i + p gets small row s through row 2i + p - 2s + 1 of the transposed kernel: row 2i from i - 1 (3) and i (1), row 2i + 1 from i (2) and i + 1 (0).
    """
    rows = np.zeros((2, 3, 4), weight.dtype)  # p, small row (i - 1, i, i + 1), transposed kernel row
    rows[0, 0, 3] = rows[0, 1, 1] = rows[1, 1, 2] = rows[1, 2, 0] = 1
    split = np.einsum("pax,qby,ioxy->opqiab", rows, rows, weight)
    return split.reshape(-1, *split.shape[3:])


def _padded(indices: np.ndarray, stage: Stage, before: int, behind: int) -> np.ndarray:
    """Where each row or column of a stage's input, padded, is found; -1 where it is the constant."""
    if not before and not behind:
        return indices
    mode = {"reflect": "reflect", "replicate": "edge", "constant": "constant"}[stage.padding_mode]
    return np.pad(indices, (before, behind), mode=mode, **({"constant_values": -1} if mode == "constant" else {}))
