"""Pictures become tensors in [0, 1] and come back rounded; scaling neither overshoots nor aliases."""

import numpy as np
import pytest
import torch
from conftest import synthetic_photo
from PIL import Image

from fastnst.image import load_image, resize, save_image, to_pil, to_tensor, to_uint8
from fastnst.picture import WRITABLE, ImageSize


def test_orientation_of_a_jpeg_reaches_the_tensor(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    synthetic_photo(1, 40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (1, 3, 40, 20)


def test_tensor_convention(tmp_path):
    Image.fromarray(np.array([[[0, 51, 255], [255, 0, 0]]], dtype=np.uint8)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image.shape, image.dtype) == ((1, 3, 1, 2), torch.float32)
    assert image[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])  # 51 / 255 = 0.2


def test_every_8_bit_level_survives_the_tensor():
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(np.asarray(to_pil(to_tensor(picture))), np.asarray(picture))


def test_uint8_layout():
    assert to_uint8(Image.new("RGB", (5, 4), (1, 2, 3))).shape == (3, 4, 5)
    assert to_uint8(Image.new("L", (5, 4), 7)).shape == (1, 4, 5)


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-1.0, 200.4 / 255, 200.6 / 255, 254.6 / 255, 2.0]).expand(1, 3, 1, 5)
    assert np.asarray(to_pil(values))[0, :, 0].tolist() == [0, 200, 201, 255, 255]


def test_to_pil_leaves_its_input_alone_and_takes_gradients():
    values = torch.full((1, 3, 2, 2), 1.5, requires_grad=True)
    to_pil(values)
    assert values.max() == 1.5


@pytest.mark.parametrize("suffix", WRITABLE)
def test_save_and_load_round_trip(tmp_path, suffix):
    image = to_tensor(synthetic_photo(3))
    save_image(image, tmp_path / f"a{suffix}")
    error = (load_image(tmp_path / f"a{suffix}") - image).abs()
    lossless = suffix in (".png", ".bmp", ".tif", ".tiff")
    assert error.max() == 0 if lossless else error.mean() < 4 / 255
    with Image.open(tmp_path / f"a{suffix}") as file:  # the content is what the suffix promises
        assert file.format == {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())


def test_resize_stays_in_range_and_keeps_what_fits():
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4:] = 1  # an edge, at which bicubic overshoots
    larger = resize(image, (40, 27))
    assert larger.shape == (1, 3, 40, 27)
    assert larger.min() == 0 and larger.max() == 1
    assert resize(image, (9, 9)) is image


def test_resize_is_antialiased():
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))  # standard deviation 0.29
    assert resize(noise, (32, 32)).std() < 0.1  # about 0.29 / 4 as 16 pixels are averaged; 0.19 without


def test_load_image_scales_and_drops_alpha(tmp_path):
    Image.new("RGBA", (40, 20), (10, 20, 30, 40)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", ImageSize(long_side=10)).shape == (1, 3, 5, 10)
