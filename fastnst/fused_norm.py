"""Instance norm on an NVIDIA GPU, with all that comes between two convolutions, in Triton, there and back: the ReLU, the sum with a block's
input, the padding.

An activation is read twice and written once, as the next convolution takes it. Torch's own steps read and write it some ten times, copies into
another layout among them, and at full resolution memory is what a pass waits for.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.fused_kernel import kernel
from fastnst.stages import EPSILON

_NUMBERS = 4096  # that a program holds at once
_FOLD_NUMBERS, _FOLD_PROGRAMS, _FOLD_WARPS = 1024, 660, 4  # of the way back: of ten choices on an H200 the one that suits all layers
# Numbers, of two bytes, that a program of moments takes at once; programs; how many such blocks it has or waits for; warps. The fastest of nine on an H200 for 2 to 17
# million numbers (5 and 14 us), and 1 us behind it for 66 million.
_SUMMING = 4096, 512, 3, 4
_CHANNELS = 16  # that a program adds up the parts of
_LAST = torch.channels_last


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
    skip: Tensor | None = None,
    padding: int = 0,
    mode: str = "constant",
    shuffle: int = 1,
    places: int = 1,
    margin: int = 0,
    unlike: Tensor | None = None,
) -> Tensor:
    """``(N, C s s, h, w)`` -> its instance norm, ReLU, plus ``skip``, padded by ``padding`` on all sides: ``(N, C, H + 2 p, W + 2 p)``, the same type, channels-last.

    H is ``h s`` less both margins, W likewise. ``weight`` and ``bias``: ``(C,)``. ``skip``: ``(N, C, H, W)``, channels-last or an inner part of such. ``mode``: ``reflect``,
    ``replicate`` or ``constant`` (0). ``shuffle`` s: what comes are places of ``s x s`` pixels, as ``wide`` has them; ``margin``: so many pixels on all sides of them are
    no part of it; ``places`` n: what goes are places of ``n x n``, which both sides are multiples of. ``unlike``, int32 ``(N,)``: 0 where all pixels of a channel are the same
    but for rounding, so that the norm is ``bias``. Moments and arithmetic are float32.
    """
    x = x.contiguous(memory_format=_LAST)
    return _forward(x, _moments(x, shuffle, margin, unlike), weight, bias, relu, skip, padding, mode, shuffle, places, margin)


class FusedNorm(torch.autograd.Function):
    """``fused_norm`` with gradients. Gives the output and what of it lies within the padding, which a later ``skip`` takes: the gradients of both come back apart.
    None for the second where the first are places.

    Not for ``skip`` with a ReLU or a shuffle, nor for padding by replication of more than 1 pixel.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, skip, relu, padding, mode, shuffle, places, margin) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous(memory_format=_LAST)
        moments = _moments(x, shuffle, margin)
        out = _forward(x, moments, weight, bias, relu, skip, padding, mode, shuffle, places, margin)
        ctx.save_for_backward(x, moments, weight, bias)
        ctx.how, ctx.skips, ctx.shape = (relu, padding, mode, shuffle, places, margin), skip is not None, out.shape
        ctx.set_materialize_grads(False)
        return out, out[:, :, padding : out.shape[2] - padding, padding : out.shape[3] - padding] if places == 1 else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, within: Tensor | None):
        x, moments, weight, bias = ctx.saved_tensors
        relu, padding, mode, shuffle, places, margin = ctx.how
        images, channels, height, width, sizes = _sizes(x, shuffle, margin)
        gradient = x.new_zeros(ctx.shape) if gradient is None else gradient
        gradient = gradient.contiguous(memory_format=_LAST)
        within = None if within is None else within.contiguous(memory_format=_LAST)
        folded = torch.empty_like(x)  # the gradient behind padding and ReLU
        fewer = sizes | {"BLOCK": max(1, _FOLD_NUMBERS // sizes["WIDTH"]), "num_warps": _FOLD_WARPS}
        columns = triton.cdiv(width, fewer["BLOCK"])
        parts = max(1, min(height * columns, _FOLD_PROGRAMS // images))
        sums = x.new_empty(images, parts, 2, channels, dtype=torch.float32)
        choices = {"PADDING": padding, "MODE": mode, "RELU": relu, "WITHIN": within is not None, "SHUFFLE": shuffle, "PLACES": places, "MARGIN": margin}
        _fold[(parts, images)](x, moments, weight, bias, gradient, x if within is None else within, folded, sums, height, width, columns, **choices, **fewer)
        totals = x.new_empty(images, 2, channels, dtype=torch.float32)
        _total[(images, triton.cdiv(channels, _CHANNELS))](sums, totals, parts, CHANNELS=channels, WIDTH=_CHANNELS, PARTS=triton.next_power_of_2(parts), num_warps=4)
        back, whole = torch.empty_like(x), x.new_empty(2, channels, dtype=torch.float32)
        flat = (triton.cdiv((height + 2 * margin) * (width + 2 * margin), sizes["BLOCK"]), images)
        _back[flat](x, moments, weight, folded, totals, back, whole, height, width, SHUFFLE=shuffle, MARGIN=margin, **sizes)
        bias_gradient, weight_gradient = whole.to(weight.dtype)
        return back, weight_gradient, bias_gradient, folded if ctx.skips else None, None, None, None, None, None, None


def _sizes(x: Tensor, shuffle: int, margin: int) -> tuple[int, int, int, int, dict[str, Any]]:
    """Images, channels, height and width of what ``x`` holds, and the sizes that kernels are compiled for."""
    images, channels, height, width = x.shape
    channels //= shuffle**2
    wide = triton.next_power_of_2(channels)
    return images, channels, height * shuffle - 2 * margin, width * shuffle - 2 * margin, {"CHANNELS": channels, "WIDTH": wide, "BLOCK": max(1, _NUMBERS // wide), "num_warps": 8}


def _moments(x: Tensor, shuffle: int, margin: int, unlike: Tensor | None = None) -> Tensor:
    """Mean and the deviation's inverse, ``(N, 2, C)`` float32, of channels-last ``x``."""
    images, channels, height, width, sizes = _sizes(x, shuffle, margin)
    numbers, programs, stages, warps = _SUMMING
    block = max(1, 2 * numbers // x.element_size() // sizes["WIDTH"])
    parts = max(1, min(triton.cdiv(height * width, block), programs // images))
    sums = x.new_empty(images, parts, 2, channels, dtype=torch.float32)
    _sum_up[(parts, images)](x, sums, height, width, SHUFFLE=shuffle, MARGIN=margin, STAGES=stages, **sizes | {"BLOCK": block, "num_warps": warps})
    moments = x.new_empty(images, 2, channels, dtype=torch.float32)
    groups = {"CHANNELS": channels, "WIDTH": _CHANNELS, "BLOCK": block, "PARTS": triton.next_power_of_2(parts), "ASKED": unlike is not None}
    other = sums if unlike is None else unlike
    _solve[(images, triton.cdiv(channels, _CHANNELS))](sums, moments, other, height * width, parts, EPSILON=EPSILON, num_warps=4, **groups)
    return moments


def _forward(
    x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, relu: bool, skip: Tensor | None, padding: int, mode: str, shuffle: int, places: int, margin: int
) -> Tensor:
    images, channels, height, width, sizes = _sizes(x, shuffle, margin)
    out_height, out_width = height + 2 * padding, width + 2 * padding
    out = x.new_empty(images, out_height // places, out_width // places, places**2 * channels).permute(0, 3, 1, 2)
    if skip is not None and skip.stride()[1::2] != (1, channels):
        skip = skip.contiguous(memory_format=_LAST)
    other = x if skip is None else skip
    grid = (triton.cdiv(out_height * out_width, sizes["BLOCK"]), images)  # the first may be large
    choices = {"PADDING": padding, "MODE": mode, "RELU": relu, "SKIP": skip is not None, "SHUFFLE": shuffle, "PLACES": places, "MARGIN": margin, "enable_fp_fusion": True}
    _apply[grid](x, moments, weight, bias, other, out, height, width, other.stride(0) // channels, other.stride(2) // channels, **choices, **sizes)
    return out


@triton.jit
def lies_at(y, across, width, SIDE: tl.constexpr):
    """Where a pixel lies among those of its image, by places of ``SIDE x SIDE``, counted in pixels."""
    if SIDE == 1:
        return y * width + across
    return ((y // SIDE) * (width // SIDE) + across // SIDE) * SIDE * SIDE + (y % SIDE) * SIDE + across % SIDE


@triton.jit
def pixel_at(place, height, width, SIDE: tl.constexpr):
    """Image, row and column of a pixel that is the ``place``-th in memory, by places of ``SIDE x SIDE``: what ``lies_at`` gives, the other way."""
    within, place = place % (SIDE * SIDE), place // (SIDE * SIDE)
    row, rows = place // (width // SIDE), height // SIDE
    return row // rows, row % rows * SIDE + within // SIDE, place % (width // SIDE) * SIDE + within % SIDE


@triton.jit
def _lies_within(y, across, width, SIDE: tl.constexpr, MARGIN: tl.constexpr):
    """``lies_at`` in an image with a margin."""
    return lies_at(y + MARGIN, across + MARGIN, width + 2 * MARGIN, SIDE)


@triton.jit
def _area(height, width, MARGIN: tl.constexpr):
    return (height + 2 * MARGIN) * (width + 2 * MARGIN)


@triton.jit
def _any_order(number, width, SIDE: tl.constexpr, MARGIN: tl.constexpr):
    """Where the ``number``-th pixel of an image lies: as they lie, where all of what lies there is of the image."""
    return number if MARGIN == 0 else _lies_within(number // width, number % width, width, SIDE, MARGIN)


@kernel(do_not_specialize=["height", "width"])
def _sum_up(
    x, sums, height, width, SHUFFLE: tl.constexpr, MARGIN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """A part's mean of each channel, and the squares of the distances from it, in one pass: counted from the median of three pixels, so that no large number
    is subtracted from another. Blocks are asked for ``STAGES`` - 1 ahead, else a program waits for each. They are read from the end of the image, which was written last
    and is in the cache still, to its beginning, which ``_apply`` reads first."""
    part, parts, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)[None, :]
    pixels = height * width
    x += image.to(tl.int64) * _area(height, width, MARGIN) * CHANNELS
    first, count = part * BLOCK, tl.minimum(pixels - part * BLOCK, BLOCK)
    one = _pixel(x, _any_order(first, width, SHUFFLE, MARGIN), CHANNELS, channel)
    two = _pixel(x, _any_order(first + count // 2, width, SHUFFLE, MARGIN), CHANNELS, channel)
    three = _pixel(x, _any_order(first + count - 1, width, SHUFFLE, MARGIN), CHANNELS, channel)
    pivot = tl.maximum(tl.minimum(one, two), tl.minimum(tl.maximum(one, two), three))
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    apart = parts * BLOCK
    last = first + (pixels - 1 - first) // apart * apart
    for before in tl.range(0, pixels - first, apart, num_stages=STAGES):
        pixel = (last - before + tl.arange(0, BLOCK))[:, None]
        place = x + _any_order(pixel, width, SHUFFLE, MARGIN).to(tl.int64) * CHANNELS + channel
        value = tl.load(place, mask=(pixel < pixels) & (channel < CHANNELS), other=0).to(tl.float32)
        value = tl.where(pixel < pixels, value - pivot, 0.0)
        total += value
        squares += value * value
    moved, squares = _sums(total, squares)
    count = _count(part, parts, pixels, BLOCK)
    channel = tl.arange(0, WIDTH)
    sums += (image * parts + part) * 2 * CHANNELS + channel
    tl.store(sums, tl.sum(pivot, 0) + moved / count, mask=channel < CHANNELS)
    tl.store(sums + CHANNELS, squares - moved * (moved / count), mask=channel < CHANNELS)


@triton.jit
def _sums(one, other):
    """Of both over their pixels, in one go through the warps."""
    return tl.split(tl.sum(tl.join(one, other), 0))


@triton.jit
def _pixel(x, pixel, CHANNELS: tl.constexpr, channel):
    return tl.load(x + pixel.to(tl.int64) * CHANNELS + channel, mask=channel < CHANNELS, other=0).to(tl.float32)


@triton.jit
def _count(part, parts, pixels, BLOCK: tl.constexpr):
    """The pixels of a part: it has each block that comes ``parts`` after another, of which the image's last may be cut off."""
    blocks = (pixels + BLOCK - 1) // BLOCK
    cut_off = tl.where((blocks - 1) % parts == part, blocks * BLOCK - pixels, 0)
    return (blocks - part + parts - 1) // parts * BLOCK - cut_off


@kernel(do_not_specialize=["pixels", "parts"])
def _solve(
    sums, moments, unlike, pixels, parts,
    EPSILON: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """Mean and the deviation's inverse of some channels of an image, from those of its parts, all at once (Chan et al. 1979)."""
    image, channel = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, PARTS)[:, None]
    there = (part < parts) & (channel < CHANNELS)[None, :]
    sums += image * parts * 2 * CHANNELS
    near = tl.load(sums + channel, mask=channel < CHANNELS, other=0)  # the first part's mean, from which the others are not far
    sums += part * 2 * CHANNELS + channel[None, :]
    mean = tl.load(sums, mask=there, other=0)
    within = tl.load(sums + CHANNELS, mask=there, other=0)
    count = tl.where(there, _count(part, parts, pixels, BLOCK), 0)
    whole = near + tl.sum(tl.where(there, mean - near[None, :], 0.0) * count, 0) / pixels
    distance = mean - whole[None, :]
    variance = tl.sum(within + distance * distance * count, 0) / pixels
    variance = tl.where(variance < 0, 0.0, variance)
    moments += image * 2 * CHANNELS + channel
    tl.store(moments, whole, mask=channel < CHANNELS)
    inverse = 1.0 / tl.sqrt(variance + EPSILON)
    if ASKED:
        inverse = tl.where(tl.load(unlike + image) == 0, 0.0, inverse)
    tl.store(moments + CHANNELS, inverse, mask=channel < CHANNELS)


@kernel(do_not_specialize=["height", "width", "skip_image", "skip_row"])
def _apply(
    x, moments, weight, bias, skip, out, height, width, skip_image, skip_row,
    PADDING: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, SKIP: tl.constexpr, SHUFFLE: tl.constexpr, PLACES: tl.constexpr, MARGIN: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pixels of the output, one after the other, from those that padding finds there: rows are no whole number of programs, and those of a share would wait.

    What is read makes way in the cache for what is written, which the next convolution reads."""
    at, image, broad = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), width + 2 * PADDING
    row, column = at // broad, at % broad
    channel = tl.arange(0, WIDTH)[None, :]
    real = channel < CHANNELS
    there = (row < height + 2 * PADDING)[:, None] & real
    y, across = row - PADDING, column - PADDING
    inside = (y >= 0) & (y < height) & (across >= 0) & (across < width)
    if MODE == "reflect":
        y = height - 1 - tl.abs(height - 1 - tl.abs(y))
        across = width - 1 - tl.abs(width - 1 - tl.abs(across))
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    across = tl.minimum(tl.maximum(across, 0), width - 1)
    pixel = image * _area(height, width, MARGIN) + _lies_within(y, across, width, SHUFFLE, MARGIN)[:, None]
    value = tl.load(x + pixel * CHANNELS + channel, mask=there, other=0, eviction_policy="evict_first").to(tl.float32)
    mean = tl.load(moments + image * 2 * CHANNELS + channel, mask=real, other=0)
    gain = tl.load(moments + (image * 2 + 1) * CHANNELS + channel, mask=real, other=0) * tl.load(weight + channel, mask=real, other=0).to(tl.float32)
    value = (value - mean) * gain + tl.load(bias + channel, mask=real, other=0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # what is no number stays so
    if SKIP:
        pixel = image * skip_image + (y.to(tl.int64) * skip_row + across)[:, None]  # counted in pixels: that these are of so many numbers is what lets 16 bytes be read at once
        value += tl.load(skip + pixel * CHANNELS + channel, mask=there, other=0, eviction_policy="evict_first").to(tl.float32)
    if MODE == "constant":
        value = tl.where(inside[:, None], value, 0.0)
    pixel = image * (height + 2 * PADDING) * broad + lies_at(row, column, broad, PLACES)[:, None]
    tl.store(out + pixel * CHANNELS + channel, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _mirror(at, side, which, PADDING: tl.constexpr, MODE: tl.constexpr):
    """Which place of a padded side holds ``at`` again (``which`` 0: at first; 1: ahead of the side; 2: behind it), and whether there is such."""
    if MODE == "replicate":  # by 1
        ahead, is_ahead, behind, is_behind = at * 0, at == 0, at + 2, at == side - 1
    else:
        ahead, is_ahead = PADDING - at, (at >= 1) & (at <= PADDING)
        behind, is_behind = PADDING + 2 * (side - 1) - at, (at >= side - 1 - PADDING) & (at <= side - 2)
    place = tl.where(which == 0, at + PADDING, tl.where(which == 1, ahead, behind))
    return place, tl.where(which == 0, (at >= 0) & (at < side), tl.where(which == 1, is_ahead, is_behind))


@kernel(do_not_specialize=["height", "width", "columns"])
def _fold(
    x, moments, weight, bias, gradient, within, folded, sums, height, width, columns,
    PADDING: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, WITHIN: tl.constexpr, SHUFFLE: tl.constexpr, PLACES: tl.constexpr, MARGIN: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The way back through padding, sum and ReLU, for stretches of rows, of which there are ``columns`` in each, and what the norm needs of it: each channel's
    sum, and that of its products with the normalized values."""
    part, parts, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)[None, :]
    real = channel < CHANNELS
    mean = tl.load(moments + image * 2 * CHANNELS + channel, mask=real, other=0)
    gain = tl.load(moments + (image * 2 + 1) * CHANNELS + channel, mask=real, other=0) * tl.load(weight + channel, mask=real, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=real, other=0).to(tl.float32)
    broad = width + 2 * PADDING
    whole = tl.zeros([BLOCK, WIDTH], tl.float32)
    products = tl.zeros([BLOCK, WIDTH], tl.float32)
    for stretch in range(part, height * columns, parts):
        y, column = stretch // columns, stretch % columns * BLOCK + tl.arange(0, BLOCK)
        there = (column < width)[:, None] & real
        pixel = image * _area(height, width, MARGIN) + _lies_within(y, column, width, SHUFFLE, MARGIN)[:, None]
        value = tl.load(x + pixel * CHANNELS + channel, mask=there, other=0).to(tl.float32) - mean
        seen = image * (height + 2 * PADDING) * broad + lies_at(y + PADDING, column + PADDING, broad, PLACES)[:, None]
        total = tl.load(gradient + seen * CHANNELS + channel, mask=there, other=0).to(tl.float32)
        if WITHIN:
            total += tl.load(within + ((image * height + y) * width + column[:, None]) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
        if PADDING > 0 and MODE != "constant":  # which may have seen these pixels up to eight times more
            vertical = tl.where((y <= PADDING) | (y >= height - 1 - PADDING), 3, 1)
            left = stretch % columns * BLOCK
            horizontal = tl.where((left <= PADDING) | (left + BLOCK > width - 1 - PADDING), 3, 1)
            for turn in range(1, vertical * horizontal):
                row, is_row = _mirror(y, height, turn // horizontal, PADDING, MODE)
                across, is_column = _mirror(column, width, turn % horizontal, PADDING, MODE)
                seen = image * (height + 2 * PADDING) * broad + lies_at(row, across, broad, PLACES)[:, None]
                again = tl.where(is_row, there & is_column[:, None], False)  # not by `&`: what Triton 3.9 interprets takes no mask that is partly of one truth for all
                total += tl.load(gradient + seen * CHANNELS + channel, mask=again, other=0).to(tl.float32)
        if RELU:
            total = tl.where(value * gain + shift > 0, total, 0.0)
        total = tl.where(there, total, 0.0)
        tl.store(folded + pixel * CHANNELS + channel, total.to(folded.dtype.element_ty), mask=there)
        whole += total
        products += total * value
    channel = tl.arange(0, WIDTH)
    sums += (image * parts + part) * 2 * CHANNELS + channel
    whole, products = _sums(whole, products)
    tl.store(sums, whole, mask=channel < CHANNELS)
    inverse = tl.load(moments + (image * 2 + 1) * CHANNELS + channel, mask=channel < CHANNELS, other=0)
    tl.store(sums + CHANNELS, products * inverse, mask=channel < CHANNELS)


@kernel(do_not_specialize=["parts"])
def _total(sums, totals, parts, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Sums of some channels of an image over its parts, all at once."""
    image, channel = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = channel < CHANNELS
    part = tl.arange(0, PARTS)[:, None]
    place, there = sums + (image * parts + part) * 2 * CHANNELS + channel[None, :], (part < parts) & real[None, :]
    total, products = tl.load(place, mask=there, other=0), tl.load(place + CHANNELS, mask=there, other=0)
    totals += image * 2 * CHANNELS + channel
    tl.store(totals, tl.sum(total, 0), mask=real)
    tl.store(totals + CHANNELS, tl.sum(products, 0), mask=real)


@kernel(do_not_specialize=["height", "width"])
def _back(
    x, moments, weight, folded, totals, back, whole, height, width,
    SHUFFLE: tl.constexpr, MARGIN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm's input gradient: weight / deviation x (g - mean(g) - x^ mean(g x^)), x^ being the normalized values. And ``whole``, the sum of the images' totals."""
    image, pixel = tl.program_id(1).to(tl.int64), (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    real = channel < CHANNELS
    pixels, area = height * width, _area(height, width, MARGIN)
    there = (pixel < area) & real
    place = (image * area + pixel) * CHANNELS + channel
    mean = tl.load(moments + image * 2 * CHANNELS + channel, mask=real, other=0)
    inverse = tl.load(moments + (image * 2 + 1) * CHANNELS + channel, mask=real, other=0)
    total = tl.load(totals + image * 2 * CHANNELS + channel, mask=real, other=0) / pixels
    products = tl.load(totals + (image * 2 + 1) * CHANNELS + channel, mask=real, other=0) / pixels
    gain = inverse * tl.load(weight + channel, mask=real, other=0).to(tl.float32)
    normalized = (tl.load(x + place, mask=there, other=0).to(tl.float32) - mean) * inverse
    value = gain * (tl.load(folded + place, mask=there, other=0).to(tl.float32) - total - normalized * products)
    if MARGIN > 0:
        _, row, column = pixel_at(pixel, height + 2 * MARGIN, width + 2 * MARGIN, SHUFFLE)
        value = tl.where((row >= MARGIN) & (row < height + MARGIN) & (column >= MARGIN) & (column < width + MARGIN), value, 0.0)
    tl.store(back + place, value.to(back.dtype.element_ty), mask=there)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        both = tl.arange(0, 2 * WIDTH)  # of sums and products, one after the other
        both_there = both < 2 * CHANNELS
        sums = tl.zeros([2 * WIDTH], tl.float32)
        for each in range(tl.num_programs(1)):
            sums += tl.load(totals + each * 2 * CHANNELS + both, mask=both_there, other=0)
        tl.store(whole + both, sums, mask=both_there)
