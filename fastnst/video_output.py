"""Frames -> a video file, a GIF or numbered pictures, with the sound of another file; written under a temporary name, then put in place.

Takes the frames of ``video_input``: uint8 RGB ``(H, W, 3)`` with their own times. PyAV is imported when a video is begun.
"""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from fastnst.config import Config
from fastnst.files import atomic_write, check_output, without_leftovers
from fastnst.picture import check_writable, save_picture
from fastnst.video_input import ACCURATE, BT709, FULL, LIMITED, Frame, VideoInfo, import_av, is_numbered, numbered_path

WRITABLE_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif")
# The encoders of each codec, best first; names of encoders can be given as well.
ENCODERS = {
    "h264": ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf"),
    "hevc": ("libx265",),
    "av1": ("libsvtav1", "libaom-av1"),
    "vp9": ("libvpx-vp9",),
}
# Each encoder's name for quality, a value at which we see no loss in stylized frames, its name for speed, a value, and what else it wants.
_SETTINGS = {
    "libx264": ("crf", 18, "preset", "medium", {}),
    "libx265": ("crf", 20, "preset", "medium", {"x265-params": "log-level=none"}),
    "libsvtav1": ("crf", 26, "preset", "8", {}),
    "libaom-av1": ("crf", 24, "cpu-used", "6", {"row-mt": "1"}),
    "libvpx-vp9": ("crf", 24, "cpu-used", "4", {"b": "0", "row-mt": "1"}),
    "h264_nvenc": ("cq", 19, "preset", "p5", {}),
    "hevc_nvenc": ("cq", 21, "preset", "p5", {}),
    "av1_nvenc": ("cq", 27, "preset", "p5", {}),
}
_BITS_PER_PIXEL = 0.2  # of encoders that have no constant quality: half as much again as usual video, as strokes are all edges
_BAYER = "new=1:dither=bayer:bayer_scale=3"  # a fixed grid; error diffusion would crawl from frame to frame


class Encoding(Config):
    """How a video file is encoded. ``auto``: H.264, or VP9 in WebM; ``null``: the encoder's setting of ours."""

    codec: str = "auto"  # auto, h264, hevc, av1, vp9, or the name of one of FFmpeg's encoders
    quality: int | None = Field(None, ge=0, le=63)  # constant rate factor: lower is better and larger; 18 in H.264
    preset: str | None = None  # speed against size, in the encoder's own words: "veryfast" or "slow" in H.264


def check_writable_video(path: str | Path) -> None:
    """Raise ``ValueError`` unless the name of ``path`` is that of a video or of numbered pictures that we write."""
    path = Path(path)
    if is_numbered(path):
        check_writable(path)
    elif path.suffix.lower() not in WRITABLE_VIDEOS:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {', '.join(WRITABLE_VIDEOS)}, or frame_%04d.png")


@contextmanager
def create_video(
    path: str | Path,
    info: VideoInfo,
    encoding: Encoding = Encoding(),
    say: Callable[[str], None] = print,
    overwrite: bool = False,
    picture_quality: int = 95,
    cut: Callable[[], bool] = lambda: False,
) -> Iterator[Callable[[Frame], None]]:
    """Yield ``write(frame)``. Leaving the context finishes the file and puts it in place; an exception, or no frame at all, leaves none.

    ``info`` is that of the input: its rate, time base and sound, which is kept to its own end; or, where ``cut()`` then holds, to that
    of the last frame, as the input goes on beyond it. ``path`` such as ``frame_%04d.png`` writes pictures, each put in
    place at once. Raises as ``check_output``, ``ValueError`` for a name, codec or preset that cannot be
    written, ``OSError`` naming ``path``.
    """
    path = Path(path)
    check_writable_video(path)
    if is_numbered(path) or path.suffix.lower() == ".gif":
        unused = [*(["the sound"] if info.audio else []), *(f"{flag} {value}" for flag, value in _asked(encoding))]
        if unused:
            say(f"{path}: {', '.join(unused)}: left out, as {'pictures have' if is_numbered(path) else 'a GIF has'} none")
    if is_numbered(path):
        yield _picture_writer(path, overwrite, picture_quality)
        return
    check_output(path, overwrite=overwrite)
    make = _GifFile if path.suffix.lower() == ".gif" else _VideoFile
    if make is _VideoFile:
        _encoder(path, encoding)  # told of before the first frame is computed
    with ExitStack() as stack:
        writer = None

        def write(frame: Frame) -> None:
            nonlocal writer
            if writer is None:
                stack.enter_context(without_leftovers(path))
                writer = make(path, stack.enter_context(atomic_write(path)), info, encoding, say, frame)
            writer.write(frame)

        try:
            yield write
            if writer is not None:
                writer.finish(cut())
        finally:
            if writer is not None:
                writer.close()


