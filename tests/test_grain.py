"""Grain: how much of it goes where, that numpy and torch add the same, and that a `Stylizer` does in every way in."""

import tracemalloc

import numpy as np
import pytest
import torch
from conftest import PAIRS_ALONE, synthetic_photo
from fastnst.scripts import stylize as stylize_script

from fastnst import Stylizer, cli, grain
from fastnst.benchmark_inference import psnr
from fastnst.checkpoint import save_model
from fastnst.engine import ENGINES, load_engine, load_network
from fastnst.grain import GRAIN, add_grain, with_grain
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file with random weights."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    save_model(path, TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), 7, {})
    return path


def halves(height=128, width=192) -> np.ndarray:
    """Left 64, right 192 but for its last third, of noise from 65 to 191."""
    picture = np.full((height, width, 3), 192, np.uint8)
    picture[:, : width // 2] = 64
    picture[:, -width // 6 // 8 * 8 :] = np.random.default_rng(0).integers(65, 192, (height, width // 6 // 8 * 8, 1))
    return picture


def grained(picture: np.ndarray, amount: float = GRAIN) -> np.ndarray:
    result = picture.copy()
    add_grain(result, amount)
    return result


def test_flat_parts_get_what_they_lack_and_others_nothing():
    picture = np.full((512, 512, 3), 64, np.uint8)
    picture[:, 256:] = 192
    found = grained(picture, 0.05).astype(float)
    # The picture deviates by 64 levels, of which 0.05 are 3.2; rounding adds 1/12 to the variance.
    for side in (found[:, :256], found[:, 256:]):
        assert side.std() == pytest.approx((3.2**2 + 1 / 12) ** 0.5, rel=0.03)
    assert abs(found - picture).max() > 6
    picture = halves()
    detail = np.s_[:, -32:]
    changed = grained(picture) != picture
    assert not changed[detail].any() and changed[:, :-32].mean() > 0.5


def test_a_block_is_filled_up():
    picture = halves(256, 384)
    stripes = np.tile(np.array([[[100], [102]]], np.uint8), (256, 32, 3))  # deviates by 1
    picture[:, :64] = stripes
    light = picture.astype(float).mean(2)
    wanted = (0.05 * light.std()) ** 2
    added = (grained(picture, 0.05).astype(float) - picture)[:, :64]
    assert (added.std() ** 2) == pytest.approx(wanted - 1 + 1 / 12, rel=0.1)


@pytest.mark.parametrize("color", [0, 7, 128, 255])
def test_one_color_stays_one(color):
    picture = np.full((70, 41, 3), color, np.uint8)
    assert (grained(picture, 1.0) == picture).all()
    levels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    assert torch.equal(with_grain(levels, 1.0), levels)


@pytest.mark.parametrize("size", [(192, 256), (700, 900)], ids=str)
def test_nor_does_rounding_make_grain_of_one(size):
    for color in np.random.default_rng(0).uniform(0, 255, (12, 3)).astype(np.float32):
        picture = np.broadcast_to(color, (*size, 3))
        assert (grained(picture, 1.0) == picture).all()
        levels = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
        assert torch.equal(with_grain(levels, 1.0), levels)


def test_a_line_of_any_length_takes_memory_for_itself_alone():
    line = np.arange(200_000, dtype=np.uint8).reshape(1, -1, 1).repeat(3, axis=2)
    tracemalloc.start()
    add_grain(line, GRAIN)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50 * line.size  # with all rows of the textures it would be 700


def test_what_is_overexposed_makes_room_for_it_and_stays_in_range():
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[:, 256:] = 255
    # The picture deviates by 127.5 levels, of which 0.05 are 6.375. Round 13, 2.04 of those away from the end, a Gaussian loses 2 % by what is cut there:
    # of 2 + z, z normal, what is above 0 has the mean 2 Phi(2) + phi(2) = 2.009 and the deviation 0.98.
    for found in (grained(picture, 0.05), grained(picture.astype(np.float32), 0.05)):
        assert found.min() == 0 and found.max() == 255
        for side in (found[:, :256].astype(float), 255.0 - found[:, 256:]):
            assert side.std() == pytest.approx(0.98 * 6.375, rel=0.02) and side.mean() == pytest.approx(13.05, rel=0.02)
    assert grained(picture, 1.0)[:, :256].mean() == pytest.approx(127, abs=8)  # nor does the room reach beyond the middle


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (9, 8), (63, 65), (130, 77)], ids=str)
def test_numpy_and_torch_add_the_same(size):
    rng = np.random.default_rng(1)
    pictures = [np.broadcast_to(np.linspace(20, 240, size[1])[None, :, None], (*size, 3)).round().astype(np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)]
    for picture in pictures:
        mine = grained(picture, 0.1)
        assert (grained(picture.astype(np.float32), 0.1) == mine).all()
        levels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        theirs = with_grain(torch.cat([levels, 255 - levels]), 0.1)[0].permute(1, 2, 0).numpy()
        apart = np.abs(theirs - mine)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.02  # halves of a level, rounded to either side


