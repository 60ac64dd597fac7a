"""The benchmark's two sides train the same; what it counts is the formula's; what disagrees is told."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TOY_LOSS
from fastnst.scripts.benchmark import main
from PIL import Image
from torch import nn

from fastnst import cli
from fastnst.benchmark_training import LEVERS, OURS, OurStep, Report, Row, batches_of, count_flops, draw_photos
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig
from fastnst.model import NetworkConfig
from fastnst.native_library import multiplies_pairs
from fastnst.network import plainly
from fastnst.published import PUBLISHED, PublishedStep, Task

pytestmark = pytest.mark.usefixtures("native_however_small")


@pytest.fixture
def task(photos) -> Task:
    return Task(NetworkConfig(width=4, residual_blocks=1, output="linear", output_scale=1), LossConfig(**TOY_LOSS), photos, size=32, batch=2)


def test_both_steps_lower_the_same_loss_alike(task, tmp_path):
    with batches_of(task, PUBLISHED, tmp_path) as batches:
        trial = [next(batches) for _ in range(4)]
    losses = [[float(step(batch)) for batch in trial] for step in (PublishedStep(task, PUBLISHED), OurStep(task, replace(OURS, precision="float32")))]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_lever_says_where_the_whole_step_is_ours():
    assert {lever.name for lever in LEVERS if lever.ours} == {"our step alone, in float32", "ours in float32", "ours with torch.compile"}


def test_what_is_native_is_counted_with_the_multiplications_that_are_left(task):
    # VGG-16's conv1_2, 2_1 and 2_2 (not conv1_1, of 3 channels): 64 multiplications for 36 outputs instead of 324, in bfloat16 36 for 16 instead of 144, forward for
    # both pictures and back for one
    task = replace(task, network=NetworkConfig(width=2, residual_blocks=0))  # too few channels
    seen = conv_flops(plainly(load_loss_network(task.loss, task.loss.layers)), 32)
    for precision, left in ({"float32": 64 / 324} | ({"bfloat16": 36 / 144} if multiplies_pairs() else {})).items():
        assert count_flops(task) - count_flops(task, natively=True, precision=precision) == pytest.approx((1 - left) * 3 * sum(seen[1:]), abs=20)


def conv_flops(network: nn.Module, size: int) -> list[int]:
    """2 k^2 C_in C_out H W of each convolution, in order."""
    counts = []
    hooks = [
        module.register_forward_hook(lambda m, _, out: counts.append(2 * m.kernel_size[0] ** 2 * m.in_channels * m.out_channels * out.shape[2] * out.shape[3]))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    network(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return counts


def test_the_floor_counts_each_product_that_is_needed_once(task):
    own = conv_flops(plainly(task.start()), 32)
    seen = conv_flops(load_loss_network(task.loss, task.loss.layers), 32)  # conv1_1, 1_2, 2_1, 2_2
    grams = 2 * 64 * 64 * 32 * 32 + 2 * 128 * 128 * 16 * 16
    # Ours: forward, weight gradients, input gradients but the first; both pictures forward (relu2_2 is the deepest for both), one back.
    network = 3 * sum(own) - own[0]
    assert count_flops(task) == network + 3 * sum(seen) + 2 * grams
    shallow = replace(task, loss=task.loss.model_copy(update={"content_layers": {"relu1_2": 1.0}}))
    assert count_flops(shallow) == network + 2 * sum(seen) + sum(seen[:2]) + 2 * grams
    # Published: all layers of the content, too; a Gram's gradient is two products, and the batch's style is as much again, once.
    assert count_flops(shallow, ours=False) == network + 3 * sum(seen) + 3 * grams


@pytest.mark.parametrize("kept", [False, True])
def test_batches_come_without_end_and_of_one_size(task, tmp_path, kept):
    with batches_of(task, replace(PUBLISHED, kept_photos=kept), tmp_path / "kept") as batches:
        shapes = {tuple(next(batches).shape) for _ in range(9)}  # 11 photos are 5 batches
    assert shapes == {(2, 3, 32, 32)}


def test_made_up_photos_are_of_cocos_size(tmp_path):
    folder = draw_photos(tmp_path / "photos", 2)
    assert [Image.open(path).size for path in sorted(folder.iterdir())] == [(640, 480)] * 2


def report(distance: float) -> Report:
    rows = [Row("published", [4.0, 6.0, 5.0], [4.0, 6.0, 5.0], 0.1, 0.0, 0.0), Row("ours", [2.0, 2.0, 1.0], [4.0, 6.0, 5.0], 0.0, distance, 0.02)]
    return Report({"size": 32, "batch": 4, "device": "cpu"}, 1, "bfloat16", rows, 10**9, 2 * 10**9, 4e9, [("aten::bmm", 0.25)])


def test_the_table_says_rate_ratio_and_floor():
    table = report(0.01).as_markdown()
    assert "| published | 5 | 0.8 | 1.00 (1.00 to 1.00) | 10.0% | 0.00% |" in table
    assert "| ours | 2 | 2 | 3.00 (2.00 to 5.00) | 0.0% | 1.00% |" in table  # 4 / 2, 6 / 2, 5 / 1
    assert "floor: 1 GFLOP a photo (2 as published) at 4 GFLOP/s is 1 s a step; ours reaches 50% of it" in table
    assert "bmm 25%" in table


@pytest.mark.parametrize("distance, told", [(0.02, 0), (0.021, 1), (float("nan"), 1)])
def test_losses_that_do_not_agree_are_told(distance, told):
    assert len(report(distance).disagreements) == told


TINY = ["--size", "32", "--batch", "2", "--repeats", "1", "--device", "cpu", "--set", "network.width=4", "--set", "network.residual_blocks=0"]


def test_the_command_prints_a_table_and_writes_the_figures(photos, tmp_path, capfd):
    code = cli.run(main, ["--training", "--content", str(photos), "--json", str(tmp_path / "training.json"), *TINY])
    out, err = capfd.readouterr()
    assert code == 0, err
    figures = json.loads((tmp_path / "training.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["published", "ours"]
    assert figures["rows"][1]["distance"] <= figures["rows"][1]["tolerance"]
    assert "| published |" in out and "| ours |" in out and "floor:" in out


def test_another_network_and_loss_are_measured_beside_it(photos, tmp_path, capfd):
    (tmp_path / "small.yaml").write_text("network: {width: 4, residual_blocks: 0, stem: half}\nloss: {network: vgg19_slim, strength: 5, content_layers: {relu1_1: 1}, style_layers: {relu1_1: 1}}\n")
    code = cli.run(main, ["--training", "--content", str(photos), "--also", str(tmp_path / "small.yaml"), "--json", str(tmp_path / "training.json"), *TINY])
    out, err = capfd.readouterr()
    assert code == 0, err
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["published", "ours, network of small", "ours, network and loss of small", "ours"]
    assert [row["distance"] is None for row in rows] == [False, True, True, False]
    assert out.count("not the same") == 2


def test_the_figures_never_replace_what_is_read(photos, tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("network: {width: 4}")
    for flags in (["--config", str(own)], ["--loss-weights", str(own)]):
        assert cli.run(main, ["--training", "--content", str(photos), *flags, "--json", str(own), *TINY]) == 2
        assert "--json would overwrite the input" in capsys.readouterr().err
    assert own.read_text() == "network: {width: 4}"


def test_a_part_must_be_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--training" in capsys.readouterr().err


def test_half_a_flag_is_told_to_be_none(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--train"])
    assert ended.value.code == 2
    assert "error: one of the arguments --inference --training --recipes is required" in capsys.readouterr().err


def test_too_few_photos_for_a_batch_are_named(photos):
    assert cli.run(main, ["--training", "--content", str(photos), *TINY, "--batch", "50"]) == 2


def test_what_cannot_be_measured_is_one_line_at_once(photos, tmp_path, capfd):
    assert cli.run(main, ["--training", "--content", str(photos), *TINY, "--loss-weights", str(tmp_path / "nowhere.pth")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --loss-weights: no file at {tmp_path / 'nowhere.pth'}")
    with pytest.raises(SystemExit):
        cli.run(main, ["--training", "--size", "8"])
    assert "argument --size: got 8, need a whole number from 16 to 8192" in capfd.readouterr().err
