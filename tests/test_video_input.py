"""Reading videos: times, colors, orientation, what is broken, and everything else that is a sequence of pictures."""

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import moving_frames, write_clip
from PIL import Image

from fastnst import video_input
from fastnst.picture import ImageSize
from fastnst.video_input import is_numbered, is_video, open_camera, open_video

av = pytest.importorskip("av")


def read(path, **options) -> list:
    with open_video(path, **options) as video:
        return list(video)


def flat(color, height: int = 32, width: int = 32) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def test_frames_come_with_their_own_uneven_times(tmp_path):
    times = [0, 40, 45, 200, 1000, 1777]
    clip = write_clip(tmp_path / "clip.mp4", moving_frames(5), times)
    frames = read(clip)
    assert [frame.time * 1000 for frame in frames] == times[:-1]
    assert [frame.duration * 1000 for frame in frames] == [40, 5, 155, 800, 777]
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5]
    assert frames[0].pixels.dtype == np.uint8 and frames[0].pixels.shape == (48, 64, 3)
    assert np.abs(frames[3].pixels.astype(int) - moving_frames(5)[3]).mean() < 3
    with open_video(clip) as video:
        assert video.info.count == 5 and video.info.variable_rate and video.info.audio is None


def test_an_even_clip_is_known_to_be_even(tmp_path):
    with open_video(write_clip(tmp_path / "clip.mp4", moving_frames(6), sound="aac")) as video:
        assert (video.info.rate, video.info.count, video.info.variable_rate) == (25, 6, False)
        assert video.info.audio == str(tmp_path / "clip.mp4")


UNEVEN = [250 * index + (40 if index % 3 == 1 else 0) for index in range(21)]  # ms; 20 frames over 5 s


@pytest.mark.parametrize(
    "name, count, uneven, options",
    [
        ("uneven.mkv", 20, True, {"times": UNEVEN, "rate": 30}),  # 30 a second is in the header, where most programs write what they meant
        ("uneven.webm", 20, True, {"times": UNEVEN, "rate": 30, "codec": "libvpx-vp9"}),
        ("uneven.ts", 20, True, {"times": UNEVEN}),
        ("between.mkv", 12, False, {"codec": "mpeg4", "max_b_frames": 2, "gop_size": 12}),  # frames that are stored behind later ones
        ("late.mkv", 12, False, {"times": [5000 + 40 * index for index in range(13)]}),
        ("sound.mkv", 30, False, {"rate": 30, "sound": "aac", "sound_until": 5000}),  # times of 33 and 34 ms are even
        ("sound.mp4", 30, False, {"rate": 30, "sound": "aac", "sound_until": 5000}),
    ],
)
def test_how_many_frames_and_how_even_is_told_by_the_frames(tmp_path, name, count, uneven, options):
    with open_video(write_clip(tmp_path / name, moving_frames(count), **options)) as video:
        assert (video.info.count, video.info.variable_rate, video.info.missing) == (count, uneven, 0)
        assert len(list(video)) == count


@pytest.mark.parametrize("begin", [0, 5000])
def test_what_is_cut_off_is_missing(tmp_path, begin):
    clip = write_clip(tmp_path / "clip.mkv", moving_frames(40), [begin + 40 * index for index in range(41)], sound="aac")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with open_video(clip, say=lambda message: None) as video:
        frames = list(video)
        assert video.info.count - 1 <= len(frames) <= 30
        assert float(video.info.missing) == pytest.approx(1.6 - float(frames[-1].time + frames[-1].duration), abs=0.1)


