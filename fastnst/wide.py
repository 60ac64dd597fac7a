"""The network's convolutions in shapes that fill a GPU's matrix units: the same sums, of more channels at fewer places. Differentiable.

Three channels of a photo, or of a picture, leave most of a matrix unit idle. So at both ends of a network the pixels of a square are one place, of as many
times the channels, row by row: channel ``(py, px, c)``. A 9x9 convolution of pixels is one of 3x3 places of 4x4 pixels. Convolutions next to an
upsampling give all pixels of a place at once.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.stages import UPSAMPLINGS

PLACE = 4  # pixels of a side of a place of full resolution
CHANNELS = 4  # of a photo: red, green, blue and one that is 0
NUMBERS = 64  # of a place of a picture: 4x4 pixels of three, and 16 that are 0


def first_weight(weight: Tensor, stride: int) -> Tensor:
    """``(O, 3, 9, 9)`` of stride 1, or ``(O, 3, 10, 10)`` of stride 2 -> ``(n n O, 64, 3, 3)``, n = 4 / ``stride``: from places of photos to places."""
    return _of_places(F.pad(weight, (0, 0, 0, 0, 0, CHANNELS - 3)), PLACE, stride).flatten(0, 1)


def last_weight(weight: Tensor, shuffle: int = 1) -> Tensor:
    """``(3 s s, I, k, k)``, k = 9 or 5, whose output pixel shuffle by ``shuffle`` s = 1 or 2 follows -> ``(64, n n I, 3, 3)``, n = 4 / s: from places of n x n to
    such of pictures."""
    count = PLACE // shuffle
    wide = _of_places(weight, count, 1).unflatten(0, (count, count)).unflatten(2, (-1, shuffle, shuffle))  # (n, n, O, s, s, n n I, 3, 3)
    wide = wide.permute(0, 3, 1, 4, 2, 5, 6, 7).flatten(0, 4)
    return F.pad(wide, (0, 0) * 3 + (0, NUMBERS - len(wide)))


def _of_places(weight: Tensor, side: int, stride: int) -> Tensor:
    """``(O, I, k, k)`` of ``stride`` -> ``(n n, O, side side I, 3, 3)``, n = side / stride: of each of a place's outputs, as they lie in the 3x3 places around."""
    window, size = 3 * side, weight.shape[-1]
    moves = range(0, side, stride)
    moved = [F.pad(weight, (right, window - size - right, down, window - size - down)) for down in moves for right in moves]
    wide = torch.stack(moved).unflatten(-1, (3, side)).unflatten(-3, (3, side))  # (n n, O, I, 3, side, 3, side)
    return wide.permute(0, 1, 4, 6, 2, 3, 5).flatten(2, 4)


def convolved_by_fours(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """A k x k convolution, ``padding`` zeros added, as one of k + 1 and stride 2 to four times the channels, and their pixel shuffle, where sides are even."""
    if any((side + 2 * padding) % 2 for side in x.shape[2:]):
        return F.conv2d(x, weight, bias, padding=padding)
    moved = [F.pad(weight, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)]
    weight = torch.stack(moved, dim=1).flatten(0, 1)
    return F.pixel_shuffle(F.conv2d(x, weight, bias.repeat_interleave(4), stride=2, padding=padding), 2)


def last_bias(bias: Tensor, shuffle: int = 1) -> Tensor:
    """``(3 s s,)`` -> ``(48,)``, of what ``last_weight`` gives."""
    count = PLACE // shuffle
    return bias.view(1, 1, -1, shuffle, shuffle).expand(count, count, -1, -1, -1).permute(0, 3, 1, 4, 2).flatten()


def in_pixels(x: Tensor, side: int = PLACE) -> Tensor:
    """Places of ``side x side`` pixels, ``(N, s s C, h, w)``, as ``(N, C, s h, s w)``."""
    images, channels, height, width = x.shape
    x = x.unflatten(1, (side, side, channels // side**2))
    return x.permute(0, 3, 4, 1, 5, 2).reshape(images, -1, side * height, side * width)


def cropped(x: Tensor, side: int, height: int, width: int) -> tuple[Tensor, int]:
    """Makes pixels of places of ``side x side``, where these stick out beyond ``height x width``. Gives the result and the side of its places: ``side``, or 1 once they are pixels."""
    if (height, width) == (side * x.shape[2], side * x.shape[3]):
        return x, side
    return in_pixels(x, side)[:, :, :height, :width], 1


def in_places(x: Tensor, side: int = PLACE) -> Tensor:
    """``in_pixels`` the other way."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, C, h, s, w, s)
    return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def upsampled_weight(weight: Tensor, mode: str) -> Tensor:
    """3x3 kernels on a grid upsampled by 2, ``nearest`` or ``bilinear``, ``(O, I, 3, 3)``, or those of a transposed convolution of stride 2 that crops 3 pixels,
    ``(I, O, 4, 4)`` (``transposed``) -> ``(2 2 O, I, 3, 3)`` on the small grid."""
    weight = weight.transpose(0, 1) if mode == "transposed" else weight
    split = weight.reshape(-1, weight.shape[2] ** 2) @ _upsampling(mode, weight.device, weight.dtype)  # (O I, 2 2 3 3)
    return split.view(*weight.shape[:2], 4, 3, 3).permute(2, 0, 1, 3, 4).flatten(0, 1)


def around_corners(weight: Tensor) -> Tensor:
    """What ``upsampled_weight`` gives, unless bilinear, ``(2 2 O, I, 3, 3)``, less the taps that are 0 -> ``(2 2 O, I, 2, 2)``: 4 multiplications instead of 9.

    Each of the four pixels of a place looks towards another corner of it. Here places are the four that look towards one: from ``h + 2`` rows ``h + 1`` of them, of which
    the first and the last of their ``2 h + 2`` rows of pixels are no part of the picture; columns likewise.
    """
    by_pixel = weight.unflatten(0, (2, 2, -1))
    return torch.cat([by_pixel[y, x, :, :, y : y + 2, x : x + 2] for y in (1, 0) for x in (1, 0)])


@cache
def _upsampling(mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What each tap of a kernel, ``(k k, ...)``, is to the taps of the four on the small grid, ``(..., 36)``."""
    rows = UPSAMPLINGS[mode]
    with torch.inference_mode(False):
        return torch.from_numpy(np.einsum("pak,qbl->klpqab", rows, rows).reshape(-1, 36)).to(device, dtype)


def by_place(weight: Tensor) -> Tensor:
    """``(O 2 2, ...)``, as pixel shuffle takes them, -> ``(2 2 O, ...)``."""
    return weight.unflatten(0, (-1, 2, 2)).permute(1, 2, 0, *range(3, weight.ndim + 2)).flatten(0, 2)
