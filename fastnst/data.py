"""A COCO-style folder of content photos -> an endless, resumable stream of training crops.

Guards one convention: crop number ``position`` of a run is a pure function of the seed and that number, whoever
loads it and whenever, so resuming is starting at a position and needs no saved random state.
"""

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastnst.config import Config
from fastnst.image import to_uint8
from fastnst.picture import READABLE, count_kinds, find_images, open_rgb


class DataConfig(Config):
    """Which photos, and how a training crop is cut from one.

    ``crop``: ``random`` takes a square at a random place whose side is ``min_scale`` to 1 of the short side, ``center`` the
    whole short side in the middle, ``squash`` the whole photo with its proportions bent; each scaled to ``crop_size``.
    """

    content: Path = Field(description="folder of photos, searched recursively")
    annotations: Path | None = Field(None, description="COCO annotation JSON: only the photos that its `images` list names")
    validation: Path | None = Field(None, description="folder of held-out photos; none: validation_photos are set apart from content")
    validation_photos: int = Field(16, ge=1, le=100_000)
    crop_size: int = Field(256, ge=16, le=8192)
    crop: Literal["random", "center", "squash"] = "random"
    min_scale: float = Field(0.5, gt=0, le=1)
    flip: bool = True
    shuffle: bool = True
    workers: int | None = Field(None, ge=0, le=1024, description="decoding processes; none: one fewer than the cores, 1 to 8")


@dataclass(frozen=True)
class Photos:
    """Paths of the training photos and of those held out; ``held_out`` is false where there were too few to set any apart."""

    train: list[Path]
    validation: list[Path]
    held_out: bool


