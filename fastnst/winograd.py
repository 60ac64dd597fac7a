"""3x3 convolutions of training on a CPU: forward, and back to their input and their weights, by the minimal filtering of `native.c` and
`native_kernels.c`, a fifth or a quarter of the multiplications.

In float32, and in bfloat16 where vectors multiply it (gradients of weights are multiplied in float32 there, too); elsewhere, on small maps, and where
nothing was compiled, they are torch's.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.native_library import Activation, Packed, aligned, from_planes, join_threads, multiplies_pairs, native_library, sources, to_planes, weight_gradient, whole_vectors

_FEWEST_CHANNELS = {torch.float32: 16, torch.bfloat16: 32}  # that pay
_FEWEST_WEIGHED = 32  # for which the weights' gradient pays
# Positions of an image, and those times channels, below which torch is up to 6 times as fast: each image reads all kernels, tiles stick out, and threads have little to
# do. Between what AVX2 and AVX-512 would have: 20x20 to 28x28 of 128 to 512 channels, 40x40 of 64, 60x60 of 32.
_SMALLEST, _LEAST_WORK = 600, 100_000
operations = 0  # of floating point, two for each multiplication, that all of them took so far: torch's counter does not see them


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` with a 3x3 kernel of stride 1. While it is trained, and where it is frozen, its results differ from torch's by some 1e-5 of
    the largest (gradients of weights, summed over all positions, by up to 6e-5 at 600 px, torch's own by 2e-5, from float64), in bfloat16 by 1 % of
    their deviation (torch's own by 0.2 %, from float32); a trained network that is evaluated gives torch's own, which are flat where a picture is
    (norms make noise of rounding large there).

    Frozen weights are laid out once; writing to them through ``.data``, which torch does not notice either, is not noticed.
    """

    natively = True  # may be set to False
    _packed_forward: tuple[Any, Packed, Tensor] | None = None  # of frozen weights, and which they were
    _packed_back: tuple[Any, Packed, Tensor] | None = None

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or not self._is_native(x, weight):
            if self.padding_mode == "zeros" or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
                return super()._conv_forward(x, weight, bias)
            with torch.autocast("cpu", enabled=False):  # it would pad in float32
                x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)
        x = x.to(_dtype_of(x))
        with torch.autocast("cpu", enabled=False):
            if self.padding_mode != "zeros":
                x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return _Convolution.apply(x, weight, bias, 0 if self.padding_mode != "zeros" else self.padding[0], self.packed)

    def _is_native(self, x: Tensor, weight: Tensor) -> bool:
        return (
            self.natively
            and (self.training or not weight.requires_grad)
            and x.device.type == "cpu"
            and weight.dtype == torch.float32
            and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and _suit(x, _dtype_of(x), self.out_channels, self.in_channels)
            and self.kernel_size == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and self.groups == 1
            and self.padding in ((0, 0), (1, 1), (2, 2))
            and min(x.shape[2:]) + 2 * self.padding[0] >= 3
        )

    def packed(self, weight: Tensor, bias: Tensor | None, back: bool, half: bool) -> Packed:
        """The weights as ``native.c`` reads them; ``back``: those of the way from the output's gradient to the input's; ``half``: in bfloat16."""
        frozen = not weight.requires_grad and not weight.is_inference()
        if not frozen:
            return _packed(weight, bias, back, half)
        now, kept = (weight.data_ptr(), weight._version, half), self._packed_back if back else self._packed_forward
        if kept is None or kept[0] != now:
            kept = (now, _packed(weight, None, back, half), weight.detach())  # kept, so that nothing else comes to lie there
            setattr(self, "_packed_back" if back else "_packed_forward", kept)
        return _with_bias(kept[1], bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed_")}


def _packed(weight: Tensor, bias: Tensor | None, back: bool, half: bool) -> Packed:
    return _with_bias(Packed.of_kernels(weight.detach().contiguous().numpy(), back, torch.get_num_threads(), half), bias)


def _with_bias(packed: Packed, bias: Tensor | None) -> Packed:
    return replace(packed, bias=None if bias is None else F.pad(bias.detach().float(), (0, packed.outputs - len(bias))).numpy())


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """``F.conv2d``, without padding, natively where that can be; ``weight`` is one that is trained, in float32 or what ``x`` is of."""
    if stride == 1 and weight.shape[2:] == (3, 3) and weight.dtype == torch.float32 and _suit(x, x.dtype, *weight.shape[:2]):
        return _Convolution.apply(x, weight, bias, 0, _packed)
    return F.conv2d(x, weight.to(x.dtype), bias, stride)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, packed: Callable[[Tensor, Tensor | None, bool, bool], Packed]) -> Tensor:
        ctx.packed, ctx.padding = packed, padding
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _convolve(packed(weight, bias, False, x.dtype == torch.bfloat16), x, padding, _is_channels_last(weight) or _is_channels_last(x))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        x_gradient = kernels_gradient = None
        bias_gradient = gradient.sum(dim=(0, 2, 3), dtype=weight.dtype) if of_bias else None
        if torch.is_grad_enabled():  # a gradient of this gradient is to follow
            x_gradient = F.conv_transpose2d(gradient, weight.to(gradient.dtype), padding=ctx.padding) if of_x else None
            kernels_gradient = torch.nn.grad.conv2d_weight(x, weight.shape, gradient, padding=ctx.padding).to(weight.dtype) if of_weight else None
            return x_gradient, kernels_gradient, bias_gradient, None, None
        if of_x:
            x_gradient = _convolve(ctx.packed(weight, None, True, gradient.dtype == torch.bfloat16), gradient, 2 - ctx.padding, _is_channels_last(weight) or _is_channels_last(gradient))
        if of_weight and min(weight.shape[:2]) >= _FEWEST_WEIGHED:
            kernels_gradient = _weight_gradient(x, gradient, ctx.padding)
        elif of_weight:
            one, wanted = [1, 1], [False, True, False]
            kernels_gradient = torch.ops.aten.convolution_backward(gradient, x, weight.to(x.dtype), None, one, [ctx.padding] * 2, one, False, [0, 0], 1, wanted)[1].to(weight.dtype)
        return x_gradient, kernels_gradient, bias_gradient, None, None