@pytest.mark.parametrize("hidden", [30, 4])
def test_what_is_trimmed_without_encoding_it_anew_is_not_cut_off(tmp_path, hidden):
    """As `ffmpeg -ss 1.2 -i a.mp4 -c copy b.mp4`: the table still has all of the 40 frames."""
    with av.open(str(write_clip(tmp_path / "a.mp4", moving_frames(40)))) as whole, av.open(str(tmp_path / "b.mp4"), "w") as trimmed:
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                shift = round(Fraction(hidden, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                trimmed.mux(packet)
    with open_video(tmp_path / "b.mp4") as video:
        assert len(list(video)) == video.info.count == 40 - hidden and not video.info.missing and not video.info.variable_rate


def test_what_has_no_times_has_no_count(tmp_path):
    write_clip(tmp_path / "a.h264", moving_frames(5))
    with open_video(tmp_path / "a.h264") as video:
        assert video.info.count is None and len(list(video)) == 5


def test_a_large_file_is_said_to_be_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(video_input, "_LARGE", 100)
    said = []
    for name in ("clip.mkv", "clip.mp4"):
        open_video(write_clip(tmp_path / name, moving_frames(4)), say=said.append).close()
    assert said == [f"{tmp_path / 'clip.mkv'}: it is looked through first, as it does not tell how many frames it has"]  # an MP4 file does


def test_time_begins_at_zero_where_the_clock_of_the_file_does_not(tmp_path):
    write_clip(tmp_path / "clip.ts", moving_frames(4), [1500, 1540, 1580, 1620, 1660])
    with av.open(str(tmp_path / "clip.ts")) as container:
        assert container.start_time == 1_500_000
    assert [frame.time for frame in read(tmp_path / "clip.ts")] == [Fraction(index, 25) for index in range(4)]


def yuv(color, red: float, blue: float, full: bool) -> tuple[np.ndarray, ...]:
    """The planes that ITU-R BT.601 and BT.709 prescribe for a color, of 32x32 pixels with halved chroma."""
    r, g, b = (value / 255 for value in color)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    values = [255 * luma, *(128 + 255 * c for c in chroma)] if full else [16 + 219 * luma, *(128 + 224 * c for c in chroma)]
    return tuple(np.full((side, side), round(min(value, 255)), np.uint8) for value, side in zip(values, (32, 16, 16), strict=True))


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 60, 30), (20, 180, 90)])
@pytest.mark.parametrize("matrix, coefficients", [(5, BT601), (6, BT601), (1, BT709)])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_those_that_the_file_tells(tmp_path, color, matrix, coefficients, full):
    planes = yuv(color, *coefficients, full)
    clip = write_clip(tmp_path / "clip.mkv", [planes], codec="ffv1", colorspace=matrix, color_range=2 if full else 1)
    (frame,) = read(clip)
    assert np.abs(frame.pixels.astype(int) - color).max() <= 3  # 8 bits of luma and chroma, each rounded, then times up to 2.1


def test_without_a_matrix_small_video_is_bt601(tmp_path):
    (frame,) = read(write_clip(tmp_path / "clip.mkv", [yuv((200, 60, 30), *BT601, False)], codec="ffv1"))
    assert np.abs(frame.pixels.astype(int) - (200, 60, 30)).max() <= 3


