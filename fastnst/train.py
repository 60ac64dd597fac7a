"""Fit a ``TransformNetwork`` to one style: the training loop, top to bottom.

To resume, run the same command again. A run folder holds ``config.yaml`` (resolved), ``model.safetensors`` (for
inference), ``training_state.pt`` (for resuming) and TensorBoard's event files.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastnst.checkpoint import STATE_NAME, load_training_state, restore, save_model, save_training_state
from fastnst.config import Config, ConfigError, flatten, load_config, to_yaml
from fastnst.data import DataConfig, Photos, PhotoStream, keep_photos, list_photos, load_validation, training_batches
from fastnst.files import atomic_write, exclusive
from fastnst.image import load_image, resize, to_pil
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, calibrate
from fastnst.model import MODEL_NAME, NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.objective import Compile, Objective, adam
from fastnst.picture import ImageSize
from fastnst.runtime import memory_format, resolve_precision
from fastnst.schedule import LearningRate, learning_rate_at

CONFIG_NAME = "config.yaml"
_SAVE_SECONDS = 300  # a slow machine saves this often, whatever save_every says: no more is lost to a power cut
# Keys that a resumed run may change: they alter how long or how watched it is, not what any step computes.
_MAY_CHANGE = {"train.steps", "train.log_every", "train.validate_every", "train.save_every", "data.workers", "data.cache", "data.cache_gb", "train.compile"}

_ADVICE = "What was saved before is intact; lower train.learning_rate.initial or the weights of loss, or set train.clip_gradient"


class StyleConfig(ImageSize):
    """The painting, and the size at which its strokes are learned: 512 px as most of Johnson et al.'s released models."""

    image: Path
    long_side: int | None = Field(512, ge=16, le=65_535)


class LoopConfig(Config):
    """How long and how fast to learn; the defaults are Johnson et al. 2016."""

    steps: int = Field(40_000, ge=1, le=10**9)
    batch_size: int = Field(4, ge=1, le=4096, description="photos per step")
    learning_rate: LearningRate = LearningRate()
    clip_gradient: float | None = Field(None, gt=0, description="largest norm of the whole gradient")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Compile = Field("auto", description="torch.compile; auto: on CUDA, for 2,000 steps or more")
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(20, ge=1, description="steps")
    validate_every: int = Field(500, ge=1, description="steps")
    save_every: int = Field(500, ge=1, description="steps")


class TrainConfig(Config):
    """Everything that decides a training run."""

    style: StyleConfig
    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    train: LoopConfig = LoopConfig()


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
    """How a call of ``train`` ended; ``finished`` is false when it was asked to stop before the last step."""

    step: int
    finished: bool
    seconds: float
    model: Path
    validation: dict[str, float]
    unreadable: dict[str, str]


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


def find_run(config: TrainConfig, run_dir: Path) -> bool:
    """Whether ``run_dir`` holds a run of this config to resume; false where it is new.

    Raises ``ValueError`` where going on would mix two runs or destroy a model.
    """
    if (run_dir / STATE_NAME).exists():
        if not (run_dir / CONFIG_NAME).exists():
            raise ValueError(f"{run_dir} holds {STATE_NAME} but no {CONFIG_NAME} to compare with; choose another --run-dir")
        try:
            old, new = flatten(load_config(TrainConfig, run_dir / CONFIG_NAME)), flatten(config)
        except ConfigError as error:
            raise ValueError(f"{run_dir / CONFIG_NAME} is damaged or of another version, choose another --run-dir ({str(error).splitlines()[0]})") from None
        # With a cosine the rate of every step depends on how many there are.
        fixed = set(new) - _MAY_CHANGE | ({"train.steps"} if config.train.learning_rate.decay == "cosine" else set())
        changed = [f"{key}: {old[key]} in the run, {new[key]} asked for" for key in new if key in fixed and _resolved(old[key]) != _resolved(new[key])]
        if changed:
            raise ValueError(f"{run_dir} holds a run with another config; choose another --run-dir, or undo the change of {'; '.join(changed)}")
        return True
    if (run_dir / MODEL_NAME).exists():
        raise ValueError(f"{run_dir} holds a finished {MODEL_NAME} without the {STATE_NAME} to resume from, and would lose it; choose another --run-dir")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file; choose another --run-dir")
    return False


