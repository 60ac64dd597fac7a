"""Fit a ``TransformNetwork`` to one style: the training loop, top to bottom.

To resume, run the same command again. Under torchrun every process trains on its part of each batch, and the first alone writes.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from fastnst.checkpoint import STATE_NAME, load_training_state, restore, save_model, save_training_state
from fastnst.config import to_yaml
from fastnst.data import Photos, keep_photos, list_photos
from fastnst.image import load_image, resize, to_pil
from fastnst.losses import LossConfig
from fastnst.model import MODEL_NAME, read_model
from fastnst.network import TransformNetwork
from fastnst.objective import Objective
from fastnst.optimizer import make_optimizer
from fastnst.picture import ImageSize
from fastnst.ranks import Ranks
from fastnst.run import CONFIG_NAME, check_space, check_there, find_run, hold, portable
from fastnst.runtime import resolve_precision
from fastnst.schedule import learning_rate_at
from fastnst.survey import survey
from fastnst.task import CUT_EVERY, Task, TrainConfig, batches_from, check_same_photos, learn, prepare, validate
from fastnst.watchdog import Trouble, Watchdog

_SAVE_SECONDS = 300  # a slow machine saves this often, whatever save_every says: no more is lost to a power cut
# Keys that a resumed run may change: they alter how long, how watched or how divided it is, not what any step computes.
_MAY_CHANGE = {f"train.{key}" for key in ("steps", "accumulate", "log_every", "validate_every", "save_every", "keep", "rollbacks", "compile")}
_MAY_CHANGE |= {"data.workers", "data.cache", "data.cache_gb"}


@dataclass(frozen=True)
class TrainProgress:
    """What ``train`` reports: after every step, and with ``losses`` (mean since the last) or ``validation`` when it has them."""

    step: int
    steps: int
    photos_per_second: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended; ``finished`` is false when it was asked to stop before the last step.

    ``seconds``, ``photos_per_second`` and ``waiting``, the share of time spent waiting for photos, are those of this call;
    ``losses`` are the last means, ``best_step`` is the step of the best on validation.
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


class TrainingDiverged(RuntimeError):
    """The training has gone wrong more often than ``train.rollbacks`` allows."""


def plan(config: TrainConfig, run_dir: Path, device: torch.device) -> str:
    """What ``train`` would do, in words, with the inputs looked at but nothing written or downloaded."""
    step = load_training_state(run_dir / STATE_NAME)["step"] if find_run(config, run_dir, _may_change(config)) else 0
    style = load_image(config.style.image, config.style)
    with torch.device("meta"):
        network = TransformNetwork(config.network)
    return _summary(config, run_dir, device, step, list_photos(config.data), style, network)


def check_data(config: TrainConfig, run_dir: Path, device: torch.device, report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Decode every photo, try two steps, and say what was found and what the training would take. ``report``: photos done, of how many."""
    photos = list_photos(config.data)
    everything = [*photos.train, *photos.validation] if photos.held_out else photos.train
    seen = survey(everything, config.data, thorough=True, report=lambda done: report(done, len(everything)))
    task = prepare(config, device, Ranks())
    batch = task.validation.repeat(-(-config.train.batch_size // len(task.validation)), 1, 1, 1)[: config.train.batch_size]
    took = []
    for step in (1, 0, 1):  # the first warms up; with a cut and without
        began = time.monotonic()
        float(learn(task, batch, step)[1][0])
        took.append(time.monotonic() - began)
    seconds = (took[1] + (CUT_EVERY - 1) * took[2]) / CUT_EVERY * config.train.steps
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
        state = load_training_state(run_dir / STATE_NAME) if ranks.main and find_run(config, run_dir, _may_change(config)) else None
        task = prepare(config, device, ranks)
        network, loss, optimizer = task.network, task.loss, make_optimizer(loop.optimizer, task.network)
        begun = _snapshot(network, optimizer, 0, Watchdog())
        if state is not None:
            restore(run_dir / STATE_NAME, state, network, optimizer)
        elif ranks.main:
            check_space(run_dir, _bytes_to_save(task))
        found = survey(task.photos.train, config.data) if ranks.main and (state is None or state["step"] < loop.steps) else None
    check_same_photos(task)
    state = ranks.from_main(state)
    if state is not None:
        restore(run_dir / STATE_NAME, state, network, optimizer)
    loss.config = ranks.from_main(LossConfig(**state["loss"]) if state and state.get("loss") else loss.config)
    watchdog = Watchdog(**(state or {}).get("watchdog") or {})
    step = state["step"] if state else 0
    unreadable = (state["unreadable"] if state else {}) | task.unreadable
    task = _set_off(task, step, report, should_stop)
    flat = min(0.01, 0.1 * float(task.style.std(dim=(2, 3)).mean()))  # contrast: a painting may be nearly flat itself

    good = _snapshot(network, optimizer, step, watchdog)
    older, went_back = begun if state is None else good, -1  # for when the good one proves not to be
    fresh, first = state is None, step  # what lies at a resumed step was logged before
    window: list[Tensor] = []  # the numbers of each step since the last log, still on the device
    complaints: list[tuple[str, int]] = []
    names: list[str] = []
    losses: dict[str, float] = {}
    validation: dict[str, float] = {}
    wary, learned, waited, window_waited = False, 0, 0.0, 0.0
    window_began = looping = saved = time.monotonic()
    report(TrainProgress(step, loop.steps, message=_summary(config, run_dir, device, step, task.photos, task.style, network, ranks)))
    report(TrainProgress(step, loop.steps, message=_raw_weights(config.loss, loss.config)))
    if found is not None and (found.unreadable or found.small or found.gray):
        report(TrainProgress(step, loop.steps, message=str(found)))

    with ranks.apart(agreed=TrainingDiverged), ExitStack() as opened, ExitStack() as loading:
        board = _NoBoard()
        if ranks.main:
            opened.enter_context(hold(run_dir, config))
            board = opened.enter_context(SummaryWriter(str(run_dir), purge_step=None if fresh else step + 1))
        if fresh:
            board.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)
            board.add_text("raw_weights", _raw_weights(config.loss, loss.config), 0)
            board.add_image("style", task.style[0].clamp(0, 1), 0)
        elif ranks.main and step > 0 and (loop.keep == "last" or watchdog.best_step in (0, step)) and not _holds_model_of(run_dir, step):
            _save_model(task, run_dir, step)  # a crash came between the state and the model
        batches = loading.enter_context(batches_from(step, task))
        while True:
            stop, overdue = ranks.any(should_stop(), time.monotonic() - saved > _SAVE_SECONDS)
            stopping = step >= loop.steps or stop
            validating = (fresh or step > first) and (step % loop.validate_every == 0 or step >= loop.steps)
            saving = step > first and (step % loop.save_every == 0 or validating or stopping or overdue)
            trouble = None
            if window and (step % loop.log_every == 0 or validating or saving):
                rows = [dict(zip(names, row)) for row in ranks.sum(torch.stack(window)).tolist()]  # sync point
                losses = {name: sum(row[name] for row in rows) / len(rows) for name in names}
                seconds = time.monotonic() - window_began
                rate = len(rows) * loop.batch_size / seconds
                scheduled = watchdog.rate * learning_rate_at(loop.learning_rate, step - 1, loop.steps)
                timing = {"train/photos_per_second": rate, "train/learning_rate": scheduled, "train/waiting_for_photos": window_waited / seconds}
                for name, value in (losses | timing).items():
                    board.add_scalar(name, value, step)
                for message, at in sum(ranks.gather(complaints), []):
                    if message not in unreadable:
                        unreadable[message] = f"step {at}"
                        report(TrainProgress(step, loop.steps, message=f"skipped {message}"))
                report(TrainProgress(step, loop.steps, rate, losses))
                trouble = watchdog.watch(step, rows, flat, loop.learning_rate.warmup_steps)
                wary = watchdog.suspicious(rows[-1], flat)  # too early to call it trouble, but nothing to save
                window.clear()
                complaints.clear()
                window_began, window_waited = time.monotonic(), 0.0
            if trouble is None and saving:
                trouble = _last_look(network, step, wary and step >= loop.steps)
            if trouble is not None:
                if watchdog.rollbacks >= loop.rollbacks:
                    board.add_text("watchdog", f"{trouble.what}; given up after {watchdog.rollbacks} rollbacks", good["step"])
                    raise TrainingDiverged(_given_up(trouble, watchdog, good["step"], loop.rollbacks))
                good = begun if trouble.from_start else older if good["step"] == went_back else good
                watchdog = watchdog.rolled_back(good["watchdog"])
                restore(run_dir / STATE_NAME, deepcopy(good), network, optimizer)
                good["watchdog"] = watchdog.state()
                step = first = went_back = good["step"]
                loading.close()
                batches = loading.enter_context(batches_from(step, task))
                done = f"Back to step {step}, the rate now {watchdog.rate:.2g} of the schedule's (rollback {watchdog.rollbacks} of {loop.rollbacks})"
                message = f"{trouble.what}. {done}. If it happens again: {trouble.advice}"
                board.add_text("watchdog", message, step)
                report(TrainProgress(step, loop.steps, message=f"watchdog: {message}"))
                if ranks.main:
                    check_there(run_dir)
                    save_training_state(run_dir / STATE_NAME, network, optimizer, step, unreadable, loss.config.model_dump(), watchdog.state())
                    board.flush()
                wary, fresh = False, False
                continue
            best = False
            if validating and ranks.main:
                validation, pairs = validate(network, loss, task.validation, task.photos_at_once)
                for name, value in validation.items():
                    board.add_scalar(name, value, step)
                board.add_image("validation/content_and_stylized", pairs, step)
                report(TrainProgress(step, loop.steps, validation=validation))
                best = not wary and step > 0 and watchdog.is_best(step, validation["validation/total"])
                window_began = time.monotonic()
            if saving and not wary:
                if ranks.main:
                    check_there(run_dir)
                    save_training_state(run_dir / STATE_NAME, network, optimizer, step, unreadable, loss.config.model_dump(), watchdog.state())
                    if best or loop.keep == "last" or not watchdog.best_step or not (run_dir / MODEL_NAME).exists():
                        _save_model(task, run_dir, step)  # behind the state: a model alone could not be gone on with
                    board.flush()
                older, good = good, _snapshot(network, optimizer, step, watchdog)
                saved = time.monotonic()
            if stopping:
                break

            asked = time.monotonic()
            content, messages = next(batches)
            window_waited += time.monotonic() - asked
            waited += time.monotonic() - asked
            complaints += [(message, step) for message in messages]
            names, numbers = learn(task, content, step)
            for group in optimizer.param_groups:
                group["lr"] = watchdog.rate * learning_rate_at(loop.learning_rate, step, loop.steps)
            optimizer.step()
            step += 1
            learned += 1
            window.append(numbers)
            report(TrainProgress(step, loop.steps))

    seconds = time.monotonic() - looping
    return TrainResult(
        good["step"],
        good["step"] >= loop.steps,
        time.monotonic() - began,
        run_dir / MODEL_NAME,
        validation,
        unreadable,
        learned * loop.batch_size / seconds,
        waited / seconds,
        losses,
        watchdog.best_step,
        watchdog.rollbacks,
    )


def _set_off(task: Task, step: int, report: Callable[[TrainProgress], None], should_stop: Callable[[], bool]) -> Task:
    """The task with what only a long run pays for: photos kept as pixels, the objective compiled; gradients averaged over the ranks."""
    loop, ranks, left = task.config.train, task.ranks, task.config.train.steps - step

    def say(message: str) -> None:
        report(TrainProgress(step, loop.steps, message=message))

    with ranks.together():
        cache = keep_photos(task.photos.train, task.config.data, left * loop.batch_size / len(task.photos.train), say, should_stop)
    compile = loop.compile if ranks.size == 1 or loop.compile == "on" else "off"
    objective = Objective(ranks.average_gradients(task.network), task.loss, task.objective.precision, compile, left, say)
    return replace(task, objective=objective, cache=cache)


def _snapshot(network: nn.Module, optimizer: torch.optim.Optimizer, step: int, watchdog: Watchdog) -> dict[str, Any]:
    """A copy of what a rollback restores."""
    return deepcopy({"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict(), "watchdog": watchdog.state()})


def _save_model(task: Task, run_dir: Path, step: int) -> None:
    thumbnail = to_pil(resize(task.style, ImageSize(long_side=128).of(*task.style.shape[-2:])))
    save_model(run_dir / MODEL_NAME, task.network, step, portable(task.config), thumbnail)


def _holds_model_of(run_dir: Path, step: int) -> bool:
    try:
        return read_model(run_dir / MODEL_NAME)[1].step == step
    except (OSError, ValueError):
        return False


def _last_look(network: nn.Module, step: int, ends_badly: bool) -> Trouble | None:
    """What speaks against saving the weights of ``step``."""
    advice = "lower train.learning_rate.initial or the weights of loss, or set train.clip_gradient"
    if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
        return Trouble(f"the weights are not finite at step {step}", advice)
    return Trouble(f"the loss or the output of the last steps, up to {step}, is far from what it was", advice) if ends_badly else None


def _given_up(trouble: Trouble, watchdog: Watchdog, good_step: int, allowed: int) -> str:
    tried = f" {watchdog.rollbacks} rollbacks with lower rates, the last {watchdog.rate:.2g} of the schedule's, did not help." if watchdog.rollbacks else ""
    intact = f"What was saved before, at step {good_step}, is intact." if good_step else "No good step was saved."
    return f"{trouble.what}.{tried} {intact} What to change: {trouble.advice}; or allow more than train.rollbacks={allowed}"


def _may_change(config: TrainConfig) -> set[str]:
    # With a cosine the rate of every step depends on how many there are.
    return _MAY_CHANGE - ({"train.steps"} if config.train.learning_rate.decay == "cosine" else set())


def _bytes_to_save(task: Task) -> int:
    """The model and the state (weights and Adam's two moments), each once more while it is written."""
    return 2 * 4 * 4 * sum(parameter.numel() for parameter in task.network.parameters())


def _bytes_needed(task: Task) -> int:
    """On disk in the end: with pictures and curves for TensorBoard."""
    loop, crop = task.config.train, task.config.data.crop_size
    pictures = (2 + loop.steps // loop.validate_every) * 2 * min(4, len(task.validation)) * 2 * crop**2
    return _bytes_to_save(task) + pictures + 1500 * (loop.steps // loop.log_every)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


class _NoBoard:
    """Stands for TensorBoard's writer on the ranks that write nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _summary(
    config: TrainConfig, run_dir: Path, device: torch.device, step: int, photos: Photos, style: Tensor, network: TransformNetwork, ranks: Ranks = Ranks()
) -> str:
    held = f"{len(photos.validation)} held out for validation" if photos.held_out else "too few to hold any out: validation uses training photos"
    where = f"{device.type}, {ranks.size} ranks," if ranks.size > 1 else device.type
    precision = str(resolve_precision(config.train.precision, device)).removeprefix("torch.")
    return (
        f"{'resume' if step else 'train'} {run_dir} at step {step:,} of {config.train.steps:,} on {where} in {precision}\n"
        f"photos: {len(photos.train):,} to train on, each seen {config.train.steps * config.train.batch_size / len(photos.train):.3g} times; {held}\n"
        f"style: {config.style.image} at {style.shape[3]}x{style.shape[2]}; loss network: {config.loss.network}, weights {config.loss.resolved_weights}\n"
        f"network: {sum(parameter.numel() for parameter in network.parameters()):,} parameters\n"
        f"writes: {CONFIG_NAME}, {MODEL_NAME}, {STATE_NAME} and TensorBoard events in {run_dir}"
    )


def _raw_weights(asked: LossConfig, raw: LossConfig) -> str:
    dial = "raw weights" if asked.strength is None else f"strength {asked.strength:g} is here, in raw weights"
    layers = ", ".join(f"{layer} {raw.style_weight * weight:.4g}" for layer, weight in raw.style_layers.items())
    return f"{dial}: content {raw.content_weight:.4g}, style {layers}, tv {raw.tv_weight:.4g}, grid {raw.grid_weight:.4g}, stability {raw.stability_weight:.4g}"
