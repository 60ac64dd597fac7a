"""The loss network on an NVIDIA GPU in half precision: frozen convolutions that keep their output alone, and bias, ReLU, pooling and padding in kernels
of our own, there and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnst.fused_kernel import kernel
from fastnst.fused_pixels import normalized, places_to_pixels
from fastnst.runtime import is_out_of_memory
from fastnst.wide import CHANNELS, NUMBERS, PLACE

_NUMBERS = 2048  # that a program makes: 16 bytes by each thread
_LAST = torch.channels_last
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple, "_Kernels"]]] = WeakKeyDictionary()  # by name of a convolution: what its weights were, and what was made of them
_WITHOUT: set[tuple] = set()  # kinds of convolutions that cuDNN has no kernel for with a ReLU


def can_fuse(network: nn.Module) -> bool:
    """Whether there are kernels for such a ``LossNetwork``: a frozen VGG of max pooling."""
    frozen = not any(parameter.requires_grad for parameter in network.parameters())
    return frozen and all(isinstance(module, (nn.Conv2d, nn.ReLU, nn.MaxPool2d)) for module in network.features) and network.features[0].kernel_size == (3, 3)


def fused_features(
    network: nn.Module, images: Tensor, wanted: dict[str, int], dtype: torch.dtype, each: Callable[[str, Tensor], None] = lambda layer, features: None
) -> dict[str, Tensor]:
    """What a ``LossNetwork`` gives for ``images`` at ``wanted``, layers with their places, in ``dtype``."""
    asked, modules, heads = set(wanted.values()), network.features, network.heads
    x, found = images.float(), {}

    def give(place: int, features: Tensor) -> None:
        for layer in (layer for layer, index in wanted.items() if index == place):
            found[layer] = _convolve(network, layer, heads[layer], features, True) if layer in heads else features
            each(layer, found[layer])

    for index, module in enumerate(modules[: max(asked, default=-1) + 1]):
        if isinstance(module, nn.Conv2d):
            relu = index not in asked and index < max(asked)
            pooled = relu and index + 2 <= max(asked) and isinstance(modules[index + 2], nn.MaxPool2d)
            if index > 0:
                x = _convolve(network, str(index), module, x, relu, pooled)
            elif x.shape[2] % PLACE or x.shape[3] % PLACE or module.padding_mode != "zeros":
                x = _convolve(network, "0", module, ((x - network.mean) / network.std).to(dtype), relu, pooled)
            else:
                x = _First.apply(x, network.mean, network.std, _kernels(network, "first", module, dtype, _Kernels.of_first), relu, pooled)
        elif isinstance(module, nn.MaxPool2d):
            pooled, alias = _MaxPool.apply(x)
            give(index - 1, alias)
            x = pooled
        elif index - 1 in asked:  # else the convolution did it
            x = torch.relu(x)
        if not (index + 1 <= max(asked) and isinstance(modules[index + 1], nn.MaxPool2d)):  # else its alias is given
            give(index, x)
    return {layer: found[layer] for layer in wanted}


def _convolve(network: nn.Module, name: str, module: nn.Conv2d, x: Tensor, relu: bool, pooled: bool = False) -> Tensor:
    kernels, padding = _kernels(network, name, module, x.dtype, _Kernels.of), module.padding[0]
    if padding and module.padding_mode != "zeros":
        x, padding = _Reflect.apply(x), 0
    return _Frozen.apply(x.contiguous(memory_format=_LAST), kernels, padding, relu, pooled)


def _kernels(network: nn.Module, name: str, module: nn.Conv2d, dtype: torch.dtype, make: Callable[..., "_Kernels"]) -> "_Kernels":
    """What ``make`` makes of a convolution's weights, anew where these were written to."""
    kept, weight = _kept.setdefault(network, {}), module.weight
    which = (dtype, *(about for each in (weight, module.bias) for about in (each.device, each.data_ptr(), None if each.is_inference() else each._version)))
    if name not in kept or kept[name][0] != which:
        with torch.inference_mode(False), torch.no_grad():
            kept[name] = (which, make(weight, module.bias, dtype))
    return kept[name][1]


