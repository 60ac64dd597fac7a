"""Apply a trained model: one forward pass for each picture. Knows nothing of losses, data sets or training, nor needs torch."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastnst.blend import Blend, read_mask
from fastnst.engine import Engine, load_engine, load_network
from fastnst.grain import GRAIN, add_grain, check_grain
from fastnst.jobs import Job
from fastnst.model import ModelInfo
from fastnst.picture import MOST_PIXELS, ImageSize, open_rgb, save_picture, to_rgb
from fastnst.runtime import in_words, is_out_of_memory, outlive_fork
from fastnst.stages import minds_ground
from fastnst.tiles import plan_rows, stylize_tiled

_MEMORY_SHARE = 0.8  # of what is free, for one picture
_LARGE = 60_000_000  # bytes of a decoded picture from which on fewer are held ready


_stylizers: weakref.WeakSet[Stylizer] = weakref.WeakSet()


def _renew_turns() -> None:
    """In a forked process, which has not the thread whose turn it may have been."""
    for stylizer in _stylizers:
        stylizer._turn = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_turns)


class Stylizer:
    """A model on a device, ready to be called, also from several threads: ``Stylizer.from_file("model.safetensors")(image)``.

    ``tile``: ``auto`` goes strip by strip where the whole picture needs more memory than is free, ``off`` never does, a number
    always does, in strips of so many rows. Strips change no pixel by more than 1/255 (in float32; patterns of single pixels change more in torch and ONNX Runtime). ``notice`` is called
    with a sentence where something is done in another way than expected. ``blend`` says what of the photo stays. ``grain``, 0 to 1, is what flat parts
    of a picture get first, in shares of its contrast.
    """

    def __init__(
        self, engine: Engine, tile: str | int = "auto", notice: Callable[[str], None] = lambda message: None, blend: Blend = Blend(), grain: float = GRAIN
    ) -> None:
        self.engine = engine
        self.info: ModelInfo = engine.network.info
        self.tile = _parse_tile(tile)
        self.notice = notice
        self.blend = blend
        self.grain = check_grain(grain)
        self._turn = threading.Lock()  # engines take one caller at a time
        self._plain: tuple[Any, np.ndarray | None] = ((), None)  # shape and color of the last picture of a single color, and what became of it
        self._float32: Engine | None = engine if engine.precision == "float32" else None
        _stylizers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Stylizer stays in its process: it can be neither pickled nor copied; give other processes the name of its file, for Stylizer.from_file")

    @classmethod
    def from_file(
        cls,
        model: str | Path,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "auto",
        tile: str | int = "auto",
        opacity: float = 1.0,
        keep_colors: bool = False,
        mask: str | Path | np.ndarray | None = None,
        grain: float = GRAIN,
    ) -> Stylizer:
        """Load a model file, ``.safetensors`` or ``.onnx``; raises as ``load_network``, ``load_engine``, ``Blend``, ``check_grain`` and, for a ``mask`` that is a file, ``read_mask``."""
        blend = Blend(opacity, keep_colors, read_mask(mask) if isinstance(mask, (str, Path)) else mask)
        return cls(load_engine(load_network(model), str(device), engine, precision), tile, blend=blend, grain=grain)

    def __call__(self, image: Any) -> Any:
        """Stylize one or more pictures of any size; what comes out is of the kind and size that went in.

        A PIL image (alpha is kept), a numpy array ``(H, W, 3)`` or ``(N, H, W, 3)`` of uint8, a torch tensor
        ``(N, 3, H, W)`` of RGB in [0, 1] on any device, or a path, which gives a PIL image. Raises ``TypeError`` or ``ValueError`` for anything else.
        """
        if isinstance(image, (str, os.PathLike)):
            picture, alpha = open_rgb(image)
            return self._with_alpha(picture, alpha)
        if isinstance(image, Image.Image):
            return self._with_alpha(*to_rgb(ImageOps.exif_transpose(image)))
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3 or not image.size:
                raise ValueError(f"got an array of {image.dtype} and shape {image.shape}, need uint8 (H, W, 3) or (N, H, W, 3)")
            return self.pictures(image[None])[0] if image.ndim == 3 else self.pictures(image)
        if type(image).__module__.split(".")[0] == "torch":
            return self._tensor(image)
        raise TypeError(f"got a {type(image).__name__}, need a path, a PIL image, a numpy array or a torch tensor")

    def pictures(self, pixels: np.ndarray, report: Callable[[float], None] = lambda done: None, in_place: bool = False) -> np.ndarray:
        """``(N, H, W, 3)`` uint8 -> the same; ``in_place`` lets strips overwrite ``pixels``. Raises ``MemoryError`` where even strips are too large."""

        def stylize(engine: Engine, some: np.ndarray) -> np.ndarray:
            whole = self._whole(engine, some.shape[:3], lambda: engine.run(some, **self._at_device))
            if whole is None:
                whole = np.stack([self._strips(engine, one, report, in_place) for one in (self._grained(some, in_place) if self._at_device else some)])
            return whole

        in_place = in_place and not self.blend
        with self._turn:
            plain = self._of_one_color(pixels)
            exact = self._for_float32(pixels, plain)  # asked of the photo: black beside white shows it with grain, too (36 dB)
            given = pixels if self._at_device else self._grained(pixels, in_place)
            in_place = in_place or given is not pixels  # a copy of ours
            whole = self._together(stylize, given, exact, plain, np.empty_like)
        return self.blend.pictures(pixels, whole) if self.blend else whole

    @property
    def _at_device(self) -> dict[str, float]:
        """What the engine's passes are told besides: away from the CPU they add the grain themselves."""
        return {} if self.engine.device == "cpu" else {"grain": self.grain}

    def _grained(self, pictures: np.ndarray, in_place: bool) -> np.ndarray:
        """``(N, H, W, 3)`` of levels with their grain."""
        if not self.grain:
            return pictures
        grained = pictures if in_place else pictures.copy()
        for one in grained:
            add_grain(one, self.grain)
        return grained

    def _for_float32(self, pictures: np.ndarray, done: Container[int]) -> list[int]:
        """Those of ``(N, H, W, 3)``, levels of 0..255, that are not ``done`` and would show the rounding of the engine's precision, by index."""
        rounds = self.engine.precision == "bfloat16"
        return [index for index, one in enumerate(pictures) if rounds and index not in done and _shows_rounding(one)]

    def _in_float32(self) -> Engine:
        self._float32 = self._float32 or load_engine(self.engine.network, self.engine.device, precision="float32")
        return self._float32

    def _together(self, stylize: Callable[[Engine, Any], Any], pictures: Any, exact: list[int], plain: dict[int, Any], empty_like: Callable[[Any], Any]) -> Any:
        """``(N, ...)``: what ``stylize`` makes of the pictures, of the ``exact`` in float32, and in the place of the ``plain`` what these are already."""
        if len(exact) == len(pictures):
            return stylize(self._in_float32(), pictures)
        apart = {index: stylize(self._in_float32(), pictures[index : index + 1])[0] for index in exact} | plain  # before strips overwrite anything
        whole = stylize(self.engine, pictures) if len(apart) < len(pictures) else empty_like(pictures)
        if apart and not isinstance(whole, np.ndarray):
            whole = whole.clone()  # torch lets nobody write into what inference mode made
        for index, stylized in apart.items():
            whole[index] = stylized
        return whole

    def _whole(self, engine: Engine, shape: tuple[int, int, int], run: Callable[[], Any]) -> Any:
        """What ``run`` makes of whole pictures, ``(N, H, W)``; None where they are to go in strips."""
        count, height, width = shape
        if self.tile != "off" and (self.tile != "auto" or engine.needed_memory(count, height, width) > _MEMORY_SHARE * engine.free_memory()):
            return None
        try:
            return run()
        except Exception as error:  # ONNX Runtime has kinds of its own
            if not is_out_of_memory(error):
                raise
            if self.tile == "off":
                raise MemoryError(f"{width}x{height} pixels need more memory than {engine.device} has free; use --tile auto, or --short-side N") from error
            self.notice(f"{width}x{height} pixels did not fit into the memory of {engine.device}; going on in strips")
        return None

    def _strips(self, engine: Engine, pixels: np.ndarray, report: Callable[[float], None] = lambda done: None, in_place: bool = False) -> np.ndarray:
        rows = self.tile if isinstance(self.tile, int) else plan_rows(engine.network, pixels.shape[1])
        try:
            return stylize_tiled(engine, pixels, rows, engine.free_memory(), report, in_place, self.notice)
        except Exception as error:  # ONNX Runtime has kinds of its own
            if not is_out_of_memory(error):
                raise
            raise MemoryError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels do not fit into the memory of {engine.device}, not even in strips; use --short-side N") from error

    def _of_one_color(self, pictures: np.ndarray) -> dict[int, np.ndarray]:
        """Those of ``(N, H, W, 3)`` that are of a single color, stylized, by index.

        All deviations in them are rounding, of which norms would make a pattern as strong as a style; strips in float32 know it from deviations.
        The last one is kept: black frames of a video come in a row, also where they fade, which makes no difference but to padding by a constant.
        """
        found = {}
        for index, one in enumerate(pictures):
            color = one[0, 0]
            if (one[0] == color).all() and (one == color).all():  # the first row tells of most that they are not
                this = (one.shape, one.dtype, color.tobytes() if minds_ground(self.engine.network) else None)
                if self._plain[0] != this:
                    self._plain = (this, self._strips(self._in_float32(), one))
                found[index] = self._plain[1]
        return found

    def _with_alpha(self, picture: Image.Image, alpha: Image.Image | None) -> Image.Image:
        if not picture.width * picture.height:
            raise ValueError(f"got a picture of {picture.width}x{picture.height} pixels, need one at least")
        stylized = Image.fromarray(self.pictures(np.asarray(picture)[None])[0])
        return stylized if alpha is None else Image.merge("RGBA", (*stylized.split(), alpha))

    def _tensor(self, images: Any) -> Any:
        import torch

        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
            raise ValueError(f"got a tensor of {images.dtype} and shape {tuple(images.shape)}, need floats (N, 3, H, W) in [0, 1]")
        outlive_fork()
        given = images.detach().float()

        def levels(some: Any) -> np.ndarray:
            return some.cpu().permute(0, 2, 3, 1).numpy() * 255

        def pixels(stylized: Any) -> Any:
            return (torch.from_numpy(stylized).movedim(-1, -3) / 255).contiguous()

        def stylize(engine: Engine, some: Any) -> Any:
            on_device = hasattr(engine, "run_tensor")
            whole = self._whole(
                engine,
                (len(some), *some.shape[2:]),
                lambda: engine.run_tensor(some.to(engine.device), "float", **self._at_device) if on_device else torch.from_numpy(engine.run(some.cpu().numpy(), "float")),
            )
            if whole is None:
                seen = self._grained(levels(some), in_place=True) if self._at_device else levels(some)
                whole = pixels(np.stack([self._strips(engine, one, in_place=True) for one in seen]))
            return whole

        with self._turn:
            grained = given
            if given.is_cuda and self._at_device:  # nothing here should wait for it; its kernels know pictures of one color, and take over after a few
                exact, plain = [], {}
            else:
                least, most = (float(end) for end in given.aminmax())
                if not (least > -0.5 and most < 1.5):  # a little beyond is what resizing leaves; NaN is neither
                    raise ValueError(f"got a tensor of values from {least:g} to {most:g}, need [0, 1]")
                seen = levels(given)
                plain = self._of_one_color(seen)
                exact = self._for_float32(seen, plain)
                if self.grain and not self._at_device:
                    seen = self._grained(seen, in_place=True)
                    grained = pixels(seen)
                del seen  # as large as the pictures, and of no use to what follows
            whole = self._together(stylize, grained, exact, {index: pixels(stylized) for index, stylized in plain.items()}, torch.empty_like)
        whole = whole.to(images.device)
        if self.blend:
            whole = self.blend.tensors(given, whole)
        whole = whole.to(images.dtype)
        return whole.clone() if whole.is_inference() else whole  # which nobody could write into, nor learn from


