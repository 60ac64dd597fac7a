"""The mean square of how far features are from a target on a CPU, as ``native_distance.c`` does it: nothing is kept for the way back but both."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.native_library import join_threads, native_library


class _Distance(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in "a b sums factor back".split()), ("count", ctypes.c_int64), ("half", ctypes.c_int32), ("threads", ctypes.c_int32)]


def can_compare(a: Tensor, b: Tensor) -> bool:
    """Whether it is there for such tensors, of which the second needs no gradient. Of tensors of other kinds, as for tracing, there may be no numbers."""
    if torch.compiler.is_compiling() or b.requires_grad or (a.requires_grad and b.is_inference()):  # the last could not be kept for the way back
        return False
    alike = all(type(each) is Tensor and each.device.type == "cpu" and each.dtype == a.dtype in (torch.float32, torch.bfloat16) and not each.is_neg() for each in (a, b))
    return alike and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0 and _is_dense(a) and native_library() is not None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


class MeanSquare(torch.autograd.Function):
    """Of a - b, in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        sums = torch.empty(-(-a.numel() // native_library().fastnst_distance_part()), dtype=torch.float64)
        _run("fastnst_distance", a, b, sums=sums)
        return (sums.sum() / a.numel()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        a, b = ctx.saved_tensors
        back = torch.empty_like(a)
        _run("fastnst_distance_back", a, b, factor=gradient * (2 / a.numel()), back=back)
        return back, None


def _run(name: str, a: Tensor, b: Tensor, **tensors: Tensor) -> None:
    join_threads()
    places = {field: tensor.data_ptr() for field, tensor in tensors.items()}
    distance = _Distance(a=a.data_ptr(), b=b.data_ptr(), count=a.numel(), half=a.dtype == torch.bfloat16, threads=torch.get_num_threads(), **places)
    getattr(native_library(), name)(ctypes.byref(distance))
