"""A ``TransformNetwork`` as it is trained on an NVIDIA GPU: the same weights and function, its convolutions as ``wide`` has them, and all between them
in the kernels of ``fused_norm``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst import wide
from fastnst.fused_norm import FusedNorm
from fastnst.fused_pixels import take
from fastnst.model import NetworkConfig

if TYPE_CHECKING:
    from fastnst.network import TransformNetwork

Kind = Literal["plain", "nearest", "bilinear", "transposed", "subpixel"]


@dataclass(frozen=True)
class _Step:
    """A convolution and what follows it."""

    conv: nn.Conv2d | nn.ConvTranspose2d
    kind: Kind
    norm: nn.InstanceNorm2d | None
    relu: bool = True
    skip: bool = False
    shave: int = 0

    @property
    def padding(self) -> tuple[int, str]:
        """Of what this convolution takes, on the grid that it takes."""
        mode = "constant" if self.conv.padding_mode == "zeros" else self.conv.padding_mode
        if self.kind == "transposed":
            return 1, "constant"
        if self.kind in ("nearest", "bilinear"):  # by reflection or replication of a pixel on the large grid is replication on the small one
            return 1, "constant" if mode == "constant" else "replicate"
        return self.conv.padding[0], mode

    @property
    def shuffle(self) -> int:
        return 1 if self.kind == "plain" else 2

    def weight(self) -> Tensor:
        weight = self.conv.weight
        if self.kind == "transposed":
            return wide.transposed_weight(F.pad(weight, (0, 1, 0, 1)))
        if self.kind == "subpixel":
            return wide.by_place(weight)
        return weight if self.kind == "plain" else wide.upsampled_weight(weight, self.kind)


def can_fuse(config: NetworkConfig) -> bool:
    """Whether there are kernels for such a network."""
    return config.norm == "instance" and config.padding != "replicate"


def fused_layers(network: "TransformNetwork", images: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``network.layers`` gives for ``(N, 3, H, W)`` in [0, 1], which need no gradient, with activations of ``dtype``: float32."""
    steps, half = list(_steps(network.layers)), network.config.stem == "half"
    padding, mode = steps[0].padding
    # Whole numbers, which bfloat16 holds exactly; what is subtracted from them a norm does not mind.
    x = take(images.detach(), "float", dtype, (0, 0), network.config.start_padding, padding, mode, -128.0)
    earlier = within = None  # what the steps before gave, without padding
    for index, (step, after) in enumerate(zip(steps, steps[1:])):
        if index == 0:
            weight, stride = step.conv.weight / 255, step.conv.stride[0]
            x = wide.first(x, weight.to(dtype), _laid_out(wide.first_weight(weight, stride), dtype), stride)
        else:
            bias = wide.by_place(step.conv.bias).to(dtype) if step.kind == "subpixel" else None  # each pixel of a place has its own
            x = F.conv2d(x, _laid_out(step.weight(), dtype), bias, stride=1 if step.kind == "transposed" else step.conv.stride)
        skip, cut = earlier if step.skip else None, step.shave
        skip = skip[:, :, cut : skip.shape[2] - cut, cut : skip.shape[3] - cut] if cut else skip
        unminded, earlier = None if step.kind == "subpixel" else step.conv.bias, within
        x, within = FusedNorm.apply(x, step.norm.weight, step.norm.bias, unminded, skip, step.relu, *after.padding, step.shuffle)
    conv, shuffle = steps[-1].conv, 2 if half else 1
    x = wide.last(x, _laid_out(wide.last_weight(conv.weight, shuffle), dtype), shuffle)
    return wide.in_pixels(x.float() + wide.last_bias(conv.bias, shuffle)[:, None, None])


def _laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _steps(layers: nn.Sequential) -> Iterator[_Step]:
    """The convolutions of ``layers`` with what surrounds them, in order."""
    left = [module for module in layers if not isinstance(module, (nn.ReLU, nn.ReflectionPad2d))]
    while left:
        module = left.pop(0)
        if not isinstance(module, (nn.Conv2d, nn.Upsample, nn.ConvTranspose2d)):  # a residual block
            first, norm, _, second, second_norm = module.layers
            yield _Step(first, "plain", norm)
            yield _Step(second, "plain", second_norm, relu=False, skip=True, shave=module.shave)
            continue
        kind: Kind = "transposed" if isinstance(module, nn.ConvTranspose2d) else "plain"
        if isinstance(module, nn.Upsample):
            kind, module = module.mode, left.pop(0)
        elif left and isinstance(left[0], nn.PixelShuffle):
            kind, _ = "subpixel", left.pop(0)
        yield _Step(module, kind, left.pop(0) if left else None)
