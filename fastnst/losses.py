"""What is minimized: content, style, total variation and (in ``texture``) what keeps networks from weaving, and ``PerceptualLoss``, which adds them up.

``train`` lowers it over the weights of a network, ``optimize`` over the pixels of one image. Functions hold the
mathematics, classes the settings.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnst.background import SideStream
from fastnst.fused import on_device, triton_works
from fastnst.loss_network import LossNetwork, LossNetworkConfig, layer_index
from fastnst.native_distance import MeanSquare, can_compare
from fastnst.pull import pull
from fastnst.self_product import SelfProduct
from fastnst.texture import SPECTRUM_SIDE, log_spectrum, regular_grid, spectrum_distance

LayerWeights = dict[str, Annotated[float, Field(ge=0)]]
Distance = Literal["mse", "sse", "rmse"]
Gram = Literal["chw", "hw", "sqrt_chw", "none"]
NETWORK_TERMS = ("grid_weight", "spectrum_weight", "stability_weight")  # for networks alone


class LossConfig(LossNetworkConfig):
    """The objective: content_weight x sum_l w_l content_l + style_weight x sum_l w_l style_l + tv_weight x tv + grid_weight x grid + spectrum_weight x spectrum.

    ``distance`` between features and between Grams, for each image, averaged over the batch: ``mse`` mean of squares, ``sse``
    sum of squares, ``rmse`` root of the mean of squares. ``gram``: what F F^T is divided by; ``sqrt_chw`` makes the squared
    distance that of the bare Grams over C H W. ``statistics``: ``gram`` as Gatys et al. 2016, or ``mean_covariance``, the
    Wasserstein-2 distance between Gaussians. The layers are those of Johnson et al.'s released recipe.

    ``strength``, 0 to 10, makes the weights mean the same for every painting, loss network and size: content, each style layer
    and total variation are then measured in units of their own size (``calibrate``), 5 is a balanced picture, each 1 more
    doubles the style, and the weights above multiply those units. Without it they are raw, as papers print them.

    Three terms are for networks alone, never scaled by ``strength``. ``grid_weight`` is of ``regular_grid``, in squares of [0, 1]: it
    keeps them from weaving their 4 px cells. ``spectrum_weight`` is of ``spectrum_distance`` to the painting: without it they make fine texture of
    threads 2.7 px apart, across and down, the mirror image of strokes of 8 px in the last upsampling. ``stability_weight`` is of the mean square by which the
    picture of a cut of the photo differs from the cut of its picture (``Objective``): flicker in videos, and what padding does to borders.
    """

    strength: float | None = Field(None, ge=0, le=10)
    content_weight: float = Field(1.0, ge=0)
    content_layers: LayerWeights = {"relu3_3": 1.0}
    style_weight: float = Field(1.0, ge=0)
    style_layers: LayerWeights = {"relu1_2": 1.0, "relu2_2": 1.0, "relu3_3": 1.0, "relu4_3": 1.0}
    distance: Distance = "mse"
    gram: Gram = "chw"
    statistics: Literal["gram", "mean_covariance"] = "gram"
    tv_weight: float = Field(0.0, ge=0)
    tv_power: Literal[1, 2] = Field(2, description="1: absolute differences, 2: squared ones")
    tv_reduction: Literal["mean", "sum"] = Field("sum", description="over the pixels and channels of an image")
    tv_units: Literal["pixels", "network"] = Field("network", description="pixels: [0, 1]; network: (pixels - mean) / std, 0..255 for Caffe weights")
    grid_weight: float = Field(0.0, ge=0)
    spectrum_weight: float = Field(0.0, ge=0)
    stability_weight: float = Field(0.0, ge=0)

    @field_validator("content_layers", "style_layers")
    @classmethod
    def _layers_exist(cls, layers: dict[str, float], info) -> dict[str, float]:
        network = info.data.get("network")
        for layer in layers if network else ():
            layer_index(network, layer)
        return layers

    @model_validator(mode="after")
    def _something_to_minimize(self):
        if not self.layers:
            raise ValueError("content_layers and style_layers are both empty: nothing to minimize")
        return self

    @property
    def layers(self) -> list[str]:
        """Every layer whose features are needed."""
        return list(dict.fromkeys([*self.content_layers, *self.style_layers]))

    @property
    def for_pictures(self) -> "LossConfig":
        """Without the terms that are for networks alone."""
        return self.model_copy(update=dict.fromkeys(NETWORK_TERMS, 0.0))

    @property
    def bare(self) -> "LossConfig":
        """The same terms without weights."""
        ones = {name: 1.0 if getattr(self, name) else 0.0 for name in ("tv_weight", "grid_weight", "spectrum_weight")}
        layers = {name: dict.fromkeys(getattr(self, name), 1.0) for name in ("content_layers", "style_layers")}
        return self.model_copy(update={"content_weight": 1.0, "style_weight": 1.0, **layers, **ones})


def gram_matrix(features: Tensor, divisor: Gram = "chw") -> Tensor:
    """``(N, C, H, W)`` -> ``(N, C, C)``, F F^T / divisor, in float32 at least: half precision overflows.

    Gatys et al. 2016, eq. 3; divided by C H W as Johnson et al. 2016, eq. 3.
    """
    return SelfProduct.apply(features.flatten(2)) / _divisor(features, divisor)


def _divisor(features: Tensor, kind: Gram) -> float:
    _, c, h, w = features.shape
    return {"chw": c * h * w, "hw": h * w, "sqrt_chw": (c * h * w) ** 0.5, "none": 1}[kind]


def mean_covariance(features: Tensor, epsilon: float = 1e-4) -> tuple[Tensor, Tensor]:
    """``(N, C, H, W)`` -> mean ``(N, C)`` and covariance ``(N, C, C)`` over the positions, plus ``epsilon`` on its diagonal."""
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    second_moment = gram_matrix(features if features.is_cuda else exact, "hw")  # of which nearly all may be subtracted: a CPU's of bfloat16 is too coarse
    mean = exact.mean(dim=(2, 3))
    covariance = second_moment - mean[:, :, None] * mean[:, None, :]
    return mean, covariance + epsilon * torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)


def gaussian_wasserstein(mean: Tensor, covariance: Tensor, target_mean: Tensor, target_root: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance between Gaussians, a channel (over C), averaged over the batch (crowsonkb/style-transfer-pytorch).

    |m - m'|^2 + tr(S + S' - 2 (R S R)^(1/2)) with R = ``target_root`` = S'^(1/2). The trace of the root is the sum of the
    roots of the eigenvalues, whose gradient is stable where that of the eigenvectors is not.
    """
    eigenvalues = torch.linalg.eigvalsh(target_root @ covariance @ target_root)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1) + target_root.square().sum(dim=(1, 2)) - 2 * eigenvalues.clamp(min=1e-12).sqrt().sum(1)
    return ((mean - target_mean).square().mean(1) + trace / mean.shape[1]).mean()


