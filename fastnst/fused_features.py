"""The loss network on an NVIDIA GPU in half precision: frozen convolutions that keep their output alone, and bias, ReLU, pooling and padding in kernels
of our own, there and back."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fastnst.wide import CHANNELS, PLACE

if TYPE_CHECKING:
    from fastnst.loss_network import LossNetwork

_NUMBERS = 4096  # that a program makes
_LAST = torch.channels_last


def can_fuse(network: "LossNetwork") -> bool:
    """Whether there are kernels for such a network: a frozen VGG of max pooling."""
    frozen = not any(parameter.requires_grad for parameter in network.parameters())
    return frozen and all(isinstance(module, (nn.Conv2d, nn.ReLU, nn.MaxPool2d)) for module in network.features) and network.features[0].kernel_size == (3, 3)


def fused_features(network: "LossNetwork", images: Tensor, wanted: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``network`` gives for ``images`` at ``wanted``, layers with their places, in ``dtype``."""
    asked = set(wanted.values())
    x = ((images - network.mean) / network.std).to(dtype)
    found: dict[int, Tensor] = {}
    for index, module in enumerate(network.features[: max(asked, default=-1) + 1]):
        if isinstance(module, nn.Conv2d):
            relu = index + 1 in asked or (index not in asked and index < max(asked))
            x = _convolve(network, str(index), module, x, relu and index not in asked)
        elif isinstance(module, nn.MaxPool2d):
            x = _MaxPool.apply(x)
        elif index - 1 in asked:  # else the convolution did it
            x = torch.relu(x)
        if index in asked:
            found[index] = x
    heads = network.heads
    return {layer: _convolve(network, layer, heads[layer], found[index], True) if layer in heads else found[index] for layer, index in wanted.items()}


def _convolve(network: "LossNetwork", name: str, module: nn.Conv2d, x: Tensor, relu: bool) -> Tensor:
    kept, weight = network.__dict__.setdefault("_in_half", {}), module.weight
    which = (x.dtype, weight.device, weight.data_ptr(), weight._version)
    grouped = module.in_channels == 3
    if name not in kept or kept[name][0] != which:
        with torch.inference_mode(False):
            kept[name] = (which, *(_both_ways(kernels, x.dtype) for kernels in ([_first_weight(weight)] if grouped else []) + [weight.detach()]), module.bias.detach().float())
    _, *kernels, bias = kept[name]
    padding = module.padding[0]
    if padding and module.padding_mode != "zeros":
        x, padding = _Reflect.apply(x), 0
    if not grouped or x.shape[3] % PLACE or not padding:
        return _ConvBias.apply(x.contiguous(memory_format=_LAST), *kernels[-1], bias, padding, relu)
    images, _, height, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, CHANNELS - 3)).permute(0, 2, 3, 1).reshape(images, height, width // PLACE, -1).permute(0, 3, 1, 2)
    x = _ConvBias.apply(x, *kernels[0], bias, padding, relu)
    return x.permute(0, 2, 3, 1).reshape(images, height, width, -1).permute(0, 3, 1, 2)


def _both_ways(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kernels forward, and those whose convolution of the gradient is the way back."""
    back = weight.flip(2, 3).transpose(0, 1)
    return weight.to(dtype).contiguous(memory_format=_LAST), back.to(dtype).contiguous(memory_format=_LAST)


@torch.no_grad()
def _first_weight(weight: Tensor) -> Tensor:
    """``(O, 3, 3, 3)`` -> ``(4 O, 16, 3, 3)``: of four pixels across at once, each of four channels, as ``wide.first`` has them."""
    moved = [F.pad(weight, (PLACE - 1 + at, 3 * PLACE - 3 - (PLACE - 1 + at), 0, 0, 0, CHANNELS - 3)) for at in range(PLACE)]
    wide = torch.stack(moved).unflatten(-1, (3, PLACE))  # (4, O, 4, 3, 3, 4)
    return wide.permute(0, 1, 5, 2, 3, 4).reshape(PLACE * weight.shape[0], PLACE * CHANNELS, 3, 3)


class _ConvBias(torch.autograd.Function):
    """A frozen convolution of stride 1, its bias (of channels, or of as many places of channels as there are) and ReLU; a ReLU's gradient needs the output alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor, padding: int, relu: bool) -> Tensor:
        out = F.conv2d(x, weight, padding=padding).contiguous(memory_format=_LAST)
        _add_bias[_grid(out)](out, bias, out.numel(), CHANNELS=bias.numel(), RELU=relu, **_sizes(out))
        ctx.save_for_backward(back, out if relu else None)
        ctx.padding = back.shape[2] - 1 - padding
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        back, out = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_LAST)
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        return F.conv2d(gradient, back, padding=ctx.padding), None, None, None, None, None


class _MaxPool(torch.autograd.Function):
    """2x2, of stride 2; the gradient goes to the first of the largest, found again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=_LAST)
        images, channels, height, width = x.shape
        out = x.new_empty(images, height // 2, width // 2, channels).permute(0, 3, 1, 2)
        _pool[_grid(out)](x, out, out.numel(), height, width, CHANNELS=channels, **_sizes(x))
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        images, channels, height, width = x.shape
        gradient, back = gradient.contiguous(memory_format=_LAST), torch.empty_like(x)
        count = images * triton.cdiv(height, 2) * triton.cdiv(width, 2) * channels
        _pool_back[(triton.cdiv(count, _NUMBERS),)](x, gradient, back, count, height, width, CHANNELS=channels, **_sizes(x))
        return back


class _Reflect(torch.autograd.Function):
    """Padding by reflection of a pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=_LAST)
        images, channels, height, width = x.shape
        out = x.new_empty(images, height + 2, width + 2, channels).permute(0, 3, 1, 2)
        _reflect[_grid(out)](x, out, out.numel(), height, width, CHANNELS=channels, **_sizes(out))
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        images, channels, height, width = ctx.shape
        gradient = gradient.contiguous(memory_format=_LAST)
        back = gradient.new_empty(images, height, width, channels).permute(0, 3, 1, 2)
        _reflect_back[_grid(back)](gradient, back, back.numel(), height, width, CHANNELS=channels, **_sizes(gradient))
        return back


