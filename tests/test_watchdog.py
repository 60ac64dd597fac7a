"""What is trouble and what is not, on made-up numbers."""

import json
import math

import pytest

from fastnst.watchdog import PATIENCE, WINDOW, Watchdog


def rows(losses, contrast: float = 0.2, brightness: float = 0.5, norm: float = 1.0) -> list[dict[str, float]]:
    return [
        {"loss/total": loss, "loss/style": loss, "output/contrast": contrast, "output/brightness": brightness, "train/gradient_norm": norm} for loss in losses
    ]


def after(losses, **options) -> Watchdog:
    """A watchdog that has seen sound ``losses``."""
    watchdog = Watchdog()
    assert watchdog.watch(len(losses), rows(losses, **options)) is None
    return watchdog


def test_a_falling_loss_is_no_trouble():
    assert after([100 * 0.99**step + 5 * (step % 3) for step in range(2000)]).rollbacks == 0


def test_a_loss_that_is_not_finite_is_named_with_step_and_terms():
    trouble = Watchdog().watch(12, rows([3.0, math.nan, 2.0]))
    assert trouble.what == "the loss is not finite at step 11: loss/total nan, loss/style nan"
    assert "train.learning_rate.initial" in trouble.advice


def test_a_gradient_that_is_not_finite_is_named():
    assert Watchdog().watch(1, rows([3.0], norm=math.inf)).what == "the gradient is not finite at step 1: loss/total 3, loss/style 3, train/gradient_norm inf"


def test_an_output_that_is_no_number_is_named_though_the_loss_is_one():
    assert Watchdog().watch(1, rows([3.0], contrast=math.nan)).what == "the output is not finite at step 1: loss/total 3, loss/style 3, output/contrast nan, output/brightness 0.5"


def test_an_explosion_is_five_times_the_lowest_mean():
    watchdog = after([1.0] * 40)
    assert watchdog.watch(60, rows([4.9] * WINDOW)) is None
    # 20 steps of 4.9, then of 10: the mean passes 5 x 1 with the first of them, (19 x 4.9 + 10) / 20 = 5.155
    assert watchdog.watch(80, rows([10.0] * WINDOW)).what == "the loss has exploded at step 61: 5.155, was 1 (means of 20 steps)"


def test_an_explosion_in_the_first_steps_is_measured_by_the_untrained_loss():
    assert Watchdog().watch(20, rows([1.0] + [4.9] * 19)) is None
    # (2 + 19 x 12) / 20 = 11.5, above 5 x 2
    trouble = Watchdog().watch(20, rows([2.0] + [12.0] * 19))
    assert trouble.what == "the loss has exploded at step 20: 11.5, the mean of 20 steps, was 2 untrained" and trouble.from_start
    watchdog = after([2.0, 3.0])
    assert watchdog.suspicious(rows([10.1])[0]) and not watchdog.suspicious(rows([9.9])[0])


def test_a_single_bad_step_is_suspicious_but_no_trouble():
    watchdog = after([1.0] * 40)
    assert watchdog.watch(41, rows([60.0])) is None  # (19 + 60) / 20 = 3.95
    assert watchdog.suspicious(rows([60.0])[0]) and not watchdog.suspicious(rows([4.9])[0])


@pytest.mark.parametrize("brightness, color", [(0.01, "black"), (0.99, "white"), (0.4, "flat")])
def test_an_output_without_contrast_is_named_by_its_color(brightness, color):
    watchdog = after([1.0] * 40)
    seen = rows([1.0] * WINDOW, contrast=0.001, brightness=brightness)
    assert watchdog.suspicious(seen[-1])
    assert f"the output has gone {color} at step 60" in watchdog.watch(60, seen).what


def test_an_output_that_begins_flat_is_no_trouble():
    watchdog = after([1.0] * 40, contrast=0.002)
    assert not watchdog.suspicious(rows([1.0], contrast=0.002)[0])


@pytest.mark.parametrize("first, then, stuck", [(2.0, 1.99, True), (2.0, 1.97, False), (0.0, 0.0, True), (math.inf, 2.0, False), (math.nan, 2.0, False)])
def test_stuck_is_not_having_fallen_by_a_hundredth_on_validation(first, then, stuck):
    watchdog = Watchdog(first_total=first)
    watchdog.is_best(100, then)
    watchdog.is_best(PATIENCE, 3.0)
    trouble = watchdog.stuck(PATIENCE)
    assert (trouble is not None) == stuck
    if stuck:
        assert trouble.what == f"the loss is stuck: by step 500 its best on validation is {then:g}, and was {first:g} untrained" and trouble.from_start


def test_early_steps_and_those_of_the_warmup_do_not_count_as_stuck():
    watchdog = Watchdog(first_total=1.0, best_total=1.0)
    assert watchdog.stuck(PATIENCE - 1) is None and watchdog.stuck(PATIENCE, warmup=100) is None and watchdog.stuck(PATIENCE + 100, warmup=100) is not None


def test_the_lowest_total_is_the_best_and_nan_never():
    watchdog = Watchdog()
    assert [watchdog.is_best(step, total) for step, total in ((1, math.nan), (2, 3.0), (3, 4.0), (4, 2.0), (5, math.nan))] == [False, True, False, True, False]
    assert (watchdog.best_step, watchdog.best_total) == (4, 2.0)


def test_judging_in_pieces_and_resumed_is_judging_at_once():
    losses = [100 * 0.99**step for step in range(90)]
    whole, pieces = after(losses), Watchdog()
    for start in range(0, 90, 7):
        assert pieces.watch(min(start + 7, 90), rows(losses[start : start + 7])) is None
        pieces = Watchdog.of({"first_mean": 3.0} | json.loads(json.dumps(pieces.state())))  # of an older fastnst some
    assert pieces == whole


def test_a_rollback_lowers_the_rate_and_forgets_what_came_after():
    watchdog = after([5.0] * 30)
    earlier = watchdog.state()
    watchdog.watch(60, rows([1.0] * 30))
    watchdog.is_best(60, 0.5)
    back = watchdog.rolled_back(watchdog.rolled_back(earlier).state())
    assert watchdog.rolled_back(earlier).lowest_mean == 5.0
    assert (back.rate, back.rollbacks, back.best_step) == (pytest.approx(0.3), 1, 60)
