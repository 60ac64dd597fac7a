"""Between the convolutions of a loss network on a CPU, as ``native_features.c`` does it: the ReLU and the pooling behind it, there and back, each in one pass."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.native_library import fields, join_threads, native_library, reads

_LAST = torch.channels_last


class _Features(ctypes.Structure):
    _fields_ = fields(ctypes.c_void_p, "x out pooled gradient of_pooled back") + fields(ctypes.c_int32, "images height width channels half threads")


def can_rectify(x: Tensor) -> bool:
    """Whether it is there for such activations."""
    return reads(x) and x.dim() == 4 and x.is_contiguous(memory_format=_LAST) and x.numel() > 0


class Rectified(torch.autograd.Function):
    """``(N, C, H, W)``, channels-last -> its ReLU, and where it ``pools`` the largest of each 2x2 of that, ``(N, C, H / 2, W / 2)``, else None: the gradients of both come back in
    one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pools: bool) -> tuple[Tensor, Tensor | None]:
        images, channels, height, width = x.shape
        out = torch.empty_like(x)
        pooled = x.new_empty(images, height // 2, width // 2, channels).permute(0, 3, 1, 2) if pools else None
        _run("fastnst_features", x=x, out=out, pooled=pooled)
        ctx.save_for_backward(out)
        ctx.set_materialize_grads(False)
        return out, pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_pooled: Tensor | None):
        (out,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is to follow
            total = torch.zeros_like(out) if gradient is None else gradient
            if of_pooled is not None:
                places = F.max_pool2d(out.detach(), 2, return_indices=True)[1]
                total = total + torch.zeros_like(out).flatten(2).scatter(2, places.flatten(2), of_pooled.flatten(2)).view_as(out)
            return torch.where(out.detach() > 0, total, 0.0), None
        gradient, of_pooled = (None if each is None else each.contiguous(memory_format=_LAST) for each in (gradient, of_pooled))
        back = torch.empty_like(out)
        _run("fastnst_features_back", out=out, gradient=gradient, of_pooled=of_pooled, back=back)
        return back, None


def _run(name: str, out: Tensor, **tensors: Tensor | None) -> None:
    join_threads()
    images, channels, height, width = out.shape
    places = {field: tensor.data_ptr() for field, tensor in tensors.items() if tensor is not None}
    features = _Features(
        out=out.data_ptr(), images=images, height=height, width=width, channels=channels, half=out.dtype == torch.bfloat16, threads=torch.get_num_threads(), **places
    )
    getattr(native_library(), name)(ctypes.byref(features))
