"""The learning rate is a function of the step alone."""

import pytest

from fastnst.config import ConfigError, validate_config
from fastnst.schedule import LearningRate, learning_rate_at


@pytest.mark.parametrize(
    "options, step, rate",
    [
        ({}, 0, 0.1),
        ({}, 99, 0.1),
        ({"warmup_steps": 4}, 0, 0.1 * 1 / 5),
        ({"warmup_steps": 4}, 3, 0.1 * 4 / 5),
        ({"warmup_steps": 4}, 4, 0.1),
        ({"decay": "cosine"}, 0, 0.1),
        ({"decay": "cosine"}, 25, 0.1 * 0.5 * (1 + 0.70710678)),  # cos(pi / 4)
        ({"decay": "cosine"}, 50, 0.05),
        ({"decay": "cosine"}, 100, 0.0),
        ({"decay": "cosine"}, 150, 0.0),  # past the end
        ({"decay": "cosine", "warmup_steps": 20}, 19, 0.1 * 20 / 21),
        ({"decay": "cosine", "warmup_steps": 20}, 20, 0.1),
        ({"decay": "cosine", "warmup_steps": 20}, 60, 0.05),  # half of the 80 steps after the warm-up
        ({"decay": "step", "decay_every": 10, "decay_factor": 0.5}, 9, 0.1),
        ({"decay": "step", "decay_every": 10, "decay_factor": 0.5}, 10, 0.05),
        ({"decay": "step", "decay_every": 10, "decay_factor": 0.5}, 35, 0.1 / 8),
    ],
)
def test_rate(options, step, rate):
    assert learning_rate_at(LearningRate(initial=0.1, **options), step, 100) == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("warmup", [100, 200])
def test_warmup_as_long_as_the_run_never_divides_by_zero(warmup):
    rates = [learning_rate_at(LearningRate(warmup_steps=warmup, decay="cosine"), step, 100) for step in range(101)]
    assert all(0 < rate <= 1e-3 for rate in rates)


@pytest.mark.parametrize(
    "key, value", [("initial", 0), ("decay_factor", 1.5), ("decay_every", 0), ("decay", "linear"), ("warmup_steps", -1)]
)
def test_impossible_schedule_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}: got"):
        validate_config(LearningRate, {key: value})
