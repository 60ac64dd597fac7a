"""Motion: flow of known pans, the measure of flicker by arithmetic, and a stabilizer that steadies without ghosts."""

import sys

import numpy as np
import pytest
from conftest import synthetic_photo
from PIL import Image

from fastnst.motion import Stabilizer, estimate_flow, inside, unoccluded, warp, warping_error

pytest.importorskip("cv2")


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth blobs of a few pixels, as photos have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return np.asarray(small.resize((4 * (width // 4 + 1), 4 * (height // 4 + 1)), Image.Resampling.BICUBIC))[:height, :width]


def pan(count: int, step: tuple[int, int], side: int = 96) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A camera that moves by ``step`` (x, y) px a frame over a texture, and the flow: what is at p now was at p + step before."""
    wide = texture(side + count * step[1], side + count * step[0])
    frames = [wide[index * step[1] : index * step[1] + side, index * step[0] : index * step[0] + side] for index in range(count)]
    return frames, [np.broadcast_to(np.float32(step), (side, side, 2))] * (count - 1)


def noise(shape, amplitude: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, amplitude, shape)


def to_8_bit(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("step", [(3, 0), (0, 2), (5, 1)])
def test_flow_of_a_known_pan(step):
    (before, frame), (known,) = pan(2, step)
    found = estimate_flow(frame, before)
    assert found.dtype == np.float32 and found.shape == (96, 96, 2)
    assert np.abs(found - known)[8:-8, 8:-8].mean() < 0.1


def test_warping_by_the_flow_gives_the_frame_again():
    (before, frame), (flow,) = pan(2, (3, 1))
    assert (warp(before, flow) == frame)[inside(flow)].all()
    assert inside(flow).sum() == (96 - 3) * (96 - 1)


def test_occluded_is_where_the_flows_disagree():
    flow, forward = np.zeros((20, 30, 2), np.float32), np.zeros((20, 30, 2), np.float32)
    flow[..., 0], forward[..., 0] = 2, -2
    forward[:, 12:20] = 4  # what was there before went elsewhere
    expected = np.ones((20, 30), bool)
    expected[:, 10:18] = False  # those pixels come from columns 12 to 19
    expected[:, 28:] = False  # from beyond the edge
    assert (unoccluded(flow, forward) == expected).all()


def test_a_picture_that_moves_as_its_content_has_no_warping_error():
    frames, flows = pan(4, (3, 1))
    assert warping_error(frames, frames, flows) == 0
    assert warping_error(frames, [255 - frame for frame in frames], flows) == 0


def test_warping_error_by_arithmetic():
    frames, flows = pan(3, (2, 0))
    gray = [np.full_like(frame, level) for frame, level in zip(frames, (100, 110, 90), strict=True)]
    assert warping_error(frames, gray, flows) == pytest.approx((10 + 20) / 2 / 255)
    gray[1][:, -2:] = 0  # comes into view, and is not counted; the frame after sees it two columns further left
    assert warping_error(frames, gray, flows) == pytest.approx((10 * 94 + 20 * 92 + 90 * 2) / (94 + 94) / 255)


def test_the_error_by_estimated_flow_is_that_by_the_known_one():
    frames, flows = pan(4, (3, 1))
    outputs = [to_8_bit(frame + noise(frame.shape, 12, index)) for index, frame in enumerate(frames)]
    assert warping_error(frames, outputs) == pytest.approx(warping_error(frames, outputs, flows), rel=0.15)


def test_one_frame_has_no_warping_error():
    with pytest.raises(ValueError, match="two frames"):
        warping_error([texture(16, 16)], [texture(16, 16)])


# The stabilizer


def test_first_frame_and_strength_zero_change_nothing():
    frames, _ = pan(3, (2, 1))
    stabilizer = Stabilizer(0)
    assert all((stabilizer(frame, 255 - frame) == 255 - frame).all() for frame in frames)


def test_blend_by_arithmetic():
    """A still content whose stylized version jumps from 100 to 120 gets 0.9 * 100 + 0.1 * 120 = 102, then 0.9 * 102 + 12 = 103.8."""
    content, stabilizer = texture(64, 64), Stabilizer(0.9)
    found = [stabilizer(content, np.full((64, 64, 3), level, np.uint8)) for level in (100, 120, 120)]
    assert [set(frame.ravel()) for frame in found] == [{100}, {102}, {104}]


@pytest.mark.parametrize("scale", [1, 5])
def test_flicker_of_a_pan_falls_and_detail_stays(scale):
    frames, flows = pan(6, (3, 1))
    frames = [np.asarray(Image.fromarray(frame).resize((96 * scale, 96 * scale), Image.Resampling.BICUBIC)) for frame in frames]
    flows = [np.broadcast_to(np.float32((3 * scale, scale)), (96 * scale, 96 * scale, 2))] * 5
    outputs = [to_8_bit(frame * 0.7 + 30 + noise(frame.shape, 12, index)) for index, frame in enumerate(frames)]
    stabilizer = Stabilizer()
    steady = [stabilizer(content, output) for content, output in zip(frames, outputs, strict=True)]
    assert warping_error(frames, steady, flows) < 0.5 * warping_error(frames, outputs, flows)
    clean = [frame * 0.7 + 30 for frame in frames]
    assert np.abs(steady[-1] - clean[-1]).mean() < np.abs(outputs[-1] - clean[-1]).mean()  # nearer to what it should be, not blurred


def test_after_a_cut_the_new_frame_is_untouched():
    stabilizer = Stabilizer()
    stabilizer(np.full((64, 64, 3), 40, np.uint8), texture(64, 64, 1))
    new = texture(64, 64, 2)
    assert (stabilizer(np.full((64, 64, 3), 200, np.uint8), new) == new).all()


def test_a_video_that_changes_its_size_begins_anew():
    stabilizer = Stabilizer()
    stabilizer(texture(64, 64), texture(64, 64))
    new = texture(48, 80)
    assert (stabilizer(new, new) == new).all()


def test_a_moving_object_leaves_no_trail():
    """A bright square crosses a texture; with the content itself as output, all that differs from it is a ghost."""
    background, stabilizer, worst = texture(96, 128) // 3, Stabilizer(), 0.0
    for index in range(12):
        frame = background.copy()
        frame[30:60, 5 + 7 * index : 35 + 7 * index] = 255 - texture(30, 30, 1) // 4
        steady = stabilizer(frame, frame)
        worst = max(worst, float(np.abs(steady.astype(int) - frame).mean(axis=-1).reshape(24, 4, 32, 4).mean(axis=(1, 3)).max()))
    assert worst < 25  # levels, in the worst block of 4x4 px; a trail of the square would be 140 and more


def test_a_slow_fade_does_not_lag():
    """At 5 levels a frame each frame agrees with the one before, yet a blend of 90 % would lag 45 levels behind."""
    stabilizer, base = Stabilizer(), texture(64, 64) // 2
    for index in range(25):
        frame = base + np.uint8(5 * index)
        steady = stabilizer(frame, frame)
    assert np.abs(steady.astype(int) - frame).mean() < 18


@pytest.mark.parametrize("strength", [-0.1, 1, 2])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        Stabilizer(strength)


def test_tiny_videos_do_not_fail():
    stabilizer, frame = Stabilizer(), np.asarray(synthetic_photo(1, 9, 7))
    assert (stabilizer(frame, frame) == frame).all() and (stabilizer(frame, frame) == frame).all()


def test_without_opencv_the_error_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'fastnst\[video\]'"):
        Stabilizer()
