"""Frames through a function: files whole and in order, cameras live; reading, stylizing and writing each in a thread of its own.

Memory is constant: between threads wait one batch at most. The function is given: uint8 RGB ``(N, H, W, 3)`` -> the same shape.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from fastnst.background import Writer, read_ahead
from fastnst.files import check_output
from fastnst.picture import ImageSize
from fastnst.video_input import WHOLE, Frame, VideoInput, is_numbered, numbered_path, open_camera, open_video
from fastnst.video_output import Encoding, check_writable_video, create_video

Stylize = Callable[[np.ndarray], np.ndarray]  # uint8 RGB (N, H, W, 3) -> the same shape
Finish = Callable[[np.ndarray, np.ndarray], np.ndarray]  # content, stylized, both uint8 (H, W, 3) -> what is shown, frame by frame
_TOLD = 5  # broken frames named one by one


@dataclass(frozen=True)
class Progress:
    """How far a video is: ``done`` frames of ``total`` (or unknown) after ``seconds``; ``broken`` were left out, ``there``
    existed already, ``missing`` seconds are lacking at the end."""

    done: int
    total: int | None
    seconds: float
    broken: int = 0
    there: int = 0
    missing: Fraction = Fraction(0)

    @property
    def frames_per_second(self) -> float:
        return self.done / self.seconds if self.seconds > 0 else 0.0


def stylize_video(
    source: str | Path,
    target: str | Path,
    stylize: Stylize,
    *,
    size: ImageSize = ImageSize(),
    batch_size: int = 4,
    finish: Finish | None = None,
    encoding: Encoding = Encoding(),
    picture_quality: int = 95,
    pictures_per_second: Fraction | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    finish_in_order: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Stylize a video file, GIF or picture sequence into another. Times, duration, sound and color are kept, rotation is applied.

    ``stylize`` is called in the calling thread, ``on_progress`` after every batch; ``say`` is told what is left out, from any thread.
    Once ``should_stop`` holds, the frames done so far are put in place as a video that plays. ``skip_existing`` keeps the
    numbered pictures that are there and makes the others; those that are there are computed again only where ``finish_in_order`` says
    that ``finish`` depends on the frames before. Raises as ``check_output``, and ``OSError`` or ``ValueError``
    naming the file; then the target is as it was.
    """
    target = Path(target)
    check_writable_video(target)
    check_output(target, [source], overwrite)
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if is_numbered(target) and (Path(source).is_dir() or is_numbered(source)) and target.parent.resolve() == folder.resolve():
        raise ValueError(f"--output {target} would lie among the input's own pictures, and could overwrite them; choose another folder")
    told, stopped = 0, False
    keep = skip_existing and is_numbered(target)

    def is_there(frame: Frame) -> bool:
        return keep and numbered_path(target, frame.number).exists()

    def say_a_few(message: str) -> None:
        nonlocal told
        told += 1
        if told <= _TOLD:
            say(message)
        elif told == _TOLD + 1:
            say(f"{source}: more is broken; it is counted, not told")

    with contextlib.ExitStack() as stack:
        video = stack.enter_context(open_video(source, size, say_a_few, pictures_per_second))
        write = stack.enter_context(create_video(target, video.info, encoding, say, overwrite, picture_quality, cut=lambda: stopped))
        began, done, there = time.monotonic(), 0, 0

        def write_all(batch: tuple[list[Frame], np.ndarray]) -> None:
            for frame, stylized in zip(*batch, strict=True):
                shown = replace(frame, pixels=finish(frame.pixels, stylized) if finish else stylized)
                if not is_there(frame):
                    write(shown)

        with Writer(write_all, "writing frames") as writer:
            with contextlib.closing(read_ahead(_batches(video, batch_size), "reading frames")) as batches:
                for batch in batches:
                    if stopped := should_stop():
                        break
                    wanted = [frame for frame in batch if not is_there(frame)]
                    done, there = done + len(wanted), there + len(batch) - len(wanted)
                    if computed := batch if finish_in_order else wanted:
                        writer.put((computed, stylize(np.stack([frame.pixels for frame in computed]))))
                    on_progress(Progress(done, video.info.count, time.monotonic() - began, video.broken, there))
        if not done and not there and not stopped:
            raise OSError(f"{source}: no frame of it can be read")
    total, read = video.info.count or 0, done + there + video.broken
    missing = (total - read) / video.info.rate if read < WHOLE * total else video.info.missing
    return Progress(done, video.info.count, time.monotonic() - began, video.broken, there, missing)