@dataclass(frozen=True)
class _Kernels:
    """Of a frozen convolution: forward, its bias, and those whose convolution of the gradient is the way back."""

    weight: Tensor
    bias: Tensor
    back: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> "_Kernels":
        return cls._laid_out(weight, bias, weight.flip(2, 3).transpose(0, 1), dtype)

    @classmethod
    def of_first(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> "_Kernels":
        """``(O, 3, 3, 3)`` -> ``(4 O, 16, 3, 3)``, of four pixels across at once, each of four channels, and back ``(64, O, 6, 6)``, which gives places of pictures."""
        along = [F.pad(weight, (PLACE - 1 + at, 3 * PLACE - 3 - (PLACE - 1 + at), 0, 0, 0, CHANNELS - 3)) for at in range(PLACE)]
        wide = torch.stack(along).unflatten(-1, (3, PLACE))  # (4, O, 4, 3, 3, 4)
        wide = wide.permute(0, 1, 5, 2, 3, 4).reshape(PLACE * weight.shape[0], PLACE * CHANNELS, 3, 3)
        back, moves = weight.flip(2, 3).transpose(0, 1), range(PLACE)
        back = torch.cat([F.pad(back, (right, PLACE - 1 - right, down, PLACE - 1 - down)) for down in moves for right in moves])
        back = F.pad(back, (0, 0) * 3 + (0, NUMBERS - len(back)))
        return cls._laid_out(wide, bias.repeat(PLACE), back, dtype)

    @classmethod
    def _laid_out(cls, weight: Tensor, bias: Tensor, back: Tensor, dtype: torch.dtype) -> "_Kernels":
        weight, back = (kernels.to(dtype).contiguous(memory_format=_LAST) for kernels in (weight, back))
        return cls(weight, bias.to(dtype), back)


class _First(torch.autograd.Function):
    """The first convolution of 3x3, padded by zeros, with its ReLU, of photos less ``mean``, by ``std``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, mean: Tensor, std: Tensor, kernels: _Kernels, relu: bool, pooled: bool) -> Tensor:
        x = normalized(images, mean.view(3), std.view(3), kernels.weight.dtype)
        count, _, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(count, height, width // PLACE, -1).permute(0, 3, 1, 2)  # the same memory
        out = (_convolve_and_relu if relu else _convolve_alone)(x, kernels, 1).contiguous(memory_format=_LAST)
        out = out.permute(0, 2, 3, 1).reshape(count, height, width, -1).permute(0, 3, 1, 2)
        ctx.save_for_backward(std, *((out,) if relu and not pooled else ()))
        ctx.back = kernels.back
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        std, *out = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_LAST)
        if out:
            gradient = torch.ops.aten.threshold_backward(gradient, *out, 0)
        places = F.conv2d(gradient, ctx.back, stride=PLACE, padding=1)
        return places_to_pixels(places, std, std.view(3), scaled=True), None, None, None, None, None


class _Frozen(torch.autograd.Function):
    """A frozen convolution of stride 1 with its ReLU, whose gradient needs the output alone; ``pooled``: a gradient that comes has gone through it already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: _Kernels, padding: int, relu: bool, pooled: bool) -> Tensor:
        out = (_convolve_and_relu if relu else _convolve_alone)(x, kernels, padding).contiguous(memory_format=_LAST)
        if relu and not pooled:
            ctx.save_for_backward(out)
        ctx.back, ctx.padding = kernels.back, kernels.back.shape[2] - 1 - padding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        gradient = gradient.contiguous(memory_format=_LAST)
        if ctx.saved_tensors:
            gradient = torch.ops.aten.threshold_backward(gradient, *ctx.saved_tensors, 0)
        return F.conv2d(gradient, ctx.back, padding=ctx.padding), None, None, None, None


