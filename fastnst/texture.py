"""Fine texture that networks make by themselves: the grid of their cells, threads. What it measures has a gradient, to be minimized.

Guards one convention: images are ``(N, 3, H, W)`` RGB in [0, 1]; what is measured is in float32 at least.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SPECTRUM_SIDE = 32  # px, of the windows of which spectra are taken
_LEVEL = 1e-3  # of spectra: the power of noise of 0.7 of 255 levels, less than which does not count


def regular_grid(images: Tensor) -> Tensor:
    """Mean square of the pattern that repeats every 4 px, in windows of 32 px, averaged over the batch; 0 where there is none.

    4 px is what a network's two upsamplings make of one position: trained on too few photos, it fills all positions alike, which looks woven.
    What is coarser than 5 px does not count. Random texture leaves a 64th of its variance (more below 32 px).
    """
    images = _exact(images)
    window = min(8, *(side // 4 for side in images.shape[-2:]))  # cells
    if not window:
        return images.new_zeros(())
    with torch.autocast(images.device.type, enabled=False):
        down, across = (_cell_means(torch.eye(side, dtype=images.dtype, device=images.device), window) for side in images.shape[-2:])
        whole, coarse = (rows.mT @ (images @ columns) for rows, columns in zip(down, across))
    pattern = (whole - coarse).unflatten(3, (-1, 4)).unflatten(2, (-1, 4))  # (N, 3, windows, 4, windows, 4)
    return (pattern - pattern.mean((3, 5), keepdim=True)).square().mean()


def _cell_means(pixels: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of each row the mean of every fourth pixel over a ``window`` of cells, ``(rows, 4 x windows)``, and the same of its means over 5 pixels.

    Of an identity these are what images are multiplied by, across and down: all of it is linear, and pixel by pixel it took seven times as long.
    """

    def means(rows: Tensor) -> Tensor:
        return rows[:, : rows.shape[1] // 4 * 4].unflatten(1, (-1, 4)).unfold(1, window, max(1, window // 2)).mean(-1).flatten(1)

    return means(pixels), means(F.avg_pool1d(pixels, 5, 1, 2, count_include_pad=False))


def log_spectrum(images: Tensor) -> Tensor:
    """How much fine texture of each frequency and direction: logarithms of the mean power in windows of 32 px, ``(N, F)``, of all frequencies above
    0.2 cycles a pixel (waves shorter than 5 px) across or down. Images are 32 px at least."""
    power = _Power.apply(_exact(images).contiguous())
    first = SPECTRUM_SIDE // 5 + 1  # frequencies across are 0 to 16 32nds, down 0 to 16 and -15 to -1; no mask, for whose size a GPU would be waited for
    fine = torch.cat([power[:, :, first:].flatten(1), power[:, first : 1 - first, :first].flatten(1)], 1)
    return (fine + _LEVEL).log()


def spectrum_distance(images: Tensor, target: Tensor) -> Tensor:
    """Mean square of what ``log_spectrum`` says of the images, ``(N, 3, H, W)``, beyond ``target``, ``(1, F)`` (after Durall et al. 2020, who compare the spectra
    of real and generated images over all directions); 0 for images below 32 px."""
    return (log_spectrum(images) - target).square().mean() if min(images.shape[-2:]) >= SPECTRUM_SIDE else images.new_zeros((), dtype=torch.float32)


class _Power(torch.autograd.Function):
    """Mean power of windows that overlap by half, under a Hann window, at each frequency: ``(N, C, H, W)`` -> ``(N, 32, 17)``; a window's own mean is left in it,
    and shows at the lowest frequencies alone. By autograd the way back takes three times as long."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        hann = torch.hann_window(SPECTRUM_SIDE, dtype=images.dtype, device=images.device)
        hann = hann[:, None] * hann
        windows = images.unfold(2, SPECTRUM_SIDE, SPECTRUM_SIDE // 2).unfold(3, SPECTRUM_SIDE, SPECTRUM_SIDE // 2)
        waves = torch.fft.rfft2(windows * hann)  # (N, C, rows, columns, 32, 17)
        ctx.save_for_backward(waves, hann)
        ctx.shape = images.shape
        return torch.view_as_real(waves).square().mean((1, 2, 3)).sum(-1)  # for absolute values, a CPU would take a third more time

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        waves, hann = ctx.saved_tensors
        n, channels, rows, columns = waves.shape[:4]
        half = SPECTRUM_SIDE // 2
        # The inverse transform takes a frequency across for two, it and its mirror image, but the first and the last, which are their own.
        twice = gradient.new_ones(half + 1)
        twice[::half] = 2
        weights = gradient * twice * (SPECTRUM_SIDE**2 / (channels * rows * columns))
        windows = torch.fft.irfft2(waves * weights[:, None, None, None])
        quarters, of_hann = (each.unflatten(-1, (2, half)).unflatten(-3, (2, half)) for each in (windows, hann))
        sums = windows.new_zeros(n, channels, rows + 1, half, columns + 1, half)
        for down in range(2):
            for across in range(2):
                place = sums[:, :, down : down + rows, :, across : across + columns]
                place.addcmul_(quarters[:, :, :, :, down, :, across].transpose(3, 4), of_hann[down, :, across, None])
        covered = sums.view(n, channels, (rows + 1) * half, (columns + 1) * half)
        return F.pad(covered, (0, ctx.shape[3] - covered.shape[3], 0, ctx.shape[2] - covered.shape[2]))


def _exact(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))
