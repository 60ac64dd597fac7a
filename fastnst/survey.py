"""What is in a folder of photos, before a training finds out: unreadable, too small, gray."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastnst.data import DataConfig, default_workers
from fastnst.picture import open_rgb

_SAMPLE = 500  # headers that are read ahead of a training: 0.1 s on a local disk
_NAMED = 5


@dataclass(frozen=True)
class Survey:
    """What was found; ``thorough`` where every photo was decoded, else the headers of some were read."""

    found: int
    looked_at: int
    thorough: bool
    crop_size: int
    unreadable: list[str]
    small: list[str]
    gray: list[str]

    def __str__(self) -> str:
        how = "every one looked at" if self.thorough else f"headers of {self.looked_at:,} read"
        lines = [f"photos: {self.found:,} found, {how}"]
        for names, what in (
            (self.unreadable, "cannot be read and will be skipped"),
            (self.small, f"are smaller than data.crop_size {self.crop_size} and will be scaled up"),
            (self.gray, "are gray"),
        ):
            if names:
                shown = names if self.thorough and names is self.unreadable else names[:_NAMED]
                more = [f"and {len(names) - len(shown):,} more"] if len(names) > len(shown) else []
                begin, between = ("\n    ", "\n    ") if names is self.unreadable else (" ", ", ")  # what is wrong with each is a sentence
                lines.append(f"  {len(names):,} {what}:{begin}{between.join([*shown, *more])}")
        return "\n".join(lines)


def survey(photos: list[Path], config: DataConfig, thorough: bool = False, report: Callable[[int], None] = lambda done: None) -> Survey:
    """Look at ``photos``: at the headers of some, evenly spread, or ``thorough``, decoding all. ``report``: photos done.

    Raises ``OSError`` where none can be read.
    """
    chosen = photos if thorough else photos[:: max(1, -(-len(photos) // _SAMPLE))]
    unreadable, small, gray = [], [], []
    pool = ThreadPoolExecutor(default_workers())  # decoders let go of the interpreter
    try:
        for done, (path, seen) in enumerate(zip(chosen, _in_order(pool, _decode if thorough else _read_header, chosen)), 1):
            if isinstance(seen, OSError):
                unreadable.append(str(seen))
            else:
                (width, height), colorless = seen
                if min(width, height) < config.crop_size:
                    small.append(f"{path} ({width}x{height})")
                if colorless:
                    gray.append(str(path))
            report(done)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for no more than is being decoded
    if len(unreadable) == len(chosen):
        raise OSError(f"data.content: none of the {len(chosen):,} photos looked at below {config.content} can be read; the first: {unreadable[0]}")
    return Survey(len(photos), len(chosen), thorough, config.crop_size, unreadable, small, gray)


def _in_order(pool: ThreadPoolExecutor, look: Callable[[Path], object], photos: list[Path]) -> Iterable:
    for start in range(0, len(photos), 256):  # not all at once: Ctrl-C would wait for them
        yield from pool.map(look, photos[start : start + 256])


def _read_header(path: Path) -> tuple[tuple[int, int], bool] | OSError:
    try:
        with Image.open(path) as image:
            return image.size, image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    except Exception:  # the full decoder knows to say why
        return _decode(path)


def _decode(path: Path) -> tuple[tuple[int, int], bool] | OSError:
    try:
        image, _ = open_rgb(path)
    except OSError as error:
        return error
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(int)
    return image.size, bool((small.max(axis=2) - small.min(axis=2)).max() <= 4)  # JPEG tints gray by a level or two
