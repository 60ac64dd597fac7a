"""The network's convolutions in shapes that fill a GPU's matrix units: the same sums, of more channels at fewer places. Differentiable.

Three channels of a photo, or of a picture, leave most of a matrix unit idle. So four neighbouring pixels are one place of four times the
channels, in the same memory, and convolutions next to an upsampling give all pixels of a place at once, row by row: channel ``(py, px, c)``.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.stages import UPSAMPLINGS

PLACE = 4  # pixels of a side of what ``first`` takes, across, and ``last`` gives
CHANNELS = 4  # of a photo: red, green, blue and one that is 0


def first_weight(weight: Tensor, stride: int) -> Tensor:
    """``(O, 3, k, k)`` of ``stride`` 1 or 2, k up to 9 or 10 -> ``(O 4 / stride, 16, k, 3)``, for ``first``."""
    size, count = weight.shape[-1], PLACE // stride
    window = 3 * PLACE  # three places hold what the pixels of one need
    moved = [F.pad(weight, (at * stride, window - size - at * stride, 0, 0, 0, CHANNELS - 3)) for at in range(count)]
    wide = torch.stack(moved)  # (count, O, 4, k, 12)
    return wide.unflatten(-1, (3, PLACE)).permute(0, 1, 5, 2, 3, 4).reshape(count * weight.shape[0], PLACE * CHANNELS, size, 3)


def first(x: Tensor, weight: Tensor, wide: Tensor, stride: int) -> Tensor:
    """The convolution of padded photos, ``(N, 4, H, W)`` channels-last; by ``wide``, ``first_weight`` of ``weight``, where W is a multiple of 4."""
    if x.shape[3] % PLACE:
        return F.conv2d(x, F.pad(weight, (0, 0, 0, 0, 0, CHANNELS - 3)), stride=stride)
    return apart(F.conv2d(together(x), wide, stride=(stride, 1)), stride)


def together(x: Tensor) -> Tensor:
    """``(N, C, H, W)``, channels-last, -> ``(N, 4 C, H, W / 4)``, the same memory."""
    images, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(images, height, width // PLACE, PLACE * channels).permute(0, 3, 1, 2)


def apart(x: Tensor, stride: int = 1) -> Tensor:
    """``(N, C 4 / stride, H, W)``, channels-last, -> ``(N, C, H, W 4 / stride)``, the same memory."""
    images, channels, height, width = x.shape
    count = PLACE // stride
    return x.permute(0, 2, 3, 1).reshape(images, height, width * count, channels // count).permute(0, 3, 1, 2)


def upsampled_weight(weight: Tensor, mode: str) -> Tensor:
    """3x3 kernels on a grid upsampled by 2, ``nearest`` or ``bilinear``, ``(O, I, 3, 3)``, or those of a transposed convolution of stride 2 that crops 3 pixels,
    ``(I, O, 4, 4)`` (``transposed``) -> ``(2 2 O, I, 3, 3)`` on the small grid."""
    weight = weight.transpose(0, 1) if mode == "transposed" else weight
    split = weight.reshape(-1, weight.shape[2] ** 2) @ _upsampling(mode, weight.device, weight.dtype)  # (O I, 2 2 3 3)
    return split.view(*weight.shape[:2], 4, 3, 3).permute(2, 0, 1, 3, 4).flatten(0, 1)


@cache
def _upsampling(mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What each tap of a kernel, ``(k k, ...)``, is to the taps of the four on the small grid, ``(..., 36)``."""
    rows = UPSAMPLINGS[mode]
    with torch.inference_mode(False):
        return torch.from_numpy(np.einsum("pak,qbl->klpqab", rows, rows).reshape(-1, 36)).to(device, dtype)


def by_place(weight: Tensor) -> Tensor:
    """``(O 2 2, ...)``, as pixel shuffle takes them, -> ``(2 2 O, ...)``."""
    return weight.unflatten(0, (-1, 2, 2)).permute(1, 2, 0, *range(3, weight.ndim + 2)).flatten(0, 2)


def last_weight(weight: Tensor, shuffle: int = 1) -> Tensor:
    """``(O s s, I, k, k)``, whose output pixel shuffle by ``shuffle`` s follows, -> ``(4 4 O, I, k + n - 1, k + n - 1)`` of stride n = 4 / s, for ``last``."""
    count = PLACE // shuffle
    moved = [F.pad(weight, (right, count - 1 - right, down, count - 1 - down)) for down in range(count) for right in range(count)]
    wide = torch.stack(moved).unflatten(0, (count, count)).unflatten(2, (-1, shuffle, shuffle))  # (n, n, O, s, s, I, k', k')
    return wide.permute(0, 3, 1, 4, 2, 5, 6, 7).flatten(0, 4)


def last_bias(bias: Tensor, shuffle: int = 1) -> Tensor:
    """``(O s s,)`` -> ``(4 4 O,)``, to be added to what ``last`` gives."""
    count = PLACE // shuffle
    return bias.view(1, 1, -1, shuffle, shuffle).expand(count, count, -1, -1, -1).permute(0, 3, 1, 4, 2).flatten()


def last(x: Tensor, wide: Tensor, shuffle: int = 1) -> Tensor:
    """The last convolution of what is padded already, without its bias: ``(N, 4 4 O, H / 4, W / 4)``."""
    return F.conv2d(x, wide, stride=PLACE // shuffle)


def in_pixels(x: Tensor, side: int = PLACE) -> Tensor:
    """Places of ``side x side`` pixels, such as ``last`` gives, ``(N, s s O, h, w)``, as ``(N, O, s h, s w)``."""
    images, channels, height, width = x.shape
    x = x.unflatten(1, (side, side, channels // side**2))
    return x.permute(0, 3, 4, 1, 5, 2).reshape(images, -1, side * height, side * width)
