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


def _gray(frame: np.ndarray) -> np.ndarray:
    return import_cv2().cvtColor(frame, import_cv2().COLOR_RGB2GRAY)


def estimate_flow(frame: np.ndarray, before: np.ndarray, fast: bool = False) -> np.ndarray:
    """The flow from ``frame`` to the one before, both uint8 RGB ``(H, W, 3)``: dense inverse search (Kroeger et al. 2016)."""
    cv2 = import_cv2()
    if min(frame.shape[:2]) < 16:
        return np.zeros((*frame.shape[:2], 2), np.float32)  # smaller than the search's patches
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST if fast else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return search.calc(_gray(frame), _gray(before), None)


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
    """Less flicker without training: each stylized frame is blended with the one before, moved along the motion of the content.

    Call it with the frames of one video in order. Where the moved content disagrees with the content that is there (occlusions, cuts,
    wrong flow), the new frame stays as it is. ``strength``: the share of the frame before, where it agrees fully (0 to below 1).
    """

    def __init__(self, strength: float = 0.8) -> None:
        if not 0 <= strength < 1:
            raise ValueError(f"stabilizing strength: got {strength}, need 0 or more and less than 1")
        self.strength = strength
        self._content: np.ndarray | None = None  # the frame before, reduced
        self._stylized: np.ndarray | None = None  # its stabilized output, float32

    def __call__(self, content: np.ndarray, stylized: np.ndarray) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)``, both -> the stabilized frame, the same."""
        cv2 = import_cv2()
        height, width = stylized.shape[:2]
        scale = min(1.0, _FLOW_SIDE / max(height, width))
        reduced = cv2.resize(content, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
        output = stylized.astype(np.float32)
        if self._stylized is not None and self._stylized.shape == output.shape:
            flow = estimate_flow(reduced, self._content)
            share = self.strength * _agreement(reduced, self._content, flow)
            if scale < 1:
                ratio = np.array((width / reduced.shape[1], height / reduced.shape[0]), np.float32)
                flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) * ratio
                share = cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)
            moved = warp(self._stylized, flow, cubic=True)
            output += share[..., None] * (moved - output)
        self._content, self._stylized = reduced, output
        return np.clip(output + 0.5, 0, 255).astype(np.uint8)


# Differences of content, in levels of 255, up to which the flow is believed in full, and from which not at all.
_BELIEVED, _DISBELIEVED = 6.0, 24.0


def _agreement(content: np.ndarray, before: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """How far the content before, moved by ``flow``, is the content now: float32 ``(H, W)`` in [0, 1]."""
    cv2 = import_cv2()
    difference = np.abs(content.astype(np.float32) - warp(before.astype(np.float32), flow)).max(-1)
    difference = cv2.blur(difference, (5, 5))
    agreement = np.clip((_DISBELIEVED - difference) / (_DISBELIEVED - _BELIEVED), 0, 1)
    return (agreement * inside(flow)).astype(np.float32)
