"""How far features are from targets and their Grams from Grams, on an NVIDIA GPU: weighted mean squares, there and back, in few kernels.

A GPU takes longer to start a kernel than to compute a few numbers, and the loss consists of little else once the features are there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.fused_kernel import kernel
from fastnst.self_product import precision_back, product_back, product_in_parts

_NUMBERS = 2048  # that a program takes at once: 16 bytes in half precision by each of its threads, of which a GPU then runs as many as it can
_PROGRAMS = 1024  # that share a mean: what an H100 runs at once


def mean_squares(
    features: Tensor, content: Tensor | None = None, gram: Tensor | None = None, divisor: float = 1.0, content_weight: float = 1.0, style_weight: float = 1.0
) -> tuple[Tensor | None, Tensor | None]:
    """Weighted mean squares of the distance of a layer's features, of any float type but float64, to ``content``, of their shape and type, and of their Grams to
    ``gram``, float32 ``(1 or N, C, C)``, symmetric as Grams are, which ``divisor`` divides theirs by; in float32, None where there is nothing to compare to. No gradient goes to
    either."""
    return _MeanSquares.apply(features, content, gram, divisor, content_weight, style_weight)


class _MeanSquares(torch.autograd.Function):
    """Both at once, so that one kernel adds up what others left, and a layer's gradients of content and style are one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, content: Tensor | None, gram: Tensor | None, divisor: float, content_weight: float, style_weight: float) -> tuple[Tensor | None, ...]:
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        targets = content, gram
        sums = x.new_empty(sum(target is not None for target in targets), _PROGRAMS, dtype=torch.float32)
        x, difference, per_content, per_style, rows = x.contiguous(memory_format=layout), None, content_weight / x.numel(), 0.0, iter(sums)
        if content is not None:
            content = content.contiguous(memory_format=layout)
            _squares[(_PROGRAMS,)](x, content, next(rows), x.numel(), per_content, NUMBERS=_NUMBERS, num_warps=8)
        if gram is not None:
            difference, per_style = _compare_grams(x, gram, divisor, style_weight, next(rows))
        ctx.save_for_backward(x, content, difference)
        ctx.factors = 2 * per_content, 4 * per_style / divisor
        ctx.set_materialize_grads(False)
        numbers = iter(sums.sum(1).unbind())
        return tuple(None if target is None else next(numbers) for target in targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_content: Tensor | None, of_style: Tensor | None):
        (x, content, difference), (per_content, per_style), back = ctx.saved_tensors, ctx.factors, None
        if of_style is not None:
            matrix = torch.empty_like(difference, dtype=precision_back(x.dtype))
            _scale[(triton.cdiv(matrix.numel(), 1024),)](difference, of_style.float(), matrix, matrix.numel(), per_style, NUMBERS=1024)
            back = product_back(matrix, x.flatten(2)).view_as(x)
        if of_content is not None:
            further, back = back is not None, torch.empty_like(x) if back is None else back
            programs = triton.cdiv(x.numel(), _NUMBERS)
            _difference[(programs,)](x, content, of_content.float(), back, x.numel(), per_content, NUMBERS=_NUMBERS, FURTHER=further, num_warps=8)
        return back, None, None, None, None, None


def _compare_grams(x: Tensor, target: Tensor, divisor: float, weight: float, sums: Tensor) -> tuple[Tensor, float]:
    """The difference of the Grams, ``(N, C, C)``, and what its squares are multiplied by in ``sums``."""
    parts = product_in_parts(x.flatten(2))
    images, count, channels, _ = parts.shape
    difference, target = parts.new_empty(images, channels, channels), target.contiguous()
    square, factor = channels**2, weight / difference.numel()
    step = square if len(target) > 1 else 0  # one target is that of all images
    _grams[(_PROGRAMS,)](parts, target, difference, sums, images, square, step, 1 / divisor, factor, PARTS=count, NUMBERS=1024 // count, num_warps=8)
    return difference, factor


# Sizes are not kept from being compiled for, as elsewhere: that a count is a multiple of 16 is what lets masked numbers be loaded 16 bytes at once.
@kernel
def _squares(a, b, sums, count, factor, NUMBERS: tl.constexpr):
    total = tl.zeros([NUMBERS], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * NUMBERS, count, tl.num_programs(0) * NUMBERS):
        at = start + tl.arange(0, NUMBERS)
        there = at < count
        difference = tl.load(a + at, mask=there, other=0).to(tl.float32) - tl.load(b + at, mask=there, other=0).to(tl.float32)
        total += difference * difference
    tl.store(sums + tl.program_id(0), tl.sum(total, 0) * factor)


@kernel
def _difference(a, b, gradient, back, count, factor, NUMBERS: tl.constexpr, FURTHER: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    difference = tl.load(a + at, mask=there, other=0).to(tl.float32) - tl.load(b + at, mask=there, other=0).to(tl.float32)
    value = difference * (factor * tl.load(gradient))
    if FURTHER:
        value += tl.load(back + at, mask=there, other=0).to(tl.float32)
    tl.store(back + at, value.to(back.dtype.element_ty), mask=there)


@kernel
def _grams(parts, target, difference, sums, images, square, step, inverse, factor, PARTS: tl.constexpr, NUMBERS: tl.constexpr):
    """Adds up the ``parts`` of each image's ``square`` numbers; ``step``: from one image's target to the next."""
    part, total, blocks = tl.arange(0, PARTS)[:, None], tl.zeros([NUMBERS], tl.float32), tl.cdiv(square, NUMBERS)
    for turn in range(tl.program_id(0), images * blocks, tl.num_programs(0)):
        image, at = (turn // blocks).to(tl.int64), turn % blocks * NUMBERS + tl.arange(0, NUMBERS)
        there = at < square
        product = tl.sum(tl.load(parts + image * PARTS * square + part * square + at[None, :], mask=there[None, :], other=0), 0)
        apart = product * inverse - tl.load(target + image * step + at, mask=there, other=0)
        tl.store(difference + image * square + at, apart, mask=there)
        total += apart * apart
    tl.store(sums + tl.program_id(0), tl.sum(total, 0) * factor)


@kernel
def _scale(x, gradient, out, count, factor, NUMBERS: tl.constexpr):
    at = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    value = tl.load(x + at, mask=at < count, other=0) * (factor * tl.load(gradient))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)
