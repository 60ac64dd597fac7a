"""The ends of a pass on an NVIDIA GPU, in Triton: photos as the first convolution takes them, pictures of what the last one gives, and these as a loss
network takes them."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.fused_kernel import kernel
from fastnst.fused_norm import lies_at, pixel_at
from fastnst.stages import PIXEL_SHIFT
from fastnst.wide import CHANNELS, NUMBERS, PLACE

_PIXELS = 1024  # that a program makes
_PLACES = 64  # that a program makes pixels of
_ROWS = 32  # of numbers, a place's or 64, that a program moves


def take(x: Tensor, pixels: str, dtype: torch.dtype, missing: tuple[int, int], start: int, padding: int, mode: str, value: float) -> tuple[Tensor, Tensor]:
    """Photos, ``(N, H, W, 3)`` uint8 or ``(N, 3, H, W)`` in [0, 1], as places of 4x4 pixels, ``(N, 64, H', W')`` channels-last, of 0..255 less ``PIXEL_SHIFT``.

    They are padded by replication by ``missing`` rows below and columns on the right, then by ``start`` on all sides by reflection, then by ``padding``
    by ``mode``, of which ``constant`` is ``value``; what then lacks of a place is of no account. The second, int32 ``(N, M)``, is for each photo all 0 where all
    of its pixels are the same.
    """
    x = x if pixels == "uint8" else x.permute(0, 2, 3, 1)
    images, height, width, _ = x.shape
    whole = [side + less for side, less in zip((height, width), missing)]
    rows, columns = (triton.cdiv(side + 2 * (start + padding), PLACE) for side in whole)
    out = x.new_empty(images, rows, columns, PLACE**2 * CHANNELS, dtype=dtype)
    choices = {"FLOAT": pixels != "uint8", "MODE": mode, "PLACE": PLACE, "CHANNELS": CHANNELS, "PIXELS": _PIXELS, "SHIFT": PIXEL_SHIFT, "num_warps": 8}
    across = min(_PIXELS, triton.next_power_of_2(columns * PLACE))  # of a program; narrow pictures are taken by several rows
    grid = (triton.cdiv(rows * PLACE, _PIXELS // across), triton.cdiv(columns * PLACE, across), images)
    unlike = x.new_empty(images, grid[0] * grid[1], dtype=torch.int32)
    _take[grid](x, out, unlike, *x.stride(), height, width, *whole, start, padding, float(value), rows * PLACE, columns * PLACE, ACROSS=across, **choices)
    return out.permute(0, 3, 1, 2), unlike


def finish(x: Tensor, bias: Tensor, output: str, height: int, width: int, pixels: str) -> Tensor:
    """Places of pictures, ``(N, 64, h, w)``, with ``bias`` ``(48,)`` float32, as pictures cropped to ``height`` and ``width``, of the kind that
    ``pixels`` says."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, _, rows, columns = x.shape
    if pixels == "uint8":
        out = x.new_empty(images, height, width, 3, dtype=torch.uint8)
    else:
        out = x.new_empty(images, 3, height, width, dtype=torch.float32).permute(0, 2, 3, 1)
    grid = (rows, triton.cdiv(columns, _PLACES), images)
    choices = {"OUTPUT": output, "FLOAT": pixels != "uint8", "PLACE": PLACE, "NUMBERS": NUMBERS, "PLACES": _PLACES, "num_warps": 8}
    _finish[grid](x, bias, out, *out.stride(), columns, height, width, WHOLE=(height, width) == (rows * PLACE, columns * PLACE), **choices)
    return out if pixels == "uint8" else out.permute(0, 3, 1, 2)


class AsPixels(torch.autograd.Function):
    """Places of pictures, ``(N, 64, h, w)``, with ``bias`` ``(48,)`` -> ``(N, 3, 4 h, 4 w)`` float32. ``give``, instead of ``bias``, gets what is to be added up
    for the gradient of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, give: Callable[[Tensor], None] | None = None) -> Tensor:
        ctx.dtype, ctx.give = x.dtype, give
        return places_to_pixels(x, bias, bias, scaled=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        out, sums = _from_pixels(gradient, gradient, gradient, ctx.dtype, PLACE, 3, scaled=False)
        sums = sums[:, : PLACE**2 * 3]
        if ctx.give is None:
            return out, sums.sum(0), None
        ctx.give(sums)
        return out, None, None


def places_to_pixels(x: Tensor, bias: Tensor, std: Tensor, scaled: bool) -> Tensor:
    """``AsPixels`` without gradient; where ``scaled``, divided by ``std``, ``(3,)`` float32, instead of plus ``bias``."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, _, rows, columns = x.shape
    out = x.new_empty(images, 3, rows * PLACE, columns * PLACE, dtype=torch.float32)
    lines = images * rows * columns
    _to_pixels[(triton.cdiv(lines, _ROWS),)](x, bias, std, out, lines, rows * PLACE, columns * PLACE, SCALED=scaled, PLACE=PLACE, NUMBERS=NUMBERS, ROWS=_ROWS, num_warps=4)
    return out


