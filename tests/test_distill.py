"""Distillation: the start from the teacher, what is saved, resuming."""

import importlib

import pytest
import torch
import yaml
from conftest import synthetic_photo
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastnst import cli, runtime
from fastnst.checkpoint import STATE_NAME
from fastnst.config import validate_config
from fastnst.distill import (
    SLIM_NAME,
    DistillConfig,
    _linear_prediction,
    _spanning_channels,
    distill,
    gram_difference_error,
    initialize_from_teacher,
    relative_error,
    teach,
)
from fastnst.loss_network import SLIM_HEADS, LossNetwork, LossNetworkConfig, load_loss_network

EXACT = [layer for layer in SLIM_HEADS if layer < "relu4"]


@pytest.fixture(scope="module")
def teacher():
    """VGG-19 to relu3_4 with random filters, in the units of Caffe's: input 0..255."""
    torch.manual_seed(0)
    network = LossNetwork("vgg19", EXACT, std=(1 / 255,) * 3)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return network


@pytest.fixture
def config(photos, tmp_path, teacher):
    weights = tmp_path / "vgg19.safetensors"
    std = ",".join(["0.00392156862745098"] * 3)
    (tmp_path / "held_out").mkdir()
    for seed in range(20, 24):
        synthetic_photo(seed).save(tmp_path / "held_out" / f"{seed}.png")
    save_file(dict(teacher.state_dict()), weights, {"mean": "0.485,0.456,0.406", "std": std})
    return {
        "teacher": {"vgg19": str(weights)},
        "data": {"content": str(photos), "validation": str(tmp_path / "held_out"), "crop_size": 32, "workers": 0},
        "distill": {"steps": 4, "batch_size": 2, "log_every": 2, "validate_every": 2, "save_every": 2},
    }


def test_relative_error_by_hand():
    # |(1, 2) - (1, 4)|^2 / |(1, 4)|^2 = 4 / 17
    assert float(relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))) == pytest.approx(4 / 17)


def test_gram_difference_error_ignores_what_all_pictures_share():
    features = torch.rand(2, 3, 4, 4)
    same_for_all = torch.rand(1, 3, 4, 4)
    # Stacking the same positions onto every picture adds the same to every Gram: their differences stay.
    assert float(gram_difference_error(torch.cat([features, same_for_all.expand(2, -1, -1, -1)], dim=2) * 2**0.5, features)) < 1e-6


def test_spanning_channels_pass_over_copies():
    channels = torch.rand(2, 3, 8, 8)
    doubled = torch.cat([channels, 2 * channels], dim=1)  # 3, 4, 5 are 0, 1, 2 again
    assert sorted(index % 3 for index in _spanning_channels(doubled, 3).tolist()) == [0, 1, 2]