def test_bands_are_not_seen(monkeypatch):
    picture = np.asarray(synthetic_photo(3, 90, 200))
    found = grained(picture, 0.2)
    monkeypatch.setattr(grain, "_ROWS", 1024)
    assert (grained(picture, 0.2) == found).all()
    assert (found != picture).any()


def test_textures_go_on_beside_themselves():
    for texture in grain._textures():
        inside = max(np.abs(np.diff(texture, axis=axis)).mean() for axis in (0, 1))
        assert np.abs(texture[0] - texture[-1]).mean() < 1.3 * inside and np.abs(texture[:, 0] - texture[:, -1]).mean() < 1.3 * inside


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
def test_a_stylizer_adds_it_in_every_way(model, engine):
    stylizer = Stylizer.from_file(model, "cpu", engine, "float32", grain=0.5)  # much: a network of random weights makes little of it
    pictures = np.stack([halves(), np.asarray(synthetic_photo(1, 192, 128))])
    kept = pictures.copy()
    expected = stylizer.engine.run(np.stack([grained(one, 0.5) for one in pictures]))
    found = stylizer(pictures)
    assert np.abs(found.astype(int) - expected).max() <= 1 and (pictures == kept).all()
    assert np.abs(found[0].astype(int) - stylizer.engine.run(pictures)[0]).mean() > 0.5
    assert np.abs(stylizer(pictures[0]).astype(int) - expected[0]).max() <= 1
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    assert np.abs((stylizer(tensor) * 255).permute(0, 2, 3, 1).numpy() - expected).max() <= 1.01
    assert np.abs(Stylizer(stylizer.engine, tile=32, grain=0.5)(pictures).astype(int) - expected).max() <= 1
    without = Stylizer(stylizer.engine, grain=0.0)
    assert (without(pictures) == stylizer.engine.run(pictures)).all()


@pytest.mark.parametrize("tile", ["off", 32])
def test_an_engine_on_a_gpu_adds_the_same(model, tile):
    """torch on the CPU in its place: it takes the same way."""
    engines = [TorchEngine(load_network(model), "cpu", "float32") for _ in range(3)]
    engines[1].device = "cpu:0"  # which is not "cpu"
    here, there, without = (Stylizer(engine, tile, grain=amount) for engine, amount in zip(engines, (0.5, 0.5, 0.0)))
    pictures = np.stack([halves(), np.asarray(synthetic_photo(1, 192, 128))])
    expected = here(pictures)
    found = there(pictures)
    assert np.abs(found.astype(int) - expected).mean() < 0.02  # a level here and there, where numpy and torch round a half otherwise
    assert np.abs(found.astype(int) - without(pictures)).mean() > 0.5
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    assert np.abs((there(tensor) * 255).permute(0, 2, 3, 1).numpy() - found).max() <= 1.01


def test_the_photo_that_a_blend_leaves_has_none(model):
    picture = halves()
    assert (Stylizer.from_file(model, "cpu", opacity=0.0)(picture) == picture).all()


