"""The loss that a model is judged by is the very one that it was trained under."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOY_LOSS
from PIL import Image

from fastnst.checkpoint import load_training_state, save_model
from fastnst.cli import find_style
from fastnst.config import ConfigError, validate_config
from fastnst.contender import METRICS_NAME, load_contenders, note_weights
from fastnst.data import DataConfig, load_validation
from fastnst.image import load_image
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, calibrate
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.picture import find_images
from fastnst.train import TrainConfig, train


@pytest.fixture
def run_dir(tmp_path, train_data) -> Path:
    """A finished run with a dial instead of raw weights."""
    train_data["loss"] |= {"strength": 6.0, "style_weight": 1.0}
    train_data["train"]["steps"] = 1
    train(validate_config(TrainConfig, train_data), tmp_path / "run")
    return tmp_path / "run"


def load(run_dir, painting, photos=(), overrides=()):
    return load_contenders([run_dir / "model.safetensors"], painting, overrides, find_images(photos) if photos else [])[0]


def test_raw_weights_are_those_that_the_run_noted(run_dir, painting):
    found = load(run_dir, painting)
    assert found.loss.config == LossConfig(**load_training_state(run_dir / "training_state.pt")["loss"])
    assert (found.label, found.step, found.weights_from) == ("run", 1, "training_state.pt")
    assert max(found.painting.shape) == 64  # the recipe's style.long_side


def test_raw_weights_of_a_published_style_are_those_of_its_metrics(run_dir, painting):
    (run_dir / "training_state.pt").unlink()
    noted = {"content": 2.0, "style": {"relu1_2": 3.0, "relu2_2": 4.0}, "tv": 0.5}
    (run_dir / "metrics.json").write_text(json.dumps({"raw_weights": noted}))
    found = load(run_dir, painting)
    c = found.loss.config
    assert (c.strength, c.content_weight, c.style_weight, c.style_layers, c.tv_weight) == (None, 2, 1, {"relu1_2": 3, "relu2_2": 4}, 0.5)
    assert found.weights_from == "metrics.json"
    (run_dir / "metrics.json").write_text('{"raw_weights": {"content": "much"}}')
    with pytest.raises(ValueError, match="metrics.json"):
        load(run_dir, painting)


def test_a_published_style_is_judged_as_its_run_was(run_dir, painting):
    weights = note_weights(load(run_dir, painting).loss.config)
    (run_dir / METRICS_NAME).write_text(json.dumps({"raw_weights": weights}))
    (run_dir / "training_state.pt").unlink()
    found = load(run_dir, painting)
    assert found.weights_from == METRICS_NAME and found.loss.config.style_weight == 1
    assert note_weights(found.loss.config) == weights


def test_raw_weights_that_nobody_noted_or_that_are_overridden_are_measured_anew(run_dir, painting, photos):
    for overrides in (["loss.strength=8"], []):
        found = load(run_dir, painting, photos, overrides)
        asked = LossConfig(**TOY_LOSS | {"style_weight": 1.0, "strength": 8.0 if overrides else 6.0})
        crops, _ = load_validation(find_images(photos)[:8], DataConfig(content=photos, crop_size=32))
        loss = PerceptualLoss(load_loss_network(asked, asked.layers), asked, load_image(painting, found.recipe.style))
        assert found.loss.config == calibrate(loss, crops.float() / 255)
        assert "anew" in found.weights_from
        (run_dir / "training_state.pt").unlink(missing_ok=True)


def test_the_painting_may_lie_beside_the_model_or_in_a_folder_of_paintings(run_dir, painting, tmp_path):
    with pytest.raises(FileNotFoundError, match="--style"):
        load(run_dir, None)
    with pytest.raises(FileNotFoundError, match="painting.png"):
        load(run_dir, tmp_path / "run")
    folder = tmp_path / "paintings"
    folder.mkdir()
    Image.new("RGB", (20, 10), "red").save(folder / "another.png")
    shutil.copy(painting, folder)
    expected = load(run_dir, painting).painting
    assert torch.equal(load(run_dir, folder).painting, expected)
    shutil.copy(painting, run_dir)
    assert torch.equal(load(run_dir, None).painting, expected)
    assert load(run_dir, folder / "another.png").painting.shape == (1, 3, 32, 64)


def test_the_shipped_style_whose_painting_is_the_project_s_own_has_it_beside_it():
    model = find_style("mosaic_sun")
    (found,) = load_contenders([model], None, [], [])
    assert (found.recipe.style.image.name, found.weights_from) == ("mosaic_sun.png", "metrics.json")
    assert torch.equal(load_contenders([model], model.parent, [], [])[0].painting, found.painting)


def test_models_side_by_side_share_a_loss_network_and_have_names_of_their_own(run_dir, painting, tmp_path):
    shutil.copytree(run_dir, tmp_path / "elsewhere" / "run")
    shutil.copy(run_dir / "model.safetensors", tmp_path / "best.safetensors")
    shutil.copy(run_dir / "training_state.pt", tmp_path)
    models = [run_dir / "model.safetensors", tmp_path / "elsewhere" / "run" / "model.safetensors", tmp_path / "best.safetensors"]
    found = load_contenders(models, painting, [], [])
    assert [one.label for one in found] == ["run", "run (2)", "best"]
    assert found[0].loss.loss_network is found[2].loss.loss_network


def test_mistakes_are_named(run_dir, painting, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_contenders([tmp_path / "none.safetensors"], painting, [], [])
    with pytest.raises(ConfigError, match="loss.wieghts"):
        load(run_dir, painting, overrides=["loss.wieghts=here"])
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--set loss.weights"):
        load(run_dir, painting, overrides=["loss.weights=nowhere.safetensors"])
    save_model(tmp_path / "bare.safetensors", TransformNetwork(NetworkConfig(width=2, residual_blocks=0)), 0, {})
    with pytest.raises(ValueError, match="bare.safetensors.*no recipe"):
        load_contenders([tmp_path / "bare.safetensors"], painting, [], [])


def test_terms_for_networks_alone_judge_nobody(run_dir, painting, photos):
    state = torch.load(run_dir / "training_state.pt", weights_only=True)
    state["loss"] |= {"grid_weight": 1000.0, "spectrum_weight": 0.3, "stability_weight": 20.0}
    torch.save(state, run_dir / "training_state.pt")
    config = load(run_dir, painting).loss.config
    assert (config.grid_weight, config.spectrum_weight, config.stability_weight) == (0, 0, 0)