class SquaredDistance(torch.autograd.Function):
    """Mean square of ``a - b``, which have one shape, in float32; the gradient is of ``a`` alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        b = b.contiguous(memory_format=_LAST) if a.is_contiguous(memory_format=_LAST) else b.contiguous()
        a = a if a.is_contiguous(memory_format=_LAST) else a.contiguous()
        parts = triton.cdiv(a.numel(), 4 * _NUMBERS)
        sums = a.new_empty(parts, dtype=torch.float32)
        _squares[(parts,)](a, b, sums, a.numel(), ROUNDS=4, **_sizes(a))
        ctx.save_for_backward(a, b)
        return sums.sum() / a.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        a, b = ctx.saved_tensors
        back = torch.empty_like(a)
        _difference[_grid(a)](a, b, gradient.float().contiguous(), back, a.numel(), **_sizes(a))
        return back, None


def _grid(made: Tensor) -> tuple[int]:
    return (triton.cdiv(made.numel(), _NUMBERS),)


def _sizes(largest: Tensor) -> dict[str, Any]:
    """What kernels are compiled for; places are counted in 32 bits where they suffice: that is twice as fast."""
    return {"NUMBERS": _NUMBERS, "INDEX": tl.int32 if largest.numel() < 2**31 else tl.int64, "num_warps": 8}


@triton.jit(do_not_specialize=["count"])
def _add_bias(x, bias, count, CHANNELS: tl.constexpr, RELU: tl.constexpr, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    value = tl.load(x + at, mask=there, other=0).to(tl.float32) + tl.load(bias + at % CHANNELS, mask=there, other=0)
    value = tl.maximum(value, 0.0) if RELU else value
    tl.store(x + at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def _corner(at, height, width, rows, columns, CHANNELS: tl.constexpr):
    """Of number ``at`` of ``(N, rows, columns, C)``: image, row, column, and where it lies in an image of ``(height, width)`` at twice these."""
    channel, pixel = at % CHANNELS, at // CHANNELS
    column, line = pixel % columns, pixel // columns
    row, image = line % rows, line // rows
    return image, row, column, ((image * height + 2 * row) * width + 2 * column) * CHANNELS + channel


@triton.jit(do_not_specialize=["count", "height", "width"])
def _pool(x, out, count, height, width, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    image, row, column, place = _corner(at, height, width, height // 2, width // 2, CHANNELS)
    first, second = tl.load(x + place, mask=there, other=0), tl.load(x + place + CHANNELS, mask=there, other=0)
    third, fourth = tl.load(x + place + width * CHANNELS, mask=there, other=0), tl.load(x + place + (width + 1) * CHANNELS, mask=there, other=0)
    tl.store(out + at, tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth)), mask=there)


@triton.jit(do_not_specialize=["count", "height", "width"])
def _pool_back(x, gradient, back, count, height, width, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    image, row, column, place = _corner(at, height, width, (height + 1) // 2, (width + 1) // 2, CHANNELS)
    right, below = there & (2 * column + 1 < width), there & (2 * row + 1 < height)
    pooled = right & below
    first, second = tl.load(x + place, mask=pooled, other=0), tl.load(x + place + CHANNELS, mask=pooled, other=0)
    third, fourth = tl.load(x + place + width * CHANNELS, mask=pooled, other=0), tl.load(x + place + (width + 1) * CHANNELS, mask=pooled, other=0)
    most = tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))
    source = ((image * (height // 2) + row) * (width // 2) + column) * CHANNELS + at % CHANNELS
    value = tl.load(gradient + source, mask=pooled, other=0)
    is_first, is_second = first == most, (second == most) & (first != most)
    is_third = (third == most) & (first != most) & (second != most)
    is_fourth = (first != most) & (second != most) & (third != most)
    tl.store(back + place, tl.where(is_first & pooled, value, 0.0), mask=there)
    tl.store(back + place + CHANNELS, tl.where(is_second & pooled, value, 0.0), mask=right)
    tl.store(back + place + width * CHANNELS, tl.where(is_third & pooled, value, 0.0), mask=below)
    tl.store(back + place + (width + 1) * CHANNELS, tl.where(is_fourth & pooled, value, 0.0), mask=pooled)


@triton.jit(do_not_specialize=["count", "height", "width"])
def _reflect(x, out, count, height, width, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    channel, pixel = at % CHANNELS, at // CHANNELS
    column, line = pixel % (width + 2) - 1, pixel // (width + 2)
    row, image = line % (height + 2) - 1, line // (height + 2)
    row, column = height - 1 - tl.abs(height - 1 - tl.abs(row)), width - 1 - tl.abs(width - 1 - tl.abs(column))
    tl.store(out + at, tl.load(x + ((image * height + row) * width + column) * CHANNELS + channel, mask=there, other=0), mask=there)


@triton.jit(do_not_specialize=["count", "height", "width"])
def _reflect_back(gradient, back, count, height, width, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    """A pixel next to the border was seen again beyond it."""
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    channel, pixel = at % CHANNELS, at // CHANNELS
    column, line = pixel % width, pixel // width
    row, image = line % height, line // height
    total = tl.zeros([NUMBERS], tl.float32)
    for vertical in tl.static_range(0, 3):
        y = row + 1 if vertical == 0 else row * 0 if vertical == 1 else row * 0 + height + 1
        is_row = there if vertical == 0 else there & (row == 1) if vertical == 1 else there & (row == height - 2)
        for horizontal in tl.static_range(0, 3):
            across = column + 1 if horizontal == 0 else column * 0 if horizontal == 1 else column * 0 + width + 1
            is_column = there if horizontal == 0 else column == 1 if horizontal == 1 else column == width - 2
            source = ((image * (height + 2) + y) * (width + 2) + across) * CHANNELS + channel
            total += tl.load(gradient + source, mask=is_row & is_column, other=0).to(tl.float32)
    tl.store(back + at, total.to(back.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _squares(a, b, sums, count, NUMBERS: tl.constexpr, INDEX: tl.constexpr, ROUNDS: tl.constexpr):
    total = tl.zeros([NUMBERS], tl.float32)
    for turn in range(ROUNDS):
        at = (tl.program_id(0).to(INDEX) * ROUNDS + turn) * NUMBERS + tl.arange(0, NUMBERS)
        difference = tl.load(a + at, mask=at < count, other=0).to(tl.float32) - tl.load(b + at, mask=at < count, other=0).to(tl.float32)
        total += difference * difference
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _difference(a, b, gradient, back, count, NUMBERS: tl.constexpr, INDEX: tl.constexpr):
    at = tl.program_id(0).to(INDEX) * NUMBERS + tl.arange(0, NUMBERS)
    there = at < count
    difference = tl.load(a + at, mask=there, other=0).to(tl.float32) - tl.load(b + at, mask=there, other=0).to(tl.float32)
    tl.store(back + at, (difference * (2.0 / count) * tl.load(gradient)).to(back.dtype.element_ty), mask=there)