def test_the_start_takes_64_bits_on_the_cpu_alone():
    """Apple's GPUs have no such numbers."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, act, types, args=(), kwargs=None):
            made = act(*args, **(kwargs or {}))
            assert not isinstance(made, torch.Tensor) or made.dtype != torch.float64 or made.device.type == "cpu", act
            return made

    with FakeTensorMode(), Watch():
        weight, offset = _linear_prediction(torch.empty(2, 3, 4, 4, device="cuda"), torch.empty(2, 5, 4, 4, device="cuda"))
    assert weight.shape == (5, 3) and weight.device == offset.device == torch.device("cuda", 0)


def test_the_start_predicts_the_teacher(teacher):
    torch.manual_seed(1)
    photos = torch.rand(6, 3, 8, 8).repeat_interleave(6, dim=2).repeat_interleave(6, dim=3)
    student = LossNetwork("vgg19_slim", EXACT, (0.485, 0.456, 0.406), (0.25,) * 3)
    wanted = {layer: feature for layer, feature in teach(teacher, None, photos, EXACT).items()}
    units = initialize_from_teacher(student, teacher, None, photos)
    errors = {layer: float(relative_error(feature * units[layer], wanted[layer])) for layer, feature in student(photos).items()}
    # Random filters compress worst of all: 24 of 64 that span the 27 numbers of a 3x3 patch. Untrained, a student is near 1.
    assert errors["relu1_1"] < 0.15
    assert max(errors.values()) < 0.4


def test_distilling_writes_a_loss_network_in_the_teachers_units(config, tmp_path, teacher):
    found = []
    path = distill(validate_config(DistillConfig, config), tmp_path / "run", report=found.append)
    assert path.stat().st_size < 4e6
    slim = load_loss_network(LossNetworkConfig(network="vgg19_slim", weights=str(path)), ["relu1_1", "relu2_2"])
    images = torch.rand(1, 3, 48, 48).repeat_interleave(2, dim=2)
    for layer, feature in slim(images).items():
        exact = teacher(images, [layer])[layer]
        assert feature.shape == exact.shape
        assert 0.7 < float(feature.mean() / exact.mean()) < 1.4
    assert [progress.step for progress in found if progress.validation] == [2, 4]
    assert {"validation/gradient", "validation_gram/relu3_4"} <= set(found[-1].validation or next(p.validation for p in reversed(found) if p.validation))


def test_the_command_tells_each_error_by_its_name(config, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config | {"distill": config["distill"] | {"steps": 2}}))
    main = importlib.import_module("fastnst.scripts.distill").main
    assert cli.run(main, ["--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"done: {tmp_path / 'run' / SLIM_NAME}\n"
    (line,) = [line for line in printed.err.splitlines() if "validation" in line]
    names = line.removeprefix("step 2: validation ").split()[::2]
    assert names[:2] == ["feature/relu1_1", "gram/relu1_1"] and names[-1] == "gradient"


def test_it_stops_and_resumes(config, tmp_path):
    stops = iter([False, False, True])
    distill(validate_config(DistillConfig, config), tmp_path / "run", should_stop=lambda: next(stops))
    assert torch.load(tmp_path / "run" / "training_state.pt", weights_only=True)["step"] == 2
    steps = []
    distill(validate_config(DistillConfig, config), tmp_path / "run", report=lambda progress: steps.append(progress.step))
    assert sorted(set(steps)) == [3, 4]


def test_a_stop_ahead_of_the_first_step_says_that_nothing_is_saved(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(runtime.StopRequest, "__call__", lambda self: True)
    cli.run(importlib.import_module("fastnst.scripts.distill").main, ["--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"), "--device", "cpu"])
    assert capsys.readouterr().out == "stopped before the first step: nothing to save\n"


def test_how_a_run_is_watched_may_change(config, tmp_path):
    distill(validate_config(DistillConfig, config), tmp_path / "run")
    config["distill"] |= {"log_every": 7, "save_every": 8, "validate_every": 9}
    distill(validate_config(DistillConfig, config), tmp_path / "run")


def test_a_teacher_that_is_not_there_is_named(config, tmp_path):
    config["teacher"]["vgg19"] = str(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="teacher.vgg19: no file at .*none.pth"):
        distill(validate_config(DistillConfig, config), tmp_path / "run")


def test_another_config_is_refused_by_name(config, tmp_path):
    distill(validate_config(DistillConfig, config), tmp_path / "run")
    config["distill"]["gram_weight"] = 3.0
    with pytest.raises(ValueError, match="distill.gram_weight"):
        distill(validate_config(DistillConfig, config), tmp_path / "run")


def test_the_same_folder_by_another_name_is_resumed(config, tmp_path, monkeypatch):
    distill(validate_config(DistillConfig, config), tmp_path / "run")
    config["data"]["content"] = "photos"
    monkeypatch.chdir(tmp_path)
    assert distill(validate_config(DistillConfig, config), tmp_path / "run") == tmp_path / "run" / SLIM_NAME


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_run_is_prolonged_where_its_rate_is_constant(config, tmp_path, decay):
    config["distill"] |= {"steps": 2, "learning_rate": {"initial": 3e-4, "decay": decay}}
    distill(validate_config(DistillConfig, config), tmp_path / "run")
    config["distill"]["steps"] = 4
    if decay == "cosine":
        with pytest.raises(ValueError, match="distill.steps: 2 in the run, 4 asked for"):
            distill(validate_config(DistillConfig, config), tmp_path / "run")
    else:
        distill(validate_config(DistillConfig, config), tmp_path / "run")
        assert torch.load(tmp_path / "run" / STATE_NAME, weights_only=True)["step"] == 4


@pytest.mark.parametrize("name", [STATE_NAME, SLIM_NAME])
def test_what_a_killed_one_left_half_written_is_removed(config, tmp_path, name):
    stem, suffix = name.split(".")
    left = tmp_path / "run" / f".{stem}-fastnst-abcdefgh.{suffix}"
    left.parent.mkdir()
    left.touch()
    distill(validate_config(DistillConfig, config), tmp_path / "run")
    assert not left.exists()


def test_too_few_validation_photos_are_refused(config, tmp_path):
    del config["data"]["validation"]  # a tenth of 12 photos is 1
    with pytest.raises(ValueError, match="data.validation"):
        distill(validate_config(DistillConfig, config), tmp_path / "run")


def test_matching_gradients_is_a_term_that_can_be_asked_for(config, tmp_path):
    config["distill"] |= {"gradient_weight": 1.0, "steps": 2}
    losses = []
    distill(validate_config(DistillConfig, config), tmp_path / "run", report=lambda progress: losses.append(progress.losses))
    assert any("loss/gradient" in found for found in losses)
