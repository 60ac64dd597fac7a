"""Instance norm on an NVIDIA GPU, with all that comes between two convolutions, in Triton: the ReLU, the sum with a block's input, the padding.

An activation is read twice and written once, as the next convolution takes it. Torch's own steps read and write it some ten times, copies into
another layout among them, and at full resolution memory is what a pass waits for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnst.stages import EPSILON

_NUMBERS = 4096  # that a program holds at once
_PROGRAMS = 512  # some four for each multiprocessor of a large GPU


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
    skip: tuple[Tensor, int] | None = None,
    padding: int = 0,
    mode: str = "constant",
) -> Tensor:
    """``(N, C, H, W)`` -> its instance norm, ReLU, plus ``skip``, padded by ``padding`` on all sides: the same type, channels-last.

    ``weight`` and ``bias``: ``(C,)``. ``skip``: a tensor and how many pixels on each side of it do not count. ``mode``: ``reflect``,
    ``replicate`` or ``constant`` (0). Moments and arithmetic are float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    block = max(1, _NUMBERS // triton.next_power_of_2(channels))
    parts = max(1, min(triton.cdiv(height * width, block), _PROGRAMS // images))
    sizes = {"CHANNELS": channels, "WIDTH": triton.next_power_of_2(channels), "BLOCK": block, "num_warps": 8, "enable_fp_fusion": True}
    sums = x.new_empty(images, parts, 2, channels, dtype=torch.float32)
    _sum_up[(parts, images)](x, sums, height * width, **sizes)
    moments = x.new_empty(images, 2, channels, dtype=torch.float32)
    _solve[(images,)](sums, weight, moments, height * width, parts, EPSILON=EPSILON, PARTS=min(block, triton.next_power_of_2(parts)), **sizes)
    out = x.new_empty(images, height + 2 * padding, width + 2 * padding, channels).permute(0, 3, 1, 2)
    other, inset = (skip[0].contiguous(memory_format=torch.channels_last), skip[1]) if skip else (x, 0)
    grid = (out.shape[2], triton.cdiv(out.shape[3], block), images)  # the first may be large
    choices = {"PADDING": padding, "MODE": mode, "RELU": relu, "SKIP": skip is not None}
    _apply[grid](x, moments, bias, other, out, height, width, other.shape[2], other.shape[3], inset, **choices, **sizes)
    return out


@triton.jit(do_not_specialize=["pixels"])
def _sum_up(x, sums, pixels, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A part's mean of each channel, and the squares of the distances from it, in one pass: counted from the mean of its first block,
    so that no large number is subtracted from another."""
    part, parts, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)[None, :]
    x += image.to(tl.int64) * pixels * CHANNELS
    first = (part * BLOCK + tl.arange(0, BLOCK))[:, None]
    there = (first < pixels) & (channel < CHANNELS)
    value = tl.load(x + first.to(tl.int64) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
    pivot = tl.sum(value, 0) / tl.minimum(pixels - part * BLOCK, BLOCK)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(part * BLOCK, pixels, parts * BLOCK):
        pixel = (start + tl.arange(0, BLOCK))[:, None]
        there = (pixel < pixels) & (channel < CHANNELS)
        value = tl.load(x + pixel.to(tl.int64) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
        value = tl.where(there, value - pivot[None, :], 0.0)
        total += value
        squares += value * value
    moved = tl.sum(total, 0) / _count(part, parts, pixels, BLOCK)
    channel = tl.arange(0, WIDTH)
    sums += (image * parts + part) * 2 * CHANNELS + channel
    tl.store(sums, pivot + moved, mask=channel < CHANNELS)
    tl.store(sums + CHANNELS, tl.sum(squares, 0) - moved * tl.sum(total, 0), mask=channel < CHANNELS)


@triton.jit
def _count(part, parts, pixels, BLOCK: tl.constexpr):
    """The pixels of a part: it has each block that comes ``parts`` after another, of which the image's last may be cut off."""
    blocks = (pixels + BLOCK - 1) // BLOCK
    cut_off = tl.where((blocks - 1) % parts == part, blocks * BLOCK - pixels, 0)
    return (blocks - part + parts - 1) // parts * BLOCK - cut_off


@triton.jit(do_not_specialize=["pixels", "parts"])
def _solve(
    sums, weight, moments, pixels, parts,
    EPSILON: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """An image's mean of each channel, and the weight over its deviation, from those of its parts, ``PARTS`` at a time (Chan et al. 1979)."""
    image = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    there = channel < CHANNELS
    sums += image * parts * 2 * CHANNELS
    total = tl.zeros([PARTS, WIDTH], tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        mean = tl.load(sums + part * 2 * CHANNELS + channel[None, :], mask=(part < parts) & there[None, :], other=0)
        total += mean * _count(part, parts, pixels, BLOCK)
    whole = tl.sum(total, 0) / pixels
    squares = tl.zeros([PARTS, WIDTH], tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        mask = (part < parts) & there[None, :]
        distance = tl.load(sums + part * 2 * CHANNELS + channel[None, :], mask=mask, other=0) - whole[None, :]
        within = tl.load(sums + part * 2 * CHANNELS + CHANNELS + channel[None, :], mask=mask, other=0)
        squares += tl.where(mask, within + distance * distance * _count(part, parts, pixels, BLOCK), 0.0)
    variance = tl.maximum(tl.sum(squares, 0) / pixels, 0.0)
    gain = tl.load(weight + channel, mask=there, other=0).to(tl.float32) / tl.sqrt(variance + EPSILON)
    tl.store(moments + image * 2 * CHANNELS + channel, whole, mask=there)
    tl.store(moments + (image * 2 + 1) * CHANNELS + channel, gain, mask=there)


@triton.jit(do_not_specialize=["height", "width", "skip_height", "skip_width", "inset"])
def _apply(
    x, moments, bias, skip, out, height, width, skip_height, skip_width, inset,
    PADDING: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, SKIP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of a row of the output, from the pixels that padding finds there."""
    row, image = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)[None, :]
    there = (column < width + 2 * PADDING)[:, None] & (channel < CHANNELS)
    y, across = row - PADDING, column - PADDING
    inside = (y >= 0) & (y < height) & (across >= 0) & (across < width)
    if MODE == "reflect":
        y = height - 1 - tl.abs(height - 1 - tl.abs(y))
        across = width - 1 - tl.abs(width - 1 - tl.abs(across))
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    across = tl.minimum(tl.maximum(across, 0), width - 1)[:, None].to(tl.int64)
    line = image.to(tl.int64) * height + y
    value = tl.load(x + (line * width + across) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
    mean = tl.load(moments + image * 2 * CHANNELS + channel, mask=channel < CHANNELS, other=0)
    gain = tl.load(moments + (image * 2 + 1) * CHANNELS + channel, mask=channel < CHANNELS, other=0)
    value = (value - mean) * gain + tl.load(bias + channel, mask=channel < CHANNELS, other=0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    if SKIP:
        line = image.to(tl.int64) * skip_height + y + inset
        value += tl.load(skip + (line * skip_width + across + inset) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
    if MODE == "constant":
        value = tl.where(inside[:, None], value, 0.0)
    line = image.to(tl.int64) * (height + 2 * PADDING) + row
    tl.store(out + (line * (width + 2 * PADDING) + column[:, None]) * CHANNELS + channel, value.to(out.dtype.element_ty), mask=there)
