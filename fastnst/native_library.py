"""`native.c`, and what belongs to it, as Python sees it: activations, stages in the order in which it reads their weights, and what it does with them. Numpy only.

Activations are ``(H, W, C)``, C rounded up to whole vectors.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastnst.runtime import has_matrix_unit, outlive_fork
from fastnst.stages import PAD_MODES, Stage

if TYPE_CHECKING:
    from torch import Tensor

_WINOGRAD, _DIRECT, _NESTED = range(3)  # kinds of convolutions
_LARGEST_KERNEL = 16  # as many rows of the input `direct_part` of native.c knows at once
_OUTPUTS = ("linear", "tanh", "sigmoid")
_POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # of native.c's F(4x4, 3x3); F(3x3, 3x3) has no last one
_POINTS_6 = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)  # of its F(6x6, 3x3)


def _kernel_transform(points: Sequence[float]) -> np.ndarray:
    """G, with which a kernel g becomes G g G^T (Lavin and Gray 2016), of these points and infinity."""
    scales = [math.prod(point - other for other in points if other != point) for point in points]
    return np.array([*([1 / scale, point / scale, point**2 / scale] for point, scale in zip(points, scales)), [0, 0, 1]])


_G6, _G4, _G3 = map(_kernel_transform, (_POINTS_6, _POINTS, _POINTS[:4]))
_PROCESS = os.getpid()  # a forked one has not the threads that torch started in this one, and waits for them
_VECTOR = 8  # numbers; a vector of any CPU that native.c is for is that many, half or twice

_floats, _doubles, _bytes, _integers = (ctypes.POINTER(kind) for kind in (ctypes.c_float, ctypes.c_double, ctypes.c_uint8, ctypes.c_int32))
_POINTERS = {np.dtype(np.float32): _floats, np.dtype(np.float64): _doubles, np.dtype(np.uint8): _bytes, np.dtype(np.int32): _integers, np.dtype(np.int16): _floats}  # int16: the bits of bfloat16


def _outputs_of_a_tile(half: int) -> int:
    """``m`` of F(m x m, 3x3), native.c's OUTPUTS."""
    return 4 if half else 6


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Of a ``ctypes.Structure``, all of one kind."""
    return [(name, kind) for name in names.split()]


class _Input(ctypes.Structure):
    _fields_ = fields(_floats, "x gain shift floor value") + fields(_integers, "rows columns") + fields(ctypes.c_int32, "width channels")


class _Convolution(ctypes.Structure):
    _fields_ = (
        fields(_floats, "weight bias output") + fields(_doubles, "mean squares") + fields(ctypes.c_int32, "kernel stride outputs shuffle height width channels threads half")
    )


class _Sum(ctypes.Structure):
    _fields_ = fields(ctypes.POINTER(_Input), "x") + fields(_floats, "gain shift y") + fields(ctypes.c_int32, "height width inset threads")


class _Picture(ctypes.Structure):
    _fields_ = fields(_floats, "x") + fields(_bytes, "bytes") + fields(_floats, "floats") + fields(ctypes.c_int32, "x_width channels shuffle height width kind threads")


class _Kernels(ctypes.Structure):
    _fields_ = fields(_floats, "weight target") + fields(ctypes.c_int32, "outputs inputs back half threads")


class _Weighed(ctypes.Structure):
    _fields_ = fields(_floats, "sums target") + fields(ctypes.c_int32, "outputs inputs threads")


class _Transposition(ctypes.Structure):
    _fields_ = fields(_floats, "source target") + fields(ctypes.c_int64, "rows columns source_step target_step")


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled code that suits this CPU best; None where none was compiled, or before the source was changed last."""
    source = Path(__file__).with_name("native.c")
    changed = max((file.stat().st_mtime - 60 for file in source.parent.glob("native*.[ch]")), default=0.0)  # a copied folder has the time of the copy, in any order
    for name in ("_native_bfloat16", "_native_avx512", "_native_avx2", "_native"):
        for path in (source.with_name(name + suffix) for suffix in EXTENSION_SUFFIXES):
            if path.is_file() and path.stat().st_mtime >= changed:
                with suppress(OSError, AttributeError):  # of another system, or an older fastnst's
                    library = ctypes.CDLL(str(path))
                    if library.fastnst_norm and library.fastnst_distance and library.fastnst_features and library.fastnst_runs_here():
                        return library
    return None