@pytest.mark.parametrize("engine", [pytest.param("native", marks=PAIRS_ALONE), "openvino", "torch"])
@pytest.mark.parametrize("amount", [0.002, 0.01, GRAIN])
def test_smooth_pictures_of_any_grain_are_near_those_of_float32(engine, amount):
    """As near as `auto` promises for photos, 45 dB, where what is in the picture or the grain is too little for bfloat16, by float32."""
    ramp = np.linspace(0, 255, 80).round().astype(np.uint8)[None, :, None].repeat(64, axis=0).repeat(3, axis=2)
    thing = np.full((64, 80, 3), 250, np.uint8)
    thing[20:30, 30:50] = 10
    steps = ramp // 128 * 255
    rounded, exact = (Stylizer.from_file(cli.shipped_styles()["mosaic_sun"], "cpu", engine, precision, grain=amount) for precision in ("bfloat16", "float32"))
    for picture in (ramp, thing, steps):
        assert (psnr(rounded(picture), exact(picture)) or 99) >= 45


@pytest.mark.parametrize("amount", [-0.1, 1.5, float("nan"), "much", None])
def test_another_amount_is_refused(model, amount):
    with pytest.raises(ValueError, match=f"grain: got {amount!r}, need a number from 0, none, to 1"):
        Stylizer(load_engine(load_network(model), "cpu"), grain=amount)


def test_a_number_of_numpy_is_an_amount(model):
    assert Stylizer(load_engine(load_network(model), "cpu"), grain=np.float32(0.5)).grain == 0.5


@pytest.mark.parametrize("kind, numbers", [("array", 4.5), ("tensor", 9)])
def test_strips_take_the_place_of_the_copy_that_has_the_grain(model, kind, numbers):
    """Without grain, an array takes 4.1 bytes for each of its own."""
    picture = np.asarray(synthetic_photo(1, 640, 480))[None].copy()
    given = picture if kind == "array" else torch.from_numpy(picture).permute(0, 3, 1, 2) / 255
    stylizer = Stylizer(load_engine(load_network(model), "cpu", precision="float32"), tile=16)
    stylizer(given)  # what is made once
    tracemalloc.start()
    stylizer(given)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < numbers * picture.size


def test_the_flag(model, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(halves()).save(tmp_path / "in.png")

    def run(name, *flags):
        arguments = ["--model", str(model), "--device", "cpu", "--input", str(tmp_path / "in.png"), "--output", str(tmp_path / name), *flags]
        assert cli.run(stylize_script.main, arguments) == 0
        return np.asarray(Image.open(tmp_path / name))

    default = run("default.png")
    assert (run("same.png", "--grain", str(GRAIN)) == default).all()
    assert (run("none.png", "--grain", "0") == Stylizer.from_file(model, "cpu", grain=0)(halves())).all()
    assert (run("none.png", "--grain", "0", "--overwrite") != default).any()
    for wrong in ("-1", "2", "some"):
        with pytest.raises(SystemExit) as stopped:
            stylize_script.main(["--style", "wave", "--input", "a", "--output", "b", "--grain", wrong])
        assert stopped.value.code == 2 and "--grain" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stylize_script.main(["--help"])
    assert f"(default: {GRAIN}; 0, none, for videos" in " ".join(capsys.readouterr().out.split())


def test_what_moves_has_none_unless_asked_for(model, tmp_path):
    """It would stay in its place on the screen."""
    from PIL import Image

    frames = [np.roll(halves(), 8 * index, axis=1) for index in range(2)]
    (tmp_path / "in").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "in" / f"{index}.png")
    stylizer = Stylizer.from_file(model, "cpu", grain=0.5)
    for name, flags, wanted in (("plain", [], stylizer.engine.run(np.stack(frames))), ("grained", ["--grain", "0.5"], stylizer(np.stack(frames)))):
        arguments = ["--model", str(model), "--device", "cpu", "--input", str(tmp_path / "in"), "--output", str(tmp_path / name / "%d.png"), *flags]
        assert cli.run(stylize_script.main, arguments) == 0
        found = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())])
        assert np.abs(found.astype(int) - wanted).max() <= 1
    assert np.abs(stylizer(frames[0]).astype(int) - stylizer.engine.run(frames[0][None])[0]).mean() > 0.5