def _convolve_alone(x: Tensor, kernels: _Kernels, padding: int) -> Tensor:
    return F.conv2d(x, kernels.weight, kernels.bias, padding=padding)


def _convolve_and_relu(x: Tensor, kernels: _Kernels, padding: int) -> Tensor:
    """In one kernel of cuDNN, where it has such."""
    kind = (x.device, x.dtype, x.shape, kernels.weight.shape)
    if x.is_cuda and kind not in _WITHOUT:
        try:
            return torch.cudnn_convolution_relu(x, kernels.weight, kernels.bias, [1, 1], [padding, padding], [1, 1], 1)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _WITHOUT.add(kind)
    return _convolve_alone(x, kernels, padding).relu_()


class _MaxPool(torch.autograd.Function):
    """2x2, of stride 2, of what a ReLU gave; the gradient goes to the first of the largest, found again, and on through that ReLU.

    Gives what it took, too: the gradients of both come back in one kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=_LAST)
        images, channels, height, width = x.shape
        out = x.new_empty(images, height // 2, width // 2, channels).permute(0, 3, 1, 2)
        count, sizes = images * (height // 2) * (width // 2), _sizes(x)
        _pool[(triton.cdiv(count, sizes["BLOCK"]),)](x, out, count, height, width, **sizes)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, further: Tensor | None) -> Tensor:
        (x,) = ctx.saved_tensors
        images, channels, height, width = x.shape
        gradient = x.new_zeros(images, channels, height // 2, width // 2) if gradient is None else gradient
        gradient, back = gradient.contiguous(memory_format=_LAST), torch.empty_like(x)
        further = None if further is None else further.contiguous(memory_format=_LAST)
        count, sizes = images * triton.cdiv(height, 2) * triton.cdiv(width, 2), _sizes(x)
        other = x if further is None else further
        _pool_back[(triton.cdiv(count, sizes["BLOCK"]),)](x, gradient, other, back, count, height, width, FURTHER=further is not None, **sizes)
        return back


class _Reflect(torch.autograd.Function):
    """Padding by reflection of a pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=_LAST)
        images, channels, height, width = x.shape
        out = x.new_empty(images, height + 2, width + 2, channels).permute(0, 3, 1, 2)
        count, sizes = images * (height + 2) * (width + 2), _sizes(out)
        _reflect[(triton.cdiv(count, sizes["BLOCK"]),)](x, out, count, height, width, **sizes)
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        images, channels, height, width = ctx.shape
        gradient = gradient.contiguous(memory_format=_LAST)
        back = gradient.new_empty(images, height, width, channels).permute(0, 3, 1, 2)
        count, sizes = images * height * width, _sizes(gradient)
        _reflect_back[(triton.cdiv(count, sizes["BLOCK"]),)](gradient, back, count, height, width, **sizes)
        return back