def reads(*tensors: "Tensor") -> bool:
    """Whether there is compiled code, and these have numbers that it reads where they lie: plain tensors on a CPU, float32 or bfloat16. Others, such as fake ones for
    tracing, may have no memory."""
    import torch

    if torch.compiler.is_compiling() or native_library() is None:
        return False
    return all(type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not x.is_neg() for x in tensors)


def join_threads() -> None:
    """Where torch computes in this process, too, let the compiled code work in its threads, if their OpenMP is of a kind that it knows: 0.85 of a training step."""
    if hasattr(sys.modules.get("torch"), "_C") and os.getpid() == _PROCESS:  # another thread may be importing it
        outlive_fork()
        _join_threads()


@cache
def _join_threads() -> None:
    for place in (None, sys.modules["torch"]._C.__file__):  # what the process shows to all, as torch itself finds it first, then what torch brought along for itself
        with suppress(OSError, TypeError, AttributeError):  # no such process, or no such function
            return native_library().fastnst_join(ctypes.cast(ctypes.CDLL(place).GOMP_parallel, ctypes.c_void_p))


def multiplies_pairs() -> bool:
    """Whether the compiled code multiplies bfloat16, at twice the rate of float32; not where there is a matrix unit, which others use and are faster."""
    library = native_library()
    return library is not None and bool(library.fastnst_halves()) and not has_matrix_unit()


