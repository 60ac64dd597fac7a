"""The two ends of a pass on an NVIDIA GPU, in Triton: photos as the first convolution takes them, and pictures of what the last one gives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnst.fused_norm import lies_at
from fastnst.stages import PIXEL_SHIFT
from fastnst.wide import CHANNELS, PLACE

_PIXELS = 1024  # that a program makes


def take(x: Tensor, pixels: str, dtype: torch.dtype, missing: tuple[int, int], start: int, padding: int, mode: str, value: float) -> Tensor:
    """Photos, ``(N, H, W, 3)`` uint8 or ``(N, 3, H, W)`` in [0, 1], as places of 4x4 pixels, ``(N, 64, H', W')`` channels-last, of 0..255 less ``PIXEL_SHIFT``.

    They are padded by replication by ``missing`` rows below and columns on the right, then by ``start`` on all sides by reflection, then by ``padding``
    by ``mode``, of which ``constant`` is ``value``; what then lacks of a place is of no account.
    """
    x = x if pixels == "uint8" else x.permute(0, 2, 3, 1)
    images, height, width, _ = x.shape
    whole = [side + less for side, less in zip((height, width), missing)]
    rows, columns = (triton.cdiv(side + 2 * (start + padding), PLACE) for side in whole)
    out = x.new_empty(images, rows, columns, PLACE**2 * CHANNELS, dtype=dtype)
    choices = {"FLOAT": pixels != "uint8", "MODE": mode, "PLACE": PLACE, "CHANNELS": CHANNELS, "PIXELS": _PIXELS, "SHIFT": PIXEL_SHIFT, "num_warps": 8}
    grid = (rows * PLACE, triton.cdiv(columns * PLACE, _PIXELS), images)
    _take[grid](x, out, *x.stride(), height, width, *whole, start, padding, float(value), columns * PLACE, **choices)
    return out.permute(0, 3, 1, 2)


def finish(x: Tensor, bias: Tensor, output: str, height: int, width: int, pixels: str) -> Tensor:
    """Places of 4x4 pixels, ``(N, 48, h, w)``, with ``bias`` ``(48,)`` float32, as pictures cropped to ``height`` and ``width``, of the kind that
    ``pixels`` says."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, _, rows, columns = x.shape
    if pixels == "uint8":
        out = x.new_empty(images, height, width, 3, dtype=torch.uint8)
    else:
        out = x.new_empty(images, 3, height, width, dtype=torch.float32).permute(0, 2, 3, 1)
    grid = (height, triton.cdiv(width, _PIXELS), images)
    _finish[grid](x, bias, out, *out.stride(), rows, columns, width, OUTPUT=output, FLOAT=pixels != "uint8", PLACE=PLACE, PIXELS=_PIXELS, num_warps=8)
    return out if pixels == "uint8" else out.permute(0, 3, 1, 2)


@triton.jit
def _reflected(at, side):
    return side - 1 - tl.abs(side - 1 - tl.abs(at))


@triton.jit(do_not_specialize=["height", "width", "whole_height", "whole_width", "start", "padding", "value", "out_width"])
def _take(
    x, out, image_stride, row_stride, column_stride, channel_stride, height, width, whole_height, whole_width, start, padding, value, out_width,
    FLOAT: tl.constexpr, MODE: tl.constexpr, PLACE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)[None, :]
    there = column < out_width
    y, across = row - padding, column - padding  # in what is padded by `start`
    tall, broad = whole_height + 2 * start, whole_width + 2 * start
    inside = (y >= 0) & (y < tall) & (across >= 0) & (across < broad)
    if MODE == "reflect":
        y, across = _reflected(y, tall), _reflected(across, broad)
    y, across = tl.minimum(tl.maximum(y, 0), tall - 1), tl.minimum(tl.maximum(across, 0), broad - 1)
    y, across = _reflected(y - start, whole_height), _reflected(across - start, whole_width)
    y, across = tl.minimum(tl.maximum(y, 0), height - 1), tl.minimum(tl.maximum(across, 0), width - 1)
    place = x + image * image_stride + y.to(tl.int64) * row_stride + across[:, None].to(tl.int64) * column_stride + channel * channel_stride
    pixel = tl.load(place, mask=there[:, None] & (channel < 3), other=0).to(tl.float32)
    pixel = (pixel * 255 if FLOAT else pixel) - SHIFT
    if MODE == "constant":
        pixel = tl.where(inside[:, None], pixel, value)
    pixel = tl.where(channel < 3, pixel, 0.0)
    pixel_at = image * tl.num_programs(0) * out_width + lies_at(row, column, out_width, PLACE)[:, None]
    tl.store(out + pixel_at * CHANNELS + channel, pixel.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["rows", "columns", "width"])
def _finish(
    x, bias, out, image_stride, row_stride, column_stride, channel_stride, rows, columns, width,
    OUTPUT: tl.constexpr, FLOAT: tl.constexpr, PLACE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    y, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, 4)[None, :]
    there = (column < width) & (channel < 3)
    place, within = (image * rows + y // PLACE) * columns + column // PLACE, (y % PLACE * PLACE + column % PLACE) * 3 + channel
    value = tl.load(x + place * PLACE * PLACE * 3 + within, mask=there, other=0).to(tl.float32) + tl.load(bias + within, mask=there, other=0)
    if OUTPUT == "tanh":
        value = 127.5 + 150 * (2 * tl.sigmoid(2 * value) - 1)
    elif OUTPUT == "sigmoid":
        value = 255 * tl.sigmoid(value)
    value = tl.where(value < 0, 0.0, tl.where(value > 255, 255.0, value))  # what is no number stays so
    place = out + image * image_stride + y.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride + channel * channel_stride
    if FLOAT:
        tl.store(place, value / 255, mask=there)
    else:
        tl.store(place, ((value + 12582912.0) - 12582912.0).to(tl.uint8), mask=there)  # 1.5 x 2^23, beside which halves are rounded to even
