"""What a training works on, and what it computes at a step: photos, style, loss and network, on their device, on any number of ranks."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastnst.config import Config
from fastnst.data import DataConfig, Photos, PhotoStream, list_photos, load_validation, training_batches
from fastnst.gradient import Gradient
from fastnst.image import load_image
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, calibrate
from fastnst.metrics import judgement
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.objective import Compile, Cut, Objective
from fastnst.optimizer import OptimizerName
from fastnst.photo_cache import PhotoCache
from fastnst.picture import ImageSize
from fastnst.ranks import Ranks
from fastnst.runtime import is_out_of_memory, largest_that_fits, memory_format, resolve_precision
from fastnst.schedule import LearningRate

CUT_EVERY = 4  # steps: another pass of the network at each would make a step half as long again, for the same result (our measurement)


class StyleConfig(ImageSize):
    """The painting, and the size at which its strokes are learned: 512 px as most of Johnson et al.'s released models."""

    image: Path
    long_side: int | None = Field(512, ge=16, le=65_535)


class LoopConfig(Config):
    """How long and how fast to learn; the defaults are Johnson et al. 2016."""

    steps: int = Field(40_000, ge=1, le=10**9)
    batch_size: int = Field(4, ge=1, le=4096, description="photos per step, over all ranks")
    accumulate: int = Field(1, ge=1, le=4096, description="parts that a rank's photos of a step are computed in: less memory, the same result")
    optimizer: OptimizerName = "adam"
    learning_rate: LearningRate = LearningRate()
    clip_gradient: float | None = Field(None, gt=0, description="largest norm of the whole gradient")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Compile = Field("auto", description="torch.compile; auto: off")
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(20, ge=1, description="steps; the stability term is there at every fourth")
    validate_every: int | None = Field(None, ge=1, description="steps; none: a twentieth of all, 500 at the least")
    save_every: int | None = Field(None, ge=1, description="steps; none: after each validation, and every five minutes")
    keep: Literal["best", "last"] = Field("best", description="the model of the lowest validation total, or of the last save")
    rollbacks: int = Field(3, ge=0, le=100, description="times that a run gone wrong goes back to its last good state with a lower rate")

    @property
    def validates_every(self) -> int:
        """Steps."""
        return self.validate_every or max(500, self.steps // 20)


class TrainConfig(Config):
    """Everything that decides a training run."""

    style: StyleConfig
    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    train: LoopConfig = LoopConfig()


@dataclass(frozen=True)
class Task:
    """What a training works on, ready on its device. ``gradient`` may hold ``network`` wrapped, averaging gradients over the ranks."""

    config: TrainConfig
    device: torch.device
    ranks: Ranks
    photos: Photos
    style: Tensor
    style_digest: str
    loss: PerceptualLoss
    network: TransformNetwork
    gradient: Gradient
    validation: Tensor
    unreadable: dict[str, str]
    cache: PhotoCache | None = None

    @property
    def photos_at_once(self) -> int:
        return -(-self.config.train.batch_size // (self.ranks.size * self.config.train.accumulate))


def prepare(config: TrainConfig, device: torch.device, ranks: Ranks) -> Task:
    """Load everything. Only the main rank has validation photos and a calibrated loss. Raises ``ValueError`` or ``OSError`` naming what is wrong."""
    loop, layout = config.train, memory_format(device)
    if loop.batch_size < ranks.size:
        raise ValueError(f"train.batch_size: got {loop.batch_size}, need a photo for each of the {ranks.size} ranks; raise it or start fewer processes")
    if config.network.norm == "batch" and (loop.accumulate > 1 or (ranks.size > 1 and device.type != "cuda")):
        raise ValueError(
            "network.norm: batch norm needs the whole batch at once: set train.accumulate=1 and, on the CPU, start one process; or set network.norm=instance"
        )
    photos = list_photos(config.data)
    with as_large_as_fits(config.style, device):
        style = load_image(config.style.image, config.style).to(device)
        loss_network = load_loss_network(config.loss, config.loss.layers).to(device, memory_format=layout)
        loss = PerceptualLoss(loss_network, config.loss, style)
    style_digest = digest(config.style.image)
    validation, unreadable = torch.empty(0), []
    if ranks.main:
        validation, unreadable = load_validation(photos.validation, config.data)
        loss.config = calibrate(loss, validation[:8].to(device).float().div(255))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        network = TransformNetwork(config.network)
    if ranks.size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # does nothing to instance norm
    network.to(device, memory_format=layout)
    gradient = gradient_of(Objective(network, loss, resolve_precision(loop.precision, device)), loop, ranks)
    return Task(config, device, ranks, photos, style, style_digest, loss, network, gradient, validation, {message: "validation" for message in unreadable})


@contextmanager
def as_large_as_fits(style: StyleConfig, device: torch.device) -> Iterator[None]:
    """Around work on the painting: memory that runs out is a ``ValueError`` naming the key that makes it so large."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        key = "short_side" if style.short_side else "long_side"
        raise ValueError(
            f"style.{key}: got {getattr(style, key)}, at which {style.image} does not fit in the memory of {device.type}; set it lower, 512 is the default"
        ) from error


def gradient_of(objective: Objective, loop: LoopConfig, ranks: Ranks, say: Callable[[str], None] = lambda message: None) -> Gradient:
    """As a training takes it."""
    return Gradient(objective, loop.batch_size, loop.accumulate, loop.clip_gradient, ranks, say=say)


def batches_from(step: int, task: Task) -> AbstractContextManager:
    """This rank's part of each batch from ``step`` on, as ``training_batches`` gives them."""
    loop, ranks = task.config.train, task.ranks
    stream = PhotoStream(task.photos.train, task.config.data, loop.seed, task.cache)
    return training_batches(stream, step * loop.batch_size, loop.batch_size, max(0, loop.steps - step), task.device, ranks.rank, ranks.size)


def learn(task: Task, content: Tensor, step: int = 0) -> tuple[list[str], Tensor]:
    """``task.gradient`` over this rank's ``(N, 3, S, S)`` uint8 ``content``.

    ``step`` decides where, and whether, the stability term cuts: at every fourth, with four times its weight. Raises ``ValueError``
    naming the sizes that would fit where memory runs out.
    """
    try:
        return task.gradient(content, _cut(task.config, content.shape[-1], step))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    raise ValueError(_what_would_fit(task))  # here the error no longer holds the activations


@torch.inference_mode()
def validate(network: TransformNetwork, loss: PerceptualLoss, photos: Tensor, batch_size: int) -> tuple[dict[str, float], Tensor]:
    """Mean terms and looks over ``(N, 3, S, S)`` uint8 ``photos``, in float32, and the first four beside their stylized versions."""
    device = next(network.parameters()).device
    network.eval()
    sums: dict[str, Tensor] = {}
    pairs = []
    for batch in photos.split(batch_size):
        content = batch.to(device).float().div_(255)
        stylized = network(content)
        terms = {name.replace("loss", "validation", 1): term for name, term in loss(stylized, loss.content_targets(content)).scalars().items()}
        looks = {f"validation_look/{name}": each.mean() for name, each in judgement(network, content, stylized).items()}
        for name, value in (terms | looks).items():
            sums[name] = sums.get(name, 0) + value * len(batch)
        if len(pairs) < 4:
            pairs += [torch.cat(pair, dim=2) for pair in zip(content, stylized.clamp(0, 1))]
    network.train()
    means = {name: float(value) / len(photos) for name, value in sums.items()}
    return means, torch.cat(pairs[:4], dim=1).cpu()


def _cut(config: TrainConfig, side: int, step: int) -> Cut | None:
    if not config.loss.stability_weight or step % CUT_EVERY:
        return None
    rng, less = random.Random(f"{config.train.seed}:{step}:cut"), side // 8
    return Cut(torch.tensor(rng.randint(0, less)), torch.tensor(rng.randint(0, less)), side - less, CUT_EVERY)


def _what_would_fit(task: Task) -> str:
    """The sizes at which a step would not run out of memory, found by trying."""
    config, loop, photos = task.config, task.config.train, task.photos_at_once
    gradient = Gradient(Objective(task.network, task.loss, task.gradient.objective.precision), loop.batch_size, record=False)

    def attempt(count: int, side: int) -> None:
        try:
            gradient(torch.zeros(count, 3, side, side, dtype=torch.uint8), _cut(config, side, step=0))
        finally:
            task.network.zero_grad(set_to_none=True)
            if task.device.type == "cuda":
                torch.cuda.empty_cache()

    crop = config.data.crop_size
    fits = largest_that_fits(lambda count: attempt(count, crop), photos)
    side = 16 * largest_that_fits(lambda units: attempt(photos, 16 * units), -(-crop // 16))
    ways = []
    if fits:
        here = -(-loop.batch_size // task.ranks.size)
        ways.append(f"train.accumulate={-(-here // fits)} (slower, the same result) or train.batch_size={fits * task.ranks.size * loop.accumulate}")
    if side:
        ways.append(f"data.crop_size={side}")
    keys = f"train.batch_size {loop.batch_size} on {task.ranks.size} rank(s), train.accumulate {loop.accumulate}, data.crop_size {crop}"
    fitting = ", or ".join(ways) or "nothing; set network.width lower"
    return f"{photos} photos of {crop} px at once do not fit in the memory of {task.device.type} ({keys}); tried out, this fits: {fitting}"


def fingerprint(photos: list[Path]) -> tuple[int, str]:
    """How many photos these are, and what tells them from others by name."""
    names = "\n".join(f"{path.parent.name}/{path.name}" for path in photos)
    return len(photos), hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


def digest(path: Path) -> str:
    """What tells this file from another of its name: the bytes, as the pixels of one picture differ by a level between decoders and between machines."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_same_style(image: Path, now: str, state: dict[str, Any]) -> None:
    """Raise ``ValueError`` where ``image``, whose digest is ``now``, is another picture than that of a training state; older states do not tell."""
    if state.get("style") not in (None, now):
        raise ValueError(f"style.image: {image} is another picture than when the run began; choose another --run-dir, or give the old picture, wherever it lies now")


def check_same_photos(task: Task) -> None:
    """Raise ``ValueError``, on all ranks, where the hosts have different photos."""
    found = task.ranks.gather(fingerprint(task.photos.train))
    if len(set(found)) > 1:
        counts = ", ".join(str(count) for count, _ in found)
        raise ValueError(f"data.content: the ranks find different photos ({counts}, or others of the same number); give every host the same folder")
