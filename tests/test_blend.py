"""What stays of a photo: a share of it, its colors; the same for arrays, tensors, strips and files."""

import numpy as np
import pytest
import torch
from conftest import moving_frames, synthetic_photo
from PIL import Image

from fastnst import Stylizer
from fastnst.blend import Blend, read_mask
from fastnst.checkpoint import save_model
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork

PHOTO, STYLIZED = np.array([[[[200, 100, 50]]]], np.uint8), np.array([[[[100, 200, 150]]]], np.uint8)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), step=1, recipe={})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "blend, expected",
    [
        (Blend(), [100, 200, 150]),
        (Blend(0.0), [200, 100, 50]),
        (Blend(0.25), [175, 125, 75]),  # a quarter of the way
        (Blend(1.0, True), [240, 140, 90]),  # luma 124.2 -> 164.4: 0.299 (-100) + 0.587 (100) + 0.114 (100) = 40.2 more of each
        (Blend(0.5, True), [220, 120, 70]),
        (Blend(np.float32(0.5)), [150, 150, 100]),
    ],
)
def test_a_pixel_by_hand(blend, expected):
    assert blend.pictures(PHOTO, STYLIZED.copy()).ravel().tolist() == expected
    assert bool(blend) == (expected != [100, 200, 150])


def test_what_leaves_the_range_is_cut_off():
    white, black = (np.full((1, 1, 1, 3), level, np.uint8) for level in (255, 0))
    red = np.array([[[[250, 10, 10]]]], np.uint8)
    assert Blend(keep_colors=True).pictures(red, white.copy()).ravel().tolist() == [255, 183, 183]  # luma 81.76 -> 255: 173.24 more
    assert Blend(keep_colors=True).pictures(red, black.copy()).ravel().tolist() == [168, 0, 0]


def test_colors_are_the_photos_and_luma_is_the_styles():
    random = np.random.default_rng(0)
    photo, stylized = (random.uniform(100, 150, (200, 7, 3)) for _ in range(2))
    found = Blend(keep_colors=True)(photo, stylized)
    luma = np.array([0.299, 0.587, 0.114])
    assert np.allclose(found @ luma, stylized @ luma)
    assert np.allclose(found - (found @ luma)[..., None], photo - (photo @ luma)[..., None])


@pytest.mark.parametrize("opacity", [-0.1, 1.01, float("nan"), "0.5", None])
def test_an_opacity_out_of_range_is_named(model, opacity):
    with pytest.raises(ValueError, match="opacity: got .*, need a number from 0"):
        Stylizer.from_file(model, opacity=opacity)


MASK = np.random.default_rng(1).integers(0, 256, (5, 4), dtype=np.uint8)


@pytest.mark.parametrize("options", [{"opacity": 0.4}, {"keep_colors": True}, {"opacity": 0.7, "keep_colors": True, "mask": MASK}], ids=lambda options: "+".join(options))
@pytest.mark.parametrize("engine", ["torch", "openvino", "native"])
def test_every_kind_of_picture_is_blended_alike(model, engine, options):
    plain, blended = (Stylizer.from_file(model, "cpu", engine, "float32", **more) for more in ({}, options))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 130, 37, 3), dtype=np.uint8)
    kept = pixels.copy()
    share = np.asarray(Image.fromarray(MASK).resize((37, 130), Image.Resampling.BILINEAR))[..., None] / 255 if "mask" in options else 1.0
    exact = np.clip(Blend(**options)(pixels.astype(float), plain(pixels).astype(float), share), 0, 255)
    found = blended(pixels)
    assert np.abs(found - exact).max() <= 0.5001 and np.array_equal(pixels, kept)
    assert np.array_equal(np.asarray(blended(Image.fromarray(pixels[0]))), found[0])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    assert np.abs(blended(tensor).permute(0, 2, 3, 1).numpy() * 255 - exact).max() < 1
    strips = Stylizer.from_file(model, "cpu", engine, "float32", tile=16, **options)
    assert np.abs(strips.pictures(pixels, in_place=True).astype(int) - found).max() <= 1


