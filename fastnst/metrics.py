"""How a stylized picture looks, in figures that no loss network decides: steadiness, border, grid, clipping, content kept.

Guards one convention: ``(N, 3, H, W)`` RGB in [0, 1] in, one figure a picture ``(N,)`` out, without waiting for the device. All are 0
for a flawless picture but ``noise_gain`` and ``structural_similarity``, which are 1 where nothing was changed. Units are those
of the pixels: 1/255 is one level of 8 bits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Stylize = Callable[[Tensor], Tensor]
_NOISE = 2 / 255  # standard deviation: the noise of a good camera
_BORDER = 16  # pixels; pictures of less than 128 px have an eighth of their side


def judgement(stylize: Stylize, content: Tensor, stylized: Tensor) -> dict[str, Tensor]:
    """Every figure that needs no further library, at the price of three more passes; ``stylized`` is ``stylize(content)``.

    ``stylize`` and ``stylized`` need not be clamped: they are, here.
    """
    stylized = stylized.clamp(0, 1)

    def clamped(images: Tensor) -> Tensor:
        return stylize(images).clamp(0, 1)

    return {
        "flicker": flicker(clamped, content, stylized),
        "noise_gain": noise_gain(clamped, content, stylized),
        "border": border_error(clamped, content, stylized),
    } | looks(stylized)


def looks(images: Tensor) -> dict[str, Tensor]:
    """The figures that need a picture alone."""
    return {"frame": frame(images), "grid_2": grid_energy(images, 2), "grid_4": grid_energy(images, 4), "clipped": clipped(images)}


def flicker(stylize: Stylize, content: Tensor, stylized: Tensor) -> Tensor:
    """RMS by which the output changes, beyond moving along, when the input moves by one pixel right and down.

    The first row and column are repeated to fill the gap; the border is left out. 0 for what moves with its input.
    """
    shifted = F.pad(content, (1, 0, 1, 0), mode="replicate")[..., :-1, :-1]
    change = stylize(shifted)[..., 1:, 1:] - stylized[..., :-1, :-1]
    margin = _border_of(content)
    return _rms(change[..., margin:-margin, margin:-margin])


def noise_gain(stylize: Stylize, content: Tensor, stylized: Tensor) -> Tensor:
    """RMS of the output's change over that of the input's, under small normal noise, the same each time; 1 for the photo itself."""
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device sees the same noise
    noisy = (content + _NOISE * torch.randn(content.shape[1:], generator=generator).to(content)).clamp(0, 1)
    return _rms(stylize(noisy) - stylized) / _rms(noisy - content)


def border_error(stylize: Stylize, content: Tensor, stylized: Tensor) -> Tensor:
    """RMS of what padding does to the outer 16 px: the picture of a photo cut by 16 px against the same pixels of the whole
    photo's picture, in the outer 16 px less in the middle, where the cut makes itself felt through normalization alone.
    """
    band = _border_of(content) // 4 * 4 or _border_of(content)  # multiples of 4 keep the strides of the network aligned
    cut = slice(band, -band)
    change = stylize(content[..., cut, cut]) - stylized[..., cut, cut]
    middle = change[..., cut, cut]
    around = change.square().sum(dim=(1, 2, 3)) - middle.square().sum(dim=(1, 2, 3))
    outer = (around.clamp(min=0) / (change[0].numel() - middle[0].numel())).sqrt()
    return outer - _rms(middle)


def frame(images: Tensor) -> Tensor:
    """Share of the colour that the outer 3 px lack against the inside: 0 where there is none, 1 where they are gray, below 0 where they have
    more; photos have some. Zero padding in the loss network teaches networks such a pale frame. Colour: RMS of the channels about their mean."""
    colour = (images - images.mean(dim=1, keepdim=True)).square().mean(dim=1)
    inside = torch.zeros_like(colour[0], dtype=torch.bool)
    inside[3:-3, 3:-3] = True
    least = 1 / 255**2  # of a gray picture none can be lacking
    return 1 - ((colour[:, ~inside].mean(1) + least) / (colour[:, inside].mean(1) + least)).sqrt()


def grid_energy(images: Tensor, period: int) -> Tensor:
    """RMS of the regular grid of 2 or 4 px ``period`` that upsampling leaves (Odena et al. 2016): 0 where there is none.

    The energy of the spectrum at the frequencies of that period, across, down and diagonally, beyond that of the frequencies beside
    them, so that texture, which has both, counts nothing. Averaged over windows of 64 px, as the grid's phase changes
    with the picture. Period 4 is without what is of period 2 too.
    """
    if min(images.shape[-2:]) < 32:
        missing = [max(0, 32 - side) for side in (images.shape[-1], images.shape[-2])]
        images = F.pad(images, (0, missing[0], 0, missing[1]), mode="circular")
    side = 64 if min(images.shape[-2:]) >= 64 else 32
    windows = images.unfold(2, side, side // 2).unfold(3, side, side // 2)  # (N, C, rows, columns, side, side)
    hann = torch.hann_window(side, periodic=True, dtype=images.dtype, device=images.device)
    window = hann[:, None] * hann
    windows = windows - windows.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(windows * window).abs().square().mean(dim=(1, 2, 3)) / (side**2 * window.square().sum())  # sums to the variance
    lobes = F.avg_pool2d(F.pad(power[:, None], (1, 1, 1, 1), mode="circular"), 3, 1)[:, 0] * 9  # a frequency spreads over 3x3 in a Hann window

    quarter, excess = side // 4, torch.zeros_like(power[:, 0, 0])
    for down in range(4):
        for across in range(4):
            if (down, across) == (0, 0) or (period == 2) != (down % 2 == across % 2 == 0):
                continue
            row, column = down * quarter, across * quarter
            beside = [(row, (column + step) % side) for step in (-3, 3) if across] + [((row + step) % side, column) for step in (-3, 3) if down]
            excess = excess + lobes[:, row, column] - sum(lobes[:, r, c] for r, c in beside) / len(beside)
    return excess.clamp(min=0).sqrt()


def clipped(images: Tensor) -> Tensor:
    """Share of the pixels of which a channel is at 0 or 255 of 8 bits."""
    levels = (images * 255).round()
    return ((levels <= 0) | (levels >= 255)).any(dim=1).float().mean(dim=(1, 2))


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of the luminance (Wang et al. 2004), as scikit-image has it: 1 where the same, about 0 where nothing is shared."""
    from skimage.metrics import structural_similarity as ssim

    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grays = [(images.float().cpu() * weights).sum(1).numpy() for images in (a, b)]
    return torch.tensor([float(ssim(x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)) for x, y in zip(*grays)])


def _border_of(images: Tensor) -> int:
    return min(_BORDER, min(images.shape[-2:]) // 8)


def _rms(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1).sqrt()
