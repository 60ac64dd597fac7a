"""Models and training states come back bit for bit, and damaged files are named."""

import base64
import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_picture import png_header

from fastnst import __version__, checkpoint
from fastnst.checkpoint import load_model, load_training_state, restore, save_model, save_training_state, snapshot
from fastnst.model import MODEL_FORMAT, NetworkConfig
from fastnst.network import TransformNetwork

RECIPE = {"train": {"steps": 7}, "style": {"image": "wave.jpg"}}


def small(**options) -> TransformNetwork:
    torch.manual_seed(3)
    return TransformNetwork(NetworkConfig(**{"width": 2, "residual_blocks": 1} | options))


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, small(), 7, RECIPE, Image.new("RGB", (8, 6), (200, 30, 30)))
    return path


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_snapshot_is_a_copy_however_it_is_laid_out(monkeypatch, on_gpu):
    if on_gpu:  # whose tensors are moved all at once
        monkeypatch.setattr("fastnst.checkpoint._tensors", lambda state, found=checkpoint._tensors: iter([Elsewhere(each) for each in found(state)]))
    network = small(norm="batch", width=4).to(memory_format=torch.channels_last)  # its counts are whole numbers, without a shape
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    taken = snapshot(network, optimizer, 1, {"losses": [1.0, 2.0]})
    before = copy.deepcopy({"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert taken["step"] == 1 and taken["watchdog"] == {"losses": [1.0, 2.0]}
    assert taken["network"].keys() == before["network"].keys() and all(torch.equal(each, before["network"][name]) for name, each in taken["network"].items())
    assert {name: each.dtype for name, each in taken["network"].items()} == {name: each.dtype for name, each in before["network"].items()}
    for index, state in before["optimizer"]["state"].items():
        assert all(torch.equal(taken["optimizer"]["state"][index][name], each) for name, each in state.items())


class Elsewhere(torch.Tensor):
    """A tensor that says to lie on a GPU."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.detach().as_subclass(cls)

    device = torch.device("cuda")


@pytest.mark.parametrize(
    "options", [{}, {"norm": "batch"}, {"padding": "start", "upsampling": "subpixel", "output": "linear", "residual_blocks": 0}]
)
def test_model_round_trip_is_bit_for_bit(tmp_path, options):
    network = small(**options)
    network(torch.rand(2, 3, 16, 16))  # batch norm now has statistics of its own
    save_model(tmp_path / "m.safetensors", network, 1, RECIPE)
    again, info = load_model(tmp_path / "m.safetensors")
    assert info.network == network.config == again.config
    expected = network.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    image = torch.rand(1, 3, 20, 17)
    with torch.inference_mode():
        assert torch.equal(network.eval()(image), again(image))


def test_loaded_model_is_in_evaluation_mode(model):
    assert not load_model(model)[0].training


def test_model_says_what_it_is(model):
    _, info = load_model(model)
    assert (info.step, info.recipe) == (7, RECIPE)
    assert info.versions["fastnst"] == __version__ and info.versions["torch"] == torch.__version__
    assert info.thumbnail.size == (8, 6)
    red, green, blue = info.thumbnail.convert("RGB").getpixel((4, 3))
    assert red > 180 and green < 60 and blue < 60


def test_metadata_is_readable_without_fastnst(model):
    with safe_open(model, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == MODEL_FORMAT
    assert '"width":2' in metadata["network"]
    assert '"steps": 7' in metadata["recipe"]


def test_model_without_a_thumbnail(tmp_path):
    save_model(tmp_path / "m.safetensors", small(), 1, RECIPE)
    assert load_model(tmp_path / "m.safetensors")[1].thumbnail is None


def test_half_precision_model_is_loaded_in_float32(model):
    resave(model, lambda tensors, metadata: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    assert {parameter.dtype for parameter in load_model(model)[0].parameters()} == {torch.float32}


def resave(path: Path, change) -> None:
    """Write the model file anew after ``change(tensors, metadata)``."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # a file that is mapped Windows does not let go
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.popitem(),
        lambda tensors, metadata: tensors.update(extra=torch.zeros(1)),
        lambda tensors, metadata: metadata.pop("network"),
        lambda tensors, metadata: metadata.pop("recipe"),
        lambda tensors, metadata: metadata.update(network='{"width": 4, "residual_blocks": 1}'),  # not the tensors' sizes
        lambda tensors, metadata: metadata.update(network='{"widht": 4}'),
        lambda tensors, metadata: metadata.update(network="[1]"),
        lambda tensors, metadata: metadata.update(network="3"),
        lambda tensors, metadata: metadata.update(network="{"),
        lambda tensors, metadata: metadata.update(step="many"),
        lambda tensors, metadata: metadata.update(style_thumbnail="!"),
        lambda tensors, metadata: metadata.update(style_thumbnail="aGVsbG8="),  # base64, but no picture
        lambda tensors, metadata: metadata.update(style_thumbnail=base64.b64encode(png_header(60_000, 60_000)).decode()),
        lambda tensors, metadata: metadata.update(recipe="3"),
        lambda tensors, metadata: metadata.update(versions="null"),
        lambda tensors, metadata: metadata.update(recipe="[" * 100_000),
    ],
)
def test_inconsistent_model_is_named(model, change):
    resave(model, change)
    with pytest.raises(ValueError, match=r"model\.safetensors: the model file is damaged or of a newer fastnst"):
        load_model(model)