def _picture_writer(pattern: Path, overwrite: bool, quality: int) -> Callable[[Frame], None]:
    def write(frame: Frame) -> None:
        path = numbered_path(pattern, frame.number)
        check_output(path, overwrite=overwrite)
        save_picture(Image.fromarray(frame.pixels), path, quality=quality)

    return write


class _VideoFile:
    """A video stream and the sound of the input. Sound is muxed up to the frame that is written, so that a stopped file can end with both."""

    def __init__(self, path: Path, temporary: Path, info: VideoInfo, encoding: Encoding, say: Callable[[str], None], first: Frame) -> None:
        av = import_av()
        self.path, self.durations, self.end = path, {}, Fraction(0)
        encoder = _encoder(path, encoding)
        height, width = first.pixels.shape[:2]
        self.padding = ((0, height % 2), (0, width % 2), (0, 0))  # 4:2:0 chroma wants even sides
        if height % 2 or width % 2:
            say(f"{path}: {width}x{height} becomes {width + width % 2}x{height + height % 2}, as video files want even sides; the last line is doubled")
        self.container = av.open(str(temporary), "w", options={"movflags": "+faststart"} if path.suffix.lower() in (".mp4", ".m4v", ".mov") else {})
        try:
            stream = self.container.add_stream(encoder, rate=info.rate.limit_denominator(100_000), options=_options(encoder, encoding, info))
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            if stream.codec_context.name not in _SETTINGS:
                stream.bit_rate = round(width * height * float(info.rate) * _BITS_PER_PIXEL)
            context = stream.codec_context
            context.time_base = stream.time_base = info.time_base
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
            self.stream, self.reformat = stream, av.video.reformatter.VideoReformatter().reformat
            self.sound = _Sound(info, self.container, path, say) if info.audio else None
            try:
                self.container.start_encoding()
            except (av.FFmpegError, ValueError) as error:
                wanted = ", ".join(f"{flag} {value}" for flag, value in _asked(encoding)) or "--codec auto"
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"{path}: cannot encode {width}x{height} pixels with {encoder} into {path.suffix} ({wanted}): {reason}") from error
        except BaseException:
            self.container.close()
            raise

    def write(self, frame: Frame) -> None:
        from av import VideoFrame

        pixels = np.pad(frame.pixels, self.padding, mode="edge") if any(sum(side) for side in self.padding) else frame.pixels
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
        colors = {"dst_colorspace": BT709, "src_color_range": FULL, "dst_color_range": LIMITED}
        picture = self.reformat(picture, format="yuv420p", interpolation=ACCURATE, **colors)
        base = self.stream.codec_context.time_base
        picture.time_base, picture.pts = base, round(frame.time / base)
        self.durations[picture.pts] = max(1, round(frame.duration / base))
        self.end = frame.time + frame.duration
        self._mux(picture)
        if self.sound:
            self.sound.copy_until(frame.time)

    def _mux(self, picture) -> None:
        av = import_av()
        try:
            for packet in self.stream.encode(picture):
                packet.duration = self.durations.pop(packet.pts, packet.duration)  # else the last frame would be shown for no time
                self.container.mux(packet)
        except av.FFmpegError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def finish(self, cut: bool) -> None:
        self._mux(None)
        if self.sound:
            self.sound.copy_until(self.end if cut else math.inf)
            self.sound.finish()
        self.container.close()

    def close(self) -> None:
        if self.sound:
            self.sound.close()
        self.container.close()


