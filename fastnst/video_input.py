"""Moving pictures -> frames: video files, GIFs, numbered pictures and cameras, one frame in memory at a time.

Guards the convention at the door: a frame is uint8 RGB ``(H, W, 3)``, upright, of square pixels, full range, BT.709/sRGB.
PyAV is imported when a video is opened, never with this module.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from pathlib import Path

import numpy as np
from PIL import Image

from fastnst.picture import READABLE, ImageSize, open_rgb

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".flv", ".wmv", ".ogv", ".y4m")
PICTURES_PER_SECOND = Fraction(25)
_LARGE = 2**30  # bytes
_EVEN = Fraction(2, 1000)  # seconds by which steps of even times may differ, as many files round them to milliseconds
WHOLE = Fraction(8, 10)  # of the frames, or of the duration, that a file claims: with less it is cut off. Claims are rounded, and may leave out the last frame
_NUMBERED = re.compile(r"%\d+d|%d(?![^\W\d_])")  # %d before a letter is words: 50%discount.jpg
BT709, _BT601 = 1, 5  # matrix coefficients, as ITU-T H.273 numbers them
# FFmpeg's SWS_BICUBIC, _FULL_CHR_H_INT, _FULL_CHR_H_INP and _ACCURATE_RND. Without them it cuts off instead of rounding, 0.7 of 255
# too dark, and repeats chroma instead of interpolating it.
ACCURATE = 0x4 | 0x2000 | 0x4000 | 0x40000
_PQ, _HLG = 16, 18  # transfer characteristics of high dynamic range, ITU-T H.273
LIMITED, FULL = 1, 2  # FFmpeg's color ranges


@dataclass(frozen=True)
class Frame:
    """One picture of a video: ``pixels`` uint8 RGB ``(H, W, 3)``, shown from ``time`` on for ``duration`` (seconds)."""

    pixels: np.ndarray
    time: Fraction
    duration: Fraction
    number: int  # counts from 1, broken frames too; of numbered pictures the number in the file name


@dataclass(frozen=True)
class VideoInfo:
    """What is known before the first frame: how many there are, where that is known; ``rate`` is frames per second on average, as the file tells it."""

    name: str
    count: int | None
    rate: Fraction
    time_base: Fraction  # seconds; every time of a frame is a multiple of it
    variable_rate: bool
    missing: Fraction = Fraction(0)  # seconds at the end that the file says it has, and has not: it is cut off
    start: Fraction = Fraction(0)  # seconds that the file's own clock shows at time 0
    audio: str | None = None  # the file to take sound from, where there is one


class VideoInput:
    """Iterate over the frames; ``info`` tells what is known before, ``broken`` counts frames that could not be decoded."""

    def __init__(self, info: VideoInfo, read: Callable[["VideoInput"], Iterator[Frame]], close: Callable[[], None] = lambda: None) -> None:
        self.info = info
        self.broken = 0
        self.close = close
        self._frames = read(self)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def __enter__(self) -> "VideoInput":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_numbered(path: str | Path) -> bool:
    """Whether ``path`` is a pattern such as ``frames/%04d.png``, and not a file or folder of that very name."""
    return _NUMBERED.search(Path(path).name) is not None and not Path(path).exists()


def numbered_path(pattern: Path, number: int) -> Path:
    """The file that ``pattern`` stands for: ``frames/%04d.png`` and 7 give ``frames/0007.png``."""
    return pattern.with_name(_NUMBERED.sub(lambda hit: hit[0] % number, pattern.name, count=1))


def is_video(path: str | Path) -> bool:
    """Whether ``path`` names a video, a GIF or numbered pictures; files are not looked into."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES or is_numbered(path)


