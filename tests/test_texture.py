"""Fine texture: known answers, by numpy, and gradients against what autograd makes of the same steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastnst import texture
from fastnst.texture import log_spectrum, regular_grid, spectrum_distance


def test_regular_grid_of_stripes_every_4_px():
    # The mean over 5 columns takes 1/5 of a stripe, at the place between two stripes 2/5: 1 - 1/5, -1/5, -2/5, -1/5 are left at the four places.
    # Their mean is 0, their mean square (0.64 + 0.04 + 0.16 + 0.04) / 4 = 0.22; the picture's border is one cell of 40.
    stripes = torch.zeros(2, 3, 160, 160)
    stripes[..., ::4] = 0.5
    assert float(regular_grid(stripes)) == pytest.approx(0.22 * 0.5**2, rel=0.02)
    assert float(regular_grid(stripes.roll(1, 3))) == pytest.approx(0.22 * 0.5**2, rel=0.02)  # wherever they lie


def test_regular_grid_counts_what_repeats_every_4_px_alone():
    wide = torch.arange(160).remainder(10).lt(5).float().expand(1, 3, 160, 160)  # every 10 px
    ramp = torch.linspace(0, 1, 160).expand(1, 3, 160, 160)
    noise = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert float(regular_grid(wide)) < 0.22 / 20 and float(regular_grid(ramp)) < 1e-6
    # 64 cells of a window averaged: a 64th of the variance 1/12, of which the 5x5 mean has taken 1/25
    assert float(regular_grid(noise)) == pytest.approx(1 / 12 * 24 / 25 / 64, rel=0.1)


@pytest.mark.parametrize("height, width", [(3, 50), (4, 4), (5, 33), (16, 16), (50, 47)])
def test_regular_grid_takes_any_size(height, width):
    assert math.isfinite(float(regular_grid(torch.rand(1, 3, height, width))))


def grid_by_pixels(images):
    """As the definition has it: fine texture at each of the 16 places of a cell, averaged over the cells of a window, beyond the mean of the places."""
    height, width = (side // 4 * 4 for side in images.shape[-2:])
    fine = (images - F.avg_pool2d(images, 5, 1, 2, count_include_pad=False))[..., :height, :width]
    places = F.pixel_unshuffle(fine, 4)
    window = min(8, *places.shape[-2:])
    pattern = F.avg_pool2d(places, window, max(1, window // 2)).unflatten(1, (-1, 16))
    return (pattern - pattern.mean(2, keepdim=True)).square().mean()


@pytest.mark.parametrize("height, width", [(4, 4), (5, 33), (16, 16), (50, 47), (64, 131)])
def test_regular_grid_by_products_is_that_by_pixels(height, width):
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, theirs = regular_grid(images), grid_by_pixels(images)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(grid, images)[0] for grid in (ours, theirs)), rtol=1e-9, atol=1e-15)


def test_half_precision_is_not_for_textures():
    """A pattern of 1 level of 255 on a ground of 0.9 would be lost in it."""
    images = torch.full((1, 3, 64, 64), 0.9)
    images[..., ::4] += 1 / 255
    exact = [float(regular_grid(images)), float(log_spectrum(images).mean())]
    with torch.autocast("cpu", torch.bfloat16):
        assert [float(regular_grid(images)), float(log_spectrum(images).mean())] == exact
    assert exact[0] == pytest.approx(0.22 / 255**2, rel=0.1)


def waves(amplitude: float, cycles: int, count: int = 1) -> torch.Tensor:
    """Across, ``cycles`` in 32 px."""
    wave = amplitude * torch.cos(2 * math.pi * cycles / 32 * torch.arange(96))
    return (0.5 + wave).expand(count, 3, 64, 96)


def test_spectrum_distance_of_waves():
    # Twice the amplitude is 4 times the power. A Hann window spreads a wave over 3 x 3 frequencies, of 32 x 17 - 13 x 7 above 0.2 cycles a pixel.
    assert float(spectrum_distance(waves(0.2, 12, 2), log_spectrum(waves(0.1, 12)))) == pytest.approx(9 * math.log(4) ** 2 / 453, rel=1e-3)
    assert float(spectrum_distance(waves(0.2, 12), log_spectrum(waves(0.2, 12)))) == 0
    assert float(spectrum_distance(waves(0.2, 5), log_spectrum(waves(0.1, 5)))) < 1e-6  # strokes of more than 5 px
    down = waves(0.2, 12).transpose(2, 3)
    assert float(spectrum_distance(waves(0.2, 12), log_spectrum(down))) > 1  # the direction counts


def test_the_spectrum_is_the_mean_power_of_windows():
    """By numpy, of four windows that overlap by half, in double precision."""
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    windows = np.stack([image[0, :, y : y + 32, x : x + 32].double().numpy() for y in (0, 16) for x in (0, 16)])
    power = (np.abs(np.fft.rfft2((windows - windows.mean((2, 3), keepdims=True)) * hann[:, None] * hann)) ** 2).mean((0, 1))
    fine = np.concatenate([power[:, 7:].ravel(), power[7:-6, :7].ravel()])  # above 6.4 of 32 cycles across, or down in either direction
    np.testing.assert_allclose(log_spectrum(image)[0].numpy(), np.log(fine + texture._LEVEL), rtol=1e-5)


def test_spectrum_distance_is_of_each_image_alone():
    images, target = torch.rand(3, 3, 70, 50, generator=torch.Generator().manual_seed(0)), log_spectrum(waves(0.1, 9))
    alone = [float(spectrum_distance(image[None] * scale, target)) for image, scale in zip(images, (0.1, 0.5, 1))]
    together = torch.stack([image * scale for image, scale in zip(images, (0.1, 0.5, 1))])
    assert float(spectrum_distance(together, target)) == pytest.approx(sum(alone) / 3, rel=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (48, 70), (65, 47)])
def test_the_gradient_of_a_spectrum(height, width):
    """As autograd has it, of each window's transform."""
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hann = torch.hann_window(32, dtype=torch.float64)
    waves = torch.fft.rfft2(images.unfold(2, 32, 16).unfold(3, 32, 16) * (hann[:, None] * hann))
    power = waves.abs().square().mean((1, 2, 3))
    expected = (torch.cat([power[:, :, 7:].flatten(1), power[:, 7:-6, :7].flatten(1)], 1) + texture._LEVEL).log()
    pull = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad(each, images, pull)[0] for each in (log_spectrum(images), expected)), rtol=1e-9, atol=1e-12)


def test_a_flat_image_has_a_finite_spectrum_and_gradient():
    flat = torch.full((1, 3, 48, 48), 0.3, requires_grad=True)
    spectrum_distance(flat, log_spectrum(waves(0.3, 12))).backward()
    assert torch.isfinite(flat.grad).all()
