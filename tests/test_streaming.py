"""Frames through a function: order, batches, constant memory, being stopped, errors in any thread, and live cameras."""

import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from conftest import moving_frames, write_clip
from PIL import Image

import fastnst.streaming as streaming
from fastnst.picture import ImageSize
from fastnst.streaming import LiveProgress, Progress, stylize_live, stylize_video
from fastnst.video_input import Frame, VideoInfo, VideoInput, open_video
from fastnst.video_output import Encoding

av = pytest.importorskip("av")

FAST = Encoding(quality=4, preset="ultrafast")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """One second of 25 frames with sound."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_frames(25), sound="aac")


def negative(batch: np.ndarray) -> np.ndarray:
    return 255 - batch


def read(path) -> list[Frame]:
    with open_video(path) as video:
        return list(video)


def duration(path) -> float:
    with av.open(str(path)) as container:
        return container.duration / 1_000_000


def test_every_frame_once_and_in_order_with_times_duration_and_sound(clip, tmp_path):
    shapes, reports = [], []

    def stylize(batch):
        shapes.append(batch.shape)
        assert batch.dtype == np.uint8
        return negative(batch)

    result = stylize_video(clip, tmp_path / "out.mp4", stylize, batch_size=4, encoding=FAST, on_progress=reports.append)
    assert shapes == [(4, 48, 64, 3)] * 6 + [(1, 48, 64, 3)]
    assert [(report.done, report.total) for report in reports] == [(done, 25) for done in (4, 8, 12, 16, 20, 24, 25)]
    assert (result.done, result.total, result.broken) == (25, 25, 0)
    before, after = read(clip), read(tmp_path / "out.mp4")
    assert [frame.time for frame in after] == [frame.time for frame in before]
    assert all(np.abs(255 - new.pixels.astype(int) - old.pixels).mean() < 3 for old, new in zip(before, after, strict=True))
    assert duration(tmp_path / "out.mp4") == duration(clip)
    with av.open(str(clip)) as source, av.open(str(tmp_path / "out.mp4")) as target:
        assert [bytes(packet) for packet in source.demux(audio=0)] == [bytes(packet) for packet in target.demux(audio=0)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_outlasts_the_picture_is_kept_but_for_a_stopped_video(tmp_path, suffix):
    clip = write_clip(tmp_path / f"clip{suffix}", moving_frames(10), sound="aac", sound_until=2000)  # 0.4 s of picture
    for name, batches, seconds in (("whole", 5, 2.0), ("stopped", 1, 0.2)):
        done = []
        stylize_video(clip, tmp_path / f"{name}{suffix}", negative, batch_size=5, encoding=FAST, on_progress=done.append, should_stop=lambda: len(done) == batches)
        with av.open(str(tmp_path / f"{name}{suffix}")) as container:
            sound = sum(frame.samples for frame in container.decode(audio=0)) / 48_000
        assert sound == pytest.approx(seconds, abs=0.045)


def test_an_uneven_clip_is_as_long_afterwards(tmp_path):
    times = [*range(0, 400, 40), *range(2400, 5001, 650)]
    clip = write_clip(tmp_path / "screen.webm", moving_frames(len(times) - 1), times, rate=30, codec="libvpx-vp9")
    stylize_video(clip, tmp_path / "out.mp4", negative)
    assert duration(tmp_path / "out.mp4") == duration(clip) == 5.0


def test_progress_counts_speed():
    assert Progress(done=30, total=100, seconds=6.0, broken=10).frames_per_second == 5.0


def test_size_is_scaled_to_even_sides(clip, tmp_path):
    stylize_video(clip, tmp_path / "out.mp4", negative, size=ImageSize(short_side=32), encoding=FAST)
    assert read(tmp_path / "out.mp4")[0].pixels.shape == (32, 44, 3)  # 42.7 rounds to 43


def test_content_and_stylized_are_finished_in_order(clip, tmp_path):
    seen = []

    def finish(content, stylized):
        seen.append(content)
        assert (stylized == 255 - content).all()
        return np.zeros_like(stylized)

    stylize_video(clip, tmp_path / "out.mp4", negative, finish=finish, encoding=FAST)
    assert all((content == frame.pixels).all() for content, frame in zip(seen, read(clip), strict=True))
    assert max(frame.pixels.max() for frame in read(tmp_path / "out.mp4")) <= 2


def test_memory_is_constant(monkeypatch, tmp_path):
    """However slow the network is, of a video without end only a few batches are ever held."""
    alive = most = 0
    lock = threading.Lock()

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            if self.base is None or not isinstance(self.base, Counted):
                with lock:
                    alive -= 1

    def frames():
        nonlocal alive, most
        for index in range(120):
            pixels = Counted((16, 16, 3), np.uint8)
            pixels[:] = index
            with lock:
                alive += 1
                most = max(most, alive)
            yield Frame(pixels, Fraction(index, 25), Fraction(1, 25), index + 1)

    info = VideoInfo("endless", None, Fraction(25), Fraction(1, 25), variable_rate=False)
    monkeypatch.setattr(streaming, "open_video", lambda *_: VideoInput(info, lambda video: frames()))
    result = stylize_video("endless", tmp_path / "out.mp4", lambda batch: (time.sleep(0.005), negative(batch))[1], batch_size=2, encoding=FAST)
    assert result.done == 120
    assert 2 <= most <= 2 * 8  # being read, waiting, being stylized, waiting, being written: 5 batches, and a frame here and there


def test_a_stopped_video_plays_and_ends_with_its_sound(clip, tmp_path):
    done = []
    result = stylize_video(
        clip, tmp_path / "out.mp4", negative, batch_size=5, encoding=FAST, on_progress=done.append, should_stop=lambda: len(done) == 2
    )
    assert result.done == 10
    assert len(read(tmp_path / "out.mp4")) == 10
    assert duration(tmp_path / "out.mp4") == pytest.approx(0.4, abs=0.045)  # sound comes in pieces of 0.021 s
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_stopped_before_the_first_frame_leaves_no_file(clip, tmp_path):
    assert stylize_video(clip, tmp_path / "out.mp4", negative, should_stop=lambda: True).done == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("culprit", ["reading", "stylizing", "stabilizing"])
def test_an_error_in_any_thread_is_raised_and_leaves_no_file(monkeypatch, clip, tmp_path, culprit):
    def fail_after(count, function):
        calls = []

        def call(*args):
            calls.append(None)
            if len(calls) > count:
                raise RuntimeError(f"{culprit} failed")
            return function(*args)

        return call

    stylize, finish = negative, None
    if culprit == "reading":
        make = fail_after(2, Frame)
        monkeypatch.setattr("fastnst.video_input.Frame", make)
    elif culprit == "stylizing":
        stylize = fail_after(2, negative)
    else:
        finish = fail_after(2, lambda content, stylized: stylized)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match=f"{culprit} failed"):
        stylize_video(clip, tmp_path / "out.mp4", stylize, finish=finish, batch_size=2, encoding=FAST)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_the_input_is_never_overwritten(clip, tmp_path):
    before = clip.read_bytes()
    with pytest.raises(ValueError, match="would overwrite the input"):
        stylize_video(clip, clip, negative, overwrite=True)
    assert clip.read_bytes() == before


def test_a_folder_in_the_place_of_the_result_is_told_before_the_work(clip, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"--output: .*folder\.mp4 is a folder, need the name of a file"):
        stylize_video(clip, tmp_path / "folder.mp4", lambda pictures: pytest.fail("began"), overwrite=True)


def test_many_broken_frames_are_counted_and_a_few_named(tmp_path):
    for index in range(12):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    Image.new("RGB", (32, 32)).save(tmp_path / "12.png")
    told = []
    result = stylize_video(tmp_path, tmp_path / "out.mp4", negative, encoding=FAST, say=told.append)
    assert (result.done, result.broken) == (1, 12)
    assert len(told) == 6 and "more is broken" in told[-1]


def test_a_video_without_a_readable_frame_is_an_error(tmp_path):
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(OSError, match="no frame of it can be read"):
        stylize_video(tmp_path, tmp_path / "out.mp4", negative, say=lambda message: None)


def test_pictures_to_a_gif_and_a_video_to_pictures(clip, tmp_path):
    stylize_video(clip, tmp_path / "pictures" / "%03d.png", negative, say=lambda message: None)
    assert len(list((tmp_path / "pictures").iterdir())) == 25
    stylize_video(tmp_path / "pictures", tmp_path / "out.gif", negative, pictures_per_second=Fraction(10))
    frames = read(tmp_path / "out.gif")
    assert len(frames) == 25 and frames[1].time == Fraction(1, 10)
    assert np.abs(frames[3].pixels.astype(int) - read(clip)[3].pixels).mean() < 6  # twice negative; 256 colors, dithered


# Live


def test_live_drops_frames_rather_than_lag(clip, tmp_path):
    shown = []

    def slow(batch):
        assert len(batch) == 1
        time.sleep(0.1)
        return negative(batch)

    began = time.monotonic()
    result = stylize_live(str(clip), slow, lambda pixels, progress: shown.append((pixels, progress)), target=tmp_path / "out.mp4", encoding=FAST)
    wall = time.monotonic() - began
    assert 0.9 < wall < 2.5  # 25 frames of 0.1 s would take 2.5 s; the clip lasts 1 s
    assert result.shown == len(shown) and 3 <= result.shown <= 12
    assert result.shown + result.dropped == 25
    assert 2 < result.frames_per_second < 11
    recorded = read(tmp_path / "out.mp4")
    assert len(recorded) == result.shown and recorded[0].time == 0
    assert np.abs(recorded[0].pixels.astype(int) - shown[0][0]).mean() < 3
    assert duration(tmp_path / "out.mp4") == pytest.approx(1.0, abs=0.1)


def test_live_shows_every_frame_when_fast_and_stops_when_asked():
    shown: list[LiveProgress] = []
    stylize_live(
        "lavfi:testsrc2=size=64x48:rate=50",  # without end
        negative,
        lambda pixels, progress: shown.append(progress),
        size=ImageSize(short_side=24),
        should_stop=lambda: len(shown) == 25,
    )
    assert len(shown) == 25
    assert 10 < shown[-1].frames_per_second < 60


def test_an_error_while_live_is_raised_and_leaves_no_file(clip, tmp_path):
    def fail(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        stylize_live(str(clip), fail, lambda *_: None, target=tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []
