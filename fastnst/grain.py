"""Grain for the flat parts of a photo: skies, walls, what is overexposed. Without any a network finds nothing there to make strokes of, or JPEG's blocks."""

from functools import cache
from numbers import Real
from typing import Any

import numpy as np

GRAIN = 0.03  # of the deviation of the photo's light and dark. By 0.05 what is flat is too busy, and the objective on held-out photos begins to rise
_BLOCK = 8  # pixels: what is flat is told for squares of so many
_SIZE = 3  # pixels: the deviation of the Gaussian that white noise is blurred by
_PERIODS = 211, 307  # pixels after which two textures repeat themselves: their sum does so where nobody sees it
_ROOM = 2  # deviations
_ROWS = 64  # at once, whole blocks: a large picture's floats would take four times its memory


def check_grain(grain: float) -> float:
    """The same. Raises ``ValueError`` unless it is from 0 to 1."""
    if isinstance(grain, Real) and 0 <= grain <= 1:
        return grain
    raise ValueError(f"grain: got {grain!r}, need a number from 0, none, to 1; {GRAIN} is the default")


@cache
def _textures() -> tuple[np.ndarray, ...]:
    """Two, ``(period, period)`` of float32, whose sum is of mean 0 and deviation 1; each goes on without a seam beside itself."""
    made = []
    for seed, period in enumerate(_PERIODS):
        noise = np.frombuffer(np.random.RandomState(seed).bytes(period**2), np.uint8).reshape(period, period).astype(np.float32)
        for axis in (0, 1):
            noise = sum(np.float32(np.exp(-((shift / _SIZE) ** 2) / 2)) * np.roll(noise, shift, axis) for shift in range(-3 * _SIZE, 3 * _SIZE + 1))
        made.append((noise - noise.mean()) / noise.std() / np.float32(len(_PERIODS) ** 0.5))
    return tuple(made)


def add_grain(picture: np.ndarray, grain: float) -> None:
    """Give each block of ``(H, W, 3)``, levels of 0..255 in uint8 or float32, the deviation of its light and dark that it lacks of ``grain`` times that of the whole picture.

    A picture of a single color stays as it is.
    """
    height, width = picture.shape[:2]
    bands = [slice(top, top + _ROWS) for top in range(0, height, _ROWS)]
    firsts = [np.arange(0, side, _BLOCK) for side in (height, width)]
    counts = np.outer(*(np.diff(first, append=side) for first, side in zip(firsts, (height, width))))
    sums = [np.concatenate(each) for each in zip(*(_sums(picture[band], picture[0, 0]) for band in bands))]
    mean, square = (each.sum(dtype=np.float64) / (height * width) for each in sums)
    wanted = grain**2 * max(0.0, square - mean**2)
    missing = np.sqrt(np.maximum(0, wanted - (sums[1] / counts - np.square(sums[0] / counts)))).astype(np.float32)
    lines = [texture[:height, np.arange(width) % len(texture)] for texture in _textures()]
    most = _ROOM * wanted**0.5
    kind = np.int16 if picture.dtype == np.uint8 else np.float32
    for top, band in zip(range(0, height, _ROWS), bands):
        here = missing[top // _BLOCK : (top + _ROWS) // _BLOCK]
        if here.any():
            rows = np.arange(top, min(height, top + _ROWS))
            deviation = here.repeat(_BLOCK, 0)[: len(rows)].repeat(_BLOCK, 1)[:, :width]
            noise = np.rint(sum(each[rows % len(each)] for each in lines) * deviation).astype(kind)
            levels = picture[band].astype(kind, order="C").reshape(len(rows), -1)
            if levels.min() < most or levels.max() > 255 - most:  # black and white make room for it
                room = np.rint(np.minimum(_ROOM * here, 127)).astype(kind).repeat(_BLOCK, 0)[: len(rows)].repeat(3 * _BLOCK, 1)[:, : 3 * width]
                np.minimum(np.maximum(levels, room, out=levels), 255 - room, out=levels)
            levels += noise.repeat(3, axis=1)
            picture[band] = np.clip(levels, 0, 255, out=levels).reshape(len(rows), width, 3)


def _sums(band: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a band's light over that of ``ground``, one of its colors, so that one color leaves nothing to round, and of its squares, ``(rows of blocks, blocks)``."""
    light, dark = (levels.astype(np.float32) @ np.full(3, 1 / 3, np.float32) for levels in (band, ground))
    light -= dark
    return tuple(np.add.reduceat(np.add.reduceat(each, range(0, light.shape[1], _BLOCK), axis=1), range(0, light.shape[0], _BLOCK), axis=0) for each in (light, light * light))


def with_grain(levels: Any, grain: float) -> Any:
    """``add_grain`` for a torch tensor ``(N, 3, H, W)`` of float32 levels, on any device, which nothing here waits for; gives a new one."""
    import torch
    import torch.nn.functional as F

    light = levels.mean(dim=1, keepdim=True)
    light = light - light.mean(dim=(2, 3), keepdim=True)  # what is left of a single color is rounding: its squares are as good as nothing
    mean, square = (F.avg_pool2d(each, _BLOCK, ceil_mode=True) for each in (light, light * light))
    wanted = grain**2 * (light * light).mean(dim=(2, 3), keepdim=True)
    missing = (wanted - (square - mean * mean)).clamp_(min=0).sqrt_()
    height, width = levels.shape[2:]
    rows, columns = (torch.arange(side, device=levels.device) for side in (height, width))
    deviation = missing[:, :, rows // _BLOCK][..., columns // _BLOCK]
    noise = deviation * sum(texture[rows % len(texture)][:, columns % len(texture)] for texture in _textures_on(levels.device))
    room = (_ROOM * deviation).clamp(max=127).round_()
    return (levels.clamp(room, 255 - room) + noise.round_()).clamp_(0, 255)


@cache
def _textures_on(device: Any) -> Any:
    import torch

    return [torch.from_numpy(texture).to(device) for texture in _textures()]
