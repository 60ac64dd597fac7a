"""The reference mode: the objective falls, only its proportions matter, and every picture and number is written down."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TOY_LOSS, synthetic_photo
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from fastnst.cli import run
from fastnst.config import validate_config
from fastnst.image import load_image, resize, to_tensor
from fastnst.loss_network import load_loss_network
from fastnst.optimize import OptimizeConfig, optimize_image, scale_plan

ADAM = {"optimizer": "adam", "learning_rate": {"initial": 0.02}}
LBFGS = {"optimizer": "lbfgs", "learning_rate": {"initial": 1.0}}


def config_of(loss: dict | None = None, content: dict | None = None, **descent) -> OptimizeConfig:
    data = {
        "content": content or {"long_side": 32},
        "style": {"long_side": 32},
        "loss": TOY_LOSS | (loss or {}),
        "optimize": {"steps": 10, "log_every": 1} | descent,
    }
    return validate_config(OptimizeConfig, data)


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    """A photo of 64x48 and a style picture of other sides."""
    return to_tensor(synthetic_photo(1, 64, 48)), to_tensor(synthetic_photo(2, 50, 70))


def optimize(pictures, config: OptimizeConfig, should_stop=lambda: False):
    """The picture and all reports."""
    reports = []
    image = optimize_image(*pictures, load_loss_network(config.loss, config.loss.layers), config, reports.append, should_stop)
    return image, reports


def objectives(reports) -> list[float]:
    return [progress.losses["loss/total"] for progress in reports if progress.losses]


# Descending


@pytest.mark.parametrize("init", ["content", "style", "noise"])
@pytest.mark.parametrize("optimizer", [LBFGS, ADAM], ids=["lbfgs", "adam"])
def test_the_objective_falls(pictures, optimizer, init):
    image, reports = optimize(pictures, config_of({"style_weight": 1e5}, steps=25, init=init, **optimizer))
    found = objectives(reports)
    # From the style image itself there is little style to gain: what falls is the content, slowly.
    assert found[-1] < (0.9 if init == "style" else 0.75) * found[0]
    assert image.shape == (1, 3, 24, 32)
    assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize(
    "loss",
    [{"distance": "rmse"}, {"distance": "sse"}, {"gram": "sqrt_chw"}, {"statistics": "mean_covariance"}, {"tv_weight": 1.0, "tv_power": 1}],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_every_kind_of_objective_can_be_lowered(pictures, loss):
    found = objectives(optimize(pictures, config_of(loss, init="noise", **ADAM))[1])
    assert found[-1] < found[0]


@pytest.mark.parametrize("optimizer", [LBFGS, ADAM], ids=["lbfgs", "adam"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_only_the_proportions_of_the_weights_matter(pictures, optimizer, factor):
    weights = {"content_weight": 1.0, "style_weight": 100.0, "tv_weight": 0.01}
    scaled = {name: weight * factor for name, weight in weights.items()}
    plain, plain_reports = optimize(pictures, config_of(weights, **optimizer))
    other, other_reports = optimize(pictures, config_of(scaled, **optimizer))
    assert (plain - resize(pictures[0], tuple(plain.shape[-2:]))).abs().mean() > 0.005  # it did move
    torch.testing.assert_close(other, plain, atol=2e-3, rtol=0)
    assert objectives(other_reports)[-1] == pytest.approx(factor * objectives(plain_reports)[-1], rel=1e-2)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pictures):
    a, b, c = (optimize(pictures, config_of(init="noise", seed=seed, steps=3))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_pictures_given_are_left_alone(pictures):
    before = [picture.clone() for picture in pictures]
    optimize(pictures, config_of(content={"long_side": 64}, steps=2, clamp=True, **ADAM))
    assert all(torch.equal(picture, copy) for picture, copy in zip(pictures, before))


@pytest.mark.parametrize("units, low, high", [("pixels", 0.019, 0.021), ("network", 0.019 * 0.224, 0.021 * 0.229)])
def test_the_first_step_of_adam_has_the_length_of_its_rate(pictures, units, low, high):
    # Adam's first step is the rate times the sign of the gradient; in the network's units a pixel moves std times that.
    start = torch.full((1, 3, 32, 32), 0.5)
    config = config_of({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, steps=1, units=units, **ADAM)
    image, _ = optimize((start, pictures[1]), config)
    moved = (image - start).abs().median()
    assert low < moved < high


def test_clamp_keeps_every_iterate_in_range(pictures):
    rate = {"optimizer": "adam", "learning_rate": {"initial": 0.5}}  # far out of range in one step
    free, clamped = (objectives(optimize(pictures, config_of(steps=4, clamp=clamp, **rate))[1]) for clamp in (False, True))
    assert free[0] == clamped[0]
    assert free[2] > clamped[2]


def test_average_is_that_of_the_iterates(pictures):
    # Adam's iterates do not depend on the average: take them from runs cut short, with the average off.
    x1, x2, x3 = (optimize(pictures, config_of(steps=steps, clamp=True, **ADAM))[0] for steps in (1, 2, 3))
    averaged, _ = optimize(pictures, config_of(steps=3, clamp=True, average=0.5, **ADAM))
    # Debiased: (0.125 x1 + 0.25 x2 + 0.5 x3) / 0.875
    torch.testing.assert_close(averaged, (x1 + 2 * x2 + 4 * x3) / 7, atol=1e-5, rtol=0)


def test_it_ends_early_when_asked(pictures):
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) == 4

    image, reports = optimize(pictures, config_of(steps=50), should_stop)
    assert (reports[-1].step, reports[-1].steps) == (4, 50)
    assert torch.equal(reports[-1].image, image)


def test_reports_come_at_the_start_every_so_often_and_at_the_end(pictures):
    _, reports = optimize(pictures, config_of(steps=10, log_every=4, save_every=5))
    assert [progress.step for progress in reports if progress.losses] == [0, 4, 8, 10]
    assert [progress.step for progress in reports if progress.image is not None] == [5, 10, 10]
    seconds = [progress.seconds for progress in reports]
    assert seconds == sorted(seconds)


def test_an_objective_without_gradient_is_explained(pictures):
    with pytest.raises(ValueError, match="no gradient"):
        optimize(pictures, config_of({"style_weight": 0.0}, init="content"))


def test_an_objective_that_is_not_finite_names_the_step(pictures):
    with pytest.raises(FloatingPointError, match="step [1-9]"):
        optimize(pictures, config_of(optimizer="adam", learning_rate={"initial": 1e30}))


@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, -0.1]])
def test_betas_out_of_range_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        config_of(betas=betas)


# Scales


@pytest.mark.parametrize(
    "content, first_side, height, width, sides",
    [
        ({"long_side": 512}, 128, 600, 800, [128, 181, 256, 362, 512]),
        ({"long_side": 512}, 128, 800, 600, [128, 181, 256, 362, 512]),
        ({"short_side": 256}, 128, 300, 600, [128, 181, 256]),
        ({"long_side": None}, 100, 150, 200, [100, 141, 200]),
        ({"long_side": 180}, 128, 600, 800, [180]),  # 180 / sqrt 2 = 127.3 is below the first side
        ({"long_side": 64}, 128, 600, 800, [64]),
        ({"long_side": 512}, None, 600, 800, [512]),
    ],
)
def test_scales_grow_by_the_root_of_2_to_the_size_asked_for(content, first_side, height, width, sides):
    config = config_of(content=content, first_side=first_side, first_steps=7, steps=3)
    plan = scale_plan(config, height, width)
    assert [round(sides[-1] * scale) for scale, _ in plan] == sides
    assert [steps for _, steps in plan] == [7] + [3] * (len(sides) - 1)


@pytest.mark.parametrize("optimizer", [LBFGS, ADAM], ids=["lbfgs", "adam"])
def test_a_picture_grows_through_its_scales(pictures, optimizer):
    config = config_of(content={"long_side": 64}, first_side=32, first_steps=3, steps=2, save_every=1, average=0.9, **optimizer)
    image, reports = optimize(pictures, config)
    shapes = [tuple(progress.image.shape[-2:]) for progress in reports if progress.image is not None]
    # 64x48 / 2 and / sqrt 2 = 45.25 x 33.94
    assert shapes == [(24, 32)] * 3 + [(34, 45)] * 2 + [(48, 64)] * 2 + [(48, 64)]
    assert image.shape == (1, 3, 48, 64)
    assert reports[-1].step == 7


def test_stopped_at_a_small_scale_it_returns_that_picture(pictures):
    config = config_of(content={"long_side": 64}, first_side=32, first_steps=3, steps=2, **ADAM)
    image, reports = optimize(pictures, config, lambda: True)
    assert image.shape == (1, 3, 24, 32) and reports[-1].step == 1


# The command


@pytest.fixture
def command(tmp_path, painting):
    """The command in this process, with a photo, the painting and a quick config; gives its exit code."""
    main = importlib.import_module("fastnst.scripts.optimize").main
    config = config_of(steps=6, log_every=2, save_every=2).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(config))
    synthetic_photo(1).save(tmp_path / "photo.png")

    def call(*arguments: str, output: Path = tmp_path / "out.png") -> int:
        inputs = ["--config", tmp_path / "quick.yaml", "--content", tmp_path / "photo.png", "--style", painting]
        fixed = [*inputs, "--output", output, "--device", "cpu"]
        return run(main, [str(argument) for argument in (*fixed, *arguments)])

    return call


def test_the_command_writes_picture_history_config_events_and_steps(command, tmp_path, capsys):
    assert command("--set", "optimize.seed=3") == 0
    assert load_image(tmp_path / "out.png").shape == (1, 3, 24, 32)
    run_dir = tmp_path / "out.run"
    history = json.loads((run_dir / "history.json").read_text())
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    assert set(history[0]) == {
        *("step", "seconds", "loss/total", "loss/content", "loss/style", "loss/tv"),
        *("loss_content/relu2_2", "loss_style/relu1_2", "loss_style/relu2_2"),
    }
    written = validate_config(OptimizeConfig, yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert written == config_of(steps=6, log_every=2, save_every=2, seed=3)
    assert sorted(path.name for path in run_dir.glob("*.png")) == ["step_000002.png", "step_000004.png"]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.value for event in events.Scalars("loss/total")] == pytest.approx([entry["loss/total"] for entry in history])
    assert [event.step for event in events.Images("image")] == [2, 4, 6, 6]
    assert "done at step 6" in capsys.readouterr().out


def test_keep_colors_takes_the_light_and_dark_alone(command, tmp_path):
    start = ("--set", "optimize.init=noise")
    assert command(*start) == 0 and command(*start, "--keep-colors", output=tmp_path / "kept.png") == 0
    plain, kept = (load_image(tmp_path / name) for name in ("out.png", "kept.png"))
    photo = resize(load_image(tmp_path / "photo.png"), (24, 32))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    wanted = (photo + (luma * (plain - photo)).sum(1, keepdim=True)).clamp(0, 1)
    assert (kept - wanted).abs().max() < 2 / 255 and (kept - plain).abs().max() > 2 / 255


@pytest.mark.parametrize("name", ["out.png", "out.run/history.json"])
def test_an_output_or_history_that_exists_is_kept_without_the_flag(command, tmp_path, capsys, name):
    (tmp_path / "out.run").mkdir()
    (tmp_path / name).write_bytes(b"precious")
    assert command() == 2
    assert (tmp_path / name).read_bytes() == b"precious"
    assert "--overwrite" in capsys.readouterr().err


def test_an_intermediate_picture_that_is_read_is_not_removed(command, tmp_path, capsys):
    assert command() == 0
    taken = tmp_path / "out.run" / "step_000002.png"
    assert command("--overwrite", "--content", str(taken)) == 2
    assert f"--output would overwrite the input {taken}" in capsys.readouterr().err and taken.exists()


def test_what_a_failed_run_left_does_not_stand_in_the_way(command, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "config.yaml").write_text("optimize: {}")
    (tmp_path / "out.run" / "step_000001.png").write_bytes(b"")
    assert command() == 0


def test_overwriting_leaves_nothing_of_the_run_before(command, tmp_path):
    assert command() == 0
    assert command("--overwrite", "--set", "optimize.steps=3") == 0
    run_dir = tmp_path / "out.run"
    assert [path.name for path in run_dir.glob("*.png")] == ["step_000002.png"]
    assert len(list(run_dir.glob("events.*"))) == 1
    assert [entry["step"] for entry in json.loads((run_dir / "history.json").read_text())] == [0, 2, 3]


def test_stopped_by_ctrl_c_it_keeps_the_picture_so_far(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastnst.runtime.StopRequest.__enter__", lambda self: setattr(self, "signal", 2) or self)
    assert command() == 130
    assert Image.open(tmp_path / "out.png").size == (32, 24)
    assert "stopped at step 1" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["photo.png", "out.gif", "out"])
def test_an_output_that_cannot_be_is_one_line_and_exit_code_2(command, tmp_path, capsys, output):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert command(output=tmp_path / output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and output in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_wrong_key_names_the_right_one(command, capsys):
    assert command("--set", "optimize.step=3") == 2
    assert "optimize.steps" in capsys.readouterr().err


# Real weights


@pytest.mark.parametrize("optimizer", [LBFGS, ADAM], ids=["lbfgs", "adam"])
def test_with_a_real_loss_network_the_objective_falls_well(shared, optimizer):
    content = load_image(shared / "images" / "tubingen.jpg")
    style = load_image(shared / "styles" / "starry_night.jpg")
    loss = {
        "network": "vgg19",
        "weights": str(shared / "weights" / "vgg19_to_relu3_4.safetensors"),
        "content_layers": {"relu3_3": 1},
        "style_layers": {"relu1_1": 1, "relu2_1": 1, "relu3_1": 1},
        "style_weight": 100.0,
    }
    config = config_of(loss, content={"long_side": 96}, steps=30, log_every=30, **optimizer)
    first, last = objectives(optimize((content, style), config)[1])
    assert last < 0.3 * first


def test_lbfgs_gives_the_best_picture_that_it_met_not_the_last(pictures, monkeypatch):
    step, count = torch.optim.LBFGS.step, []

    def spoiled(self, closure):
        found = step(self, closure)
        count.append(1)
        if len(count) >= 9:  # from then on each step leads astray
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(0.5 * torch.randn_like(self.param_groups[0]["params"][0]))
        return found

    monkeypatch.setattr(torch.optim.LBFGS, "step", spoiled)
    found = objectives(optimize(pictures, config_of({"style_weight": 1e5}, steps=12, init="content", **LBFGS))[1])
    assert found[-2] > 2 * min(found[:-1])  # before the last step the picture was bad already
    assert found[-1] == pytest.approx(min(found[:-1]), rel=0.05)  # what is given back, measured clamped, is the best one