def list_photos(config: DataConfig) -> Photos:
    """Find the photos. Raises ``FileNotFoundError`` or ``ValueError`` saying what was looked for and what is there."""
    train = _find(config.content, "data.content")
    if config.annotations is not None:
        train = _select(train, config)
    if config.validation is not None:
        held_out = _find(config.validation, "data.validation")
        apart = {photo.resolve() for photo in held_out}
        train = [photo for photo in train if photo.resolve() not in apart]
        if not train:
            raise ValueError(f"data.validation: {config.validation} holds every photo of data.content; nothing is left to train on")
        return Photos(train, _sample(held_out, config.validation_photos), True)
    # A tenth of the photos at most: a few photos are better trained on than held out.
    validation = _sample(train, min(config.validation_photos, len(train) // 10))
    if not validation:
        return Photos(train, _sample(train, config.validation_photos), False)
    apart = set(validation)
    return Photos([photo for photo in train if photo not in apart], validation, True)


def crop(image: Image.Image, config: DataConfig, rng: random.Random | None) -> Image.Image:
    """One ``crop_size`` square of an RGB image; without ``rng`` the central one, as validation sees it."""
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if config.crop != "squash":
        side = float(min(width, height))
        left, top = (width - side) / 2, (height - side) / 2
        if config.crop == "random" and rng is not None:
            side *= rng.uniform(config.min_scale, 1)
            left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        box = (left, top, left + side, top + side)
    image = image.resize((config.crop_size, config.crop_size), Image.Resampling.BICUBIC, box=box)
    if config.flip and rng is not None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


class PhotoStream(Dataset):
    """``stream[position]`` -> ``(uint8 (3, S, S), complaints about unreadable photos met)``, for every position from 0 up.

    Positions run through the photos epoch by epoch, in a new order each time (``shuffle``). An unreadable photo is replaced
    by the next one of the epoch; where none can be read there is ``None`` instead of a crop.
    """

    def __init__(self, photos: list[Path], config: DataConfig, seed: int) -> None:
        self.photos, self.config, self.seed = photos, config, seed

    def __getitem__(self, position: int) -> tuple[Tensor | None, list[str]]:
        epoch, place = divmod(position, len(self.photos))
        order = _order(len(self.photos), self.seed, epoch) if self.config.shuffle else range(len(self.photos))
        unreadable: list[str] = []
        for offset in range(len(self.photos)):
            path = self.photos[order[(place + offset) % len(self.photos)]]
            try:
                # A reduced decode must still hold crop_size pixels in the smallest square that may be cut.
                image, _ = open_rgb(path, at_least=round(self.config.crop_size / self.config.min_scale))
            except OSError as error:
                unreadable.append(str(error))
                continue
            cut = crop(image, self.config, random.Random(f"{self.seed}:{position}"))
            return to_uint8(cut), unreadable
        return None, unreadable  # raised by `training_batches`: an exception out of a worker is a page long


@contextmanager
def training_batches(
    stream: PhotoStream, start: int, batch_size: int, steps: int, pin_memory: bool = False, rank: int = 0, ranks: int = 1
) -> Iterator[Iterator[tuple[Tensor, list[str]]]]:
    """``steps`` batches ``(uint8 (N, 3, S, S), complaints)`` from position ``start`` on, loaded ahead by workers.

    Of ``ranks`` processes each gets its part of every batch, of equal size or one photo more.
    Leaving the context ends the workers, whatever happened inside. Raises ``OSError`` where no photo can be read.
    """
    workers = default_workers() if stream.config.workers is None else stream.config.workers
    loader = iter(
        DataLoader(
            stream,
            batch_sampler=_Positions(start, batch_size, steps, rank, ranks),
            num_workers=min(workers, steps),
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_parent,
        )
    )

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        for images, complaints in loader:
            if images is None:
                raise OSError(f"none of the {len(stream.photos)} photos can be read; the first: {complaints[0]}")
            yield images, complaints

    try:
        yield batches()
    finally:
        if hasattr(loader, "_shutdown_workers"):  # else an exception that holds the loader leaves them waiting forever
            loader._shutdown_workers()


@dataclass(frozen=True)
class _Positions:
    """The positions of each batch, made as they are asked for: this rank's part of them."""

    start: int
    batch_size: int
    steps: int
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[range]:
        for step in range(self.steps):
            first = self.start + step * self.batch_size
            yield range(first + self.batch_size * self.rank // self.ranks, first + self.batch_size * (self.rank + 1) // self.ranks)


def default_workers() -> int:
    """One fewer than the cores, 1 to 8: one decodes about 200 photos a second (our measurement). Several ranks on a host share its cores."""
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun leaves each of them a single thread
    cores = torch.get_num_threads() if neighbors == 1 else (os.cpu_count() or 1) // neighbors
    return min(8, max(1, cores - 1))


def load_validation(photos: list[Path], config: DataConfig) -> tuple[Tensor, list[str]]:
    """``(uint8 (N, 3, S, S) central crops, unreadable paths)``. Raises ``OSError`` when none can be read."""
    crops, unreadable = [], []
    for path in photos:
        try:
            crops.append(to_uint8(crop(open_rgb(path)[0], config, None)))
        except OSError as error:
            unreadable.append(str(error))
    if not crops:
        raise OSError(f"none of the {len(photos)} validation photos can be read; the first: {unreadable[0]}")
    return torch.stack(crops), unreadable


def _collate(items: list[tuple[Tensor | None, list[str]]]) -> tuple[Tensor | None, list[str]]:
    complaints = [message for _, messages in items for message in messages]
    if any(image is None for image, _ in items):
        return None, complaints
    return torch.stack([image for image, _ in items]), complaints


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and a terminated process group reach the workers too; the parent still needs them to save and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:epoch {epoch}").shuffle(order)
    return order


def _sample(photos: list[Path], count: int) -> list[Path]:
    return sorted(random.Random(0).sample(photos, min(count, len(photos))))


def _find(folder: Path, key: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}: no folder at {folder}; need a folder of photos ({', '.join(READABLE)})")
    photos = find_images(folder)
    if not photos:
        raise ValueError(f"{key}: no photos below {folder}; looked for {', '.join(READABLE)}, found {count_kinds(folder)}")
    return photos


def _select(photos: list[Path], config: DataConfig) -> list[Path]:
    path = config.annotations
    if not path.is_file():
        raise FileNotFoundError(f"data.annotations: no file at {path}")
    try:
        names = {str(entry["file_name"]) for entry in json.loads(path.read_text(encoding="utf-8"))["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.annotations: {path} is not a COCO annotation file, need {{\"images\": [{{\"file_name\": ...}}, ...]}} ({error})") from error
    selected = [photo for photo in photos if photo.name in names or photo.relative_to(config.content).as_posix() in names]
    if not selected:
        raise ValueError(f"data.annotations: none of the {len(names)} photos that {path} names lies below {config.content}, where there are {len(photos)} others")
    return selected
