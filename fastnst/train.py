"""Fit a ``TransformNetwork`` to one style: a training from beginning to end, what it would do, and a look at its data.

To resume, run the same command again. Under torchrun every process trains on its part of each batch, and the first alone writes.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastnst.checkpoint import STATE_NAME, load_training_state, restore, snapshot
from fastnst.config import to_yaml
from fastnst.data import Photos, keep_photos, list_photos
from fastnst.image import load_image
from fastnst.loss_network import DOWNLOADS, load_loss_network
from fastnst.losses import LossConfig
from fastnst.model import MODEL_NAME
from fastnst.network import TransformNetwork
from fastnst.objective import Objective
from fastnst.optimizer import make_optimizer
from fastnst.ranks import Ranks
from fastnst.run import CONFIG_NAME, check_space, find_run, hold
from fastnst.runtime import resolve_precision
from fastnst.survey import survey
from fastnst.task import CUT_EVERY, Task, TrainConfig, as_large_as_fits, check_same_photos, check_same_style, digest, gradient_of, learn, prepare
from fastnst.training import Training, TrainingDiverged, TrainProgress
from fastnst.watchdog import Watchdog

# Keys that a resumed run may change: they alter how long, how watched or how divided it is, not what any step computes.
_MAY_CHANGE = {f"train.{key}" for key in ("steps", "accumulate", "log_every", "validate_every", "save_every", "keep", "rollbacks", "compile")}
_MAY_CHANGE |= {"data.workers", "data.cache", "data.cache_gb", "style.image"}  # where the painting lies: itself is compared, by `check_same_style`


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended; ``finished`` is false when it was asked to stop before the last step.

    ``seconds``, ``photos_per_second`` and ``waiting``, the share of time spent waiting for photos with nothing left for the device to do, are those of
    this call; ``losses`` are the last means, ``best_step`` is the step of the best on validation.
    """

    step: int
    finished: bool
    seconds: float
    model: Path
    validation: dict[str, float]
    unreadable: dict[str, str]
    photos_per_second: float = 0.0
    waiting: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    rollbacks: int = 0


def plan(config: TrainConfig, run_dir: Path, device: torch.device) -> str:
    """What ``train`` would do, in words, with the inputs looked at but nothing written or downloaded."""
    state = _find_state(config, run_dir)
    with as_large_as_fits(config.style, device):
        style = load_image(config.style.image, config.style)
    if state is not None:
        check_same_style(config.style.image, digest(config.style.image), state)
    if config.loss.resolved_weights not in DOWNLOADS:
        load_loss_network(config.loss, config.loss.layers)
    with torch.device("meta"):
        network = TransformNetwork(config.network)
    return _summary(config, run_dir, device, state["step"] if state else 0, list_photos(config.data), style, network)