def _sizes(x: Tensor) -> dict[str, Any]:
    """What kernels over the pixels of ``x`` are compiled for."""
    wide = triton.next_power_of_2(x.shape[1])
    return {"CHANNELS": x.shape[1], "WIDTH": wide, "BLOCK": max(1, _NUMBERS // wide), "num_warps": 8}


@triton.jit
def _where(pixel, rows, columns):
    """Image, row and column of a pixel by its number."""
    line = pixel // columns
    return (line // rows)[:, None].to(tl.int64), (line % rows)[:, None], (pixel % columns)[:, None]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@kernel(do_not_specialize=["count", "height", "width"])
def _pool(x, out, count, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
    there = (pixel < count)[:, None] & (channel < CHANNELS)
    image, row, column = _where(pixel, height // 2, width // 2)
    place = x + ((image * height + 2 * row) * width + 2 * column) * CHANNELS + channel
    first, second = tl.load(place, mask=there, other=0), tl.load(place + CHANNELS, mask=there, other=0)
    third, fourth = tl.load(place + width * CHANNELS, mask=there, other=0), tl.load(place + (width + 1) * CHANNELS, mask=there, other=0)
    tl.store(out + pixel[:, None].to(tl.int64) * CHANNELS + channel, _larger(_larger(first, second), _larger(third, fourth)), mask=there)


@kernel(do_not_specialize=["count", "height", "width"])
def _pool_back(x, gradient, further, back, count, height, width, FURTHER: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
    there = (pixel < count)[:, None] & (channel < CHANNELS)
    image, row, column = _where(pixel, (height + 1) // 2, (width + 1) // 2)
    right, below = there & (2 * column + 1 < width), there & (2 * row + 1 < height)
    both = right & below  # else it is not pooled
    place = ((image * height + 2 * row) * width + 2 * column) * CHANNELS + channel
    first, second = tl.load(x + place, mask=there, other=0), tl.load(x + place + CHANNELS, mask=right, other=0)
    third, fourth = tl.load(x + place + width * CHANNELS, mask=below, other=0), tl.load(x + place + (width + 1) * CHANNELS, mask=both, other=0)
    most = _larger(_larger(first, second), _larger(third, fourth))
    value = tl.load(gradient + ((image * (height // 2) + row) * (width // 2) + column) * CHANNELS + channel, mask=both, other=0).to(tl.float32)
    _give(back, further, place, first, value, both & (first == most), there, FURTHER)
    _give(back, further, place + CHANNELS, second, value, both & (second == most) & (first != most), right, FURTHER)
    _give(back, further, place + width * CHANNELS, third, value, both & (third == most) & (first != most) & (second != most), below, FURTHER)
    _give(back, further, place + (width + 1) * CHANNELS, fourth, value, (first != most) & (second != most) & (third != most), both, FURTHER)


@triton.jit
def _give(back, further, place, x, value, chosen, there, FURTHER: tl.constexpr):
    value = tl.where(chosen, value, 0.0)
    if FURTHER:
        value += tl.load(further + place, mask=there, other=0).to(tl.float32)
    tl.store(back + place, tl.where(x > 0, value, 0.0).to(back.dtype.element_ty), mask=there)


@kernel(do_not_specialize=["count", "height", "width"])
def _reflect(x, out, count, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
    there = (pixel < count)[:, None] & (channel < CHANNELS)
    image, row, column = _where(pixel, height + 2, width + 2)
    row, column = height - 1 - tl.abs(height - 1 - tl.abs(row - 1)), width - 1 - tl.abs(width - 1 - tl.abs(column - 1))
    value = tl.load(x + ((image * height + row) * width + column) * CHANNELS + channel, mask=there, other=0)
    tl.store(out + pixel[:, None].to(tl.int64) * CHANNELS + channel, value, mask=there)


@kernel(do_not_specialize=["count", "height", "width"])
def _reflect_back(gradient, back, count, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A pixel next to the border was seen again beyond it."""
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
    there = (pixel < count)[:, None] & (channel < CHANNELS)
    image, row, column = _where(pixel, height, width)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for vertical in tl.static_range(0, 3):
        y = row + 1 if vertical == 0 else row * 0 if vertical == 1 else row * 0 + height + 1
        is_row = there if vertical == 0 else there & (row == 1) if vertical == 1 else there & (row == height - 2)
        for horizontal in tl.static_range(0, 3):
            across = column + 1 if horizontal == 0 else column * 0 if horizontal == 1 else column * 0 + width + 1
            mask = is_row if horizontal == 0 else is_row & (column == 1) if horizontal == 1 else is_row & (column == width - 2)
            source = gradient + ((image * (height + 2) + y) * (width + 2) + across) * CHANNELS + channel
            total += tl.load(source, mask=mask, other=0).to(tl.float32)
    tl.store(back + pixel[:, None].to(tl.int64) * CHANNELS + channel, total.to(back.dtype.element_ty), mask=there)
