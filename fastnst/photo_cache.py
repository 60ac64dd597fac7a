"""Photos prepared once and kept as bare uint8 pixels in one memory-mapped file, so that training does not decode them again.

Guards one convention: a kept photo is bit for bit what preparing its file again gives. So a cache may be deleted, hold a
part of the photos only, or be missing on resuming, and no crop changes.
"""

import hashlib
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastnst.files import atomic_write, exclusive, remove_leftovers
from fastnst.runtime import fed_by_processes, leave_signals_to_parent

CACHE_NAME = "photos.cache"
_TRAILER = struct.Struct("<Q16s")  # bytes of the index that stands before it, then what kind of file this is
_MAGIC = b"fastnst-photos-1"
_SAY_SECONDS = 10

Prepare = Callable[[Path], Tensor]  # -> uint8 (H, W, 3); raises OSError where it cannot


class _Stopped(Exception):
    pass


@dataclass
class PhotoCache:
    """The kept pixels of the photos that ``sizes`` names, ``(height, width)`` by place in the list they were built from.

    ``unreadable``: what was wrong with the photos that could not be prepared, by path.
    """

    path: Path
    offsets: list[int]
    sizes: list[tuple[int, int] | None]
    unreadable: dict[str, str]
    _pixels: Tensor | None = field(default=None, repr=False)

    def photo(self, place: int) -> Tensor | None:
        """uint8 ``(H, W, 3)``, not to be written to; ``None`` where this photo is not kept, or the file is gone."""
        if self.sizes[place] is None:
            return None
        if self._pixels is None:
            try:
                with warnings.catch_warnings():  # torch has no read-only tensors; a writable map may be refused for its size
                    warnings.simplefilter("ignore")
                    self._pixels = torch.from_numpy(np.memmap(self.path, dtype=np.uint8, mode="r"))
            except OSError:  # deleted since; a process that had it open goes on reading it
                self.sizes = [None] * len(self.sizes)
                return None
        height, width = self.sizes[place]
        start = self.offsets[place]
        return self._pixels[start : start + 3 * height * width].view(height, width, 3)

    @property
    def kept(self) -> int:
        return sum(size is not None for size in self.sizes)

    @property
    def gigabytes(self) -> float:
        return sum(3 * size[0] * size[1] for size in self.sizes if size is not None) / 1e9

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # each process maps the file for itself


def default_root() -> Path:
    """The user's folder for caches: ``$XDG_CACHE_HOME/fastnst``, else ``~/.cache/fastnst``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnst"


def cache_path(root: Path, photos: list[Path], base: Path, recipe: str) -> Path:
    """Where the cache of ``photos`` lies: named by their names below ``base``, sizes and times, by ``recipe`` (what decides the
    pixels) and by the decoder's version."""
    digest = hashlib.sha256(f"{_MAGIC}\n{PIL.__version__}\n{recipe}\n".encode())
    for photo in photos:
        try:
            stat = photo.stat()
            seen = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            seen = "missing"
        digest.update(f"{os.path.relpath(photo, base)}\0{seen}\n".encode("utf-8", "surrogateescape"))
    return root / f"photos-{digest.hexdigest()[:20]}" / CACHE_NAME


def read_cache(path: Path, count: int) -> PhotoCache | None:
    """The finished cache at ``path`` of ``count`` photos; ``None`` where there is none or it is damaged."""
    try:
        with open(path, "rb") as file:
            end = file.seek(-_TRAILER.size, os.SEEK_END)
            length, magic = _TRAILER.unpack(file.read())
            if magic != _MAGIC or length > end:
                return None
            file.seek(end - length)
            index = json.loads(file.read(length))
        os.utime(path)  # used now: the least recently used gives way first
        sizes, unreadable = [tuple(size) if size else None for size in index["sizes"]], index["unreadable"]
        offsets = [0, *np.cumsum([3 * size[0] * size[1] if size else 0 for size in sizes]).tolist()]
    except (OSError, ValueError, LookupError, TypeError, struct.error):
        return None
    if len(sizes) != count or offsets[-1] != end - length:
        return None
    return PhotoCache(path, offsets, sizes, unreadable)


