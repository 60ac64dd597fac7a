"""An exported file is the model: it says what it is, runs in ONNX Runtime at any size, and stylize takes it."""

import importlib

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import synthetic_photo
from PIL import Image
from test_engine import eager, photo

from fastnst import export as export_module
from fastnst.checkpoint import save_model
from fastnst.cli import run
from fastnst.export import PARITY_SIZES, export
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.onnx_graph import load_onnx


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    network = TransformNetwork(NetworkConfig(width=4, residual_blocks=1)).eval()
    save_model(tmp_path / "model.safetensors", network, 7, {"style": "painting"}, synthetic_photo(1, 16, 12))
    return tmp_path / "model.safetensors", network


@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_the_file_runs_in_onnx_runtime_at_any_batch_and_size(model, tmp_path, pixels):
    path, network = model
    found = export(path, tmp_path / "model.onnx", pixels)
    assert [(parity.height, parity.width) for parity in found] == list(PARITY_SIZES)
    assert all(parity.difference <= 1 and parity.onnx_ms > 0 for parity in found)
    assert pixels == "uint8" or max(parity.difference for parity in found) < 0.02
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    pictures = photo(19, 31, 3)
    given = pictures if pixels == "uint8" else np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32) / 255
    (got,) = session.run(None, {"pixels": given})
    got = got if pixels == "uint8" else got.transpose(0, 2, 3, 1) * 255
    assert np.abs(got - eager(network, pictures)).max() <= 0.51


def test_the_file_explains_itself(model, tmp_path):
    export(model[0], tmp_path / "model.onnx")
    info = load_onnx(tmp_path / "model.onnx").info
    assert (info.step, info.recipe, info.network.width, info.thumbnail.size) == (7, {"style": "painting"}, 4, (16, 12))


@pytest.mark.parametrize("engine", ["native", "openvino", "onnxruntime", "torch"])
def test_stylize_takes_it_with_the_same_picture(model, tmp_path, engine):
    export(model[0], tmp_path / "model.onnx", "float")
    synthetic_photo(0).save(tmp_path / "in.png")
    main = importlib.import_module("fastnst.scripts.stylize").main
    for file in ("model.safetensors", "model.onnx"):
        flags = ["--device", "cpu", "--engine", engine, "--precision", "float32", "--input", str(tmp_path / "in.png"), "--output", str(tmp_path / f"{file}.png")]
        assert run(main, ["--model", str(tmp_path / file), *flags]) == 0
    one, other = (np.asarray(Image.open(tmp_path / f"{file}.png")) for file in ("model.safetensors", "model.onnx"))
    assert np.array_equal(one, other)


def test_a_difference_is_an_error_and_leaves_no_file(model, tmp_path, monkeypatch, capsys):
    real = export_module.load_model

    def another(path):
        network, info = real(path)
        with torch.no_grad():
            network.layers[0].weight.mul_(-1)
        return network, info

    monkeypatch.setattr(export_module, "load_model", another)
    main = importlib.import_module("fastnst.scripts.export").main
    assert run(main, ["--model", str(model[0]), "--output", str(tmp_path / "model.onnx")]) == 2
    assert "would differ from torch by" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


def test_the_command_says_what_it_measured(model, tmp_path, capsys):
    main = importlib.import_module("fastnst.scripts.export").main
    arguments = ["--model", str(model[0]), "--output", str(tmp_path / "model.onnx"), "--pixels", "float"]
    assert run(main, arguments) == 0
    assert "201x123: differs from torch by at most" in capsys.readouterr().out
    assert run(main, arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(main, [*arguments, "--overwrite"]) == 0
    named = (tmp_path / "model.safetensors").rename(tmp_path / "trained.onnx")  # by its user
    assert run(main, ["--model", str(named), "--output", str(named), "--overwrite"]) == 2
    assert "--output would overwrite the input" in capsys.readouterr().err
    assert run(main, ["--model", str(model[0]), "--output", str(tmp_path / "model.pb")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err


@pytest.mark.parametrize("data, message", [(b"", "not a fastnst model file"), (b"\xff\xff garbage", "not a readable ONNX file")])
def test_a_file_that_is_no_model_is_named(tmp_path, data, message):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=f"model.onnx: {message}"):
        load_onnx(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="nothing.onnx"):
        load_onnx(tmp_path / "nothing.onnx")


def test_a_file_with_weights_that_are_no_numbers_is_named(model, tmp_path):
    export(model[0], tmp_path / "model.onnx")
    data = bytearray((tmp_path / "model.onnx").read_bytes())
    weight = load_onnx(tmp_path / "model.onnx").stages[2].weight.tobytes()
    at = data.find(weight)
    assert at > 0
    data[at : at + 64] = b"\xff" * 64
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="model.onnx: .*stage 2: its weight holds what is no number"):
        load_onnx(tmp_path / "model.onnx")


def test_a_model_with_weights_that_are_no_numbers_is_named(model, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(model[0], framework="pt") as file:
        weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    weights["layers.0.weight"].view(-1)[0] = torch.nan
    save_file(weights, tmp_path / "broken.safetensors", metadata)
    main = importlib.import_module("fastnst.scripts.export").main
    assert run(main, ["--model", str(tmp_path / "broken.safetensors"), "--output", str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'broken.safetensors'}: ")


def test_a_failed_export_keeps_the_old_file(model, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"precious")
    monkeypatch.setattr(export_module, "_LEVELS", -1.0)
    with pytest.raises(ArithmeticError, match="not written"):
        export(model[0], tmp_path / "model.onnx", overwrite=True)
    assert (tmp_path / "model.onnx").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_takes_no_more_is_told_once_by_the_file_s_own_name(model, tmp_path, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    main = importlib.import_module("fastnst.scripts.export").main
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))
    try:
        assert run(main, ["--model", str(model[0]), "--output", str(tmp_path / "model.onnx")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'model.onnx'}: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
