"""A ``TransformNetwork`` as it is trained on an NVIDIA GPU: the same weights and function, its convolutions as ``wide`` has them, and all between them
in the kernels of ``fused_norm``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnst import wide
from fastnst.background import SideStream
from fastnst.fused_norm import FusedNorm
from fastnst.fused_pixels import AsPixels, take
from fastnst.fused_weights import LaidOut, Layout, WeightLayouts
from fastnst.model import NetworkConfig
from fastnst.pull import pull
from fastnst.steps import Step, steps_of

_kept: WeakKeyDictionary[nn.Module, dict[torch.dtype, WeightLayouts]] = WeakKeyDictionary()


def can_fuse(config: NetworkConfig) -> bool:
    """Whether there are kernels for such a network."""
    return config.norm == "instance" and config.padding != "replicate"


def fused_layers(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """What the ``layers`` of a ``TransformNetwork`` give for ``(N, 3, H, W)`` in [0, 1], which need no gradient, with activations of ``dtype``: float32."""
    steps, half, aside = list(steps_of(network.layers)), network.config.stem == "half", network.aside
    padding, mode = steps[0].padding
    # Whole numbers, which bfloat16 holds exactly; what is subtracted from them a norm does not mind.
    x = take(images.detach(), "float", dtype, (0, 0), network.config.start_padding, padding, mode, -128.0)[0]
    shuffle = 2 if half else 1  # after the last convolution
    layouts = _layouts(network, steps, shuffle, dtype)
    weights = LaidOut.apply(layouts, *layouts.parameters)
    first, last = steps[0].conv, steps[-1].conv
    earlier = within = None  # what the steps before gave, without padding
    for index, (step, after) in enumerate(zip(steps, steps[1:])):
        bias = wide.by_place(step.conv.bias).to(dtype) if step.kind == "subpixel" else None  # each pixel of a place has its own
        stride = step.conv.stride if index and step.kind == "plain" else (1, 1)
        x = _convolve(x, weights[index], bias, stride, aside, first=index == 0)
        side = step.shuffle
        if index == 0:
            sides = ((side + 2 * (network.config.start_padding + padding) - first.kernel_size[0]) // first.stride[0] + 1 for side in images.shape[2:])
            x, side = wide.cropped(x, wide.PLACE // first.stride[0], *sides)
        skip, cut = earlier if step.skip else None, step.shave
        skip = skip[:, :, cut : skip.shape[2] - cut, cut : skip.shape[3] - cut] if cut else skip
        earlier = within
        places = wide.PLACE // shuffle if after is steps[-1] else 1
        x, within = FusedNorm.apply(x, step.norm.weight, step.norm.bias, skip, step.relu, *after.padding, side, places, int(step.to_corners))
    x, bias = _convolve(x, weights[-1], None, (1, 1), aside), wide.last_bias(last.bias, shuffle)
    return AsPixels.apply(x, bias) if aside is None else AsPixels.apply(x, bias.detach(), partial(aside.put_sums, bias))


def _layouts(network: nn.Module, steps: list[Step], shuffle: int, dtype: torch.dtype) -> WeightLayouts:
    """Of all convolutions' weights, made anew where these have moved."""
    kept = _kept.setdefault(network, {})
    kernels = [step.conv.weight for step in steps]
    without_effect = [step.conv.bias for step in steps[:-1] if step.kind != "subpixel"]  # a norm follows
    if dtype not in kept or not kept[dtype].holds((*kernels, *without_effect)):
        stride = steps[0].conv.stride[0]
        layouts = [_layout(step) for step in steps]
        layouts[0] = lambda weight: wide.first_weight(weight / 255, stride)
        layouts[-1] = lambda weight: wide.last_weight(weight, shuffle)
        kept[dtype] = WeightLayouts(kernels, layouts, without_effect, dtype)
    return kept[dtype]


def _layout(step: Step) -> Layout | None:
    if step.kind == "plain":
        return None
    return (lambda weight: wide.around_corners(step.laid_out(weight))) if step.to_corners else step.laid_out


class Aside:
    """The gradients of convolutions' weights, which a GPU computes beside the way back to the photos: small as they are, neither fills it.

    They are found on a stream of their own. What is read there is held until all of it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = SideStream(device)
        self._held: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []  # weights and biases, as laid out, and their gradients

    def put(self, weight: Tensor, x: Tensor, gradient: Tensor, stride: tuple[int, int]) -> None:
        """Find the gradient of ``weight``, by which ``x`` was convolved."""
        self._held += [x, gradient]
        with self._side.beside():
            self._found.append((weight, _backward(gradient, x, weight.detach(), stride, (False, True, False))[1]))

    def put_sums(self, bias: Tensor, sums: Tensor) -> None:
        """Find the gradient of ``bias``, of which ``sums`` are parts."""
        self._held.append(sums)
        with self._side.beside():
            self._found.append((bias, sums.sum(0)))

    def give(self) -> None:
        """What was found to the parameters that the weights were made of."""
        if self._found:  # else the network was not fused, and a recording may not wait for a stream outside it
            self._side.wait()
            pull(*zip(*self._found))

    def let_go(self) -> None:
        """Of what is held, once it is no longer read."""
        self._held.clear()
        self._found.clear()


@contextmanager
def weights_aside(network: nn.Module, aside: Aside) -> Iterator[None]:
    """In here the gradients of ``network``'s weights, where it is fused, are computed ``aside``; they are there when it is left."""
    network.aside = aside
    try:
        yield
        aside.give()
    finally:
        network.aside = None
        aside.let_go()  # also where it failed: it would never be freed


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], aside: Aside | None, first: bool = False) -> Tensor:
    """Without padding. ``first``: ``x`` needs no gradient."""
    if aside is None or not weight.requires_grad:
        return F.conv2d(x, weight, bias, stride)
    x = _ConvAside.apply(x.detach().requires_grad_() if first else x, weight.detach(), _Owner(weight, aside), stride, first)
    return x if bias is None else x + bias[:, None, None]


@dataclass(frozen=True)
class _Owner:
    """A weight with its history, which autograd may not see where it is computed aside."""

    weight: Tensor
    aside: Aside


class _ConvAside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, owner: _Owner, stride: tuple[int, int], first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.stride, ctx.first = owner, stride, first
        return F.conv2d(x, weight, stride=stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        back = None if ctx.first else _backward(gradient, x, weight, ctx.stride, (True, False, False))[0]
        # After that, which fills a GPU: what comes then, until the next convolution, waits for memory.
        ctx.owner.aside.put(ctx.owner.weight, x, gradient, ctx.stride)
        return back, None, None, None, None


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, list(stride), [0, 0], [1, 1], False, [0, 0], 1, list(wanted))