def _dtype_of(x: Tensor) -> torch.dtype:
    """What a convolution of it is to be computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float32, torch.bfloat16) else x.dtype


def _suit(x: Tensor, dtype: torch.dtype, *channels: int) -> bool:
    fewest, positions = _FEWEST_CHANNELS.get(dtype), x.shape[2] * x.shape[3]
    compiled = multiplies_pairs() if dtype == torch.bfloat16 else native_library() is not None
    large = positions >= _SMALLEST and positions * min(channels) >= _LEAST_WORK
    return fewest is not None and compiled and large and all(count >= fewest and count % 8 == 0 for count in channels)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _convolve(packed: Packed, x: Tensor, padding: int, channels_last: bool) -> Tensor:
    """``(N, C, H, W)``, padded by zeros, -> ``(N, O, H', W')``."""
    global operations
    join_threads()
    threads = torch.get_num_threads()
    half = x.dtype == torch.bfloat16
    channels_last |= half
    rows, columns = (sources(np.arange(side), padding) for side in x.shape[2:])
    nothing, size = np.zeros(whole_vectors(x.shape[1]), np.float32), packed.size(rows, columns)
    operations += len(x) * packed.operations(*size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    output = torch.empty(len(x), packed.channels, *size, dtype=x.dtype, device=x.device, memory_format=layout)
    aside = None if channels_last else aligned((*size, packed.channels))
    written = output.permute(0, 2, 3, 1) if channels_last else output
    for picture, target in zip(_pictures(x, threads), (written.view(torch.int16) if half else written).numpy()):
        packed.convolve(Activation.of(picture), rows, columns, nothing, target if aside is None else aside, False, threads)
        if aside is not None:
            to_planes(aside, packed.channels, threads, target)
    return output


def _pictures(x: Tensor, threads: int) -> Iterable[np.ndarray]:
    """``(N, C, H, W)`` as N of ``(H, W, C)``; bfloat16 as its bits."""
    if x.dtype == torch.float32 and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):  # torch's copy takes ten times as long
        return [from_planes(planes, len(planes), threads) for planes in x.detach().numpy()]
    last = x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return (last.view(torch.int16) if x.dtype == torch.bfloat16 else last).numpy()


def _weight_gradient(x: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """Of the kernels that made, of ``(N, I, H, W)``, padded by zeros, what has the ``gradient``, ``(N, O, H', W')``: ``(O, I, 3, 3)``, channels-last."""
    global operations
    join_threads()
    threads = torch.get_num_threads()
    operations += round(2 * 64 / 36 * x.shape[1] * gradient.numel())
    found = weight_gradient(_pictures(x, threads), _pictures(gradient, threads), gradient.shape[1], x.shape[1], padding, threads)
    return torch.from_numpy(found).permute(0, 3, 1, 2)
