"""A batch of photos -> the weighted terms of the objective and the stylized photos, as every training step computes it, compiled where that pays."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnst.background import SideStream
from fastnst.losses import LossTerms, PerceptualLoss
from fastnst.runtime import autocast, memory_format

Compile = Literal["auto", "off", "on"]


class Cut(NamedTuple):
    """A square of the photos, in pixels; ``share`` multiplies the stability term that it gives.

    Where it lies is a tensor ``()`` of int64 each: cuts at other places are the same work to a compiler.
    """

    top: Tensor
    left: Tensor
    side: int
    share: float = 1.0


class Objective:
    """``loss`` of what ``network`` makes of a batch, convolutions in ``precision``; both lie on one device.

    ``compile``: ``on`` hands both to ``torch.compile``, which takes a minute or more; ``auto`` does not: our own ways through the network are faster, on
    CPUs (1.4 times in bfloat16) and on NVIDIA GPUs.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: PerceptualLoss,
        precision: torch.dtype,
        compile: Compile = "off",
    ) -> None:
        self.network, self.loss, self.precision = network, loss, precision
        self.device = loss.loss_network.mean.device
        self._compute = torch.compile(self._measure) if compile == "on" else self._measure
        self.side, self.comparing = (SideStream(self.device if compile != "on" else None) for _ in range(2))  # for small work

    def __call__(self, photos: Tensor, cut: Cut | None = None) -> tuple[LossTerms, Tensor]:
        """uint8 ``(N, 3, S, S)``, on any device -> terms with gradient, and what the network made of the photos.

        With a ``cut`` the stability term is there too, at the price of another pass of the network. Who reads the terms waits for ``comparing``.
        """
        photos = photos.to(self.device, non_blocking=True)
        if cut is not None:
            cut = cut._replace(top=cut.top.to(self.device, non_blocking=True), left=cut.left.to(self.device, non_blocking=True))
        return self._compute(photos, cut)

    def _measure(self, photos: Tensor, cut: Cut | None) -> tuple[LossTerms, Tensor]:
        content = photos.contiguous(memory_format=memory_format(self.device)) / 255
        with autocast(self.device, self.precision):
            with self.side.beside():  # neither fills a GPU by itself
                targets, colorful = self.loss.content_targets(content), _colorful(photos)
            stylized = self.network(content)
            self.side.wait()
            stylized = _Heard.apply(stylized, colorful)
            terms = self.loss(stylized, targets, self.comparing)
            weight = self.loss.config.stability_weight
            if cut is None:
                return (replace(terms, stability=self.loss.zero) if weight else terms), stylized
            rows, columns = (corner + torch.arange(cut.side, device=self.device) for corner in (cut.top, cut.left))
            network = getattr(self.network, "module", self.network)  # averaging over ranks counts on one pass a step
            piece = _crop(content, rows, columns)
            of_piece = network(piece)
            of_piece = _Heard.apply(of_piece, _colorful(piece))
            change = of_piece.float() - _crop(stylized, rows, columns).float()
            return replace(terms, stability=weight * cut.share * change.square().mean()), stylized


def _colorful(photos: Tensor) -> Tensor:
    """Which of ``(N, 3, S, S)`` are not of a single color, ``(N, 1, 1, 1)``."""
    least, most = photos.flatten(2).aminmax(dim=2)
    return (least < most).any(1)[:, None, None, None]


class _Heard(torch.autograd.Function):
    """The same images, ``(N, 3, S, S)``, of which those that are not ``colorful`` get no gradient. Their deviation is 0, so that each instance norm would multiply it
    by 316, 1 / sqrt(epsilon): one such photo ended a training in bfloat16."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, colorful: Tensor) -> Tensor:
        ctx.save_for_backward(colorful)
        return images.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        return torch.where(ctx.saved_tensors[0], gradient, 0.0), None


def _crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return images.index_select(2, rows).index_select(3, columns)