def normalized(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """``(N, 3, H, W)`` float32, less ``mean``, by ``std``, both ``(3,)``: ``(N, 4, H, W)`` of ``dtype``, channels-last, the last channel 0."""
    return _from_pixels(images, mean, std, dtype, 1, CHANNELS, scaled=True)[0]


def _from_pixels(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, side: int, channels: int, scaled: bool) -> tuple[Tensor, Tensor]:
    """Places of ``side x side`` pixels of ``channels``, channels-last, filled up to 64 with zeros if they are larger than a pixel, and sums of their numbers,
    ``(M, 64)`` float32, to be added up."""
    count, _, height, width = images.shape
    out = images.new_empty(count, height // side, width // side, channels if side == 1 else NUMBERS, dtype=dtype)
    lines = triton.cdiv(out.numel(), NUMBERS)
    programs = triton.cdiv(lines, _ROWS)
    sums = images.new_empty(programs, NUMBERS, dtype=torch.float32)
    choices = {"SCALED": scaled, "SIDE": side, "CHANNELS": channels, "NUMBERS": NUMBERS, "ROWS": _ROWS, "num_warps": 4}
    _to_places[(programs,)](images, mean, std, out, sums, *images.stride(), out.numel(), height, width, **choices)
    return out.permute(0, 3, 1, 2), sums


@triton.jit
def _reflected(at, side):
    return side - 1 - tl.abs(side - 1 - tl.abs(at))


@kernel(do_not_specialize=["height", "width", "whole_height", "whole_width", "start", "padding", "value", "out_height", "out_width"])
def _take(
    x, out, unlike, image_stride, row_stride, column_stride, channel_stride, height, width, whole_height, whole_width, start, padding, value, out_height, out_width,
    FLOAT: tl.constexpr, MODE: tl.constexpr, PLACE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACROSS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    pixel, image = tl.arange(0, PIXELS), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * (PIXELS // ACROSS) + pixel // ACROSS, tl.program_id(1) * ACROSS + pixel % ACROSS
    channel = tl.arange(0, CHANNELS)[None, :]
    there = (row < out_height) & (column < out_width)
    y, across = row - padding, column - padding  # in what is padded by `start`
    tall, broad = whole_height + 2 * start, whole_width + 2 * start
    inside = (y >= 0) & (y < tall) & (across >= 0) & (across < broad)
    if MODE == "reflect":
        y, across = _reflected(y, tall), _reflected(across, broad)
    y, across = tl.minimum(tl.maximum(y, 0), tall - 1), tl.minimum(tl.maximum(across, 0), broad - 1)
    y, across = _reflected(y - start, whole_height), _reflected(across - start, whole_width)
    y, across = tl.minimum(tl.maximum(y, 0), height - 1), tl.minimum(tl.maximum(across, 0), width - 1)
    place = x + image * image_stride + (y.to(tl.int64) * row_stride + across.to(tl.int64) * column_stride)[:, None] + channel * channel_stride
    pixel = tl.load(place, mask=there[:, None] & (channel < 3), other=0).to(tl.float32)
    first = tl.load(x + image * image_stride + channel * channel_stride, mask=channel < 3, other=0).to(tl.float32)
    program = (image * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(unlike + program, tl.max(tl.max((there[:, None] & (pixel != first)).to(tl.int32), 1), 0))
    pixel = (pixel * 255 if FLOAT else pixel) - SHIFT
    if MODE == "constant":
        pixel = tl.where(inside[:, None], pixel, value)
    pixel = tl.where(channel < 3, pixel, 0.0)
    pixel_at = image * out_height * out_width + lies_at(row, column, out_width, PLACE)[:, None]
    tl.store(out + pixel_at * CHANNELS + channel, pixel.to(out.dtype.element_ty), mask=there[:, None])


@kernel(do_not_specialize=["columns", "height", "width"])
def _finish(
    x, bias, out, image_stride, row_stride, column_stride, channel_stride, columns, height, width,
    OUTPUT: tl.constexpr, FLOAT: tl.constexpr, PLACE: tl.constexpr, NUMBERS: tl.constexpr, PLACES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some places of a row of them, four numbers by each thread: the 12 of a place and a row of pixels lie side by side, there and, as bytes, in the result."""
    line, image, lane = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.arange(0, PLACE * PLACE * 4)[None, :]
    place, number = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[:, None], lane % (PLACE * 4)
    within, real = lane // (PLACE * 4) * (PLACE * 3) + number, number < PLACE * 3
    y, column, channel, there = line * PLACE + lane // (PLACE * 4), place * PLACE + number // 3, number % 3, (place < columns) & real
    value = tl.load(x + ((image * tl.num_programs(0) + line) * columns + place) * NUMBERS + within, mask=there, other=0).to(tl.float32)
    value += tl.load(bias + within, mask=real, other=0)
    if OUTPUT == "tanh":
        value = 127.5 + 150 * (2 * tl.sigmoid(2 * value) - 1)
    elif OUTPUT == "sigmoid":
        value = 255 * tl.sigmoid(value)
    value = tl.where(value < 0, 0.0, tl.where(value > 255, 255.0, value))  # what is no number stays so
    out += image * image_stride + y.to(tl.int64) * row_stride
    if not WHOLE:
        there = there & (y < height) & (column < width)
    if FLOAT:
        tl.store(out + column.to(tl.int64) * column_stride + channel * channel_stride, value / 255, mask=there)
    else:
        tl.store(out + place * (PLACE * 3) + number, ((value + 12582912.0) - 12582912.0).to(tl.uint8), mask=there)  # 1.5 x 2^23, beside which halves are rounded to even


@kernel(do_not_specialize=["lines", "height", "width"])
def _to_pixels(x, bias, std, out, lines, height, width, SCALED: tl.constexpr, PLACE: tl.constexpr, NUMBERS: tl.constexpr, ROWS: tl.constexpr):
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, NUMBERS)[None, :]
    numbers: tl.constexpr = PLACE * PLACE * 3
    there, channel = (row < lines) & (lane < numbers), lane % 3
    value = tl.load(x + row.to(tl.int64) * NUMBERS + lane, mask=there, other=0).to(tl.float32)
    if SCALED:
        value = value / tl.load(std + channel)
    else:
        value += tl.load(bias + lane, mask=lane < numbers, other=0).to(tl.float32)
    image, y, across = pixel_at(row * PLACE * PLACE + lane // 3, height, width, PLACE)
    tl.store(out + ((image * 3 + channel).to(tl.int64) * height + y) * width + across, value, mask=there)


@kernel(do_not_specialize=["height", "width"])  # a count that is a multiple of 16 lets masked numbers be stored 16 bytes at once
def _to_places(
    images, mean, std, out, sums, image_stride, channel_stride, row_stride, column_stride, count, height, width,
    SCALED: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, NUMBERS)[None, :]
    there = row * NUMBERS + lane < count
    if SIDE == 1:
        pixel, channel = row * (NUMBERS // CHANNELS) + lane // CHANNELS, lane % CHANNELS
    else:
        pixel, channel = row * SIDE * SIDE + lane // 3, tl.where(lane < SIDE * SIDE * 3, lane % 3, 3)
    image, y, across = pixel_at(pixel, height, width, SIDE)
    color = there & (channel < 3)
    place = images + image.to(tl.int64) * image_stride + channel * channel_stride + y * row_stride + across * column_stride
    value = tl.load(place, mask=color, other=0)
    if SCALED:
        value = (value - tl.load(mean + channel, mask=channel < 3, other=0)) / tl.load(std + channel, mask=channel < 3, other=1)
    value = tl.where(color, value, 0.0)
    tl.store(out + row.to(tl.int64) * NUMBERS + lane, value.to(out.dtype.element_ty), mask=there)
    if not SCALED:
        lane = tl.arange(0, NUMBERS)
        tl.store(sums + tl.program_id(0) * NUMBERS + lane, tl.sum(value, 0))