def total_variation(images: Tensor, power: int = 2, reduction: str = "sum") -> Tensor:
    """Differences between neighbours to the right and below, absolute or squared, averaged over the batch.

    ``sum`` over channels and pixels of an image, or that sum divided by C H W (``mean``).
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    below = images[..., 1:, :] - images[..., :-1, :]
    total = right.abs().sum() + below.abs().sum() if power == 1 else right.square().sum() + below.square().sum()
    return total / (images.shape[0] if reduction == "sum" else images.numel())


def distance(a: Tensor, b: Tensor, kind: Distance = "mse") -> Tensor:
    """Distance of each ``a[i]`` to ``b[i]`` (or to a single ``b``), averaged over the batch; in float32 at least."""
    if kind == "mse" and _fuses(a, b):
        with on_device(a.device):
            return _compare(a, b.expand_as(a))[0]
    if kind == "mse":
        return (MeanSquare if can_compare(a, b) else _MeanSquare).apply(a, b)
    difference = _difference(a, b)
    if kind == "sse":
        return difference.square().sum() / difference.shape[0]
    # The tiny constant keeps the gradient finite at distance 0, where an image starts from its own content.
    return (difference.square().flatten(1).mean(1) + 1e-12).sqrt().mean()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return a.float() - b.float() if a.dtype in (torch.float16, torch.bfloat16) else a - b


class _MeanSquare(torch.autograd.Function):
    """Of a - b. On the way back autograd would multiply by a gradient that lies in another order than what is channels-last (on a CPU ten times as long)."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        difference = _difference(a, b)
        ctx.save_for_backward(difference)
        ctx.kinds = [(each.dtype, each.shape) for each in (a, b)]
        return difference.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (difference,) = ctx.saved_tensors
        of_a = difference * (gradient * (2 / difference.numel()))
        return tuple(
            (of_a if sign > 0 else -of_a).sum_to_size(shape).to(dtype) if wanted else None for sign, wanted, (dtype, shape) in zip((1, -1), ctx.needs_input_grad, ctx.kinds)
        )