def check_data(config: TrainConfig, run_dir: Path, device: torch.device, report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Decode every photo, try some steps, and say what was found and what the training would take. ``report``: photos done, of how many."""
    photos = list_photos(config.data)
    everything = [*photos.train, *photos.validation] if photos.held_out else photos.train
    seen = survey(everything, config.data, thorough=True, report=lambda done: report(done, len(everything)))
    task = prepare(config, device, Ranks())
    batch = task.validation.repeat(-(-config.train.batch_size // len(task.validation)), 1, 1, 1)[: config.train.batch_size]
    took = []
    for step in (0, 1, 0, 1):  # with a cut and without; the first two warm up
        began = time.monotonic()
        float(learn(task, batch, step)[1][0])
        took.append(time.monotonic() - began)
    seconds = (took[2] + (CUT_EVERY - 1) * took[3]) / CUT_EVERY * config.train.steps
    needed = f"about {_duration(seconds)} for {config.train.steps:,} steps on {device.type}, unless photos come slower"
    return f"{seen}\ntime: {needed}\ndisk: about {_bytes_needed(task) / 1e6:.1f} MB in {run_dir}"


def train(
    config: TrainConfig,
    run_dir: str | Path,
    device: torch.device = torch.device("cpu"),
    report: Callable[[TrainProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = Ranks(),
) -> TrainResult:
    """Train until ``config.train.steps``, resuming from what ``run_dir`` holds; ends early, saved, when ``should_stop()`` on any rank.

    On the CPU an interrupted and resumed run ends bit for bit where an uninterrupted one does. A run that goes wrong goes back
    to its last good state with a lower rate; after ``train.rollbacks`` of these ``TrainingDiverged`` is raised, naming step,
    terms and what to change, with the last good state intact.
    """
    began, loop, run_dir = time.monotonic(), config.train, Path(run_dir)
    report = report if ranks.main else lambda progress: None
    with ranks.together():  # what is missing or wrong is found here, before anything is written
        state = _find_state(config, run_dir) if ranks.main else None
        task = prepare(config, device, ranks)
        network, loss, optimizer = task.network, task.loss, make_optimizer(loop.optimizer, task.network)
        begun = snapshot(network, optimizer, 0, Watchdog().state())
        if state is not None:
            check_same_style(config.style.image, task.style_digest, state)
            restore(run_dir / STATE_NAME, state, network, optimizer)  # tried here, so that one that does not fit is told before the other ranks get it
        found = None
        if ranks.main and (state is None or state["step"] < loop.steps):
            check_space(run_dir, _bytes_to_save(task) // (1 if state is None else 2))
            found = survey(task.photos.train, config.data)
    check_same_photos(task)
    state = ranks.from_main(state)
    if state is not None:
        restore(run_dir / STATE_NAME, state, network, optimizer)
    loss.config = ranks.from_main(LossConfig(**state["loss"]) if state and state.get("loss") else loss.config)
    watchdog = Watchdog.of((state or {}).get("watchdog") or {})
    step = state["step"] if state else 0
    unreadable = (state["unreadable"] if state else {}) | task.unreadable
    task = _set_off(task, step, report, should_stop)

    training = Training(task, run_dir, optimizer, watchdog, step, begun, state is None, unreadable, report)
    training.say(_summary(config, run_dir, device, step, task.photos, task.style, task.network, ranks))
    training.say(_raw_weights(config.loss, loss.config))
    if found is not None and (found.unreadable or found.small or found.gray):
        training.say(str(found))
    now, before = training.photos, (state or {}).get("photos")
    if before and tuple(before) != now:
        change = f"{now[0]:,} photos now, {before[0]:,} before" if now[0] != before[0] else f"{now[0]:,} photos as before, but others"
        training.say(f"data.content has changed since the last save ({change}): the run goes on, but not as it would have with the same photos")

    with ranks.apart(agreed=TrainingDiverged), ExitStack() as opened:
        if ranks.main:
            opened.enter_context(hold(run_dir, config))
            training.board = opened.enter_context(SummaryWriter(str(run_dir), purge_step=None if state is None else step + 1))
        if state is None:
            training.board.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)
            training.board.add_text("raw_weights", _raw_weights(config.loss, loss.config), 0)
            training.board.add_image("style", task.style[0].clamp(0, 1), 0)
        opened.enter_context(training.later)
        opened.enter_context(training)
        while True:
            due = training.due(should_stop())
            trouble = training.log() if due.log else None
            if trouble is None and due.save:
                trouble = training.last_look()
            if trouble is None and due.validate:
                trouble = training.validate()
            if trouble is not None:
                training.go_back(trouble)
                continue
            if due.save:
                training.save()
            if due.stop:
                break
            training.learn()

    seconds = time.monotonic() - training.began
    return TrainResult(
        step=training.good["step"],
        finished=training.good["step"] >= loop.steps,
        seconds=time.monotonic() - began,
        model=run_dir / MODEL_NAME,
        validation=training.validation,
        unreadable=unreadable,
        photos_per_second=training.learned * loop.batch_size / seconds,
        waiting=training.waited / seconds,
        losses=training.losses,
        best_step=training.watchdog.best_step,
        rollbacks=training.watchdog.rollbacks,
    )


def _set_off(task: Task, step: int, report: Callable[[TrainProgress], None], should_stop: Callable[[], bool]) -> Task:
    """The task with what only a long run pays for: photos kept as pixels, the objective compiled where that is asked for; gradients averaged over the ranks."""
    loop, ranks, left = task.config.train, task.ranks, task.config.train.steps - step

    def say(message: str) -> None:
        report(TrainProgress(step, loop.steps, message=message))

    with ranks.together():
        cache = keep_photos(task.photos.train, task.config.data, left * loop.batch_size / len(task.photos.train), say, should_stop)
    objective = Objective(ranks.average_gradients(task.network), task.loss, task.gradient.objective.precision, loop.compile)
    return replace(task, gradient=gradient_of(objective, loop, ranks, say), cache=cache)


def _find_state(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """The training state to resume, or None where the run is new; raises as ``find_run``."""
    if not find_run(config, run_dir, _may_change(config)):
        return None
    state = load_training_state(run_dir / STATE_NAME)
    if state.get("style") is None:  # an older one does not tell the painting itself, so that where it lies has to
        find_run(config, run_dir, _may_change(config) - {"style.image"})
    return state


def _may_change(config: TrainConfig) -> set[str]:
    # With a cosine the rate of every step depends on how many there are.
    return _MAY_CHANGE - ({"train.steps"} if config.train.learning_rate.decay == "cosine" else set())


def _bytes_to_save(task: Task) -> int:
    """The model and the state (weights and Adam's two moments), each once more while it is written."""
    return 2 * 4 * 4 * sum(parameter.numel() for parameter in task.network.parameters())


def _bytes_needed(task: Task) -> int:
    """On disk in the end: with pictures and curves for TensorBoard."""
    loop, crop = task.config.train, task.config.data.crop_size
    pictures = (2 + loop.steps // loop.validates_every) * min(4, len(task.validation)) * crop**2  # two of half a byte a pixel
    return _bytes_to_save(task) + pictures + 1500 * (loop.steps // loop.log_every)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _summary(
    config: TrainConfig, run_dir: Path, device: torch.device, step: int, photos: Photos, style: Tensor, network: TransformNetwork, ranks: Ranks = Ranks()
) -> str:
    held = f"{len(photos.validation)} held out for validation" if photos.held_out else "too few to hold any out: validation uses training photos"
    where = f"{device.type}, {ranks.size} ranks," if ranks.size > 1 else device.type
    precision = str(resolve_precision(config.train.precision, device)).removeprefix("torch.")
    if step >= config.train.steps:
        begin = f"{run_dir} is finished already, at step {step:,} where {config.train.steps:,} are asked for,"
    else:
        begin = f"{'resume' if step else 'train'} {run_dir} at step {step:,} of {config.train.steps:,}"
    return (
        f"{begin} on {where} in {precision}\n"
        f"photos: {len(photos.train):,} to train on, each seen {config.train.steps * config.train.batch_size / len(photos.train):.3g} times; {held}\n"
        f"style: {config.style.image} at {style.shape[3]}x{style.shape[2]}; loss network: {config.loss.network}, weights {config.loss.resolved_weights}\n"
        f"network: {sum(parameter.numel() for parameter in network.parameters()):,} parameters\n"
        f"writes: {CONFIG_NAME}, {MODEL_NAME}, {STATE_NAME} and TensorBoard events in {run_dir}"
    )


def _raw_weights(asked: LossConfig, raw: LossConfig) -> str:
    dial = "raw weights" if asked.strength is None else f"strength {asked.strength:g} is here, in raw weights"
    layers = ", ".join(f"{layer} {raw.style_weight * weight:.4g}" for layer, weight in raw.style_layers.items())
    return f"{dial}: content {raw.content_weight:.4g}, style {layers}, tv {raw.tv_weight:.4g}, grid {raw.grid_weight:.4g}, spectrum {raw.spectrum_weight:.4g}, stability {raw.stability_weight:.4g}"
