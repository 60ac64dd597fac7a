"""The reference mode: lower the objective over the pixels of one image (Gatys et al. 2016).

The image may be grown through several scales. The objective is scaled by its first gradient before any optimizer sees
it, so that only the proportions of the weights matter: torch's L-BFGS has absolute thresholds, and stalls on small ones.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fastnst.config import Config
from fastnst.image import resize
from fastnst.loss_network import LossNetwork
from fastnst.losses import LossConfig, PerceptualLoss, calibrate
from fastnst.picture import ImageSize
from fastnst.schedule import LearningRate, learning_rate_at


class DescentConfig(Config):
    """How the pixels descend.

    ``units``: what Adam's rate is measured in, ``pixels`` of [0, 1] or the ``network``'s (pixels - mean) / std, as recipes that
    optimize the preprocessed image have it. ``first_side`` starts at that side and grows by sqrt 2 to the full size,
    ``first_steps`` at the first scale and ``steps`` at each other. ``average``: decay of the running average of iterates that
    ends each scale; 0 takes the last iterate.
    """

    init: Literal["content", "style", "noise"] = "content"
    noise: float = Field(0.02, gt=0, description="init: noise is normal, of this standard deviation, around mid-gray 0.5")
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    steps: int = Field(500, ge=1, le=10**9)
    learning_rate: LearningRate = LearningRate(initial=1.0)
    history: int = Field(100, ge=1, description="L-BFGS: updates remembered")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam: decay of the moments")
    units: Literal["pixels", "network"] = "pixels"
    clamp: bool = Field(False, description="keep pixels in [0, 1] after every step")
    average: float = Field(0.0, ge=0, lt=1)
    first_side: int | None = Field(None, ge=16)
    first_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(10, ge=1, description="steps")
    save_every: int | None = Field(None, ge=1, description="steps between intermediate images; none: no such images")

    @model_validator(mode="after")
    def _settings_fit(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}, need two numbers from 0 to below 1")
        if self.units == "network" and self.optimizer == "lbfgs":
            raise ValueError("units: network is for optimizer: adam; L-BFGS is the same in any units")
        return self


class OptimizeConfig(Config):
    """Everything that decides an optimization but the two pictures."""

    content: ImageSize = ImageSize(long_side=512)
    style: ImageSize = ImageSize(long_side=512)
    loss: LossConfig = LossConfig()
    optimize: DescentConfig = DescentConfig()

    @model_validator(mode="after")
    def _no_term_that_needs_a_network(self):
        if self.loss.stability_weight:
            raise ValueError(f"loss.stability_weight: got {self.loss.stability_weight:g}, need 0: it is of networks, which train fits")
        return self


@dataclass(frozen=True)
class OptimizeProgress:
    """Reported at step 0, every ``log_every`` steps and at the last: the unscaled terms, and the image where it is due."""

    step: int
    steps: int
    losses: dict[str, float]
    seconds: float
    image: Tensor | None = None


def scale_plan(config: OptimizeConfig, height: int, width: int) -> list[tuple[float, int]]:
    """``[(scale, steps), ...]`` ending at scale 1.0, the content size that ``config`` asks for."""
    descent = config.optimize
    height, width = config.content.of(height, width)
    side = min(height, width) if config.content.short_side else max(height, width)
    scales = [1.0]
    while descent.first_side is not None and side * scales[0] / math.sqrt(2) >= descent.first_side - 0.5:
        scales.insert(0, scales[0] / math.sqrt(2))
    return [(scale, descent.first_steps if index == 0 and descent.first_steps else descent.steps) for index, scale in enumerate(scales)]


def optimize_image(
    content: Tensor,
    style: Tensor,
    loss_network: LossNetwork,
    config: OptimizeConfig,
    report: Callable[[OptimizeProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Lower the objective from ``config.optimize.init``; return ``(1, 3, H, W)`` in [0, 1] at the content size asked for.

    ``content`` and ``style``: ``(1, 3, H, W)`` RGB in [0, 1] as loaded, on the loss network's device; scaled here. Ends
    early when ``should_stop()``, at the scale then reached. Raises ``FloatingPointError`` when the objective stops being finite.
    """
    began, descent = time.monotonic(), config.optimize
    full, full_style = config.content.of(*content.shape[-2:]), config.style.of(*style.shape[-2:])
    plan = scale_plan(config, *content.shape[-2:])
    steps = sum(count for _, count in plan)
    image = moments = objective_scale = None
    step, stopped = 0, False

    for scale, count in plan:
        scaled_content, scaled_style = resize(content, _scaled(full, scale)), resize(style, _scaled(full_style, scale))
        loss = PerceptualLoss(loss_network, config.loss, scaled_style)
        loss.config = calibrate(loss, scaled_content)
        targets = loss.content_targets(scaled_content)
        image = _initial_image(descent, scaled_content, scaled_style) if image is None else resize(image, _scaled(full, scale))
        if objective_scale is None or descent.optimizer == "lbfgs":
            objective_scale = _objective_scale(loss, image, targets)

        # image = variable * unit + zero; the optimizer moves the variable.
        unit, zero = _units(descent, loss_network, image)
        variable = ((image - zero) / unit).requires_grad_()
        optimizer = _optimizer(descent, variable, moments)
        terms: dict[str, Tensor] = {}
        best, lowest = variable.detach().clone(), torch.full((), math.inf, device=image.device)

        def objective() -> Tensor:
            nonlocal lowest
            optimizer.zero_grad(set_to_none=True)
            found = loss(variable * unit + zero, targets)
            terms.update(found.scalars())
            total = found.total * objective_scale
            total.backward()
            best.copy_(torch.where(total.detach() < lowest, variable.detach(), best))
            lowest = torch.minimum(lowest, total.detach())
            return total

        average, weight = torch.zeros_like(image), 0.0
        for _ in range(count):
            optimizer.param_groups[0]["lr"] = learning_rate_at(descent.learning_rate, step, steps)
            optimizer.step(objective)  # evaluates the objective once, at the iterate before this step
            if descent.optimizer == "lbfgs" and not optimizer.state[variable]["old_dirs"]:
                optimizer.state[variable]["n_iter"] = 0  # no curvature found yet: a short first step again, not a leap along the gradient
            if step % descent.log_every == 0:
                report(OptimizeProgress(step, steps, _checked(terms, step), time.monotonic() - began))
            step += 1
            with torch.no_grad():
                if descent.clamp:
                    variable.copy_(((variable * unit + zero).clamp(0, 1) - zero) / unit)
                average = descent.average * average + (1 - descent.average) * (variable * unit + zero)
                weight = descent.average * weight + (1 - descent.average)
            if descent.save_every is not None and step % descent.save_every == 0:
                report(OptimizeProgress(step, steps, {}, time.monotonic() - began, (average / weight).clamp(0, 1)))
            stopped = should_stop()
            if stopped:
                break
        if descent.optimizer == "lbfgs" and not descent.average:  # without a line search it rises in many an iteration: the best picture counts, not the last
            objective()
            image = (best * unit + zero).clamp(0, 1)
        else:
            image = (average / weight).clamp(0, 1)
        moments = optimizer.state_dict() if descent.optimizer == "adam" else None
        if stopped:
            break

    with torch.no_grad():
        terms = loss(image, targets).scalars()
    report(OptimizeProgress(step, steps, _checked(terms, step), time.monotonic() - began, image))
    return image


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _initial_image(descent: DescentConfig, content: Tensor, style: Tensor) -> Tensor:
    if descent.init == "content":
        return content
    if descent.init == "style":
        return resize(style, tuple(content.shape[-2:]))
    generator = torch.Generator().manual_seed(descent.seed)  # on the CPU, so that every device starts alike
    return (0.5 + descent.noise * torch.randn(content.shape, generator=generator)).clamp(0, 1).to(content.device)


