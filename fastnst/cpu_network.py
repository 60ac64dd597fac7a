"""A ``TransformNetwork`` as it is trained on a CPU: the same weights and function, channels last, as convolutions want it there.

Those next to an upsampling take the small grid, and in bfloat16 nothing leaves it in between.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnst import wide
from fastnst.native_norm import NativeNorm, can_norm
from fastnst.stages import EPSILON, PIXEL_SHIFT
from fastnst.steps import steps_of
from fastnst.winograd import convolved


def cpu_layers(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """What the ``layers`` of a ``TransformNetwork`` with instance norms give for ``(N, 3, H, W)`` in [0, 1], with activations of ``dtype``: float32 at least."""
    steps, start = list(steps_of(network.layers)), network.config.start_padding
    x = images * 255 - PIXEL_SHIFT  # whole numbers, which bfloat16 holds exactly; what is subtracted a norm does not mind
    x = F.pad(x, [start] * 4, mode="reflect") if start else x
    x = _padded(x, *steps[0].padding, value=-PIXEL_SHIFT).to(dtype, memory_format=torch.channels_last)
    earlier = within = None  # what the steps before gave, without padding
    for index, (step, after) in enumerate(zip(steps, steps[1:])):
        weight, bias = step.laid_out(step.conv.weight), step.conv.bias
        weight = weight if index else weight / 255
        without_effect = None if step.kind == "subpixel" else bias  # a norm follows
        bias = wide.by_place(bias).to(dtype) if without_effect is None else None  # each pixel of a place has its own
        x = convolved(x, weight, bias, step.conv.stride[0] if step.kind == "plain" else 1)
        cut = step.shave
        skip = earlier[:, :, cut : earlier.shape[2] - cut, cut : earlier.shape[3] - cut] if step.skip else None
        earlier = within
        between = NativeNorm.apply if can_norm(x, step.norm.weight) else _by_torch
        x, within = between(x, step.norm.weight, step.norm.bias, without_effect, skip, step.relu, *after.padding, step.shuffle)
    weight, bias = steps[-1].conv.weight.to(dtype), steps[-1].conv.bias.to(dtype)
    x = wide.convolved_by_fours(x, weight, bias) if network.config.stem == "full" else F.pixel_shuffle(F.conv2d(x, weight, bias), 2)
    return x.to(torch.promote_types(dtype, torch.float32))


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, without_effect: Tensor | None, skip: Tensor | None, relu: bool, padding: int, mode: str, shuffle: int
) -> tuple[Tensor, Tensor]:
    """As ``NativeNorm``, in torch's own steps."""
    x = _InstanceNorm.apply(_in_pixels(x) if shuffle > 1 else x, weight, bias, without_effect)
    x = F.relu_(x) if relu else x
    x = x if skip is None else x + skip
    return _padded(x, padding, mode), x


def _padded(x: Tensor, padding: int, mode: str, value: float = 0.0) -> Tensor:
    if not padding:
        return x
    return F.pad(x, [padding] * 4, mode=mode, **({"value": value} if mode == "constant" else {}))


def _in_pixels(x: Tensor) -> Tensor:
    """Places of 2x2 pixels, ``(N, 2 2 C, h, w)``, as ``(N, C, 2 h, 2 w)``, as `wide.in_pixels` does; both lie channels last, so that what is moved are the rows of a place."""
    images, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(images, height, width, 2, channels // 2)
    return rows.transpose(2, 3).reshape(images, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)


class _InstanceNorm(torch.autograd.Function):
    """Image by image: torch's batch norm knows channels-last, its instance norm copies. The bias of a convolution that it does not mind gets 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, without_effect: Tensor | None) -> Tensor:
        y, found = torch.empty_like(x), []
        for image, normed in zip(x.split(1), y.split(1)):
            moments = [weight.new_empty(weight.shape) for _ in range(2)]
            torch.native_batch_norm(image, weight, bias, None, None, True, 0.0, EPSILON, out=(normed, *moments))
            found.append(moments)
        ctx.save_for_backward(x, weight, without_effect)
        ctx.found = found
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        x, weight, without_effect = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_each = [
            torch.ops.aten.native_batch_norm_backward(g, image, weight, None, None, *moments, True, EPSILON, [True, True, True])
            for g, image, moments in zip(gradient.split(1), x.split(1), ctx.found)
        ]
        of_x, of_weight, of_bias = zip(*of_each)
        return torch.cat(of_x), sum(of_weight), sum(of_bias), None if without_effect is None else torch.zeros_like(without_effect)
