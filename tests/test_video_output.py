"""Writing videos: what comes back when they are read, colors, sizes, sound, and that no file is ever half written."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import moving_frames, write_clip
from PIL import Image

from fastnst.video_input import Frame, VideoInfo, open_video
from fastnst.video_output import Encoding, check_writable_video, create_video

av = pytest.importorskip("av")

FAST = Encoding(quality=4, preset="ultrafast")
INFO = VideoInfo("test", None, Fraction(25), Fraction(1, 1000), variable_rate=False)


def frames_of(pictures, times=None) -> list[Frame]:
    times = times or [40 * index for index in range(len(pictures) + 1)]
    return [
        Frame(pixels, Fraction(begin, 1000), Fraction(end - begin, 1000), number)
        for number, (pixels, begin, end) in enumerate(zip(pictures, times, times[1:], strict=False), 1)
    ]


def save(path, frames, info=INFO, encoding=FAST, **options):
    with create_video(path, info, encoding, **options) as write:
        for frame in frames:
            write(frame)
    return path


def read(path) -> list[Frame]:
    with open_video(path) as video:
        return list(video)


def left_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".m4v"])
def test_what_is_written_comes_back(tmp_path, suffix):
    pictures = moving_frames(7)
    found = read(save(tmp_path / f"out{suffix}", frames_of(pictures)))
    assert len(found) == 7
    assert [frame.time - found[0].time for frame in found] == [Fraction(index, 25) for index in range(7)]
    for frame, pixels in zip(found, pictures, strict=True):
        assert np.abs(frame.pixels.astype(int) - pixels).mean() < 2
    assert left_in(tmp_path) == [f"out{suffix}"]


def test_uneven_times_and_the_duration_are_kept(tmp_path):
    times = [0, 40, 45, 200, 1000, 1777]
    info = VideoInfo("test", None, Fraction(3), Fraction(1, 1000), variable_rate=True)
    path = save(tmp_path / "out.mp4", frames_of(moving_frames(5), times), info, Encoding())
    assert [frame.time * 1000 for frame in read(path)] == times[:-1]
    with av.open(str(path)) as container:
        assert container.duration == 1_777_000


def test_frames_out_of_order_inside_the_file_keep_an_even_duration(tmp_path):
    path = save(tmp_path / "out.mp4", frames_of(moving_frames(30)), encoding=Encoding())  # libx264 reorders frames at this preset
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.has_b_frames
        assert container.duration == 1_200_000


def test_the_file_is_bt709_of_limited_range_and_says_so(tmp_path):
    colors = [(255, 255, 255), (0, 0, 0), (200, 60, 30)]
    pictures = [np.full((32, 32, 3), color, np.uint8) for color in colors]
    path = save(tmp_path / "out.mp4", frames_of(pictures), encoding=Encoding(quality=1))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range, context.pix_fmt) == (1, 1, 1, 1, "yuv420p")
        planes = [[int(np.frombuffer(plane, np.uint8)[0]) for plane in frame.planes] for frame in container.decode(video=0)]
    # 200, 60, 30: Y' = (0.2126 * 200 + 0.7152 * 60 + 0.0722 * 30) / 255 = 0.3435; 16 + 219 Y' = 91; Cb, Cr = 128 + 224 * (-0.1218, 0.2799)
    assert np.abs(np.array(planes) - [[235, 128, 128], [16, 128, 128], [91, 101, 191]]).max() <= 1


def test_odd_sides_are_made_even_by_doubling_the_last_line(tmp_path):
    (pixels,) = moving_frames(1, height=33, width=47)
    told = []
    (frame,) = read(save(tmp_path / "out.mp4", frames_of([pixels]), say=told.append))
    assert frame.pixels.shape == (34, 48, 3)
    assert np.abs(frame.pixels[:33, :47].astype(int) - pixels).mean() < 3
    assert len(told) == 1 and "47x33 becomes 48x34" in told[0]


@pytest.mark.parametrize(
    "codec, preset, suffix, found",
    [
        ("hevc", "ultrafast", ".mp4", "hevc"),
        ("av1", "12", ".mkv", "av1"),
        ("vp9", "8", ".mp4", "vp9"),
        ("auto", "8", ".webm", "vp9"),
        ("mpeg4", None, ".mkv", "mpeg4"),
    ],
)
def test_other_codecs(tmp_path, codec, preset, suffix, found):
    pictures = moving_frames(3, 64, 96)
    path = save(tmp_path / f"out{suffix}", frames_of(pictures), encoding=Encoding(codec=codec, preset=preset))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec.canonical_name == found
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_quality_and_preset_reach_the_encoder(tmp_path):
    pictures = moving_frames(12)
    sizes = [save(tmp_path / f"{quality}.mp4", frames_of(pictures), encoding=Encoding(quality=quality)).stat().st_size for quality in (1, 20, 45)]
    assert sizes[0] > sizes[1] + 400 > sizes[2] + 800
    with pytest.raises(ValueError, match="out.mp4: cannot encode 64x48 pixels with libx264.*preset slowish"):
        save(tmp_path / "out.mp4", frames_of(pictures), encoding=Encoding(preset="slowish"))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("codec", ["h265", "aac", "no_such"])
def test_an_unknown_codec_is_named_before_the_first_frame_and_leaves_no_file(tmp_path, codec):
    with pytest.raises(ValueError, match=f"codec '{codec}': no such video encoder.*hevc"), create_video(tmp_path / "out.mp4", INFO, Encoding(codec=codec)):
        pytest.fail("frames would be computed")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("codec, suffix, instead", [("h264", ".webm", "--codec auto or av1 or vp9"), ("vp9", ".m4v", "--codec auto or h264")])
def test_a_codec_that_such_a_file_does_not_hold_is_named_before_the_first_frame(tmp_path, codec, suffix, instead):
    with pytest.raises(ValueError, match=f"out{suffix}: such a file holds no {codec}; use {instead}, or"), create_video(tmp_path / f"out{suffix}", INFO, Encoding(codec=codec)):
        pytest.fail("frames would be computed")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name, has", [("out.gif", "a GIF has"), ("%02d.png", "pictures have")])
def test_what_gifs_and_pictures_have_not_is_said(tmp_path, name, has):
    told = []
    save(tmp_path / name, frames_of(moving_frames(2)), encoding=Encoding(codec="h264", quality=0), say=told.append)
    save(tmp_path / f"plain_{name}", frames_of(moving_frames(2)), encoding=Encoding(), say=told.append)
    assert told == [f"{tmp_path / name}: --codec h264, --crf 0: left out, as {has} none"]


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="out.mp4 exists already; use --overwrite"):
        save(path, frames_of(moving_frames(1)))
    with pytest.raises(RuntimeError), create_video(path, INFO, FAST, overwrite=True) as write:
        write(frames_of(moving_frames(1))[0])
        raise RuntimeError("stopped half way")
    with create_video(path, INFO, FAST, overwrite=True):
        pass  # no frame came
    assert path.read_bytes() == b"precious" and left_in(tmp_path) == ["out.mp4"]
    save(path, frames_of(moving_frames(2)), overwrite=True)
    assert len(read(path)) == 2 and left_in(tmp_path) == ["out.mp4"]


def test_what_a_killed_run_left_is_removed_by_the_next_but_no_file_that_is_being_written(tmp_path):
    half = tmp_path / ".out-fastnst-abcd1234.mp4"
    half.write_bytes(b"half")
    first, *others = frames_of(moving_frames(3))
    with create_video(tmp_path / "out.mp4", INFO, FAST) as write:
        write(first)
        assert not half.exists()
        save(tmp_path / "out.mp4", [first])  # another run
        for frame in others:
            write(frame)
    assert len(read(tmp_path / "out.mp4")) == 3 and left_in(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("name", ["out.avi", "out", "frame_%04d.txt"])
def test_a_name_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: cannot write"):
        check_writable_video(tmp_path / name)


def test_a_gif_keeps_times_and_colors(tmp_path):
    colors = [(250, 10, 10), (10, 240, 20), (20, 30, 230)]
    pictures = [np.full((10, 21, 3), color, np.uint8) for color in colors]
    path = save(tmp_path / "out.gif", frames_of(pictures, [0, 100, 350, 410]))
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (21, 10), 0)
        durations = []
        for index, color in enumerate(colors):
            gif.seek(index)
            durations.append(gif.info["duration"])
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - color).max() <= 4
    assert durations == [100, 250, 60]


def test_a_gif_leaves_out_frames_too_fast_for_it(tmp_path):
    path = save(tmp_path / "out.gif", frames_of(moving_frames(20), [round(1000 * index / 100) for index in range(21)]))  # 100 frames/s
    assert [frame.time for frame in read(path)] == [Fraction(index, 50) for index in range(10)]


def test_pictures_are_numbered_like_the_frames(tmp_path):
    pictures = moving_frames(3)
    save(tmp_path / "new" / "p_%03d.png", frames_of(pictures))
    assert left_in(tmp_path / "new") == ["p_001.png", "p_002.png", "p_003.png"]
    assert all((np.asarray(Image.open(tmp_path / "new" / f"p_00{index}.png")) == pictures[index - 1]).all() for index in (1, 2, 3))
    with pytest.raises(FileExistsError, match="p_001.png exists already"):
        save(tmp_path / "new" / "p_%03d.png", frames_of(pictures))
    save(tmp_path / "new" / "p_%03d.png", frames_of(pictures), overwrite=True)


# Sound


def sound_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def packets_of(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.fixture(scope="module")
def clip_with_sound(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("sound") / "clip.mp4", moving_frames(25), sound="aac")


def copy_video(source, target, count: int | None = None, say=print):
    with open_video(source) as video:
        save(target, list(video)[:count], video.info, say=say, cut=lambda: count is not None)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_copied_bit_for_bit(clip_with_sound, tmp_path, suffix):
    told = []
    copy_video(clip_with_sound, tmp_path / f"out{suffix}", say=told.append)
    assert packets_of(tmp_path / f"out{suffix}") == packets_of(clip_with_sound)
    assert told == []


@pytest.mark.parametrize("suffix, encoding", [(".mp4", FAST), (".webm", Encoding(preset="8"))])
def test_sound_stays_with_the_picture_where_the_clock_begins_late(tmp_path, suffix, encoding):
    times = [1500 + 40 * index for index in range(26)]
    clip = write_clip(tmp_path / "clip.ts", moving_frames(25), times, sound="aac")
    with open_video(clip) as video:
        path = save(tmp_path / f"out{suffix}", list(video), video.info, encoding)

    def lead(path) -> float:
        """Seconds by which the sound begins before the picture."""
        with av.open(str(path)) as container:
            first = {kind: next(av.open(str(path)).decode(**{kind: 0})).time for kind in ("video", "audio")}
            assert path == clip or container.start_time < 50_000
        return first["video"] - first["audio"]

    assert lead(path) == pytest.approx(lead(clip), abs=0.01)
    assert len(sound_of(path)) == pytest.approx(48_000, abs=2048)


def test_sound_that_the_container_does_not_take_is_encoded_anew(clip_with_sound, tmp_path):
    told = []
    with open_video(clip_with_sound) as video:
        save(tmp_path / "out.webm", list(video), video.info, Encoding(preset="8"), say=told.append)
    sound = sound_of(tmp_path / "out.webm")
    assert len(sound) == pytest.approx(48_000, abs=1500)  # 1 s, and the start of an encoder
    crossings = (np.diff(np.sign(sound[4800:43_200])) != 0).sum()
    assert crossings == pytest.approx(2 * 440 * 0.8, abs=3)  # still 440 Hz
    assert len(told) == 1 and "encoded anew as libopus" in told[0]


def test_a_video_cut_short_has_sound_as_long(clip_with_sound, tmp_path):
    copy_video(clip_with_sound, tmp_path / "out.mp4", count=10)
    assert len(sound_of(tmp_path / "out.mp4")) == pytest.approx(0.4 * 48_000, abs=2048)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration == pytest.approx(400_000, abs=45_000)


@pytest.mark.parametrize("name", ["out.gif", "p_%02d.jpg"])
def test_where_no_sound_can_be_it_is_told(clip_with_sound, tmp_path, name):
    told = []
    copy_video(clip_with_sound, tmp_path / name, count=4, say=told.append)
    assert len(told) == 1 and "sound" in told[0]
