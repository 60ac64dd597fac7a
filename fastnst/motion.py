"""Motion between frames: optical flow, a measure of flicker, and a stabilizer that lets strokes move with what is painted.

A flow is float32 ``(H, W, 2)``, in pixels (x, y): a pixel of this frame at p was at p + flow[p] in the frame before.
OpenCV is imported when it is used, never with this module.
"""

from collections.abc import Iterable

import numpy as np

_FLOW_SIDE = 384  # pixels of the long side at which motion is estimated: flow is smooth, and larger costs time


def import_cv2():
    """OpenCV; raises ``ValueError`` telling how to install it."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"motion between frames needs OpenCV ({error}): pip install 'fastnst[video]'") from None
    return cv2


def estimate_flow(frame: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The flow from ``frame`` to the one before, both uint8 RGB ``(H, W, 3)``: dense inverse search (Kroeger et al. 2016)."""
    cv2 = import_cv2()
    if min(frame.shape[:2]) < 16:
        return np.zeros((*frame.shape[:2], 2), np.float32)  # smaller than the search's patches
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (frame, before)), None)


def warp(before: np.ndarray, flow: np.ndarray, cubic: bool = False) -> np.ndarray:
    """``before`` moved to where its parts are now; beyond its edges the edge is repeated."""
    cv2 = import_cv2()
    rows, columns = np.indices(flow.shape[:2], dtype=np.float32)
    return cv2.remap(before, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def inside(flow: np.ndarray) -> np.ndarray:
    """Where the frame before was inside the picture: bool ``(H, W)``."""
    height, width = flow.shape[:2]
    rows, columns = np.indices((height, width), dtype=np.float32)
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def unoccluded(flow: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Where flow and the flow the other way agree and vary slowly: bool ``(H, W)``, by the criteria of Sundaram et al. 2010.

    As used by Ruder et al. 2016 and Lai et al. 2018. ``forward``: from the frame before to this one.
    """
    back = warp(forward, flow)
    squares = (flow**2).sum(-1) + (back**2).sum(-1)
    agree = ((flow + back) ** 2).sum(-1) <= 0.01 * squares + 0.5
    gradient = sum((np.gradient(flow[..., axis], axis=along) ** 2 for axis in (0, 1) for along in (0, 1)), np.zeros(flow.shape[:2], np.float32))
    return inside(flow) & agree & (gradient <= 0.01 * (flow**2).sum(-1) + 0.002)


def warping_error(contents: Iterable[np.ndarray], stylized: Iterable[np.ndarray], flows: Iterable[np.ndarray] | None = None) -> float:
    """How much a stylized video flickers: the mean of |output_t - warp(output_{t-1})| over what was visible before, of 255 levels to 1.

    Frames are uint8 RGB ``(H, W, 3)``, at least two. ``flows``: the known motion, one for each frame but the first; without it, it is
    estimated from ``contents`` and occlusions are left out. After Huang et al. 2017 and Lai et al. 2018, who take the mean square.
    """
    known = iter(flows) if flows is not None else None
    total, count = 0.0, 0
    content_before = output_before = None
    for content, output in zip(contents, stylized, strict=True):
        if output_before is not None:
            if known is not None:
                flow = next(known)
                visible = inside(flow)
            else:
                flow = estimate_flow(content, content_before)
                visible = unoccluded(flow, estimate_flow(content_before, content))
            difference = np.abs(output.astype(np.float32) - warp(output_before.astype(np.float32), flow))
            total += float(difference[visible].sum())
            count += int(visible.sum()) * output.shape[-1]
        content_before, output_before = content, output
    if not count:
        raise ValueError("the warping error needs two frames at least, that show something in common")
    return total / count / 255


class Stabilizer:
    """Less flicker without training: each stylized frame is blended with the ones before, moved along the motion of the content.

    Call it with the frames of one video in order. The contents are blended just the same, and where that blend no longer is the
    content that is there (occlusions, cuts, wrong flow, fades), the new frame stays as it is: what lags in the output would lag in
    it too. Averaging strokes dulls them, so the blend gets back the local contrast of the new frame. ``strength``: the share of
    the frames before where all agrees, 0 to below 1; they are remembered for about 1 / (1 - strength) frames.
    """

    def __init__(self, strength: float = 0.9) -> None:
        if not 0 <= strength < 1:
            raise ValueError(f"stabilizing strength: got {strength}, need 0 or more and less than 1")
        import_cv2()
        self.strength = strength
        self._content: np.ndarray | None = None  # the frame before, reduced
        self._blended_content: np.ndarray | None = None  # the contents before, reduced, float32
        self._blend: np.ndarray | None = None  # the outputs before, float32

    def __call__(self, content: np.ndarray, stylized: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)``, both -> the stabilized frame, the same."""
        cv2 = import_cv2()
        height, width = stylized.shape[:2]
        scale = min(1.0, _FLOW_SIDE / max(height, width))
        reduced = cv2.resize(content, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
        fresh, blended_content = stylized.astype(np.float32), reduced.astype(np.float32)
        if self._blend is None or self._blend.shape != fresh.shape:
            self._content, self._blended_content, self._blend = reduced, blended_content, fresh
            return stylized
        flow = estimate_flow(reduced, self._content)
        moved_content = warp(self._blended_content, flow, cubic=True)
        difference = cv2.blur(np.abs(moved_content - blended_content).max(-1), (5, 5))
        share = self.strength * np.clip((_DISBELIEVED - difference) / (_DISBELIEVED - _BELIEVED), 0, 1) * inside(flow)
        share = share.astype(np.float32)
        blended_content += _times(share, moved_content - blended_content)
        if reduced.shape != content.shape:
            ratio = np.array((width / reduced.shape[1], height / reduced.shape[0]), np.float32)
            flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) * ratio
            share = cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)
        blend = fresh + _times(share, warp(self._blend, flow, cubic=True) - fresh)
        self._content, self._blended_content, self._blend = reduced, blended_content, blend
        return _with_contrast_of(blend, fresh)


# Differences of content, in levels of 255, up to which the blend is believed in full, and from which not at all.
_BELIEVED, _DISBELIEVED = 6.0, 24.0
_STROKE = 11  # pixels: strokes are narrower than twice this, whatever the size of the picture, as the network is local
_MOST_GAIN = 2.0


def _with_contrast_of(blend: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """``blend`` with its fine detail raised, at most doubled, to the local energy that it has in ``fresh``: float32 -> uint8."""
    cv2 = import_cv2()

    def energy(picture: np.ndarray) -> np.ndarray:
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        detail = gray - cv2.blur(gray, (_STROKE, _STROKE))
        return cv2.blur(detail * detail, (_STROKE, _STROKE)) + 1

    gain = np.clip(np.sqrt(energy(fresh) / energy(blend)), 1, _MOST_GAIN) - 1
    return cv2.add(blend, _times(gain, blend - cv2.blur(blend, (_STROKE, _STROKE))), dtype=cv2.CV_8U)  # rounds, and stays in 0 to 255


def _times(weights: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """float32 ``(H, W)`` times ``(H, W, 3)``; five times as fast as NumPy's broadcasting over so short an axis."""
    cv2 = import_cv2()
    return cv2.multiply(cv2.merge([weights] * picture.shape[-1]), picture)