def import_av():
    """PyAV; raises ``ValueError`` telling how to install it."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"videos need PyAV ({error}): pip install 'fastnst[video]'") from None
    return av


def open_video(source: str | Path, size: ImageSize = ImageSize(), say: Callable[[str], None] = print, rate: Fraction | None = None) -> VideoInput:
    """Open a video file, a GIF, a folder of pictures or a pattern such as ``frames/%04d.png``.

    ``say`` is told of each broken frame, which is left out. ``rate``: frames per second of pictures.
    Raises ``FileNotFoundError`` or ``OSError`` naming ``source``.
    """
    path = Path(source)
    if path.is_dir() or is_numbered(path):
        return _open_pictures(path, size, say, rate or PICTURES_PER_SECOND)
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {path}")
    return _open_container(str(path), size, say, whole=True)


def open_camera(source: str, size: ImageSize = ImageSize(), say: Callable[[str], None] = print) -> VideoInput:
    """Open a camera by its number, or anything else that FFmpeg reads: a device, a URL, a file, ``FORMAT:NAME`` (``lavfi:testsrc2``).

    Raises ``OSError`` naming ``source``.
    """
    av = import_av()
    form, _, name = source.partition(":")
    try:
        if source.isdigit():
            form, name = _numbered_camera(int(source))
        elif form not in av.formats_available or name.startswith("//") or Path(source).exists():
            form, name = None, source
        return _open_container(name, size, say, form=form)
    except OSError as error:
        raise OSError(f"--camera {source}: {error}; give the number of a camera (0), a device, a URL, or FORMAT:NAME as FFmpeg knows them") from error


def _numbered_camera(number: int) -> tuple[str, str]:
    if sys.platform == "darwin":
        return "avfoundation", str(number)
    if sys.platform != "win32":
        return "v4l2", f"/dev/video{number}"
    from av.device import enumerate_input_devices

    cameras = [device.description for device in enumerate_input_devices("dshow") if "video" in device.media_types]
    if number >= len(cameras):
        raise OSError(f"there are {len(cameras)} cameras")
    return "dshow", f"video={cameras[number]}"


def _open_container(name: str, size: ImageSize, say: Callable[[str], None], form: str | None = None, whole: bool = False) -> VideoInput:
    """``whole``: a file, with its sound, that can be looked through before; else what comes as it comes."""
    av = import_av()
    try:
        container = av.open(name, format=form)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise OSError(f"{name}: not a video that can be read, or damaged ({error})") from error
    # A cover picture of a sound file is a video stream of one frame, and no video.
    streams = [stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        found = ", ".join(stream.type for stream in container.streams)
        container.close()
        raise OSError(f"{name}: there is no video in it, only {found or 'nothing'}")
    stream = streams[0]
    stream.thread_type = "AUTO"
    average, guessed, base = map(_exact, (stream.average_rate, stream.guessed_rate, stream.base_rate))
    rate = average or guessed or PICTURES_PER_SECOND
    start = Fraction(max(0, container.start_time or 0), 1_000_000)
    count, missing = stream.frames if whole else None, Fraction(0)
    variable_rate = average is None or abs(average / (base or rate) - 1) > Fraction(1, 1000)
    hidden = stream.duration is not None and stream.duration * stream.time_base * rate < stream.frames - 1  # as what is trimmed without encoding it anew
    if whole and (not count or hidden):  # there is no table of frames, as an MP4 file has, or one of more than are shown
        if os.path.getsize(name) > _LARGE:
            say(f"{name}: it is looked through first, as it does not tell how many frames it has")
        count, variable_rate, end = _look_through(name, stream.index)
        told = Fraction(container.duration or 0, 1_000_000) - start
        missing = told - (end - start) if end - start < WHOLE * told else missing
    info = VideoInfo(
        name=name,
        count=count or None,
        rate=rate,
        time_base=_exact(stream.time_base),
        variable_rate=variable_rate,
        missing=missing,
        start=start,
        audio=name if whole and container.streams.audio else None,
    )
    if whole and container.streams.subtitles:
        say(f"{name}: its subtitles are left out")
    return VideoInput(info, lambda video: _decoded(container, stream, video, size, say), container.close)


def _exact(rational: Rational | None) -> Fraction | None:
    """A number of PyAV's, which from 19 on has a type of its own for them; None where it is not known."""
    return Fraction(rational.numerator, rational.denominator) if rational else None


