"""Figures of pictures whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_photo
from skimage.metrics import structural_similarity as reference_ssim
from torch import Tensor

from fastnst.image import to_tensor
from fastnst.metrics import border_error, clipped, flicker, frame, grid_energy, judgement, noise_gain, structural_similarity
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork

ROWS, COLUMNS = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return torch.cat([to_tensor(synthetic_photo(seed, 128, 128)) for seed in (1, 2)])


def pattern(values: Tensor, amplitude: float = 0.1) -> Tensor:
    """Gray of RMS ``amplitude`` around mid-gray, for ``values`` of RMS 1."""
    return (0.5 + amplitude * values).expand(1, 3, *values.shape)


# Grids


@pytest.mark.parametrize(
    "values, period_2, period_4",
    [
        (torch.zeros(128, 128), 0, 0),
        ((-1) ** (ROWS + COLUMNS), 0.1, 0),  # a checkerboard of single pixels
        ((-1) ** COLUMNS, 0.1, 0),  # columns
        (2**0.5 * torch.cos(ROWS * torch.pi / 2), 0, 0.1),  # a cosine of amplitude a has RMS a / sqrt 2
        (2 * torch.cos(ROWS * torch.pi / 2) * torch.cos(COLUMNS * torch.pi / 2), 0, 0.1),
        ((0.5**0.5) * ((-1) ** COLUMNS + 2**0.5 * torch.cos(ROWS * torch.pi / 2)), 0.1 / 2**0.5, 0.1 / 2**0.5),  # half of the energy each
        (2**0.5 * torch.cos(ROWS * torch.pi / 4), 0, 0),  # period 8: no grid of ours
        ((ROWS - 63.5) / 37, 0, 0),  # a slope
    ],
    ids=["constant", "checkerboard", "columns", "period 4", "period 4 both ways", "both", "period 8", "slope"],
)
def test_grid_energy_is_the_rms_of_a_grid(values, period_2, period_4):
    assert float(grid_energy(pattern(values), 2)) == pytest.approx(period_2, abs=1e-3)
    assert float(grid_energy(pattern(values), 4)) == pytest.approx(period_4, abs=1e-3)


def test_texture_is_no_grid_but_a_grid_in_texture_is_found(photos):
    generator = torch.Generator().manual_seed(0)
    texture = 0.5 + 0.1 * torch.randn(4, 3, 128, 128, generator=generator)
    gridded = texture + 0.03 * (-1) ** (ROWS + COLUMNS)
    assert grid_energy(texture, 2).max() < 0.01 and grid_energy(texture, 4).max() < 0.01  # of an RMS of 0.1
    torch.testing.assert_close(grid_energy(gridded, 2), torch.full((4,), 0.03), atol=0.004, rtol=0)
    assert grid_energy(photos, 2).max() < 0.5 / 255


def test_transposed_convolution_draws_a_grid_and_nearest_upsampling_does_not(photos):
    grids = {}
    for upsampling in ("nearest", "transposed"):
        torch.manual_seed(0)
        with torch.inference_mode():
            grids[upsampling] = float(grid_energy(TransformNetwork(NetworkConfig(width=8, residual_blocks=1, upsampling=upsampling)).eval()(photos), 2).mean())
    assert grids["transposed"] > 1 / 255 > 10 * grids["nearest"]


@pytest.mark.parametrize("side", [16, 31, 32, 63, 100])
def test_small_pictures_have_grids_too(side):
    checkerboard = pattern(((-1) ** (ROWS + COLUMNS))[:side, :side])
    assert float(grid_energy(checkerboard, 2)) == pytest.approx(0.1, rel=0.1)


# Flicker


def blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)


def halve_and_double(images: Tensor) -> Tensor:
    return F.interpolate(images[..., ::2, ::2], scale_factor=2, mode="nearest")


@pytest.mark.parametrize("stylize", [lambda images: images, lambda images: 1 - images, blur], ids=["identity", "negative", "blur"])
def test_what_moves_with_its_input_does_not_flicker(photos, stylize):
    assert flicker(stylize, photos, stylize(photos)).max() < 1e-6


def test_what_stays_where_its_input_moves_flickers_by_the_step_it_does_not_take():
    ramp = (COLUMNS / 255).expand(1, 3, 128, 128)
    still = lambda images: ramp  # noqa: E731
    # The input moves right by a pixel, the output stays: realigned, it is one level brighter at each pixel.
    assert float(flicker(still, ramp, ramp)) * 255 == pytest.approx(1, abs=1e-3)


def test_strides_flicker(photos):
    assert flicker(halve_and_double, photos, halve_and_double(photos)).min() > 1 / 255


def test_noise_gain_is_the_slope_of_a_linear_map(photos):
    content = 0.25 + photos / 2  # away from 0 and 1, so that nothing is clamped
    for slope in (0.0, 0.5, 1.0, 3.0):
        gain = noise_gain(lambda images: slope * images - 1, content, slope * content - 1)
        torch.testing.assert_close(gain, torch.full((2,), slope), atol=1e-3, rtol=1e-3)


# Borders


def test_a_frame_around_each_picture_is_its_border_error(photos):
    def framed(images: Tensor) -> Tensor:
        whole = images.clone()
        whole[..., 16:-16, 16:-16] -= 0.1
        return whole + 0.1

    # Of a cut photo the outer 16 px are 0.1 brighter than the same pixels of the whole, and the middle is the same.
    torch.testing.assert_close(border_error(framed, photos, framed(photos)), torch.full((2,), 0.1), atol=1e-5, rtol=0)


def test_pointwise_maps_have_no_border_and_zero_padding_has(photos):
    assert border_error(lambda images: images**2, photos, photos**2).abs().max() < 1e-6
    dark = lambda images: F.avg_pool2d(images, 9, 1, 4)  # noqa: E731  zeros beyond the edge
    kind = lambda images: F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="reflect"), 9, 1)  # noqa: E731
    assert (border_error(dark, photos, dark(photos)) > 3 * border_error(kind, photos, kind(photos))).all()


# Clipping, and content kept


def test_frame_is_the_colour_that_the_outer_pixels_lack():
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(2, 3, 64, 64).clone()
    assert frame(red).tolist() == pytest.approx([0, 0], abs=1e-6)
    red[1, :, 3:-3, 3:-3] *= 0.5  # twice the colour around: 1 - 2
    red[0, :, :3] = red[0, :, -3:] = red[0, :, :, :3] = red[0, :, :, -3:] = 0.5
    assert frame(red).tolist() == pytest.approx([1, -1], abs=0.02)
    assert float(frame(pattern(torch.rand(128, 128)))) == pytest.approx(0)  # gray


def test_clipped_counts_pixels_not_channels():
    image = torch.full((1, 3, 4, 5), 0.5)
    image[0, :, 0, 0] = 0.0  # one black pixel
    image[0, 1, 1, 1] = 1.2  # one over-bright channel
    image[0, 2, 2, 2] = 0.4 / 255  # rounds to 0
    image[0, 2, 3, 3] = 0.6 / 255  # rounds to 1
    assert float(clipped(image)) == pytest.approx(3 / 20)


def test_structural_similarity_is_that_of_the_luminance(photos):
    assert structural_similarity(photos, photos).tolist() == pytest.approx([1, 1])
    a, b = (np.tensordot([0.299, 0.587, 0.114], photo.double().numpy(), axes=1) for photo in photos)
    expected = reference_ssim(a, b, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert float(structural_similarity(photos[:1], photos[1:])) == pytest.approx(expected, abs=1e-4)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert structural_similarity(noise[:1], noise[1:]).abs().max() < 0.1  # nothing is shared


# All at once


def test_a_judgement_clamps_and_has_a_figure_for_each_picture(photos):
    found = judgement(lambda images: 3 * images - 1, photos, 3 * photos - 1)
    assert list(found) == ["flicker", "noise_gain", "border", "frame", "grid_2", "grid_4", "clipped"]
    assert all(values.shape == (2,) and values.isfinite().all() for values in found.values())
    whole = judgement(lambda images: (3 * images - 1).clamp(0, 1), photos, (3 * photos - 1).clamp(0, 1))
    assert {name: values.tolist() for name, values in found.items()} == {name: values.tolist() for name, values in whole.items()}
    one_by_one = judgement(lambda images: 3 * images - 1, photos[1:], 3 * photos[1:] - 1)
    assert all(float(one_by_one[name]) == pytest.approx(float(values[1]), abs=1e-6) for name, values in found.items())


def test_the_photo_itself_is_flawless(photos):
    found = judgement(lambda images: images, photos, photos)
    assert found["noise_gain"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert found["flicker"].max() == 0 and found["border"].max() == 0


@pytest.mark.parametrize("side", [16, 32])
def test_the_smallest_training_crops_can_be_judged(side, photos):
    found = judgement(blur, photos[..., :side, :side], blur(photos[..., :side, :side]))
    assert all(values.isfinite().all() for values in found.values())