def test_without_a_matrix_high_definition_is_bt709(tmp_path):
    planes = tuple(np.full((side, 32 * side // 720), plane[0, 0], np.uint8) for plane, side in zip(yuv((200, 60, 30), *BT709, False), (720, 360, 360)))
    (frame,) = read(write_clip(tmp_path / "clip.mkv", [planes], codec="ffv1"))
    assert np.abs(frame.pixels.astype(int) - (200, 60, 30)).max() <= 3


@pytest.mark.parametrize("transfer, signal, gray", [(16, 0.58, 255), (18, 0.75, 255), (16, 0.411, 118), (16, 0, 0), (18, 0, 0)])
def test_high_dynamic_range_is_brought_down(tmp_path, transfer, signal, gray):
    """BT.2408: reference white lies at 58 % of the PQ and 75 % of the HLG signal; 41.1 % of PQ is 37 cd/m2, 0.18 of it, in sRGB 118."""
    luma, chroma = round((16 + 219 * signal) * 4), 512
    planes = (np.full((32, 32), luma, np.uint16), *(np.full((16, 16), chroma, np.uint16),) * 2)
    clip = write_clip(tmp_path / "clip.mkv", [planes], codec="ffv1", pix_fmt="yuv420p10le", colorspace=9, color_range=1, color_trc=transfer, color_primaries=9)
    assert np.abs(read(clip)[0].pixels.astype(int) - gray).max() <= 3


@pytest.mark.parametrize(
    "matrix, turned",
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),  # what phones held upright write: a quarter to the right
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
        ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
        ((0, 1, 1, 0), lambda pixels: pixels.transpose(1, 0, 2)),
    ],
)
def test_rotation_is_applied(tmp_path, matrix, turned):
    (frame,) = moving_frames(1)
    clip = write_clip(tmp_path / "clip.mp4", [frame])
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # after version, times, track, layer and volume
    a, b, c, d = (65536 * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(data)
    (found,) = read(clip)
    assert found.pixels.shape == turned(frame).shape
    assert np.abs(found.pixels.astype(int) - turned(frame)).mean() < 3


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", moving_frames(1), sample_aspect_ratio=Fraction(3, 2))
    assert read(clip)[0].pixels.shape == (48, 96, 3)
    assert read(clip, size=ImageSize(short_side=24))[0].pixels.shape == (24, 48, 3)


def test_a_broken_frame_is_told_and_left_out(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", moving_frames(6))
    with av.open(str(clip)) as container:
        packets = [(bytes(packet), packet.pts) for packet in container.demux() if packet.size]
    data = clip.read_bytes()
    clip.write_bytes(data.replace(packets[2][0], b"\xff" * len(packets[2][0])))
    told = []
    with open_video(clip, say=told.append) as video:
        frames = list(video)
    assert [frame.time for frame in frames] == [Fraction(index, 25) for index in (0, 1, 3, 4, 5)]
    assert [frame.number for frame in frames] == [1, 2, 4, 5, 6]
    assert video.broken == 1
    assert len(told) == 1 and "clip.mkv: frame 3 is broken and left out" in told[0]


def test_a_cut_off_file_gives_what_it_has(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", moving_frames(12))
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert 2 < len(read(clip, say=lambda message: None)) < 12


def test_a_gif_keeps_its_times_and_is_white_where_it_is_transparent(tmp_path):
    pictures = [Image.new("RGBA", (20, 10), color) for color in ((0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 255))]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 250, 40], loop=0, disposal=2)
    frames = read(tmp_path / "a.gif")
    assert [(frame.time, frame.duration) for frame in frames] == [(0, Fraction(1, 10)), (Fraction(1, 10), Fraction(1, 4)), (Fraction(35, 100), Fraction(1, 25))]
    assert [tuple(frame.pixels[5, 5]) for frame in frames] == [(255, 255, 255), (255, 0, 0), (0, 0, 255)]


def test_numbered_pictures_in_the_order_of_their_numbers(tmp_path):
    for number in (7, 10, 9):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"frame_{number}.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "other.png")
    frames = read(tmp_path / "frame_%d.png", rate=Fraction(10))
    assert [(frame.number, frame.time, frame.pixels[0, 0, 0]) for frame in frames] == [(7, 0, 7), (9, Fraction(1, 10), 9), (10, Fraction(2, 10), 10)]


def test_a_folder_in_natural_order_with_a_broken_picture(tmp_path):
    for name, size in (("2.png", (8, 6)), ("10.png", (16, 12)), ("1.png", (8, 6))):
        Image.new("RGB", size, (int(name.split(".")[0]), 0, 0)).save(tmp_path / name)
    (tmp_path / "3.png").write_bytes(b"no picture")
    told = []
    frames = read(tmp_path, say=told.append)
    assert [frame.pixels[0, 0, 0] for frame in frames] == [1, 2, 10]
    assert {frame.pixels.shape for frame in frames} == {(6, 8, 3)}
    assert [frame.time for frame in frames] == [0, Fraction(1, 25), Fraction(3, 25)]
    assert len(told) == 1 and "3.png" in told[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.mp4", None, "no video file at .*absent.mp4"),
        ("text.mp4", b"not a video at all", "text.mp4: not a video"),
        ("empty.mp4", b"", "empty.mp4: not a video"),
        ("frame_%03d.png", None, "frame_%03d.png: no pictures of such names"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=message):
        open_video(tmp_path / name)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(OSError, match="sound.wav: there is no video in it, only audio"):
        open_video(tmp_path / "sound.wav")


def test_without_pyav_the_error_tells_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'fastnst\[video\]'"):
        open_video(tmp_path / "clip.mp4")


def test_names_of_videos(tmp_path):
    assert is_video("a/clip.MP4") and is_video(Path("loop.gif")) and is_video("frames/%04d.png")
    assert not is_video("photo.jpg") and not is_video("100%.png") and not is_numbered("clip.mp4")
    assert all(is_numbered(name) for name in ("%d.png", "a%d_b.png", "%03dpx.png", "50%-%04d.png"))
    assert not any(is_numbered(name) for name in ("50%discount.jpg", "100%done.jpg", "5%dänisch.jpg", "20%discount"))
    assert is_numbered(tmp_path / "100%d")
    (tmp_path / "100%d").mkdir()
    assert not is_numbered(tmp_path / "100%d")


def test_a_test_source_stands_in_for_a_camera():
    with open_camera("lavfi:testsrc2=size=64x48:rate=10:duration=0.5", ImageSize(short_side=24)) as camera:
        frames = list(camera)
    assert len(frames) == 5 and frames[0].pixels.shape == (24, 32, 3)


@pytest.mark.parametrize("camera", ["97", "/dev/no-such-camera", "lavfi:no_such_filter"])
def test_a_camera_that_is_not_there_is_named(camera):
    with pytest.raises(OSError, match=f"--camera {camera}: "):
        open_camera(camera)