def _asked(encoding: Encoding) -> list[tuple[str, str | int]]:
    """Flags and values of what is to be otherwise than by default."""
    flags = (("--codec", "codec"), ("--crf", "quality"), ("--preset", "preset"))
    return [(flag, getattr(encoding, name)) for flag, name in flags if getattr(encoding, name) != getattr(Encoding(), name)]


def _encoder(path: Path, encoding: Encoding) -> str:
    av = import_av()
    codec = encoding.codec if encoding.codec != "auto" else "vp9" if path.suffix.lower() == ".webm" else "h264"
    for name in ENCODERS.get(codec, (codec,)):
        try:
            if av.Codec(name, "w").type == "video":
                _check_takes(path, name, codec)
                return name
        except av.codec.codec.UnknownCodecError:  # also what can be decoded only
            pass
    raise ValueError(f"codec {codec!r}: no such video encoder in this FFmpeg; use auto, {', '.join(ENCODERS)}, or an encoder that `ffmpeg -encoders` names")


def _check_takes(path: Path, encoder: str, codec: str) -> None:
    """Raise ``ValueError`` unless a file of such a name can hold what ``encoder`` makes."""
    av = import_av()
    with io.BytesIO() as nothing:
        nothing.name = path.name
        with av.open(nothing, "w") as container:
            try:
                container.add_stream(encoder)
            except ValueError as error:
                held = [name for name in ENCODERS if name in container.supported_codecs]
                raise ValueError(f"{path}: such a file holds no {codec}; use --codec auto or {' or '.join(held)}, or write another kind of file") from error


def _options(encoder: str, encoding: Encoding, info: VideoInfo) -> dict[str, str]:
    if encoder not in _SETTINGS:
        return {"preset": encoding.preset} if encoding.preset else {}
    quality_name, quality, speed_name, speed, more = _SETTINGS[encoder]
    options = {quality_name: str(quality if encoding.quality is None else encoding.quality), speed_name: encoding.preset or speed, **more}
    if info.variable_rate and encoder in ("libx264", "libx265"):
        options["bf"] = "0"  # with frames out of order and uneven, FFmpeg's reader misjudges the duration of an MP4 file
    return options


