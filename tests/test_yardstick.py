"""What a model is worth, and runs that are made once."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_LOSS

from fastnst.image import load_image
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss
from fastnst.yardstick import PlannedRun, read_run, worth


@pytest.mark.parametrize(
    "objective, expected",
    [
        (200, 0),  # worse than the start
        (100, 0),
        (75, 0.5),  # half way to the first iteration, linearly
        (50, 1),
        (40, 2),
        (35, 2 * math.sqrt(3 / 2)),  # half way from 2 to 3 on the logarithm
        (30, 3),
        (29.9, math.inf),  # never reached
    ],
)
def test_worth_is_where_the_curve_comes_down_to_the_objective(objective, expected):
    assert worth(objective, [100, 50, 40, 30]) == pytest.approx(expected)


def test_worth_is_the_first_of_several_crossings():
    assert worth(45, [100, 40, 60, 40]) == pytest.approx(55 / 60)


def planned(tmp_path, **changes) -> PlannedRun:
    config = LossConfig(**TOY_LOSS)
    painting = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    photo = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    loss = PerceptualLoss(load_loss_network(config, config.layers), config, painting)
    return replace(PlannedRun(photo, painting, loss, "noise", 3, tmp_path / "runs"), **changes)


def fake(stop_after: int = 3):
    """An optimizer whose objective after k iterations is 10 - k and which takes a second for each."""

    def optimize(content, style, loss_network, loss, start, iterations, report, should_stop):
        for step in range(stop_after):
            report(SimpleNamespace(step=step, losses={"loss/total": 10.0 - step}, seconds=step + 1.0))
            report(SimpleNamespace(step=step + 1, losses={}, seconds=step + 1.0))  # an image alone
        report(SimpleNamespace(step=stop_after, losses={"loss/total": 10.0 - stop_after}, seconds=stop_after + 0.5))
        return content

    return optimize


def test_a_run_is_written_whole_and_read_back(tmp_path):
    run, seen = planned(tmp_path), []
    assert run.make(fake(), seen.append, lambda: False)
    found = read_run(run.file)
    assert found.objective == [10, 9, 8, 7]
    assert found.seconds == [0, 1, 2, 3.5]  # the last includes measuring the last image
    assert torch.equal(load_image(found.picture), run.photo[None].float() / 255)
    assert seen == [0, 1, 2, 3] and run.cost == 3  # 1,024 pixels, in thousands
    assert "CPU" in found.machine


def test_a_stopped_run_leaves_nothing(tmp_path):
    run = planned(tmp_path)
    assert not run.make(fake(stop_after=2), lambda done: None, lambda: True)
    assert not run.cache.exists()


def test_a_run_is_named_after_all_that_decides_it_and_no_path(tmp_path):
    run = planned(tmp_path)
    other_loss = planned(tmp_path).loss
    other_loss.config = other_loss.config.model_copy(update={"tv_weight": 1.0})
    other_network = planned(tmp_path).loss
    next(other_network.loss_network.parameters()).mul_(2)
    same_elsewhere = planned(tmp_path).loss
    same_elsewhere.config = same_elsewhere.config.model_copy(update={"weights": "/elsewhere/vgg16.safetensors"})
    others = [
        replace(run, photo=255 - run.photo),
        replace(run, painting=1 - run.painting),
        replace(run, start="content"),
        replace(run, iterations=4),
        replace(run, loss=other_loss),
        replace(run, loss=other_network),
    ]
    assert len({run.file, *(other.file for other in others)}) == 7
    assert replace(run, loss=same_elsewhere).file == run.file
    assert planned(tmp_path).file == run.file


def test_a_run_s_name_is_found_out_once(tmp_path, monkeypatch):
    run = planned(tmp_path)
    name = run.file
    monkeypatch.setattr(run.loss.loss_network, "state_dict", lambda: pytest.fail("hashed again"))
    assert run.file is name


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"objective": [1]})])
def test_a_damaged_run_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json.*remove it"):
        read_run(tmp_path / "run.json")