def test_a_mask_says_where():
    photo, stylized = np.full((1, 2, 5, 3), 100, np.uint8), np.full((1, 2, 5, 3), 200, np.uint8)
    half = Blend(mask=np.array([[0, 51, 128, 204, 255]] * 2, np.uint8))
    assert half and half.pictures(photo, stylized.copy())[0, 0, :, 0].tolist() == [100, 120, 150, 180, 200]  # 51 is a fifth of 255; 128 gives 150.2
    assert Blend(0.5, mask=half.mask).pictures(photo, stylized.copy())[0, 1, :, 1].tolist() == [100, 110, 125, 140, 150]
    scaled = Blend(mask=np.array([[0, 255]], np.uint8)).pictures(np.repeat(photo, 2, 2), np.repeat(stylized, 2, 2))[0, :, :, 2]
    assert (np.diff(scaled.astype(int), axis=1) >= 0).all() and scaled[0, 0] == 100 and scaled[0, -1] == 200


def test_a_mask_of_another_kind_is_told(model):
    with pytest.raises(ValueError, match=r"mask: got float64 of shape \(2, 2\), need a numpy array of uint8, \(H, W\)"):
        Stylizer.from_file(model, mask=np.ones((2, 2)))
    mask = np.zeros((2, 2), np.uint8)
    blend = Blend(mask=mask)
    mask[:] = 255  # its owner's
    assert not blend.mask.any()
    with pytest.raises(FileNotFoundError, match="no image file at .*none.png"):
        Stylizer.from_file(model, mask="none.png")


def test_a_mask_file_is_its_alpha_or_how_light_it_is(tmp_path):
    Image.new("RGB", (2, 1), "white").save(tmp_path / "white.png")
    assert read_mask(tmp_path / "white.png").tolist() == [[255, 255]]
    cut_out = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    cut_out.putpixel((1, 0), (255, 255, 255, 0))
    cut_out.save(tmp_path / "cut_out.png")
    assert read_mask(tmp_path / "cut_out.png").tolist() == [[255, 0]]


def test_alpha_stays(model):
    picture = synthetic_photo(0)
    picture.putalpha(synthetic_photo(1).convert("L"))
    found = Stylizer.from_file(model, "cpu", opacity=0.0)(picture)
    assert np.array_equal(np.asarray(found), np.asarray(picture))


def test_the_command_blends(model, tmp_path, capsys):
    from fastnst.scripts.stylize import main

    from fastnst.cli import run

    synthetic_photo(0).save(tmp_path / "in.png")
    flags = ["--model", str(model), "--device", "cpu", "--input", str(tmp_path / "in.png")]
    assert run(main, [*flags, "--output", str(tmp_path / "out.png"), "--opacity", "0.3", "--keep-colors"]) == 0
    wanted = Stylizer.from_file(model, "cpu", opacity=0.3, keep_colors=True)(tmp_path / "in.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(wanted))
    with pytest.raises(SystemExit):
        run(main, [*flags, "--output", str(tmp_path / "other.png"), "--opacity", "1.5"])
    assert "argument --opacity: got 1.5, need a number from 0 to 1" in capsys.readouterr().err


def test_the_command_takes_a_mask(model, tmp_path, capsys):
    from fastnst.scripts.stylize import main

    from fastnst.cli import run

    synthetic_photo(0, 64, 48).save(tmp_path / "in.png")
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "mask.png")
    flags = ["--model", str(model), "--device", "cpu", "--input", str(tmp_path / "in.png"), "--output"]
    assert run(main, [*flags, str(tmp_path / "whole.png")]) == 0
    assert run(main, [*flags, str(tmp_path / "right.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    photo, whole, right = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("in", "whole", "right"))
    assert np.array_equal(right[:, :32], photo[:, :32]) and np.array_equal(right[:, 32:], whole[:, 32:]) and not np.array_equal(photo, whole)
    assert run(main, [*flags, str(tmp_path / "other.png"), "--mask", str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
    kept = (tmp_path / "mask.png").read_bytes()
    first, second = map(Image.fromarray, moving_frames(2))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=[second])
    for source, mask, output in (("in.png", "mask.png", "mask.png"), ("clip.gif", "mask.gif", "mask.gif"), ("clip.gif", "o_001.png", "o_%03d.png")):
        (tmp_path / mask).write_bytes(kept)
        more = ["--input", str(tmp_path / source), "--mask", str(tmp_path / mask), "--overwrite", "--output", str(tmp_path / output)]
        assert run(main, ["--model", str(model), "--device", "cpu", *more]) == 2
        assert "--output would overwrite the input" in capsys.readouterr().err and (tmp_path / mask).read_bytes() == kept
