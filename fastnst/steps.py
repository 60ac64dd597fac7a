"""The layers of a ``TransformNetwork`` as steps: a convolution, on the grid that it takes, and what follows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastnst import wide

Kind = Literal["plain", "nearest", "bilinear", "transposed", "subpixel"]


@dataclass(frozen=True)
class Step:
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

    @property
    def to_corners(self) -> bool:
        """Whether there are kernels for ``wide.around_corners``."""
        return self.kind in ("nearest", "transposed")

    def laid_out(self, weight: Tensor) -> Tensor:
        """The convolution's weight as it is taken here."""
        if self.kind == "transposed":
            return wide.upsampled_weight(F.pad(weight, (0, 1, 0, 1)), self.kind)
        if self.kind == "subpixel":
            return wide.by_place(weight)
        return weight if self.kind == "plain" else wide.upsampled_weight(weight, self.kind)


def steps_of(layers: nn.Sequential) -> Iterator[Step]:
    """The convolutions of ``layers`` with what surrounds them, in order."""
    left = [module for module in layers if not isinstance(module, (nn.ReLU, nn.ReflectionPad2d))]
    while left:
        module = left.pop(0)
        if not isinstance(module, (nn.Conv2d, nn.Upsample, nn.ConvTranspose2d)):  # a residual block
            first, norm, _, second, second_norm = module.layers
            yield Step(first, "plain", norm)
            yield Step(second, "plain", second_norm, relu=False, skip=True, shave=module.shave)
            continue
        kind: Kind = "transposed" if isinstance(module, nn.ConvTranspose2d) else "plain"
        if isinstance(module, nn.Upsample):
            kind, module = module.mode, left.pop(0)
        elif left and isinstance(left[0], nn.PixelShuffle):
            kind, _ = "subpixel", left.pop(0)
        yield Step(module, kind, left.pop(0) if left else None)