@dataclass(frozen=True)
class Done:
    """What became of a job: ``error`` is None where its target was written."""

    job: Job
    error: Exception | None = None


def stylize_files(
    stylizer: Stylizer,
    jobs: Iterable[Job],
    size: ImageSize = ImageSize(),
    quality: int = 95,
    report: Callable[[float], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Done]:
    """Stylize files, each alone or batched with its neighbours of the same size; alpha is kept, a failure costs its own file only.

    Pictures are decoded ahead and written behind while the network runs; at most a handful is in memory.
    ``report`` gets the share done of a picture that goes in strips.
    """
    waiting, ahead = deque(jobs), 2 + stylizer.engine.batch
    decoding: deque[tuple[Job, Future]] = deque()
    writing: deque[tuple[Job, Future]] = deque()
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as writers:
        try:
            while (waiting or decoding) and not should_stop():
                while waiting and len(decoding) < ahead:
                    job = waiting.popleft()
                    decoding.append((job, readers.submit(_decode, job.source, size)))
                batch: list[tuple[Job, np.ndarray, Any]] = []
                while decoding and (not batch or (len(batch) < _fitting(stylizer, batch[0][1]) and _is_alike(decoding[0], batch[0][1]))):
                    job, future = decoding.popleft()
                    try:
                        batch.append((job, *future.result()))
                    except (OSError, ValueError, MemoryError) as error:
                        yield Done(job, _named(error, job))
                if batch:
                    ahead = 2 + stylizer.engine.batch if batch[0][1].size < _LARGE else 1
                    try:
                        stylized = stylizer.pictures(np.stack([pixels for _, pixels, _ in batch]) if len(batch) > 1 else batch[0][1][None], report, in_place=True)
                    except (MemoryError, ValueError) as error:
                        for job, _, _ in batch:
                            yield Done(job, _named(error, job))
                        continue
                    for index, (job, _, alpha) in enumerate(batch):
                        writing.append((job, writers.submit(save_picture, Image.fromarray(stylized[index]), job.target, alpha, quality)))
                    batch = stylized = future = None  # what they hold is not needed while pictures are written
                while len(writing) > ahead or (writing and writing[0][1].done()):
                    yield _written(*writing.popleft())
            while writing:
                yield _written(*writing.popleft())
        finally:
            for _, future in decoding:
                future.cancel()


def _shows_rounding(levels: np.ndarray) -> bool:
    """Whether ``(H, W, 3)`` of 0..255 is for float32: norms make so much of the little that is there that bfloat16's rounding shows (25 to 46 dB, to the eye as well).

    On a plain ground more than nine tenths of the pixels equal the one 2 further on (in 1,352 photos 0.75 at most); in patterns that a stride turns into one color, the
    one 2, 3 or 4 further on. What has no detail anywhere, ramps and skies without grain, photos blurred by 4 px and more, bends by less
    than 2.5 levels over 4 px (RMS; these photos by 5.7 and more). What is left, such as photos blurred by 3 px, is at 46 dB or more in all shipped styles.
    """
    some = levels[::16].astype(np.float32)
    if some.shape[1] < 5:
        return True
    alike = max((some[:, lag:] == some[:, :-lag]).all(axis=2).mean() for lag in (2, 3, 4))
    bend = some[:, 4:] - 2 * some[:, 2:-2] + some[:, :-4]
    return bool(alike > 0.9 or np.square(bend).mean() < 2.5**2)


def _decode(source: Path, size: ImageSize) -> tuple[np.ndarray, Image.Image | None]:
    picture, alpha = open_rgb(source)
    height, width = size.of(picture.height, picture.width)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{source}: scaled to {width}x{height}, more than {MOST_PIXELS // 10**6} megapixels; use a smaller --short-side")
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        alpha = alpha and alpha.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture), alpha


def _fitting(stylizer: Stylizer, pixels: np.ndarray) -> int:
    """How many pictures of this size make a batch: some 2 million pixels, where batches pay."""
    return max(1, min(stylizer.engine.batch, 2_000_000 // (pixels.shape[0] * pixels.shape[1])))


def _is_alike(next_one: tuple[Job, Future], pixels: np.ndarray) -> bool:
    future = next_one[1]  # waited for: batches of ever other numbers could not be recorded
    return future.exception() is None and future.result()[0].shape == pixels.shape


def _written(job: Job, future: Future) -> Done:
    try:
        future.result()
    except (OSError, ValueError) as error:
        return Done(job, _named(error, job))
    return Done(job)


def _named(error: Exception, job: Job) -> Exception:
    """The error, naming the file it is about."""
    text = in_words(error)
    return error if str(job.source) in text or str(job.target) in text else OSError(f"{job.source}: {text}")


def _parse_tile(tile: str | int) -> str | int:
    if tile in ("auto", "off"):
        return tile
    if str(tile).isdigit() and int(tile) >= 16:
        return int(tile)
    raise ValueError(f"--tile: got {tile!r}, need auto, off or the rows of a strip, 16 or more")