def whole_vectors(channels: int) -> int:
    """As many channels as lie in memory."""
    return -(-channels // _VECTOR) * _VECTOR


def aligned(shape: tuple[int, ...], array: np.ndarray | None = None) -> np.ndarray:
    """float32 that begins with a line of the cache: vectors that cross two lines take longer to load. Filled with ``array``, or not at all;
    some numbers more can be read."""
    size = math.prod(shape)
    memory = np.empty(size + 32, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    found = memory[begin : begin + size].reshape(shape)
    if array is not None:
        found[:] = array
    return found


def _at(array: np.ndarray | None):
    """A pointer, which does not keep the array."""
    return None if array is None else array.ctypes.data_as(_POINTERS[array.dtype])


@dataclass(frozen=True)
class Activation:
    """``x`` is ``(H, W, C)``, float32 or, as int16, the bits of bfloat16; gain, shift and a floor (of a ReLU: 0), ``(C,)`` each, are still to come."""

    x: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    floor: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, relu: bool = False) -> "Activation":
        """``x`` as it is, but for the ReLU."""
        count = whole_vectors(x.shape[2])
        return cls(x, np.ones(count, np.float32), np.zeros(count, np.float32), np.full(count, 0 if relu else -np.inf, np.float32))

    def less(self, amount: np.ndarray) -> "Activation":
        return replace(self, shift=self.shift - amount, floor=self.floor - amount)

    def _input(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None, value: np.ndarray | None = None) -> _Input:
        return _Input(_at(self.x), _at(self.gain), _at(self.shift), _at(self.floor), _at(value), _at(rows), _at(columns), *self.x.shape[1:])


@dataclass(frozen=True)
class Packed:
    """A stage's convolution, its weights in the order in which ``native.c`` reads them."""

    kind: int
    weight: np.ndarray
    bias: np.ndarray | None
    kernel: int
    stride: int
    outputs: int  # computed at each position, zeros that fill a block included
    shuffle: int
    channels: int  # of what comes out
    half: int = 0  # 1: it multiplies bfloat16; 2: and takes and gives it
    left: int = 1  # the pixel shuffle that is left to who reads what comes out

    @classmethod
    def of(cls, stage: Stage, is_first: bool, is_last: bool, half: bool = False) -> "Packed":
        """The first stage takes 3 channels as they are. The last one gives single pixels, or leaves the shuffling to ``finish``.

        ``half``: it multiplies bfloat16, but for the first stage, in whose pictures of few channels most would be lost and least gained.
        """
        half = int(half and not is_first)
        stage = stage.shuffled.by_pixel
        weight, bias, shuffle, stride = stage.weight, stage.bias, stage.shuffle, stage.stride
        if not is_first:
            weight = np.pad(weight, ((0, 0), (0, -weight.shape[1] % _VECTOR), (0, 0), (0, 0)))
        if is_last and shuffle == 1:
            weight = _nested(weight).transpose(1, 2, 3, 0, 4, 5)
            weight = _pairs(weight[..., None])[..., 0] if half else weight
            return cls(_NESTED, aligned(weight.shape, weight), bias.astype(np.float32), 9, 1, 3, 1, 3, half)
        shuffle, left = (1, shuffle) if is_last else (shuffle, 1)
        wide, places, kernel = 2 * native_library().fastnst_lanes(), shuffle**2, weight.shape[2]
        if kernel > _LARGEST_KERNEL:
            raise ValueError(f"got a convolution of {kernel}x{kernel} pixels, --engine native takes {_LARGEST_KERNEL}x{_LARGEST_KERNEL} at most; use another engine")
        count, channels = len(weight) // places, whole_vectors(len(weight) // places)
        outputs = -(-places * channels // wide) * wide
        ordered, biases = np.zeros((outputs, *weight.shape[1:])), np.zeros(outputs, np.float32)
        for place in range(places):  # first all channels of the upper left, then those of the upper right, and so on
            ordered[place * channels :][:count] = weight[place::places]
            biases[place * channels :][:count] = 0 if bias is None else bias[place::places]
        if (kernel, stride) == (3, 1):
            transform = {4: _G4, 6: _G6}[_outputs_of_a_tile(half)]
            kind, packed = _WINOGRAD, np.einsum("xk,yl,oikl->oxyi", transform, transform, ordered, optimize=True)
        elif (kernel, stride) == (9, 1):
            kind, packed = _NESTED, _nested(ordered)
        else:
            kind, packed = _DIRECT, ordered.transpose(0, 2, 3, 1)
        blocks = np.moveaxis(packed.reshape(-1, wide, *packed.shape[1:]), 1, -1)
        blocks = _pairs(blocks) if half else blocks
        return cls(kind, aligned(blocks.shape, blocks), None if bias is None else biases, kernel, stride, outputs, shuffle, channels, half, left)

    @classmethod
    def of_kernels(cls, weight: np.ndarray, back: bool, threads: int, half: bool = False) -> "Packed":
        """A 3x3 convolution of stride 1, without bias, with ``weight``, ``(O, I, 3, 3)``, channels in whole vectors; ``back``: the way from its output's gradient to
        its input's; ``half``: of activations in bfloat16. The same as ``of``, at a tenth of the time: weights change with each step of a training."""
        weight = np.ascontiguousarray(weight)
        count, inputs = weight.shape[:2] if not back else weight.shape[1::-1]
        wide = 2 * native_library().fastnst_lanes()
        side = _outputs_of_a_tile(half) + 2
        packed = aligned((-(-count // wide), side, side, inputs // 2 if half else inputs, wide))
        native_library().fastnst_pack(ctypes.byref(_Kernels(_at(weight), _at(packed), count, inputs, back, half, threads)))
        return cls(_WINOGRAD, packed, None, 3, 1, len(packed) * wide, 1, count, 2 if half else 0)

    def operations(self, height: int, width: int) -> int:
        """Floating-point operations for so many rows and columns, two for each multiplication."""
        of_a_position = {_WINOGRAD: 1 / _outputs_of_a_tile(self.half) ** 2, _NESTED: 1 / 9, _DIRECT: 1.0}[self.kind]
        return round((4 if self.half else 2) * self.weight.size * of_a_position * height * width / self.shuffle**2)

    def size(self, rows: np.ndarray, columns: np.ndarray) -> tuple[int, int]:
        """Rows and columns that come out, of what is padded already."""
        return tuple(((len(side) - self.kernel) // self.stride + 1) * self.shuffle for side in (rows, columns))

    def convolve(
        self, given: Activation, rows: np.ndarray, columns: np.ndarray, value: np.ndarray, output: np.ndarray, statistics: bool, threads: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Fills ``output``, ``(H, W, C)``, and gives for ``statistics`` its channels' means and variances, ``(C,)``.

        ``rows`` and ``columns``: where each of the input's, padded, is found, -1 where ``value``, ``(I,)``, lies. Raises ``MemoryError``.
        """
        rows, columns = _beyond(rows), _beyond(columns)
        mean, squares = np.zeros((2, self.channels)) if statistics else (None, None)
        source, (height, width, _) = given._input(rows, columns, value), output.shape
        c = _Convolution(
            _at(self.weight), _at(self.bias), _at(output), _at(mean), _at(squares),
            self.kernel, self.stride, self.outputs, self.shuffle, height, width, self.channels, threads, self.half,
        )  # fmt: skip
        if native_library().fastnst_convolve(ctypes.byref(source), ctypes.byref(c), self.kind):
            raise MemoryError(f"no memory left for a convolution of {width}x{height} positions")
        return (mean, squares / (height * width)) if statistics else None


def weight_gradient(pictures: Iterable[np.ndarray], gradients: Iterable[np.ndarray], outputs: int, inputs: int, padding: int, threads: int) -> np.ndarray:
    """That of 3x3 kernels, ``(O, 3, 3, I)``: from what they convolved, ``(H, W, I)`` each, ``padding`` zeros added, and the gradients of what came out,
    ``(H', W', O)``; float32, from float32 or, as int16, the bits of bfloat16; channels in whole vectors. Raises ``MemoryError``."""
    library = native_library()
    wide = 2 * library.fastnst_lanes()
    sums = aligned((64, -(-inputs // wide), outputs, wide))
    sums.fill(0)
    for picture, gradient in zip(pictures, gradients, strict=True):
        given, sides = Activation.of(picture), [_beyond(sources(np.arange(side), padding)) for side in picture.shape[:2]]
        if library.fastnst_weigh(ctypes.byref(given._input(*sides)), _at(gradient), _at(sums), *gradient.shape, gradient.dtype == np.int16, threads):
            raise MemoryError(f"no memory left for the gradient of {outputs}x{inputs} kernels")
    found = np.empty((outputs, 3, 3, inputs), np.float32)
    library.fastnst_weighed(ctypes.byref(_Weighed(_at(sums), _at(found), outputs, inputs, threads)))
    return found


def sources(places: np.ndarray, padding: int | tuple[int, int], mode: str = "constant") -> np.ndarray:
    """Where each row or column of what is padded is found; -1 where it is the constant. ``places``: where each is found that is no padding."""
    return np.pad(places, padding, mode=PAD_MODES[mode], **({"constant_values": -1} if mode == "constant" else {}))


def _beyond(side: np.ndarray) -> np.ndarray:
    """Rows or columns, with some more: tiles may stick out."""
    return np.concatenate([side, side[-1:].repeat(5)]).astype(np.int32)


def _nested(weight: np.ndarray) -> np.ndarray:
    """``(O, I, 9, 9)`` as 3x3 kernels of 3x3, transformed: ``(O, 5, 5, 3, 3, I)``."""
    return np.einsum("xu,yv,oiaubv->oxyabi", _G3, _G3, weight.reshape(*weight.shape[:2], 3, 3, 3, 3), optimize=True)


def _pairs(weight: np.ndarray) -> np.ndarray:
    """``(..., I, O)`` in bfloat16, two inputs side by side in the place of a float32: ``(..., I / 2, O)``."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16  # to the nearest, ties to even
    return (bits[..., ::2, :] | bits[..., 1::2, :] << 16).view(np.float32)


def from_planes(planes: np.ndarray, channels: int, threads: int) -> np.ndarray:
    """``(C, H, W)`` as ``(H, W, channels)``, the others 0."""
    count, height, width = planes.shape
    planes = np.ascontiguousarray(planes)
    x = aligned((height, width, channels))
    x[..., count:] = 0
    _transpose(_Transposition(_at(planes), _at(x), count, height * width, height * width, channels), threads)
    return x


def to_planes(x: np.ndarray, count: int, threads: int, planes: np.ndarray | None = None) -> np.ndarray:
    """The first channels of ``(H, W, C)``, as ``(count, H, W)``, written to ``planes`` where given."""
    height, width, channels = x.shape
    planes = np.empty((count, height, width), np.float32) if planes is None else planes
    _transpose(_Transposition(_at(x), _at(planes), height * width, count, channels, height * width), threads)
    return planes


def _transpose(what: _Transposition, threads: int) -> None:
    native_library().fastnst_transpose(ctypes.byref(what), threads)


def add(value: Activation, block: Activation, inset: int, threads: int) -> Activation:
    """A block's result plus its input, which begins at (``inset``, ``inset``); it lies where ``value`` lay."""
    source, (height, width, _) = block._input(), value.x.shape
    native_library().fastnst_add(ctypes.byref(_Sum(ctypes.pointer(source), _at(value.gain), _at(value.shift), _at(value.x), height, width, inset, threads)))
    return Activation.of(value.x)


def finish(raw: np.ndarray, shuffle: int, output: str, target: np.ndarray, threads: int) -> None:
    """Fills ``target``, ``(H, W, 3)`` uint8 or ``(3, H, W)`` float32 in [0, 1], with what the last convolution gave, shuffled, cropped and bent by the network's ``output``."""
    is_bytes = target.dtype == np.uint8
    height, width = target.shape[:2] if is_bytes else target.shape[1:]
    bytes_, floats = (_at(target), None) if is_bytes else (None, _at(target))
    native_library().fastnst_finish(ctypes.byref(_Picture(_at(raw), bytes_, floats, raw.shape[1], raw.shape[2], shuffle, height, width, _OUTPUTS.index(output), threads)))
