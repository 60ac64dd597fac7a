"""Instance norm in training on a CPU, with all that comes between two convolutions, there and back, as ``native_norm.c`` does it: the ReLU, the sum with a block's
input, the padding.

Torch's own steps read and write an activation some ten times, for which a processor waits longer than it computes.
"""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.native_library import fields, join_threads, native_library, reads, sources
from fastnst.stages import EPSILON


class _Norm(ctypes.Structure):
    _fields_ = (
        fields(ctypes.c_void_p, "x weight bias moments skip out from_row from_column gradient within folded back weight_gradient bias_gradient")
        + fields(ctypes.c_int64, "skip_image skip_row within_image within_row")
        + fields(ctypes.c_int32, "images rows columns height width channels shuffle padding relu half threads")
        + fields(ctypes.c_float, "epsilon")
    )


def can_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether it is there for such activations."""
    return reads(x) and weight.dtype == torch.float32 and 0 not in x.shape[1:]


class NativeNorm(torch.autograd.Function):
    """``(N, C s s, h, w)`` -> its instance norm, ReLU, or plus ``skip``, padded by ``padding`` on all sides, ``(N, C, h s + 2 p, w s + 2 p)``, and what of it lies within the
    padding, which a later ``skip`` takes: the gradients of both come back apart. All channels-last and of one type.

    ``mode``: ``reflect``, ``replicate`` or ``constant`` (0). ``shuffle`` s: what comes are places of ``s x s`` pixels, as ``wide`` has them. ``without_effect``: a
    parameter whose effect the norm removes; it gets the gradient 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, without_effect: Tensor | None, skip: Tensor | None, relu: bool, padding: int, mode: str, shuffle: int):
        if not can_norm(x, weight):  # other numbers would be read as if they were these
            raise ValueError(f"got {x.dtype} of shape {tuple(x.shape)} on {x.device} and weights of {weight.dtype}, need what `can_norm` allows")
        if relu and skip is not None:
            raise ValueError("got a ReLU and a sum, need one of them or none")
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias, skip = weight.detach().contiguous(), bias.detach().contiguous(), _rows(skip)
        images, channels, height, width = x.shape[0], x.shape[1] // shuffle**2, x.shape[2] * shuffle, x.shape[3] * shuffle
        ctx.how = padding, mode, shuffle, relu
        out = x.new_empty(images, height + 2 * padding, width + 2 * padding, channels).permute(0, 3, 1, 2)
        moments = weight.new_empty(images, 2, channels)
        _run("fastnst_norm", ctx.how, x, weight=weight, bias=bias, moments=moments, out=out, skip=skip)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.skips, ctx.without_effect = skip is not None, None if without_effect is None else without_effect.shape
        ctx.set_materialize_grads(False)
        return out, out[:, :, padding : height + padding, padding : width + padding]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, within: Tensor | None):
        x, weight, bias, moments = ctx.saved_tensors
        gradient = None if gradient is None else gradient.contiguous(memory_format=torch.channels_last)
        shuffle = ctx.how[2]
        folded = x.new_empty(len(x), x.shape[2] * shuffle, x.shape[3] * shuffle, len(weight)).permute(0, 3, 1, 2)
        back, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        given = {"weight": weight, "bias": bias, "moments": moments, "gradient": gradient, "within": _rows(within)}
        _run("fastnst_norm_back", ctx.how, x, **given, folded=folded, back=back, weight_gradient=of_weight, bias_gradient=of_bias)
        without_effect = None if ctx.without_effect is None else weight.new_zeros(ctx.without_effect)
        return back, of_weight, of_bias, without_effect, folded if ctx.skips else None, None, None, None, None


def _rows(x: Tensor | None) -> Tensor | None:
    """The same, rows of which lie one pixel after the other."""
    return x if x is None or x.stride()[1::2] == (1, x.shape[1]) else x.contiguous(memory_format=torch.channels_last)


def _run(name: str, how: tuple[int, str, int, bool], x: Tensor, **tensors: Tensor | None) -> None:
    """A function of ``native_norm.c``."""
    join_threads()
    padding, mode, shuffle, relu = how
    height, width = (side * shuffle for side in x.shape[2:])
    from_row, from_column = (_sources(side, padding, mode) for side in (height, width))
    given = {field: tensor for field, tensor in tensors.items() if tensor is not None}
    strides = {f"{field}_{part}": given[field].stride(axis) for field in ("skip", "within") if field in given for part, axis in (("image", 0), ("row", 2))}
    norm = _Norm(
        x=x.data_ptr(), from_row=from_row.ctypes.data, from_column=from_column.ctypes.data, images=len(x), rows=len(from_row), columns=len(from_column),
        height=height, width=width, channels=x.shape[1] // shuffle**2, shuffle=shuffle, padding=padding, relu=relu, half=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(), epsilon=EPSILON, **{field: tensor.data_ptr() for field, tensor in given.items()}, **strides,
    )  # fmt: skip
    if getattr(native_library(), name)(ctypes.byref(norm)):
        raise MemoryError(f"no memory left for the norm of {width}x{height} pixels")


@lru_cache(64)
def _sources(side: int, padding: int, mode: str) -> np.ndarray:
    """Of all rows or columns, as C reads them."""
    return sources(np.arange(side, dtype=np.int32), padding, mode)