def test_a_type_that_numpy_lacks_is_named(model):
    resave(model, lambda tensors, metadata: tensors.update({"layers.0.weight": tensors["layers.0.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file .*float8"):
        load_model(model)


@pytest.mark.parametrize("part", [0, 0.001, 0.2, 0.5, 0.999])
def test_truncated_model_is_named(model, part):
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_model(model)


def test_other_projects_pth_is_named(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "mosaic.pth")
    with pytest.raises(ValueError, match=r"mosaic\.pth: not a readable safetensors file .*another project's \.pth\?"):
        load_model(tmp_path / "mosaic.pth")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors_file_is_named(tmp_path, metadata):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(
        ValueError, match=r"other\.safetensors: not a fastnst model file: its metadata has format .*, need 'fastnst-model-1'"
    ):
        load_model(tmp_path / "other.safetensors")


def test_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at .*gone.safetensors"):
        load_model(tmp_path / "gone.safetensors")


def test_folder_in_place_of_a_model_says_which_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the model file, such as .*model.safetensors"):
        load_model(tmp_path)


def trained(steps: int) -> tuple[TransformNetwork, torch.optim.Optimizer]:
    network = small()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    train(network, optimizer, range(steps))
    return network, optimizer


def train(network, optimizer, seeds) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        network(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()


def test_training_goes_on_exactly_from_its_state(tmp_path):
    whole, _ = trained(4)
    half, optimizer = trained(2)
    save_training_state(tmp_path / "s.pt", snapshot(half, optimizer, 2), {"a.jpg": "empty"})
    state = load_training_state(tmp_path / "s.pt")
    assert (state["step"], state["unreadable"]) == (2, {"a.jpg": "empty"})
    torch.manual_seed(99)
    resumed = TransformNetwork(half.config)
    resumed.load_state_dict(state["network"])
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.01)
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(2, 4))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.99])
def test_truncated_state_is_named(tmp_path, part):
    path = tmp_path / "training_state.pt"
    save_training_state(path, snapshot(*trained(1), 1), {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged or not a training state .*--run-dir"):
        load_training_state(path)


def test_no_flipped_bit_of_a_state_goes_into_a_network(tmp_path):
    path = tmp_path / "training_state.pt"
    save_training_state(path, snapshot(*trained(1), 1), {})
    data = bytearray(path.read_bytes())
    weight = next(iter(load_training_state(path)["network"].values())).numpy().tobytes()
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged .*its bytes are not those that were written.*--run-dir"):
        load_training_state(path)


@pytest.mark.parametrize("part", ["network", "optimizer"])
def test_a_state_that_is_not_finite_is_refused(tmp_path, part):
    path = tmp_path / "training_state.pt"
    learned = snapshot(*trained(1), 1)
    place = next(iter(learned["network"].values())) if part == "network" else learned["optimizer"]["state"][0]["exp_avg"]
    place.view(-1)[0] = float("nan")
    save_training_state(path, learned, {})
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged .*it holds numbers that are not finite"):
        load_training_state(path)


def test_a_state_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "training_state.pt"
    save_training_state(path, snapshot(*trained(1), 1), {})

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(PermissionError, match=r"Permission denied: .*training_state\.pt"):
        load_training_state(path)


def test_a_state_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training state at .*training_state\.pt"):
        load_training_state(tmp_path / "training_state.pt")


@pytest.mark.parametrize("data", [b"\x80\x02}q\x00", b"hello", b"\xff\xd8\xff\xe0", b"PK\x03\x04" + b"\0" * 50])
def test_damaged_state_is_named(tmp_path, data):
    path = tmp_path / "training_state.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged or not a training state") as error:
        load_training_state(path)
    assert "weights_only" not in str(error.value)  # torch's advice, which would execute what is in the file


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2], 3, torch.zeros(2)])
def test_file_that_is_no_state_is_named(tmp_path, content):
    torch.save(content, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged or not a training state"):
        load_training_state(tmp_path / "training_state.pt")


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_state_is_loaded_without_executing_code(tmp_path):
    torch.save({"step": _Malicious(tmp_path / "executed"), "network": {}, "optimizer": {}, "unreadable": {}}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt: damaged or not a training state"):
        load_training_state(tmp_path / "s.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("save", ["model", "state"])
def test_a_full_disk_is_named_and_the_old_file_kept(tmp_path, monkeypatch, save):
    network = TransformNetwork(NetworkConfig(width=4, residual_blocks=0))
    optimizer = torch.optim.Adam(network.parameters())
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="cannot write .*file.bin: No space left on device"):
        save_model(path, network, 1, {}) if save == "model" else save_training_state(path, snapshot(network, optimizer, 1), {})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("damage", [{"step": "x"}, {"network": {}}, {"optimizer": {}}])
def test_a_state_that_does_not_fit_is_named(tmp_path, damage):
    network = TransformNetwork(NetworkConfig(width=4, residual_blocks=0))
    optimizer = torch.optim.Adam(network.parameters())
    path = tmp_path / "training_state.pt"
    torch.save({"step": 1, "network": network.state_dict(), "optimizer": optimizer.state_dict(), "unreadable": {}} | damage, path)
    with pytest.raises(ValueError, match="training_state.pt: (damaged|does not fit)"):
        restore(path, load_training_state(path), network, optimizer)


def test_half_precision_halves_the_file_and_keeps_the_picture(tmp_path):
    network = TransformNetwork(NetworkConfig(width=8, residual_blocks=1)).eval()
    save_model(tmp_path / "full.safetensors", network, 1, {})
    save_model(tmp_path / "half.safetensors", network, 1, {}, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    photo = torch.rand(1, 3, 24, 24)
    network.requires_grad_(False)
    half, _ = load_model(tmp_path / "half.safetensors")
    assert float((half(photo) - network(photo)).abs().max().detach()) < 1 / 255
