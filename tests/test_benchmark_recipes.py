"""Recipes side by side: the same loss, photos and seeds for all, kept runs, and arithmetic of the tables."""

import json
import re

import pytest
import torch
import yaml
from conftest import TOY_LOSS
from fastnst.scripts import benchmark
from PIL import Image

from fastnst import cli
from fastnst.benchmark_recipes import judge_network, markdown, share_loss
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss
from fastnst.train import TrainingDiverged, train

pytest.importorskip("skimage", reason="needs SSIM of scikit-image: pip install 'fastnst[test]'")


@pytest.fixture
def command(train_data, photos, painting, tmp_path):
    """A comparison of two toy recipes, each of 4 photos seen."""
    train_data["train"] |= {"steps": 2}
    del train_data["style"]["image"], train_data["data"]["content"]
    train_data["loss"] |= {"style_weight": 1.0, "strength": 5}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(train_data))
    (tmp_path / "held_out").mkdir()
    for name in ("photo_00.jpg", "photo_01.png"):
        (photos / name).rename(tmp_path / "held_out" / name)
    recipes = [str(tmp_path / "toy.yaml"), f"{tmp_path / 'toy.yaml'}+train.optimizer=muon+loss.grid_weight=10"]
    where = ["--content", str(photos), "--held-out", str(tmp_path / "held_out"), "--style", str(painting), "--output", str(tmp_path / "out")]
    return ["--recipes", *recipes, *where, "--sizes", "32", "48", "--photos", "2"]


def test_recipes_are_trained_and_judged_and_what_is_there_is_kept(command, tmp_path, monkeypatch):
    assert cli.run(benchmark.main, [*command, "--seeds", "0"]) == 0
    first = json.loads((tmp_path / "out" / "recipes.json").read_text())
    assert [(run["seed"], run["size"]) for run in first["runs"]] == [(0, 32), (0, 48)] * 2
    assert first["runs"][0]["figures"] != first["runs"][2]["figures"]
    assert Image.open(tmp_path / "out" / "sheet_painting.jpg").height > 3 * 256
    trained = []
    monkeypatch.setattr("fastnst.train.train", lambda config, *rest, **more: trained.append(config.train.seed) or train(config, *rest, **more))
    assert cli.run(benchmark.main, [*command, "--seeds", "0", "1"]) == 0
    assert trained == [1, 1]  # both recipes, the new seed alone
    second = json.loads((tmp_path / "out" / "recipes.json").read_text())
    assert second["runs"][:4] == first["runs"] and len(second["runs"]) == 8
    assert "+train.optimizer=muon" in (tmp_path / "out" / "recipes.md").read_text()


def test_recipes_that_see_different_numbers_of_photos_are_refused(command, capsys):
    command[2] += "+train.steps=3"
    assert cli.run(benchmark.main, command) == 2
    assert "different numbers of photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (["--style", "nowhere.png"], "nowhere.png"),
        (["--output", "{photos}/out"], "--output .* lies inside of --content"),
        (["--judge", "vgg11"], "--judge: network: got 'vgg11'"),
        (["--held-out", "nowhere"], "nowhere"),
        (["--set", "train.foo=1"], "recipe .*: --set train.foo"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_trained(command, photos, tmp_path, capsys, changes, complaint):
    assert cli.run(benchmark.main, [*command, *(part.format(photos=photos) for part in changes)]) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["loss.strength=1", "loss.padding=reflect", "style.long_side=32"])
def test_what_is_the_firsts_for_all_is_not_a_recipes_to_change(command, capsys, change):
    command[2] += f"+{change}"
    assert cli.run(benchmark.main, command) == 2
    assert f"{change.partition('=')[0]} is the first recipe's for all" in capsys.readouterr().err


