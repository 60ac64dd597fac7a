"""Measuring beside the published way: counts by hand, rows that say what they are, pictures compared."""

import importlib
import json
import time

import numpy as np
import pytest
import torch
from conftest import synthetic_photo
from test_stages import staged

from fastnst import benchmark_inference
from fastnst.benchmark_inference import ON_DEVICE, PUBLISHED, Row, _Staying, measure, measure_fresh_processes, operations, psnr, to_markdown
from fastnst.checkpoint import save_model
from fastnst.cli import run
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), 7, {})
    synthetic_photo(0).save(tmp_path / "photo.png")
    return tmp_path / "model.safetensors"


def test_operations_by_hand():
    # 16x16, width 4, one block: 9x9 3->4 at 256 positions, 3x3 4->8 at 64, 3x3 8->16 at 16, two 3x3 16->16 at 16,
    # 4x4 transposed 16->8 from 6x6 (padded by 1) counted at 16 positions, 8->4 at 64, 10x10 4->12 at 64
    _, network = staged(width=4, residual_blocks=1)
    multiplications = 81 * 12 * 256 + 9 * 32 * 64 + 9 * 128 * 16 + 2 * 9 * 256 * 16 + 16 * 128 * 16 + 16 * 32 * 64 + 100 * 48 * 64
    assert operations(network, 16, 16) == 2 * multiplications


def test_psnr_by_hand():
    assert psnr(np.full((2, 2), 10), np.full((2, 2), 10)) is None
    assert psnr(np.full((2, 2), 10), np.full((2, 2), 11)) == pytest.approx(48.13, abs=0.01)  # 10 log10(255^2 / 1)


def test_every_way_is_measured_and_compared(model, tmp_path):
    told = []
    rows = measure(model, tmp_path / "photo.png", [(32, 24)], ["openvino:float32", "torch:bfloat16"], "cpu", 2, told.append)
    assert [row.way for row in rows] == [PUBLISHED, "published, memory kept", "openvino float32", "torch bfloat16"]
    assert all(row.milliseconds > 0 and row.ratio > 0 and len(row.times) == 2 for row in rows)
    assert rows[1].psnr is None and (rows[2].psnr is None or rows[2].psnr > 60) and rows[3].psnr > 35  # random weights
    assert rows[2].floor_share > 0
    assert (told[-1].done, told[-1].total) == (12, 12)  # 4 ways, 2 rounds and a first pass


def test_what_is_asked_for_by_two_names_is_measured_once(model):
    ways = [way for way, _, _ in benchmark_inference.ways_to_apply(model, "cpu", ["auto:auto", "torch:float32", "torch:float32", *benchmark_inference.default_engines("cpu")])]
    assert len(ways) == len(set(ways)) and {PUBLISHED, "torch float32", "native float32", "openvino float32", "onnxruntime float32"} < set(ways)


def test_on_an_apple_gpu_no_engine_of_cpus_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_inference.default_engines("mps") == ["torch:float32"]


def test_on_a_device_pictures_stay_there_and_are_compared_with_those_that_stay(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    moved, sleeps = [], {PUBLISHED: 0.04, PUBLISHED + ON_DEVICE: 0.02, "ours": 0.01, "ours" + ON_DEVICE: 0.005}

    def wait(way):
        def passed(pictures):
            moved.append(pictures) if way == "ours" + ON_DEVICE else None
            time.sleep(sleeps[way])
            return pictures

        return _Staying(passed, torch.device("cpu")) if way.endswith(ON_DEVICE) else passed

    monkeypatch.setattr(benchmark_inference, "ways_to_apply", lambda *_: [(way, wait(way), None) for way in sleeps])
    rows = measure(model, tmp_path / "photo.png", [(32, 24)], [], "cpu", 2)
    assert [row.ratio for row in rows] == pytest.approx([1, 1, 4, 4], rel=0.5)
    assert all(pictures is moved[0] and isinstance(pictures, torch.Tensor) for pictures in moved)


def test_a_table_for_people():
    text = to_markdown([Row(PUBLISHED, 512, 512, 1000.0, 900.0), Row("openvino bfloat16", 512, 512, 250.0, 240.0, 4.0, 57.25, 0.4)], [])
    assert "| 512x512 | openvino bfloat16 | 250 (240) | 1.05 | 4.00 | 57.2 | 40% |" in text  # 0.262144 megapixels in 0.25 s


def test_fresh_processes_tell_their_own_peak(model, tmp_path):
    published, ours = measure_fresh_processes(model, tmp_path / "photo.png", [(32, 24)], repeats=1)
    assert (published.way, ours.way) == (PUBLISHED, "stylize.py")
    assert ours.seconds < published.seconds and ours.peak_megabytes < published.peak_megabytes / 2  # no torch


def test_the_command_writes_both_tables(model, tmp_path, capsys):
    main = importlib.import_module("fastnst.scripts.benchmark").main
    flags = ["--inference", "--model", str(model), "--photo", str(tmp_path / "photo.png"), "--device", "cpu", "--sizes", "24", "32x16", "--engines", "torch:float32"]
    assert run(main, [*flags, "--rounds", "1", "--fresh", "--output", str(tmp_path / "speed")]) == 0
    assert "| 32x16 | torch float32 |" in capsys.readouterr().out
    assert (tmp_path / "speed.md").exists()
    assert len(json.loads((tmp_path / "speed.json").read_text())["passes"]) == 6  # 2 sizes, 3 ways
    with pytest.raises(SystemExit):
        run(main, [*flags, "--sizes", "big"])


def test_what_cannot_be_measured_is_told_at_once(model, tmp_path, capsys):
    main = importlib.import_module("fastnst.scripts.benchmark").main
    flags = ["--inference", "--model", str(model), "--photo", str(tmp_path / "photo.png"), "--sizes", "24", "--engines", "torch:float32", "--fresh"]
    assert run(main, [*flags, "--device", "toaster"]) == 2
    assert "device 'toaster' is not known" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(main, [*flags, "--device", "cpu", "--rounds", "0"])
    assert "argument --rounds: got 0, need a whole number from 1" in capsys.readouterr().err