def build_cache(
    path: Path,
    photos: list[Path],
    prepare: Prepare,
    limit_gb: float | None,
    workers: int,
    say: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PhotoCache | None:
    """Prepare ``photos`` into ``path``, or wait for the process that is at it; ``None`` when ``should_stop()``.

    ``limit_gb`` bounds all caches beside it together (none: a quarter of what is free on the disk): those least recently
    used are removed, and what does not fit then is not kept. Nothing is seen at ``path`` before the file is whole. Raises
    ``OSError`` naming the file where it cannot be written, ``ChildProcessError`` where one of the ``workers`` was killed.
    """
    waiting = False
    while not should_stop():
        lock = exclusive(path.parent)
        try:
            lock.__enter__()
        except BlockingIOError:
            if not waiting:
                say(f"photo cache: another process is building {path.parent}; waiting for it")
            waiting = True
            time.sleep(0.2)
            continue
        try:
            return read_cache(path, len(photos)) or _build(path, photos, prepare, limit_gb, workers, say, should_stop)
        except _Stopped:
            return None
        finally:
            lock.__exit__(None, None, None)
    return None


def _build(path: Path, photos: list[Path], prepare: Prepare, limit_gb: float | None, workers: int, say: Callable, should_stop: Callable) -> PhotoCache:
    remove_leftovers(path)  # of a build that was killed
    others = sorted((other for other in path.parents[1].glob(f"photos-*/{CACHE_NAME}") if other != path), key=lambda other: other.stat().st_mtime)
    others_bytes = sum(other.stat().st_size for other in others)
    limit = round(limit_gb * 1e9) if limit_gb is not None else (shutil.disk_usage(path.parent).free + others_bytes) // 4
    sizes: list[tuple[int, int] | None] = []
    unreadable: dict[str, str] = {}
    loader = iter(DataLoader(_Prepared(photos, prepare), batch_size=None, num_workers=min(workers, len(photos)), worker_init_fn=leave_signals_to_parent))
    began = said = time.monotonic()
    written = 0
    try:
        with fed_by_processes(), atomic_write(path) as temporary, open(temporary, "wb") as file:
            for place, (pixels, complaint) in enumerate(loader):
                if should_stop():
                    raise _Stopped
                while pixels is not None and written + pixels.numel() + others_bytes > limit and others:
                    oldest = others.pop(0)
                    its_bytes = oldest.stat().st_size
                    with suppress(PermissionError):  # on Windows, where another training reads it
                        oldest.unlink(missing_ok=True)
                        others_bytes -= its_bytes
                if pixels is not None and written + pixels.numel() <= limit:
                    file.write(pixels.numpy().data)
                    written += pixels.numel()
                    sizes.append(tuple(pixels.shape[:2]))
                else:
                    sizes.append(None)
                if pixels is not None and sizes[-1] is None:  # full: the rest is not worth preparing
                    sizes += [None] * (len(photos) - len(sizes))
                    break
                if complaint:
                    unreadable[str(photos[place])] = complaint
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    say(f"photo cache: {place + 1:,} of {len(photos):,} photos, {(place + 1) / (said - began):.0f} a second")
            index = json.dumps({"sizes": sizes, "unreadable": unreadable}).encode()
            file.write(index + _TRAILER.pack(len(index), _MAGIC))
    finally:
        if hasattr(loader, "_shutdown_workers"):
            loader._shutdown_workers()
    return read_cache(path, len(photos))


@dataclass(frozen=True)
class _Prepared(Dataset):
    """``(uint8 (H, W, 3), "")``, or ``(None, complaint)`` of an unreadable photo."""

    photos: list[Path]
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: int) -> tuple[Tensor | None, str]:
        try:
            return self.prepare(self.photos[place]).contiguous(), ""
        except OSError as error:
            return None, str(error)