class _Sound:
    """The sound of the input file beside the video: copied where the container takes its codec, else encoded anew."""

    def __init__(self, info: VideoInfo, output, path: Path, say: Callable[[str], None]) -> None:
        av = import_av()
        self.start, self.output, self.name = info.start, output, info.audio
        self.say = say
        self.container = av.open(info.audio)
        self.streams, self.encoded = {}, {}
        for stream in self.container.streams.audio:
            codec = stream.codec_context.name if stream.codec_context else None
            if stream.codec_context is not None and stream.codec.canonical_name in output.supported_codecs:
                copy = output.add_stream_from_template(stream)
            elif codec is not None:
                codec_out = "libopus" if output.default_audio_codec == "opus" else output.default_audio_codec  # FFmpeg's own opus encoder is a trial
                copy = output.add_stream(codec_out, rate=48_000 if codec_out == "libopus" else stream.codec_context.sample_rate)
                copy.codec_context.layout = stream.codec_context.layout
                self.encoded[stream.index] = copy
                say(f"{path}: sound is encoded anew as {copy.codec_context.name}, as this kind of file takes no {codec}")
            else:
                say(f"{path}: a sound track of an unknown codec is left out")
                continue
            copy.metadata.update({key: value for key, value in stream.metadata.items() if key in ("language", "title")})
            self.streams[stream.index] = copy
        self.packets = self._packets()
        self.waiting = next(self.packets, None)

    def _packets(self) -> Iterator:
        av = import_av()
        try:
            for packet in self.container.demux([stream for stream in self.container.streams.audio if stream.index in self.streams]):
                if packet.dts is not None:
                    yield packet
        except av.FFmpegError as error:
            self.say(f"{self.name}: its sound ends early ({error.strerror})")

    def copy_until(self, time: Fraction | float) -> None:
        """Mux what begins before ``time`` (seconds)."""
        av = import_av()
        while self.waiting is not None and self.waiting.dts * self.waiting.time_base - self.start < time:
            packet, self.waiting = self.waiting, next(self.packets, None)
            index = packet.stream.index
            shift = round(self.start / packet.time_base)
            if index not in self.encoded:
                packet.pts, packet.dts = (packet.dts if packet.pts is None else packet.pts) - shift, packet.dts - shift
                packet.stream = self.streams[index]
                self.output.mux(packet)
                continue
            try:
                for frame in packet.decode():
                    frame.pts = None if frame.pts is None else frame.pts - round(self.start / frame.time_base)
                    self.output.mux(self.encoded[index].encode(frame))
            except av.error.InvalidDataError as error:
                self.say(f"{self.name}: a piece of its sound is broken and left out ({error.strerror})")

    def finish(self) -> None:
        for stream in self.encoded.values():
            self.output.mux(stream.encode(None))

    def close(self) -> None:
        self.container.close()


class _GifFile:
    """A GIF whose every frame has a palette of its own."""

    def __init__(self, path: Path, temporary: Path, info: VideoInfo, encoding: Encoding, say: Callable[[str], None], first: Frame) -> None:
        av = import_av()
        height, width = first.pixels.shape[:2]
        self.begin, self.waiting = first.time, None
        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 100))
        split, palette, use, sink = (
            self.graph.add(*filter) for filter in (("split",), ("palettegen", "stats_mode=single"), ("paletteuse", _BAYER), ("buffersink",))
        )
        for origin, target, output, input in ((source, split, 0, 0), (split, use, 0, 0), (split, palette, 1, 0), (palette, use, 0, 1), (use, sink, 0, 0)):
            origin.link_to(target, output, input)
        self.graph.configure()
        self.container = av.open(str(temporary), "w", options={"loop": "0"})
        self.stream = self.container.add_stream("gif", rate=100)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "pal8"
        self.stream.codec_context.time_base = self.stream.time_base = Fraction(1, 100)

    def write(self, frame: Frame) -> None:
        centiseconds = round((frame.time - self.begin) * 100)
        if self.waiting is not None and centiseconds - self.waiting[1] < 2:
            return  # viewers show a GIF's frames for 2/100 s at least, else for 10/100: faster ones are left out
        self._flush(centiseconds)
        self.waiting = (frame, centiseconds)

    def _flush(self, until: int | None) -> None:
        """Encode the frame that waited to know how long it is shown."""
        from av import VideoFrame

        if self.waiting is None:
            return
        frame, pts = self.waiting
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame.pixels))
        picture.pts, picture.time_base = pts, Fraction(1, 100)
        self.graph.push(picture)
        self._drain((until or pts + max(2, round(frame.duration * 100))) - pts)

    def _drain(self, duration: int) -> None:
        from av import error

        while True:
            try:
                picture = self.graph.pull()
            except (error.BlockingIOError, error.EOFError):
                return
            for packet in self.stream.encode(picture):
                packet.duration = duration
                self.container.mux(packet)

    def finish(self, cut: bool) -> None:
        self._flush(None)
        self.container.mux(self.stream.encode(None))
        self.container.close()

    def close(self) -> None:
        self.container.close()
