"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math
from typing import Literal

from pydantic import Field

from fastnst.config import Config


class LearningRate(Config):
    """``initial`` after a linear ``warmup_steps``, then constant, a cosine to zero, or a factor every so many steps."""

    initial: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "cosine", "step"] = "constant"
    decay_every: int = Field(2000, ge=1, description="steps between decays, for decay: step")
    decay_factor: float = Field(0.8, gt=0, le=1, description="multiplies the rate at each decay, for decay: step")


def learning_rate_at(schedule: LearningRate, step: int, steps: int) -> float:
    """The rate used by the update number ``step`` (the first is 0) of ``steps``."""
    rate = schedule.initial
    if step < schedule.warmup_steps:
        return rate * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.decay == "cosine":
        done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule.decay == "step":
        return rate * schedule.decay_factor ** (step // schedule.decay_every)
    return rate
