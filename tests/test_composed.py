"""The scripts that put verbs together: preview, publish, quickstart, and the project's own style image."""

import contextlib
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import TOY_LOSS
from fastnst.scripts import draw_style, preview, publish, quickstart, stylize
from fastnst.scripts import train as train_script
from PIL import Image

from fastnst import cli
from fastnst.checkpoint import load_model, save_model
from fastnst.config import load_config, validate_config
from fastnst.train import TrainConfig, train

pytest.importorskip("skimage", reason="needs the photos of scikit-image: pip install 'fastnst[test]'")
TOY = ["--set", f"loss={json.dumps({**TOY_LOSS, 'style_weight': 1.0, 'strength': 5})}"]


# Styles by name


def test_a_shipped_style_is_found_by_name(tmp_path, monkeypatch, capsys, train_data):
    train(validate_config(TrainConfig, train_data), tmp_path / "checkpoints" / "toy")
    monkeypatch.setattr(cli, "shipped_folder", lambda name: tmp_path / name)
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "photo.png")
    arguments = ["--input", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out.png")]
    assert cli.run(stylize.main, ["--style", "toy", *arguments]) == 0
    assert Image.open(tmp_path / "out.png").size == (40, 30)
    assert cli.run(stylize.main, ["--style", "toi", *arguments]) == 2
    assert "did you mean toy?" in capsys.readouterr().err
    assert cli.run(stylize.main, ["--list-styles"]) == 0
    assert "toy" in capsys.readouterr().out


def test_every_shipped_style_is_small_whole_and_free_of_paintings():
    assert cli.shipped_styles()
    for name, path in cli.shipped_styles().items():
        if not (path.parent / "metrics.json").exists():
            continue  # a run of the user's own
        _, info = load_model(path)
        assert path.stat().st_size <= 4e6, name
        assert info.thumbnail is None, name
        metrics = json.loads((path.parent / "metrics.json").read_text())
        assert metrics["steps"] == info.step and metrics["objective"]["total"] > 0
        assert yaml.safe_load((path.parent / "config.yaml").read_text())["style"]["image"].count("/") == 0
        assert Image.open(path.parent / "preview.jpg").width > 600


# Preview


def test_a_preview_has_a_cell_for_each_strength_and_size(tmp_path, painting, photos, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = ["--style", str(painting), "--content", str(photos / "photo_00.jpg"), "--output", str(sheet), "--side", "24", "--steps", "2"]
    assert cli.run(preview.main, [*arguments, *TOY, "--strengths", "2", "8", "--style-sizes", "64"]) == 0
    assert "4/4" in (printed := capsys.readouterr().err) and "\r" not in printed  # a log has lines
    whole = Image.open(sheet)
    assert cli.run(preview.main, [*arguments, *TOY, "--strengths", "2", "--style-sizes", "64"]) == 2  # exists
    assert cli.run(preview.main, [*arguments, *TOY, "--overwrite", "--strengths", "2", "--style-sizes", "64"]) == 0
    assert whole.height > Image.open(sheet).height


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--strengths", "5", "99"], "argument --strengths: got 99, need a number from 0 to 10"),
        (["--strengths", "-3"], "argument --strengths: got -3, need a number from 0 to 10"),
        (["--style-sizes", "64", "-5"], "argument --style-sizes: got -5, need a whole number from 1 to 65535"),
        (["--side", "0"], "argument --side: got 0, need a whole number from 16 to 8192"),
        (["--steps", "0"], "argument --steps: got 0, need a whole number from 1 to"),
        (["--style-sizes", "512", "5"], "error: --style-sizes 5 at --side 24: long_side: got 0, need greater than or equal to 1"),  # 5 x 24 / 256
        (["--style-sizes", "512", "64"], "error: --style-sizes 64 at --side 24: an image of 6x4 pixels is too small for relu4_1"),  # 64 x 24 / 256, and 6 x 96 / 128
        (["--side", "16", "--set", 'loss.content_layers={"relu5_1": 1}'], "error: --side 16: an image of 20x16 pixels is too small for relu5_1"),
    ],
)
def test_what_a_preview_cannot_do_is_told_by_its_flag_before_the_first_cell(tmp_path, painting, monkeypatch, capsys, flags, told):
    monkeypatch.setattr("fastnst.optimize.optimize_image", lambda *_: pytest.fail("too late"))
    Image.new("RGB", (40, 32), "teal").save(tmp_path / "photo.png")
    arguments = ["--style", str(painting), "--content", str(tmp_path / "photo.png"), "--output", str(tmp_path / "sheet.png"), "--side", "24"]
    with contextlib.suppress(SystemExit):
        assert cli.run(preview.main, [*arguments, *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("flags", [["--output", "painting.png"], ["--output", "photo.png"], *(["--pick", "1,1", "--write", name] for name in ("painting.png", "photo.png", "mine.yaml", "sheet.png"))])
def test_a_preview_never_overwrites_what_it_reads(tmp_path, painting, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("photo.png")
    Image.new("RGB", (40, 30), "white").save("sheet.png")
    (tmp_path / "mine.yaml").write_text("style: {long_side: 64}  # precious\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["--style", "painting.png", "--content", "photo.png", "--config", "mine.yaml", "--output", "sheet.png", "--side", "24", "--steps", "1", "--strengths", "2", "--style-sizes", "64"]
    assert cli.run(preview.main, [*arguments, *TOY, "--overwrite", *flags]) == 2
    assert f"error: {flags[-2]} would overwrite the input {flags[-1]}; choose another" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_painting_may_have_a_name_that_means_something_in_yaml(tmp_path, painting, photos):
    named = painting.rename(tmp_path / "no. 1: the wave #2.png")
    arguments = ["--style", str(named), "--content", str(photos / "photo_00.jpg"), "--output", str(tmp_path / "sheet.png"), "--side", "24", "--steps", "1"]
    assert cli.run(preview.main, [*arguments, *TOY, "--strengths", "2", "--style-sizes", "64"]) == 0


def test_a_picked_cell_becomes_a_training_config(tmp_path, painting):
    written = tmp_path / "mine.yaml"
    arguments = ["--style", str(painting), "--output", str(tmp_path / "sheet.png"), "--strengths", "3", "7", "--style-sizes", "100", "200", "300"]
    assert cli.run(preview.main, [*arguments, "--pick", "2,3", "--write", str(written)]) == 0
    config = load_config(TrainConfig, written, ["data.content=photos"])
    assert (config.loss.strength, config.style.long_side, config.style.image) == (7, 300, painting)
    assert config.loss.network == "vgg19_slim"
    assert cli.run(preview.main, [*arguments, "--pick", "1,1", "--write", str(written)]) == 2  # exists
    assert load_config(TrainConfig, written, ["data.content=photos"]) == config


def test_a_picked_cell_keeps_what_its_config_says_in_the_project_s_own_yaml(tmp_path, painting):
    own, written = tmp_path / "own.yaml", tmp_path / "mine.yaml"
    own.write_text("data: {cache: off}\ntrain: {learning_rate: {initial: 1e-3}}\nstyle: {short_side: 64}\nloss:\n")
    precious = painting.rename(tmp_path / "painting: no. #1.png")
    arguments = ["--style", str(precious), "--output", str(tmp_path / "sheet.png"), "--config", str(own), "--pick", "1,1", "--write", str(written)]
    assert cli.run(preview.main, arguments) == 0
    config = load_config(TrainConfig, written, ["data.content=photos"])
    assert (config.data.cache, config.train.learning_rate.initial) == ("off", 1e-3)
    assert (config.loss.strength, config.style.long_side, config.style.short_side, config.style.image) == (2, 192, None, precious)


@pytest.mark.parametrize("text, told", [("", None), ("style: wave.jpg", None), ("[1, 2]", "got list"), ("a: : b", "not valid YAML"), ("optimize: {steps: 3}", "unknown key optimize")])
def test_a_config_that_a_cell_cannot_be_added_to_is_named(tmp_path, painting, capsys, text, told):
    (tmp_path / "own.yaml").write_text(text)
    arguments = ["--style", str(painting), "--output", "sheet.png", "--config", str(tmp_path / "own.yaml"), "--pick", "1,1", "--write", str(tmp_path / "mine.yaml")]
    assert cli.run(preview.main, arguments) == (2 if told else 0)
    assert (tmp_path / "mine.yaml").exists() == (told is None)
    assert told is None or f"error: {tmp_path / 'own.yaml'}: {told}" in capsys.readouterr().err


@pytest.mark.parametrize("pick", ["3,1", "0,1", "1", "a,b"])
def test_a_pick_outside_the_sheet_is_refused(tmp_path, painting, pick, capsys):
    arguments = ["--style", str(painting), "--output", "sheet.png", "--strengths", "3", "7", "--style-sizes", "100"]
    with pytest.raises(SystemExit) as stopped:
        preview.main([*arguments, "--pick", pick, "--write", str(tmp_path / "mine.yaml")])
    assert stopped.value.code == 2
    assert "from 1,1 to 2,1" in capsys.readouterr().err


# Publish


def test_a_published_style_carries_its_figures_and_no_path_of_this_machine(tmp_path, train_data, photos):
    train(validate_config(TrainConfig, train_data), tmp_path / "run")
    style = tmp_path / "styles" / "toy"
    arguments = ["--run-dir", str(tmp_path / "run"), "--output", str(style), "--device", "cpu"]
    assert cli.run(publish.main, arguments) == 0
    assert {path.name for path in style.iterdir()} == {"model.safetensors", "config.yaml", "metrics.json", "preview.jpg"}
    metrics = json.loads((style / "metrics.json").read_text())
    assert (metrics["steps"], metrics["photos_seen"]) == (6, 12)
    assert metrics["half_precision_largest_difference"] < 1 / 255
    assert metrics["objective"]["total"] == pytest.approx(metrics["objective"]["content"] + metrics["objective"]["style"], rel=1e-3)
    assert load_model(style / "model.safetensors")[1].thumbnail is None
    for text in ((style / "config.yaml").read_text(), (style / "model.safetensors").read_bytes().decode("latin-1")):
        assert str(tmp_path) not in text
    assert cli.run(publish.main, arguments) == 2  # exists


@pytest.fixture
def run(tmp_path, train_data):
    """A finished run, and the command that publishes it."""
    train(validate_config(TrainConfig, train_data), tmp_path / "run")
    return tmp_path / "run", ["--run-dir", str(tmp_path / "run"), "--device", "cpu"]


def too_large_for_half(run_dir, monkeypatch):
    network, info = load_model(run_dir / "model.safetensors")
    with torch.no_grad():
        network.layers[0].weight.mul_(1e6)  # instance norm divides it away; half precision ends at 65,504
    save_model(run_dir / "model.safetensors", network, info.step, info.recipe)


def without_scikit_image(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)


def without_memory(run_dir, monkeypatch):
    monkeypatch.setattr("fastnst.task.validate", lambda *_: (_ for _ in ()).throw(OSError("out of memory")))


def without_state(run_dir, monkeypatch):
    (run_dir / "training_state.pt").unlink()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (too_large_for_half, "half precision would change a pixel by nan of 255"),
        (without_scikit_image, "scikit-image"),
        (without_memory, "out of memory"),
        (without_state, "no training state at"),
    ],
)
def test_what_cannot_be_published_leaves_nothing_and_keeps_the_style_before(run, tmp_path, monkeypatch, capsys, spoil, told):
    run_dir, arguments = run
    assert cli.run(publish.main, [*arguments, "--output", str(tmp_path / "old")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    spoil(run_dir, monkeypatch)
    for style in ("new", "old"):
        assert cli.run(publish.main, [*arguments, "--output", str(tmp_path / style), "--overwrite"]) == 2
        assert told in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("*"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_publishing_never_overwrites_the_run_nor_the_painting_nor_what_is_not_the_style_s(run, tmp_path, painting, capsys):
    run_dir, arguments = run
    before = {path: path.read_bytes() for path in run_dir.glob("*.*")}
    assert cli.run(publish.main, [*arguments, "--output", str(run_dir), "--overwrite"]) == 2
    assert "--output would overwrite the input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.glob("*.*")} == before
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "preview.jpg").symlink_to(painting)
    assert cli.run(publish.main, [*arguments, "--output", str(tmp_path / "style"), "--overwrite"]) == 2
    assert f"--output would overwrite the input {painting}" in capsys.readouterr().err
    (tmp_path / "style" / "preview.jpg").unlink()
    (tmp_path / "style" / "config.yaml").write_text("of another program")
    assert cli.run(publish.main, [*arguments, "--output", str(tmp_path / "style")]) == 2
    assert "config.yaml exists already" in capsys.readouterr().err


def test_publish_needs_a_photo_or_more_to_measure_on(capsys):
    with pytest.raises(SystemExit):
        publish.main(["--run-dir", "run", "--output", "style", "--photos", "0"])
    assert "argument --photos: got 0, need a whole number from 1 to 100000" in capsys.readouterr().err


# Quickstart


def test_the_quickstart_ends_in_a_contact_sheet_and_runs_again_quickly(tmp_path, monkeypatch, capsys, painting):
    seen = []
    original = train_script.main

    def short(argv):
        seen.append(argv)
        tiny = ["train.steps=2", "data.crop_size=32", "network.width=4", "network.residual_blocks=0", "data.workers=0", f"loss={json.dumps(TOY_LOSS)}"]
        return original([*argv, *(part for setting in tiny for part in ("--set", setting))])

    monkeypatch.setattr(train_script, "main", short)
    for _ in range(2):
        assert cli.run(quickstart.main, ["--style", str(painting), "--output", str(tmp_path / "quick")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "quick" / "contact_sheet.jpg")).astype(int)
    # Beside rows of 220 and a margin of 8, from 2 lines of 15 and a margin on: paintings, which have blue, below the names of those that are the project's, and of this one.
    beside = [sheet[38 + 228 * row : 38 + 228 * row + 220, 8:100] for row in range(8)]
    with_blue = [row for row, part in enumerate(beside) if (part[..., 2] - part[..., 0]).max() > 60]
    assert with_blue == [1 + sorted(cli.shipped_styles()).index("mosaic_sun"), 7] and len(cli.shipped_styles()) == 6
    assert (tmp_path / "quick" / "painting" / "model.safetensors").exists()
    assert seen[0][:2] == ["--config", "quickstart"]
    printed = capsys.readouterr().out
    assert "tensorboard --logdir" in printed and "fastnst stylize" in printed and ("--style MY_PAINTING.jpg" if sys.platform == "win32" else "STYLE=MY_PAINTING.jpg ./scripts/quickstart.sh") in printed


def test_a_missing_painting_is_named(tmp_path, capsys):
    assert cli.run(quickstart.main, ["--style", str(tmp_path / "none.jpg"), "--output", str(tmp_path / "quick")]) == 2
    assert "none.jpg" in capsys.readouterr().err


def test_our_style_image_is_what_the_script_draws():
    shipped = np.asarray(Image.open(cli.shipped_folder("checkpoints") / "mosaic_sun" / "mosaic_sun.png").convert("RGB")).astype(int)
    drawn = np.asarray(draw_style.draw(512)).astype(int)
    assert shipped.shape == drawn.shape
    assert np.abs(shipped - drawn).mean() < 1  # antialiasing may differ a little between versions of Pillow