def _compare(features: Tensor, *targets: Any) -> tuple[Tensor | None, Tensor | None]:
    from fastnst.fused_distances import mean_squares

    return mean_squares(features, *targets)


def _fuses(features: Tensor, *targets: Tensor) -> bool:
    """Whether there are kernels of our own that compare features with such targets."""
    alike = features.is_cuda and features.dtype != torch.float64 and all(target.dtype == features.dtype and not target.requires_grad for target in targets)
    return alike and not torch.compiler.is_compiling() and triton_works(features.device)


def calibrate(loss: "PerceptualLoss", photos: Tensor) -> LossConfig:
    """The raw weights that ``loss.config.strength`` stands for, measured on ``photos`` ``(N, 3, H, W)``; as it is where raw already.

    The unit of content is the distance of a photo to itself moved by half its size, that is to a like photo of other content;
    the unit of a style layer and of total variation is what the photos themselves have before any stylization.
    """
    config = loss.config
    if config.strength is None:
        return config
    with torch.no_grad():
        shifted = photos.roll((photos.shape[2] // 2, photos.shape[3] // 2), dims=(2, 3))
        measured = loss.measure(photos, loss.content_targets(shifted))
    content = sum(weight * float(measured.content[layer]) for layer, weight in config.content_layers.items())
    styles = {layer: max(float(measured.style[layer]), 1e-12) for layer in config.style_layers}
    whole = sum(config.style_layers.values()) or 1.0
    return config.model_copy(
        update={
            "strength": None,
            "content_weight": config.content_weight / max(content, 1e-12),
            "style_weight": config.style_weight * 10 * 2.0 ** (config.strength - 5),
            "style_layers": {layer: weight / whole / styles[layer] for layer, weight in config.style_layers.items()},
            "tv_weight": config.tv_weight / max(float(measured.tv), 1e-12) if config.tv_weight else 0.0,
        }
    )


@dataclass(frozen=True)
class LossTerms:
    """The weighted summands of the objective, scalars with gradient; ``content`` and ``style`` by layer; 0.0: not asked for."""

    content: dict[str, Tensor]
    style: dict[str, Tensor]
    tv: Tensor
    grid: Tensor | float = 0.0
    spectrum: Tensor | float = 0.0
    stability: Tensor | float = 0.0

    @property
    def summands(self) -> list[Tensor]:
        others = (self.tv, self.grid, self.spectrum, self.stability)
        return [*self.content.values(), *self.style.values(), *(term for term in others if isinstance(term, Tensor))]

    @cached_property
    def total(self) -> Tensor:
        return _sum(self.summands)

    def pull(self, factor: float) -> None:
        """``total.backward()``, times ``factor``, which waits for none of the numbers."""
        pulled = [term for term in self.summands if term.requires_grad]
        pull(pulled, [torch.full_like(pulled[0], factor)] * len(pulled))

    def scalars(self) -> dict[str, Tensor]:
        """Detached, by the names under which TensorBoard shows them."""
        content, style = (_sum([*terms.values()]) if terms else torch.zeros_like(self.tv) for terms in (self.content, self.style))
        named = {"loss/total": self.total, "loss/content": content, "loss/style": style, "loss/tv": self.tv}
        named |= {f"loss/{name}": term for name, term in (("grid", self.grid), ("spectrum", self.spectrum), ("stability", self.stability)) if isinstance(term, Tensor)}
        named |= {f"loss_content/{layer}": term for layer, term in self.content.items()}
        named |= {f"loss_style/{layer}": term for layer, term in self.style.items()}
        return {name: term.detach() for name, term in named.items()}


def _sum(terms: list[Tensor]) -> Tensor:
    """Of scalars, in two kernels however many they are."""
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def _large_enough(style: Tensor) -> Tensor:
    if min(style.shape[-2:]) < SPECTRUM_SIDE:
        raise ValueError(
            f"loss.spectrum_weight: got a style image of {style.shape[-1]}x{style.shape[-2]}, need {SPECTRUM_SIDE} px at least; set it to 0, or style.long_side higher"
        )
    return style


class PerceptualLoss(nn.Module):
    """How far an image is from a content target and from the style of ``style``, as ``loss_network`` sees them.

    ``style``: ``(1, 3, H, W)`` RGB in [0, 1], on the loss network's device; its statistics are computed once, here.
    """

    def __init__(self, loss_network: LossNetwork, config: LossConfig, style: Tensor) -> None:
        super().__init__()
        self.loss_network = loss_network
        self.config = config
        with torch.no_grad():
            features = loss_network(style, config.style_layers)
            self._spectrum = log_spectrum(_large_enough(style)) if config.spectrum_weight else None
            self._style_targets = {layer: self._style_target(feature) for layer, feature in features.items()}
            self.zero = style.new_zeros(())  # stands for terms that are not asked for; made once, as it takes a GPU a kernel

    @torch.no_grad()
    def content_targets(self, content: Tensor) -> dict[str, Tensor]:
        """Features of ``(N, 3, H, W)`` RGB in [0, 1] at the content layers, no deeper than they lie."""
        return self.loss_network(content, self.config.content_layers)

    def forward(self, images: Tensor, content_targets: dict[str, Tensor], side: SideStream | None = None) -> LossTerms:
        """The weighted terms for ``(N, 3, H, W)`` RGB in [0, 1], against the ``content_targets`` of as many photos.

        ``side``: a stream on which layers are compared, there and back, while the loss network goes on: products of few channels do not fill a GPU. The
        terms of content and style are there once it has been waited for.
        """
        c = self.config
        if c.strength is not None:
            raise ValueError("loss.strength stands for weights that are not measured yet: calibrate first")
        return self._terms(images, content_targets, c, side or SideStream(None))

    def measure(self, images: Tensor, content_targets: dict[str, Tensor]) -> LossTerms:
        """The terms before any weight."""
        return self._terms(images, content_targets, self.config.bare, SideStream(None))

    def _terms(self, images: Tensor, content_targets: dict[str, Tensor], c: LossConfig, side: SideStream) -> LossTerms:
        content, style = self._distances(images, content_targets, c, side)
        tv = self.zero
        if c.tv_weight:
            units = (images - self.loss_network.mean) / self.loss_network.std if c.tv_units == "network" else images
            tv = c.tv_weight * total_variation(units, c.tv_power, c.tv_reduction)
        grid = c.grid_weight * regular_grid(images) if c.grid_weight else 0.0
        return LossTerms(content, style, tv, grid, c.spectrum_weight * spectrum_distance(images, self._spectrum) if c.spectrum_weight else 0.0)

    def _distances(self, images: Tensor, targets: dict[str, Tensor], c: LossConfig, side: SideStream) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted, of content and of style."""
        contents = {layer: c.content_weight * weight for layer, weight in c.content_layers.items()}
        styles = {layer: c.style_weight * weight for layer, weight in c.style_layers.items()}
        content, style = {}, {}

        def compare(layer: str, features: Tensor) -> None:
            target = targets[layer].expand_as(features) if layer in contents else None
            if c.distance == "mse" and c.statistics == "gram" and _fuses(features, *([] if target is None else [target])):
                gram = self._style_targets[layer][0] if layer in styles else None
                with side.beside(), on_device(features.device):
                    content[layer], style[layer] = _compare(features, target, gram, _divisor(features, c.gram), contents.get(layer, 0.0), styles.get(layer, 0.0))
                return
            if layer in contents:
                content[layer] = contents[layer] * distance(features, targets[layer], c.distance)
            if layer in styles:
                style[layer] = styles[layer] * self._style_distance(layer, features)

        with side.beside():  # makes it part of a CUDA graph even if nothing is compared there: a recording may not wait for a stream outside of it
            pass
        self.loss_network(images, c.layers, compare)
        return {layer: content[layer] for layer in contents}, {layer: style[layer] for layer in styles}

    def _style_target(self, features: Tensor) -> tuple[Tensor, ...]:
        if self.config.statistics == "gram":
            return (gram_matrix(features, self.config.gram),)
        mean, covariance = mean_covariance(features)
        values, vectors = torch.linalg.eigh(covariance)
        return mean, vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.transpose(1, 2)

    def _style_distance(self, layer: str, features: Tensor) -> Tensor:
        target = self._style_targets[layer]
        if self.config.statistics == "gram":
            return distance(gram_matrix(features, self.config.gram), target[0], self.config.distance)
        with torch.autocast(features.device.type, enabled=False):
            return gaussian_wasserstein(*mean_covariance(features), *target)
