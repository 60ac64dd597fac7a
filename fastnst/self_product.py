"""F F^T of features and the way back: in float32 at least, and as GPUs like to multiply."""

import torch
from torch import Tensor

from fastnst.runtime import has_matrix_unit

_FEWEST = 1024  # positions of which a GPU's part of a product is made
_HAS_MATRIX_UNIT = has_matrix_unit()  # a file is read for it, which no compiler could trace


class SelfProduct(torch.autograd.Function):
    """``(N, C, P)`` -> F F^T, ``(N, C, C)``. Autograd knows no symmetry and multiplies twice on the way back: here once, (G + G^T) F."""

    @staticmethod
    def forward(ctx, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        parts = product_in_parts(flat)
        return parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        return product_back((gradient + gradient.transpose(1, 2)).to(precision_back(flat.dtype)), flat)


def product_in_parts(flat: Tensor) -> Tensor:
    """``(N, C, P)`` -> ``(N, parts, C, C)``, a power of 2 of parts whose sum is F F^T."""
    with torch.autocast(flat.device.type, enabled=False):
        if flat.dtype not in (torch.float16, torch.bfloat16):
            return (flat @ flat.transpose(1, 2))[:, None]
        if not flat.is_cuda or torch.version.hip:
            by_tiles = _HAS_MATRIX_UNIT and flat.dtype == torch.bfloat16 and flat.device.type == "cpu"
            return _rounded_twice(flat)[:, None] if by_tiles else product_in_parts(flat.float())
        # Products of half precision are exact in float32, in which a GPU's matrix units add them up; in parts, as it has many.
        images, channels, positions = flat.shape
        parts = max(part for part in (1, 2, 4, 8, 16, 32, 64) if part == 1 or (positions % part == 0 and positions // part >= _FEWEST))
        pieces = flat.transpose(1, 2).reshape(images * parts, positions // parts, channels)
        return torch.ops.aten.bmm.dtype(pieces.transpose(1, 2), pieces, torch.float32).view(images, parts, channels, channels)


def _rounded_twice(flat: Tensor) -> Tensor:
    """F F^T in float32 of bfloat16, in which a CPU's products come out rounded: such a one and what it lacks, together 2^-17 off (more for features below 1e-15).

    By AMX it takes 0.3 of float32's time.
    """
    across = flat.transpose(1, 2)
    product = flat @ across
    return product.float() + torch.baddbmm(product, flat, across, beta=-1).float()


def precision_back(dtype: torch.dtype) -> torch.dtype:
    """Of the matrix that ``product_back`` takes: that of the features, but for float16, whose range a small gradient leaves."""
    return torch.float32 if dtype == torch.float16 else dtype


def product_back(symmetric: Tensor, flat: Tensor) -> Tensor:
    """S F, ``(N, C, P)``, of a symmetric ``(N, C, C)`` in ``precision_back``; laid out and as precise as F is."""
    channels_last = not flat.is_contiguous()  # asked outside of autocast: torch.compile cannot trace it inside, and leaves autocast changed
    with torch.autocast(flat.device.type, enabled=False):
        exact = flat.to(symmetric.dtype)
        product = (exact.transpose(1, 2) @ symmetric).transpose(1, 2) if channels_last else symmetric @ exact  # laid out as the features are
        return product.to(flat.dtype)