def _look_through(name: str, index: int) -> tuple[int, bool, Fraction]:
    """How many frames stream ``index`` of a file has, whether they come at uneven times, and where the last of all streams ends (seconds).

    For files without a table of frames. From all packets, none of them decoded: 0.7 s for 100 minutes (150,000 frames, 310 MB in memory; our measurement). A header may
    tell a plan alone, as the rate in a Matroska file is, and a duration is that of the longest stream: sound may outlast the picture.
    """
    av = import_av()
    times, end = [], Fraction(0)
    with av.open(name) as container, contextlib.suppress(av.FFmpegError):
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if not packet.size or time is None:
                continue
            end = max(end, (time + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == index and not packet.is_discard:
                times.append(time * packet.time_base)
    times.sort()
    steps = [after - before for before, after in itertools.pairwise(times)]
    return len(times), bool(steps) and max(steps) - min(steps) > _EVEN, end


def _decoded(container, stream, video: VideoInput, size: ImageSize, say: Callable[[str], None]) -> Iterator[Frame]:
    av = import_av()
    info, reformat = video.info, av.video.reformatter.VideoReformatter().reformat
    shape, number, last = None, 0, None
    last_duration = 1 / info.rate
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            say(f"{info.name}: ends early, after frame {number} ({error.strerror})")
            packet = None
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if isinstance(error, EOFError):
                return
            number += 1
            video.broken += 1
            say(f"{info.name}: frame {number} is broken and left out ({error.strerror})")
            continue
        for frame in frames:
            number += 1
            if frame.is_corrupt:
                video.broken += 1
                say(f"{info.name}: frame {number} is damaged and left out")
                continue
            if shape is None:
                width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
                shape = size.of(frame.height, width)
                if shape != (frame.height, width):
                    shape = tuple(max(2, 2 * round(side / 2)) for side in shape)  # video files want even sides
            if frame.pts is None:
                time = last + last_duration if last is not None else Fraction(0)
            else:
                time = frame.pts * frame.time_base - info.start
            if last is not None and time <= last:
                time = last + info.time_base  # clocks that stand still or run backwards: encoders need them to advance
            last_duration = frame.duration * frame.time_base if frame.duration else 1 / info.rate
            last = time
            yield Frame(_upright(_to_rgb(frame, shape, reformat), frame), time, last_duration, number)


def _to_rgb(frame, shape: tuple[int, int], reformat: Callable) -> np.ndarray:
    """A decoded frame -> uint8 RGB of ``shape``, by the frame's own matrix and range, or the usual ones where it tells none.

    ``reformat``: of one ``VideoReformatter`` for the whole video, which keeps its tables.
    """
    options = {"width": shape[1], "height": shape[0], "dst_color_range": FULL, "interpolation": ACCURATE}
    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        rgba = reformat(frame, format="rgba", **options).to_ndarray()
        if (rgba[..., 3] == 255).all():
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)  # white, as of pictures saved as JPEG
    if not frame.format.is_rgb:
        full = frame.color_range == FULL or frame.format.name.startswith(("yuvj", "gray"))
        known = frame.colorspace not in (0, 2, 3)  # RGB, unspecified, reserved
        options.update(src_colorspace=frame.colorspace if known else BT709 if frame.height >= 720 else _BT601, src_color_range=FULL if full else LIMITED)
    if frame.color_trc in (_PQ, _HLG):
        return _standard_range(reformat(frame, format="rgb48le", **options).to_ndarray(), frame.color_trc)
    return reformat(frame, format="rgb24", **options).to_ndarray()


def _standard_range(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """uint16 RGB of BT.2100 (high dynamic range) -> uint8 sRGB: reference white of 203 cd/m2 (BT.2408) becomes 255, brighter is cut off."""
    signal = np.linspace(0, 1, 65536)
    if transfer == _PQ:  # SMPTE ST 2084
        power = signal ** (1 / 78.84375)
        nits = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
        light = (nits / 203).astype(np.float32)[pixels]
    else:
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = scene.astype(np.float32)[pixels]
        luminance = light @ np.array((0.2627, 0.6780, 0.0593), np.float32)
        light *= (luminance**0.2 * (1000 / 203))[..., None]  # the system gamma of 1.2 of a display of 1,000 cd/m2
    to_bt709 = np.array(((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)), np.float32)  # BT.2087
    linear = np.linspace(0, 1, 4096)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (srgb * 255 + 0.5).astype(np.uint8)[(np.clip(light @ to_bt709.T, 0, 1) * 4095 + 0.5).astype(np.uint16)]


def _upright(pixels: np.ndarray, frame) -> np.ndarray:
    """Turned and mirrored as the display matrix tells: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5]
    if abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d)):
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _open_pictures(path: Path, size: ImageSize, say: Callable[[str], None], rate: Fraction) -> VideoInput:
    numbered = numbered_files(path) if is_numbered(path) else list(enumerate(_pictures_in(path), 1))
    if not numbered:
        raise FileNotFoundError(f"{path}: no pictures {'of such names' if is_numbered(path) else 'in this folder'}; looked for {', '.join(READABLE)}")
    return VideoInput(VideoInfo(str(path), len(numbered), rate, 1 / rate, variable_rate=False), lambda video: _read_pictures(numbered, video, size, say))


def numbered_files(pattern: Path) -> list[tuple[int, Path]]:
    """Those that are there of what ``pattern`` stands for, with their numbers, in order."""
    before, after = (pattern.name[: (hit := _NUMBERED.search(pattern.name)).start()], pattern.name[hit.end() :])
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    folder = pattern.parent
    return sorted((int(hit[1]), file) for file in (folder.iterdir() if folder.is_dir() else ()) if (hit := name.fullmatch(file.name)))


def _pictures_in(folder: Path) -> list[Path]:
    def by_number(path: Path) -> list:  # 2.png before 10.png
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    return sorted((path for path in folder.iterdir() if path.suffix.lower() in READABLE and not path.name.startswith(".")), key=by_number)


def _read_pictures(numbered: list[tuple[int, Path]], video: VideoInput, size: ImageSize, say: Callable[[str], None]) -> Iterator[Frame]:
    shape = None
    for place, (number, path) in enumerate(numbered):
        try:
            picture, alpha = open_rgb(path)
        except OSError as error:
            video.broken += 1
            say(f"{error}; left out")
            continue
        if alpha is not None:
            picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
        shape = shape or size.of(picture.height, picture.width)
        if (picture.height, picture.width) != shape:
            picture = picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        yield Frame(np.asarray(picture), place / video.info.rate, 1 / video.info.rate, number)