def _objective_scale(loss: PerceptualLoss, image: Tensor, targets: dict[str, Tensor]) -> float:
    """What makes the first gradient 1 on average over the pixels. Raises ``ValueError`` where there is no gradient."""
    image = image.detach().clone().requires_grad_()
    loss(image, targets).total.backward()
    size = float(image.grad.abs().mean())
    if size == 0 or not math.isfinite(size):
        raise ValueError(f"the objective has no gradient at the initial image (mean {size:g}); with init: content give style a weight, or use init: noise")
    return 1 / size


def _units(descent: DescentConfig, loss_network: LossNetwork, image: Tensor) -> tuple[Tensor, Tensor]:
    zero = image.new_zeros(())
    if descent.optimizer == "lbfgs":
        # L-BFGS begins with a step of length 1 in the sum of its absolute entries: make that 1 % of full range a pixel.
        return zero + 0.01 * image.numel(), zero
    return (loss_network.std, loss_network.mean) if descent.units == "network" else (zero + 1, zero)


def _optimizer(descent: DescentConfig, variable: Tensor, moments: dict | None) -> torch.optim.Optimizer:
    if descent.optimizer == "lbfgs":
        # One iteration a step, so that each can be watched; the absolute tolerances off.
        return torch.optim.LBFGS([variable], max_iter=1, history_size=descent.history, tolerance_grad=0, tolerance_change=0)
    adam = torch.optim.Adam([variable], betas=descent.betas)
    if moments is not None:  # carried from the smaller scale, as crowsonkb/style-transfer-pytorch does
        for state in moments["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                grown = F.interpolate(state[key], size=variable.shape[-2:], mode="bilinear", antialias=True)
                state[key] = grown
        adam.load_state_dict(moments)
    return adam


def _checked(terms: dict[str, Tensor], step: int) -> dict[str, float]:
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist()))
    if not math.isfinite(values["loss/total"]):
        raise FloatingPointError(
            f"the objective is not finite at step {step}: {', '.join(f'{name} {value:g}' for name, value in values.items())}; "
            "lower optimize.learning_rate.initial, or use optimizer: adam"
        )
    return values
