"""A training under way: one step after another, what is said and saved between them, and the way back when it goes wrong."""

import io
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastnst.background import Later, Mark
from fastnst.checkpoint import STATE_NAME, Optimizer, restore, save_model, save_training_state, snapshot
from fastnst.image import resize, to_pil
from fastnst.model import MODEL_NAME, read_model
from fastnst.picture import ImageSize
from fastnst.run import check_there, portable
from fastnst.runtime import is_out_of_memory
from fastnst.schedule import learning_rate_at
from fastnst.task import Task, batches_from, fingerprint, learn, validate
from fastnst.watchdog import Trouble, Watchdog

_STEADIER = "lower train.learning_rate.initial or the weights of loss, or set train.clip_gradient"
_SAVE_SECONDS = 300  # it saves this often, whatever save_every says: no more is lost to a power cut


@dataclass(frozen=True)
class TrainProgress:
    """What ``train`` reports: after every step, and with ``losses`` (mean since the last) or ``validation`` when it has them."""

    step: int
    steps: int
    photos_per_second: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    message: str = ""


class TrainingDiverged(RuntimeError):
    """The training has gone wrong more often than ``train.rollbacks`` allows."""


class Due(NamedTuple):
    """What is to be done between two steps."""

    log: bool
    validate: bool
    save: bool
    stop: bool


