"""The way back from several tensors at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pull(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """``torch.autograd.backward(tensors, gradients)``, which would import sympy to compare their shapes: half a second of every training, and more on a slow disk.

    All tensors need gradients, and each gets one of its shape: nothing of that is looked at.
    """
    _Pulled.apply(gradients, *tensors).backward()


class _Pulled(torch.autograd.Function):
    """A number, whatever it is, whose gradient gives each of the tensors its own."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _one: Tensor):
        return None, *ctx.gradients
