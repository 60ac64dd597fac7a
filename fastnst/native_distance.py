"""The mean square of how far features are from a target on a CPU, as ``native_distance.c`` does it: nothing is kept for the way back but both."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.native_library import fields, join_threads, native_library, reads
from fastnst.runtime import is_dense


class _Distance(ctypes.Structure):
    _fields_ = fields(ctypes.c_void_p, "a b sums factor back") + fields(ctypes.c_int64, "count") + fields(ctypes.c_int32, "half threads")


def can_compare(a: Tensor, b: Tensor) -> bool:
    """Whether it is there for such tensors, of which the second needs no gradient."""
    alike = reads(a, b) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0 and is_dense(a)
    return alike and not b.requires_grad and not (a.requires_grad and b.is_inference())  # what is, cannot be kept for the way back


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