class NoBoard:
    """Stands for TensorBoard's writer on the ranks that write nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Training:
    """A run of ``task`` from ``step`` on, into ``run_dir``: ``due``, ``log``, ``last_look`` and ``validate``, then ``go_back``, or ``save`` and ``learn``.

    ``begun`` is the ``snapshot`` of the untrained network; ``fresh`` is false where the run was resumed; ``unreadable`` says of each complaint
    where it was met. Saving runs in the background, by ``later``: enter that context before this one.
    """

    def __init__(
        self,
        task: Task,
        run_dir: Path,
        optimizer: Optimizer,
        watchdog: Watchdog,
        step: int,
        begun: dict[str, Any],
        fresh: bool,
        unreadable: dict[str, str],
        report: Callable[[TrainProgress], None],
    ) -> None:
        self.task, self.run_dir, self.optimizer, self.watchdog, self.step = task, run_dir, optimizer, watchdog, step
        self.unreadable, self._report = unreadable, report
        self.losses: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.learned, self.waited = 0, 0.0  # steps, and seconds in waiting for photos
        self.good = snapshot(task.network, optimizer, step, watchdog.state())
        self.photos = fingerprint(task.photos.train)
        self.later = Later("saving")
        self.board: SummaryWriter | NoBoard = NoBoard()
        self._begun, self._older = begun, begun if fresh else self.good
        self._went_back = -1  # the step of the good one, where it may prove not to be
        self._fresh, self._first = fresh, step  # what lies at a resumed step was logged before
        self._thumbnail = to_pil(resize(task.style, ImageSize(long_side=128).of(*task.style.shape[-2:])))
        self._flat = min(0.01, 0.1 * float(task.style.std(dim=(2, 3)).mean()))  # contrast: a painting may be nearly flat itself
        self._window: list[Tensor] = []  # the numbers of each step since the last log, still on the device
        self._names: list[str] = []
        self._complaints: list[tuple[str, int]] = []
        self._untold: tuple[float, dict[str, float], list[str]] | None = None  # of the last log: photos a second, what is drawn, and said
        self._launched = Mark(task.device)
        self._wary, self._is_best, self._window_waited = False, False, 0.0
        self._loading = ExitStack()
        self.began = self._window_began = self._saved = time.monotonic()

    def __enter__(self) -> "Training":
        loop, watchdog = self.task.config.train, self.watchdog
        if self.task.ranks.main and not self._fresh and self.step > 0:
            if loop.keep == "best" and watchdog.best_step not in (0, self.step) and not _holds_model_of(self.run_dir, watchdog.best_step):
                watchdog.best_step, watchdog.best_total = 0, math.inf  # train.keep was `last`, and the best is gone
            if (loop.keep == "last" or watchdog.best_step in (0, self.step)) and not _holds_model_of(self.run_dir, self.step):
                self._write_model(self.good)  # a crash came between the state and the model
        self._batches = self._loading.enter_context(batches_from(self.step, self.task))
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._tell()
        finally:
            self._loading.__exit__(*error)

    def say(self, message: str) -> None:
        self._report(TrainProgress(self.step, self.task.config.train.steps, message=message))

    def due(self, should_stop: bool) -> Due:
        """What is to be done now, the same on all ranks."""
        loop, step = self.task.config.train, self.step
        stop, overdue = self.task.ranks.any(should_stop, time.monotonic() - self._saved > _SAVE_SECONDS)
        stopping, moved = step >= loop.steps or stop, step > self._first
        validating = (self._fresh or moved) and (step % loop.validates_every == 0 or step >= loop.steps)
        saving = moved and ((loop.save_every is not None and step % loop.save_every == 0) or validating or stopping or overdue)
        logging = bool(self._window) and (step % loop.log_every == 0 or validating or saving)
        return Due(logging, validating, saving, stopping)

    def log(self) -> Trouble | None:
        """Read the numbers of the steps since the last time, to be told behind the next launch, or ahead of anything else; what the watchdog says of them."""
        task, loop, step = self.task, self.task.config.train, self.step
        rows = [dict(zip(self._names, row)) for row in task.ranks.sum(torch.stack(self._window)).tolist()]  # sync point
        self.losses = {name: sum(row[name] for row in rows) / len(rows) for name in self._names}
        seconds = time.monotonic() - self._window_began
        rate = len(rows) * loop.batch_size / seconds
        scheduled = self.watchdog.rate * learning_rate_at(loop.learning_rate, step - 1, loop.steps)
        timing = {"train/photos_per_second": rate, "train/learning_rate": scheduled, "train/waiting_for_photos": self._window_waited / seconds}
        skipped = []
        for message, at in sum(task.ranks.gather(self._complaints), []):
            if message not in self.unreadable:
                self.unreadable[message] = f"step {at}"
                skipped.append(f"skipped {message}")
        self._untold = rate, self.losses | timing, skipped
        trouble = self.watchdog.watch(step, rows, self._flat)
        self._wary = self.watchdog.suspicious(rows[-1], self._flat)  # too early to call it trouble, but nothing to save
        self._window.clear()
        self._complaints.clear()
        self._window_began, self._window_waited = time.monotonic(), 0.0
        return trouble

    def _tell(self) -> None:
        """What was logged at this step, once."""
        if self._untold is None:
            return
        (rate, scalars, messages), self._untold = self._untold, None
        for name, value in scalars.items():
            self.board.add_scalar(name, value, self.step)
        for message in messages:
            self.say(message)
        self._report(TrainProgress(self.step, self.task.config.train.steps, rate, self.losses))

    def last_look(self) -> Trouble | None:
        """What speaks against saving the weights."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.task.network.parameters()]).all():  # sync point
            return Trouble(f"the weights are not finite at step {self.step}", _STEADIER)
        if self._wary and self.step >= self.task.config.train.steps:
            return Trouble(f"the loss or the output of the last steps, up to {self.step}, is far from what it was", _STEADIER)
        return None

    def go_back(self, trouble: Trouble) -> None:
        """Restore the last good state, with a lower rate. Raises ``TrainingDiverged`` where that was done often enough."""
        self._tell()
        self.later.wait()
        allowed = self.task.config.train.rollbacks
        if self.watchdog.rollbacks >= allowed:
            self.board.add_text("watchdog", f"{trouble.what}; given up after {self.watchdog.rollbacks} rollbacks", self.good["step"])
            raise TrainingDiverged(_given_up(trouble, self.watchdog, self.good["step"], allowed))
        if trouble.from_start:
            self.good = self._older = self._begun
        elif self.good["step"] == self._went_back:
            self.good = self._older
        self.watchdog = self.watchdog.rolled_back(self.good["watchdog"])
        restore(self.run_dir / STATE_NAME, deepcopy(self.good), self.task.network, self.optimizer)
        self.good["watchdog"] = self.watchdog.state()
        self.step = self._first = self._went_back = self.good["step"]
        self._loading.close()
        self._batches = self._loading.enter_context(batches_from(self.step, self.task))
        rate = f"the learning rate now {self.watchdog.rate:.2g} of the schedule's (rollback {self.watchdog.rollbacks} of {allowed})"
        message = f"{trouble.what}. Back to step {self.step}, {rate}. If it happens again: {trouble.advice}"
        self.board.add_text("watchdog", message, self.step)
        self.say(f"watchdog: {message}")
        if self.task.ranks.main:
            self._write_state(self.good, self.unreadable)
            self.board.flush()
        self._wary, self._fresh = False, False

    def validate(self) -> Trouble | None:
        """Judge the network on the photos held out, on the main rank; what the watchdog says of that, on all."""
        self._tell()
        trouble = None
        if self.task.ranks.main:
            self.validation, pairs = self._judged()
            for name, value in self.validation.items():
                self.board.add_scalar(name, value, self.step)
            self.board.file_writer.add_summary(_picture("validation/content_and_stylized", pairs), self.step)
            self._report(TrainProgress(self.step, self.task.config.train.steps, validation=self.validation))
            total = self.validation["validation/total"]
            if self.step == 0:
                self.watchdog.first_total = total
            self._is_best = not self._wary and self.step > 0 and self.watchdog.is_best(self.step, total)
            trouble = self.watchdog.stuck(self.step, self.task.config.train.learning_rate.warmup_steps)
            if not math.isfinite(total):
                trouble = Trouble(f"the loss on validation is not finite at step {self.step}", _STEADIER)
        trouble = self.task.ranks.from_main(trouble)
        self._window_began = time.monotonic()
        return trouble

    def _judged(self) -> tuple[dict[str, float], Tensor]:
        task = self.task
        judged = partial(validate, task.network, task.loss, task.validation)
        try:
            return judged(task.photos_at_once * (4 if task.device.type == "cuda" else 1))  # a GPU waits for each launch of the few that a step takes
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        task.gradient.forget()  # what was recorded holds memory that nothing else may use
        return judged(task.photos_at_once)

    def save(self) -> None:
        """Keep the state, and the model where it is the best so far; not where the last steps look suspicious."""
        self._tell()
        if self._wary:
            return
        self._older, self.good = self.good, snapshot(self.task.network, self.optimizer, self.step, self.watchdog.state())
        if self.task.ranks.main:
            self.later(partial(self._write, self.good, dict(self.unreadable), self._is_best))
        self._saved = time.monotonic()

    def learn(self) -> None:
        """One step, of the next photos."""
        self.later.check()
        loop, asked = self.task.config.train, time.monotonic()
        content, messages = next(self._batches)
        waited = time.monotonic() - asked if self._launched.passed() else 0.0  # else the device has lost nothing
        self._window_waited += waited
        self.waited += waited
        self._complaints += [(message, self.step) for message in messages]
        self._names, numbers = learn(self.task, content, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.watchdog.rate * learning_rate_at(loop.learning_rate, self.step, loop.steps)
        self.optimizer.step()
        self._launched.set()
        self._tell()  # while a GPU works on that
        self.step += 1
        self.learned += 1
        self._window.append(numbers)
        self._is_best = False
        self._report(TrainProgress(self.step, loop.steps))

    def _write(self, learned: dict[str, Any], unreadable: dict[str, str], is_best: bool) -> None:
        self._write_state(learned, unreadable)
        if is_best or self.task.config.train.keep == "last" or not learned["watchdog"]["best_step"] or not (self.run_dir / MODEL_NAME).exists():
            self._write_model(learned)  # behind the state: a model alone could not be gone on with
        self.board.flush()

    def _write_state(self, learned: dict[str, Any], unreadable: dict[str, str]) -> None:
        check_there(self.run_dir)
        save_training_state(self.run_dir / STATE_NAME, learned, unreadable, self.task.loss.config.model_dump(), self.photos, self.task.style_digest)

    def _write_model(self, learned: dict[str, Any]) -> None:
        recipe = portable(self.task.config)
        save_model(self.run_dir / MODEL_NAME, self.task.network, learned["step"], recipe, self._thumbnail, weights=learned["network"])


def _picture(tag: str, picture: Tensor) -> Summary:
    """``(3, H, W)`` in [0, 1] for TensorBoard, as JPEG: it takes 0.2 us for each byte, in Python, and no step is launched meanwhile (0.2 s for a PNG)."""
    image, encoded = to_pil(picture), io.BytesIO()
    image.save(encoded, "JPEG", quality=90, subsampling=0)
    shown = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=shown)])


def _holds_model_of(run_dir: Path, step: int) -> bool:
    try:
        return read_model(run_dir / MODEL_NAME)[1].step == step
    except (OSError, ValueError):
        return False


def _given_up(trouble: Trouble, watchdog: Watchdog, good_step: int, allowed: int) -> str:
    tried = f" {watchdog.rollbacks} rollbacks with lower rates, the last {watchdog.rate:.2g} of the schedule's, did not help." if watchdog.rollbacks else ""
    intact = f"What was saved before, at step {good_step}, is intact." if good_step else "No good step was saved."
    return f"{trouble.what}.{tried} {intact} What to change, with another --run-dir: {trouble.advice}; or allow more than train.rollbacks={allowed}"