def _batches(frames: Iterable[Frame], batch_size: int) -> Iterator[list[Frame]]:
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class LiveProgress:
    """How a camera is doing: ``shown`` stylized frames, ``dropped`` ones that came too fast, frames per second over the last two seconds."""

    shown: int
    dropped: int
    frames_per_second: float
    seconds: float


def stylize_live(
    camera: str,
    stylize: Stylize,
    show: Callable[[np.ndarray, LiveProgress], None],
    *,
    size: ImageSize = ImageSize(),
    target: str | Path | None = None,
    finish: Finish | None = None,
    encoding: Encoding = Encoding(),
    picture_quality: int = 95,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> LiveProgress:
    """Stylize a camera (see ``open_camera``) as it films, the newest frame each time; older ones are dropped, so nothing lags.

    ``show(stylized, progress)`` gets each frame, uint8 RGB ``(H, W, 3)``; ``target`` records them as they were shown. Files and test
    sources run at their own speed, as a camera would. Ends with the source, or once ``should_stop`` holds.
    """
    if target is not None:
        check_writable_video(target)
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(open_camera(camera, size, say))
        write = None
        if target is not None:
            info = replace(video.info, variable_rate=True, time_base=Fraction(1, 90_000), count=None)
            write = stack.enter_context(Writer(stack.enter_context(create_video(target, info, encoding, say, overwrite, picture_quality)), "writing frames"))
        newest = stack.enter_context(_Newest(video))
        began = time.monotonic()
        times: deque[float] = deque()
        progress = LiveProgress(0, 0, 0.0, 0.0)
        waiting: Frame | None = None
        while not should_stop():
            frame = newest.take(timeout=0.1)
            if frame is None:
                if newest.ended:
                    break
                continue
            stylized = stylize(frame.pixels[None])[0]
            if finish is not None:
                stylized = finish(frame.pixels, stylized)
            now = time.monotonic()
            times.append(now)
            while now - times[0] > 2:
                times.popleft()
            rate = (len(times) - 1) / (now - times[0]) if len(times) > 1 else 0.0
            progress = LiveProgress(progress.shown + 1, newest.dropped, rate, now - began)
            show(stylized, progress)
            if write is not None:
                # A recorded frame waits for the next, to know how long it was shown.
                if waiting is not None:
                    write.put_or_drop(replace(waiting, duration=frame.time - waiting.time))
                waiting = replace(frame, pixels=stylized)
        if write is not None and waiting is not None:
            write.put(waiting)
    return progress


class _Newest:
    """A slot that holds the newest frame of a video, which runs in another thread no faster than its own clock."""

    def __init__(self, video: VideoInput) -> None:
        self.dropped = 0
        self.ended = False
        self._video = video
        self._frame: Frame | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="filming", daemon=True)

    def _run(self) -> None:
        try:
            began = first = None
            for frame in self._video:
                if began is None:
                    began, first = time.monotonic(), frame.time
                ahead = float(frame.time - first) - (time.monotonic() - began)
                if self._closed.wait(max(0.0, ahead)):
                    return
                with self._changed:
                    self.dropped += self._frame is not None
                    self._frame = replace(frame, time=frame.time - first)
                    self._changed.notify()
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            with self._changed:
                self._changed.notify()

    def take(self, timeout: float) -> Frame | None:
        """The newest frame not yet taken; ``None`` when there is none in ``timeout`` seconds or the video has ended."""
        with self._changed:
            if self._frame is None and not self.ended:
                self._changed.wait(timeout)
            frame, self._frame = self._frame, None
        if frame is None and self._error is not None:
            raise self._error
        return frame

    def __enter__(self) -> "_Newest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