def plan(config: TrainConfig, run_dir: Path, device: torch.device) -> str:
    """What ``train`` would do, in words, with the inputs looked at but nothing written or downloaded."""
    step = load_training_state(run_dir / STATE_NAME)["step"] if find_run(config, run_dir) else 0
    style = load_image(config.style.image, config.style)
    with torch.device("meta"):
        network = TransformNetwork(config.network)
    return _summary(config, run_dir, device, step, list_photos(config.data), style, network)


def train(
    config: TrainConfig,
    run_dir: str | Path,
    device: torch.device = torch.device("cpu"),
    report: Callable[[TrainProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train until ``config.train.steps``, resuming from what ``run_dir`` holds; ends early, saved, when ``should_stop()``.

    On the CPU an interrupted and resumed run ends bit for bit where an uninterrupted one does. Raises ``TrainingDiverged``
    at the first non-finite loss, naming step and terms, with the last saved state intact.
    """
    began, loop, run_dir = time.monotonic(), config.train, Path(run_dir)
    resuming = find_run(config, run_dir)
    photos = list_photos(config.data)
    style = load_image(config.style.image, config.style).to(device)
    layout = memory_format(device)
    loss_network = load_loss_network(config.loss, config.loss.layers).to(device, memory_format=layout)
    loss = PerceptualLoss(loss_network, config.loss, style)
    validation_photos, unreadable_validation = load_validation(photos.validation, config.data)
    loss.config = calibrate(loss, validation_photos[:8].to(device).float().div(255))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        network = TransformNetwork(config.network)
    network.to(device, memory_format=layout)
    optimizer = adam(network)
    step, unreadable = 0, {message: "validation" for message in unreadable_validation}
    if resuming:
        state = load_training_state(run_dir / STATE_NAME, device)
        restore(run_dir / STATE_NAME, state, network, optimizer)
        step, unreadable = state["step"], state["unreadable"] | unreadable
        loss.config = LossConfig(**state["loss"]) if state.get("loss") else loss.config

    first, precision = step, resolve_precision(loop.precision, device)
    objective = Objective(network, loss, precision, loop.compile, loop.steps - step, lambda message: report(TrainProgress(step, loop.steps, message=message)))
    passes = (loop.steps - step) * loop.batch_size / len(photos.train)
    cache = keep_photos(photos.train, config.data, passes, lambda message: report(TrainProgress(step, loop.steps, message=message)), should_stop)
    stream = PhotoStream(photos.train, config.data, loop.seed, cache)
    loading = training_batches(stream, step * loop.batch_size, loop.batch_size, max(0, loop.steps - step), device.type == "cuda")
    window: list[Tensor] = []  # the terms of each step since the last log, still on the device
    names: list[str] = []
    validation: dict[str, float] = {}
    window_began = saved = time.monotonic()
    report(TrainProgress(step, loop.steps, message=_summary(config, run_dir, device, step, photos, style, network)))
    report(TrainProgress(step, loop.steps, message=_raw_weights(config.loss, loss.config)))

    with exclusive(run_dir), loading as batches, SummaryWriter(str(run_dir), purge_step=step + 1 if resuming else None) as board:
        with atomic_write(run_dir / CONFIG_NAME) as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
        if not resuming:
            board.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)
            board.add_text("raw_weights", _raw_weights(config.loss, loss.config), 0)
            board.add_image("style", style[0].clamp(0, 1), 0)
        while True:
            stopping = step >= loop.steps or should_stop()
            new = step > first or not resuming  # what lies at the resumed step was logged before
            validating = new and (step % loop.validate_every == 0 or step >= loop.steps)
            overdue = time.monotonic() - saved > _SAVE_SECONDS
            saving = step > first and (step % loop.save_every == 0 or stopping or overdue)
            if window and (step % loop.log_every == 0 or validating or saving):
                losses = _mean_of_window(window, names, step)  # sync point; raises when not finite
                rate = len(window) * loop.batch_size / (time.monotonic() - window_began)
                for name, value in losses.items():
                    board.add_scalar(name, value, step)
                board.add_scalar("train/photos_per_second", rate, step)
                board.add_scalar("train/learning_rate", learning_rate_at(loop.learning_rate, step - 1, loop.steps), step)
                report(TrainProgress(step, loop.steps, rate, losses))
                window.clear()
                window_began = time.monotonic()
            if validating:
                validation, pairs = validate(network, loss, validation_photos, loop.batch_size)
                for name, value in validation.items():
                    board.add_scalar(name, value, step)
                board.add_image("validation/content_and_stylized", pairs, step)
                report(TrainProgress(step, loop.steps, validation=validation))
                window_began = time.monotonic()
            if saving:
                if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
                    raise TrainingDiverged(f"the weights are not finite at step {step}. {_ADVICE}")
                save_training_state(run_dir / STATE_NAME, network, optimizer, step, unreadable, loss.config.model_dump())
                board.flush()
                saved = time.monotonic()
            if saving or (resuming and stopping):  # the state may be ahead of the model, if a crash fell between the two
                save_model(run_dir / MODEL_NAME, network, step, _portable(config), to_pil(resize(style, ImageSize(long_side=128).of(*style.shape[-2:]))))
            if stopping:
                break

            content, messages = next(batches)
            for message in messages:
                if message not in unreadable:
                    unreadable[message] = f"step {step}"
                    report(TrainProgress(step, loop.steps, message=f"skipped {message}"))
            terms = objective(content)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            if loop.clip_gradient is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), loop.clip_gradient)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(loop.learning_rate, step, loop.steps)
            optimizer.step()
            step += 1
            scalars = terms.scalars()
            names = list(scalars)
            window.append(torch.stack(list(scalars.values())))
            report(TrainProgress(step, loop.steps))

    return TrainResult(step, step >= loop.steps, time.monotonic() - began, run_dir / MODEL_NAME, validation, unreadable)


@torch.inference_mode()
def validate(network: TransformNetwork, loss: PerceptualLoss, photos: Tensor, batch_size: int) -> tuple[dict[str, float], Tensor]:
    """Mean terms over ``(N, 3, S, S)`` uint8 ``photos``, in float32, and the first four beside their stylized versions."""
    device = next(network.parameters()).device
    network.eval()
    sums: dict[str, Tensor] = {}
    pairs = []
    for batch in photos.split(batch_size):
        content = batch.to(device).float().div_(255)
        stylized = network(content)
        scalars = loss(stylized, loss.content_targets(content)).scalars()
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0) + value * len(batch)
        if len(pairs) < 4:
            pairs += [torch.cat(pair, dim=2) for pair in zip(content, stylized.clamp(0, 1))]
    network.train()
    means = {name.replace("loss", "validation", 1): float(value) / len(photos) for name, value in sums.items()}
    return means, torch.cat(pairs[:4], dim=1).cpu()


def _mean_of_window(window: list[Tensor], names: list[str], step: int) -> dict[str, float]:
    rows = torch.stack(window).tolist()
    for offset, row in enumerate(rows):
        if not math.isfinite(row[0]):
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, row))
            raise TrainingDiverged(f"the loss is not finite at step {step - len(rows) + offset + 1}: {terms}. {_ADVICE}")
    return {name: sum(row[index] for row in rows) / len(rows) for index, name in enumerate(names)}


def _resolved(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value


def _portable(config: Config) -> dict[str, Any]:
    """The config as plain data for the model file, paths cut to names: others need not know this machine's folders."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        return value.name if isinstance(value, Path) else value

    recipe = cut(config.model_dump())
    recipe["loss"]["weights"] = Path(recipe["loss"]["weights"]).name
    return recipe


def _summary(config: TrainConfig, run_dir: Path, device: torch.device, step: int, photos: Photos, style: Tensor, network: TransformNetwork) -> str:
    held = f"{len(photos.validation)} held out for validation" if photos.held_out else "too few to hold any out: validation uses training photos"
    precision = str(resolve_precision(config.train.precision, device)).removeprefix("torch.")
    return (
        f"{'resume' if step else 'train'} {run_dir} at step {step:,} of {config.train.steps:,} on {device.type} in {precision}\n"
        f"photos: {len(photos.train):,} to train on, each seen {config.train.steps * config.train.batch_size / len(photos.train):.3g} times; {held}\n"
        f"style: {config.style.image} at {style.shape[3]}x{style.shape[2]}; loss network: {config.loss.network}, weights {config.loss.resolved_weights}\n"
        f"network: {sum(parameter.numel() for parameter in network.parameters()):,} parameters\n"
        f"writes: {CONFIG_NAME}, {MODEL_NAME}, {STATE_NAME} and TensorBoard events in {run_dir}"
    )


def _raw_weights(asked: LossConfig, raw: LossConfig) -> str:
    dial = "raw weights" if asked.strength is None else f"strength {asked.strength:g} is here, in raw weights"
    layers = ", ".join(f"{layer} {raw.style_weight * weight:.4g}" for layer, weight in raw.style_layers.items())
    return f"{dial}: content {raw.content_weight:.4g}, style {layers}, tv {raw.tv_weight:.4g}"