def test_paintings_of_the_same_name_are_refused(command, painting, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    other = painting.rename(tmp_path / "more" / painting.name)
    Image.open(other).save(painting)
    assert cli.run(benchmark.main, [*command, "--style", str(painting), str(other)]) == 2
    assert "have the same name" in capsys.readouterr().err


def test_other_settings_are_other_runs_and_judging_anew_keeps_the_time(command, tmp_path):
    read = lambda: json.loads((tmp_path / "out" / "recipes.json").read_text())["runs"]  # noqa: E731
    assert cli.run(benchmark.main, [*command, "--seeds", "0"]) == 0
    first = read()
    assert cli.run(benchmark.main, [*command, "--seeds", "0", "--photos", "1"]) == 0
    assert [run["seconds"] for run in read()] == [run["seconds"] for run in first] and read() != first
    assert cli.run(benchmark.main, [*command, "--seeds", "0", "--set", "train.steps=1"]) == 0
    assert read()[0]["figures"]["objective"] != first[0]["figures"]["objective"]


def test_a_recipe_that_diverges_costs_its_own_runs_only(command, tmp_path, monkeypatch, capsys):
    def diverge(config, *rest, **more):
        if config.train.optimizer == "muon":
            raise TrainingDiverged("the loss is not finite at step 1")
        return train(config, *rest, **more)

    monkeypatch.setattr("fastnst.train.train", diverge)
    assert cli.run(benchmark.main, [*command, "--seeds", "0"]) == 1
    assert "seed 0: the loss is not finite" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "recipes.json").read_text())["runs"]) == 2


def test_the_loss_of_the_first_is_shared_but_for_the_recipes_own_terms():
    first, other = ({**LossConfig().model_dump(), "style_weight": weight, "grid_weight": weight} for weight in (3.0, 7.0))
    assert share_loss(other, first) == {**first, "grid_weight": 7.0}


def test_a_network_that_changes_nothing_has_no_content_distance_and_all_ssim():
    config = LossConfig(**TOY_LOSS)
    painting = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = PerceptualLoss(load_loss_network(config, config.layers), config, painting)
    photos = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    figures, pictures = judge_network(torch.nn.Identity(), loss, painting, [], photos)
    assert figures["content"] == 0 and figures["ssim"] == pytest.approx(1) and figures["flicker"] == pytest.approx(0, abs=1e-6)
    assert figures["objective"] == figures["style"] > 0
    assert [picture.size for picture in pictures] == [(48, 48)] * 2


def test_the_table_gives_means_over_paintings_and_the_spread_over_seeds():
    figures = dict.fromkeys(("content", "style", "ssim", "flicker", "noise_gain", "border", "frame", "grid_2", "grid_4", "clipped"), 0.5)
    objective = {("a", "wave", 0): 1.0, ("a", "wave", 1): 2.0, ("a", "scream", 0): 3.0, ("a", "scream", 1): 4.0}
    objective |= {("b", style, seed): 5.0 for style in ("wave", "scream") for seed in (0, 1)}
    runs = [
        {"recipe": recipe, "style": style, "seed": seed, "size": 256, "seconds": 10, "figures": figures | {"objective": value}}
        for (recipe, style, seed), value in objective.items()
    ]
    text = markdown(runs, "head", ["a", "b"])
    # a: seed 0 has (1 + 3) / 2 = 2, seed 1 (2 + 4) / 2 = 3, the mean is 2.5; b has 5, twice as much. Half of 255 levels is 127.5.
    assert "| a | 2.500 (2.000 to 3.000) | 1.00 |" in text and "| b | 5.000 (5.000 to 5.000) | 2.00 |" in text
    assert "| a | 1.500 (1.000 to 2.000) | 3.500 (3.000 to 4.000) |" in text and "| 127.50 |" in text


def test_runs_that_diverged_are_told_and_compared_only_where_both_are():
    figures = dict.fromkeys(("content", "style", "ssim", "flicker", "noise_gain", "border", "frame", "grid_2", "grid_4", "clipped"), 0.5)
    objective = {("a", "wave"): 1.0, ("a", "scream"): 3.0, ("b", "wave"): 2.0}
    runs = [{"recipe": recipe, "style": style, "seed": 0, "size": 256, "seconds": 10, "figures": figures | {"objective": value}} for (recipe, style), value in objective.items()]
    text = markdown(runs, "head", ["a", "b", "c"], ["b, scream, seed 0: not finite"])
    assert "- diverged, and in no mean: b, scream, seed 0: not finite" in text
    assert "| b | 2.000 (2.000 to 2.000) | 2.00 |" in text  # against a's wave alone: 2 / 1
    assert "| b | 2.000 (2.000 to 2.000) | diverged |" in text and "| c | diverged | diverged |" in text and "| c | diverged | |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith(("| recipe", "| a | 2", "| c | diverged | |"))}
    assert len(columns) == 1
