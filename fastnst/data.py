"""A COCO-style folder of content photos -> an endless, resumable stream of training crops.

Guards one convention: crop number ``position`` of a run is a pure function of the seed and that number, whoever
loads it and whenever, so resuming is starting at a position and needs no saved random state.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastnst.background import read_ahead
from fastnst.config import Config
from fastnst.photo_cache import PhotoCache, build_cache, cache_path, default_root, read_cache
from fastnst.picture import READABLE, count_kinds, find_images, open_rgb
from fastnst.runtime import fed_by_processes, in_words, leave_signals_to_parent

_WORTH_SHRINKING = 0.75  # scaling by less spares few bytes, and costs time and sharpness


class DataConfig(Config):
    """Which photos, and how a training crop is cut from one.

    ``crop``: ``random`` takes a square at a random place whose side is ``min_scale`` to 1 of the short side, ``center`` the
    whole short side in the middle, ``squash`` the whole photo with its proportions bent; each scaled to ``crop_size``.
    ``cache`` keeps the prepared photos (``prepare``) on disk for all runs that want them alike: ``auto`` in the user's cache
    folder where each is seen twice or more, ``off``, or a folder; crops are the same with it and without.
    """

    content: Path = Field(description="folder of photos, searched recursively")
    annotations: Path | None = Field(None, description="COCO annotation JSON: only the photos that its `images` list names")
    validation: Path | None = Field(None, description="folder of held-out photos; none: validation_photos are set apart from content")
    validation_photos: int = Field(16, ge=1, le=100_000)
    crop_size: int = Field(256, ge=16, le=8192)
    crop: Literal["random", "center", "squash"] = "random"
    min_scale: float = Field(0.5, ge=0.001, le=1)
    flip: bool = True
    shuffle: bool = True
    workers: int | None = Field(None, ge=0, le=1024, description="decoding processes; none: one fewer than the cores, 1 to 8, but a thread where all crops are kept whole (cache, crop other than random)")
    cache: Literal["auto", "off"] | Path = "auto"
    cache_gb: float | None = Field(None, gt=0, description="what all caches of a folder may take together; none: a quarter of what is free")

    @field_validator("cache")
    @classmethod
    def _no_folder_called_no(cls, cache: str | Path) -> str | Path:
        if str(cache).lower() in ("no", "none", "false", "yes", "true", "on"):
            raise ValueError(f"got {str(cache)!r}, need auto, off or a folder; one of that name by its whole path")
        return cache

    @property
    def decoded_side(self) -> int:
        """Pixels that the sides of a decoded photo need: then even the smallest square that ``crop: random`` may cut has ``crop_size``."""
        return math.ceil(self.crop_size / self.min_scale)

    @property
    def kept_side(self) -> int:
        """Pixels of the short side to which a photo is scaled before it is kept; one that has at most a third more, or less, stays as it is."""
        return self.decoded_side if self.crop == "random" else self.crop_size


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


def prepare(path: Path, config: DataConfig) -> Tensor:
    """A photo as all its crops are cut from it, uint8 ``(H, W, 3)``: scaled down where it is much larger than ``kept_side``
    asks, or already the square where every crop takes the same. Raises ``OSError`` as ``open_rgb``."""
    pixels = _pixels(path, at_least=config.decoded_side)
    if config.crop != "random":
        return crop(pixels, config, None).permute(1, 2, 0)
    scale = config.kept_side / min(pixels.shape[:2])
    return _resize(pixels, *(max(1, round(side * scale)) for side in pixels.shape[:2])) if scale < _WORTH_SHRINKING else pixels


def crop(pixels: Tensor, config: DataConfig, rng: random.Random | None) -> Tensor:
    """uint8 ``(H, W, 3)`` -> one ``crop_size`` square ``(3, S, S)`` of it, in the same order of memory; without ``rng`` the central one, as validation sees it."""
    if config.crop != "squash":
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if config.crop == "random" and rng is not None:
            side = max(1, round(side * rng.uniform(config.min_scale, 1)))
            left, top = round(rng.uniform(0, width - side)), round(rng.uniform(0, height - side))
        pixels = pixels[top : top + side, left : left + side]
    pixels = _resize(pixels, config.crop_size, config.crop_size)
    if config.flip and rng is not None and rng.random() < 0.5:
        pixels = pixels.flip(1)
    return pixels.permute(2, 0, 1)


def _pixels(path: Path, at_least: int | None = None) -> Tensor:
    return torch.from_numpy(np.array(open_rgb(path, at_least)[0], dtype=np.uint8))


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, in 8 bits: as Pillow does it, 2.4 times as fast (our measurement)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return F.interpolate(pixels.permute(2, 0, 1)[None], size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def keep_photos(
    photos: list[Path],
    config: DataConfig,
    passes: float,
    say: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PhotoCache | None:
    """The cache of ``photos`` as ``config.cache`` has it, built where there is none yet; ``None`` where they are better decoded.

    ``passes``: how often each photo will be seen. Raises ``OSError`` naming ``data.cache`` where a folder asked for cannot be
    written; ``auto`` then says so and goes without.
    """
    if config.cache == "off":
        return None
    auto = config.cache == "auto"
    try:
        root = default_root() if auto else config.cache
    except RuntimeError:  # of Path.home
        say("photo cache: this user has no home folder, and XDG_CACHE_HOME names none; going without")
        return None
    path = cache_path(root, photos, config.content, f"{config.crop} {config.kept_side} from {_WORTH_SHRINKING} of {config.decoded_side}")
    cache = read_cache(path, len(photos))
    if cache is None:
        if auto and passes < 2:  # building decodes each photo once, too
            return None
        say(f"photo cache: keeping {len(photos):,} photos prepared in {path.parent}, for this run and later ones")
        workers = min(16, torch.get_num_threads()) if config.workers is None else config.workers
        try:
            cache = build_cache(path, photos, partial(prepare, config=config), config.cache_gb, workers, say, should_stop)
        except ChildProcessError:  # without a cache there are such processes, too
            raise
        except OSError as error:
            if not auto:
                raise OSError(f"data.cache: {in_words(error)}; give another folder, or off") from error
            say(f"photo cache: {in_words(error)}; going without")
    if cache is not None:
        damaged = f", {len(cache.unreadable)} cannot be read" if cache.unreadable else ""
        say(f"photo cache: {cache.kept:,} of {len(photos):,} photos{damaged}, {cache.gigabytes:.2f} GB in {path.parent}; safe to delete, data.cache: off goes without")
    return cache


class PhotoStream(Dataset):
    """``stream[position]`` -> ``(uint8 (3, S, S), complaints about unreadable photos met)``, for every position from 0 up.

    Positions run through the photos epoch by epoch, in a new order each time (``shuffle``). An unreadable photo is replaced
    by the next one of the epoch; where none can be read there is ``None`` instead of a crop. ``cache``: of these photos.
    """

    def __init__(self, photos: list[Path], config: DataConfig, seed: int, cache: PhotoCache | None = None) -> None:
        self.photos, self.config, self.seed, self.cache = photos, config, seed, cache

    def __getitem__(self, position: int) -> tuple[Tensor | None, list[str]]:
        epoch, place = divmod(position, len(self.photos))
        order = _order(len(self.photos), self.seed, epoch) if self.config.shuffle else range(len(self.photos))
        unreadable: list[str] = []
        for offset in range(len(self.photos)):
            index = order[(place + offset) % len(self.photos)]
            pixels = self.cache.photo(index) if self.cache is not None else None
            try:
                pixels = prepare(self.photos[index], self.config) if pixels is None else pixels
            except OSError as error:
                unreadable.append(str(error))
                continue
            return crop(pixels, self.config, random.Random(f"{self.seed}:{position}")), unreadable
        return None, unreadable  # raised by `training_batches`: an exception out of a worker is a page long


@contextmanager
def training_batches(
    stream: PhotoStream, start: int, batch_size: int, steps: int, device: torch.device = torch.device("cpu"), rank: int = 0, ranks: int = 1
) -> Iterator[Iterator[tuple[Tensor, list[str]]]]:
    """``steps`` batches ``(uint8 (N, 3, S, S), complaints)`` from position ``start`` on, loaded ahead by workers, processes or a thread; on ``device``, where it is a GPU's.

    Of ``ranks`` processes each gets its part of every batch, of equal size or one photo more.
    Leaving the context ends the workers, whatever happened inside. Raises ``OSError`` where no photo can be read, ``ChildProcessError``
    out of the context where a worker was killed.
    """
    workers = default_workers() if stream.config.workers is None else stream.config.workers
    by_thread = stream.config.workers is None and stream.config.crop != "random" and stream.cache is not None and stream.cache.kept == len(stream.photos)
    workers = 0 if by_thread else workers  # kept squares are merely copied: in less time than it takes to hand them over from another process
    loader = iter(
        DataLoader(
            stream,
            batch_sampler=_Positions(start, batch_size, steps, rank, ranks),
            num_workers=min(workers, steps),
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
        )
    )

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        for images, complaints in loader:
            if images is None:
                raise OSError(f"none of the {len(stream.photos)} photos can be read; the first: {complaints[0]}")
            yield images, complaints

    made = read_ahead(batches(), "reading photos", ahead=4) if by_thread else batches()
    try:
        with fed_by_processes():
            yield _copied_ahead(made, device) if device.type == "cuda" else made
    finally:
        made.close()
        if hasattr(loader, "_shutdown_workers"):  # else an exception that holds the loader leaves them waiting forever
            loader._shutdown_workers()


def _copied_ahead(batches: Iterator[tuple[Tensor, list[str]]], device: torch.device) -> Iterator[tuple[Tensor, list[str]]]:
    """``batches`` on a GPU, each copied there while the one before is worked on."""
    aside, ready, failed = torch.cuda.Stream(device), None, None
    while failed is None:
        try:
            images, complaints = next(batches)
        except (StopIteration, OSError) as error:  # which comes after the batch before
            failed = error
        else:
            with torch.cuda.stream(aside):
                copied = images.to(device, non_blocking=True)
                done = aside.record_event()
        if ready is not None:
            yield ready
        if failed is None:
            torch.cuda.current_stream(device).wait_event(done)
            copied.record_stream(torch.cuda.current_stream(device))  # its memory is not for the next before what follows here has read it
            ready = copied, complaints
    if isinstance(failed, OSError):
        raise failed


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
            crops.append(crop(_pixels(path), config, None))
        except OSError as error:
            unreadable.append(str(error))
    if not crops:
        raise OSError(f"none of the {len(photos)} validation photos can be read; the first: {unreadable[0]}")
    return torch.stack(crops).contiguous(), unreadable


def _collate(items: list[tuple[Tensor | None, list[str]]]) -> tuple[Tensor | None, list[str]]:
    complaints = [message for _, messages in items for message in messages]
    if any(image is None for image, _ in items):
        return None, complaints
    return torch.stack([image.permute(1, 2, 0) for image, _ in items]).permute(0, 3, 1, 2), complaints  # in its order of memory, else a photo takes 0.4 ms


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
