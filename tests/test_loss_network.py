"""The loss network agrees with torchvision's own modules, and its weights come from where the config says."""

import os
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import synthetic_photo
from safetensors.torch import save_file
from torch import nn

from fastnst.config import ConfigError, validate_config
from fastnst.loss_network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SLIM_HEADS,
    SLIM_WEIGHTS,
    LossNetwork,
    LossNetworkConfig,
    layer_index,
    load_loss_network,
)

CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)


def torchvision_features(network: str, depth: int) -> nn.Sequential:
    """The first ``depth`` of torchvision's own feature modules with random weights; no classifier is ever allocated."""
    with torch.device("meta"):
        features = torchvision.models.get_model(network).features[:depth]
    features = features.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in features.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return features


def state_of(features: nn.Sequential) -> dict[str, torch.Tensor]:
    return {f"features.{key}": value for key, value in features.state_dict().items()}


@pytest.fixture
def toy_state() -> dict[str, torch.Tensor]:
    """VGG-16 cut off after relu1_2."""
    return state_of(torchvision_features("vgg16", 4))


@pytest.fixture
def downloads(monkeypatch) -> dict:
    """Stands in for torchvision's download: what to return by weights, and which were asked for."""
    states: dict = {}

    def get_state_dict(weights, *args, **kwargs):
        return states[str(weights)]

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    return states


@pytest.mark.parametrize(
    "network, layers",
    [
        (
            "vgg16",
            {
                "conv1_1": 0,
                "relu1_1": 1,
                "conv1_2": 2,
                "pool1": 4,
                "relu2_2": 8,
                "conv3_3": 14,
                "relu3_3": 15,
                "relu4_3": 22,
                "features.23": 23,
                "relu5_3": 29,
                "pool5": 30,
            },
        ),
        (
            "vgg19",
            {
                "conv1_1": 0,
                "relu1_2": 3,
                "pool2": 9,
                "relu3_4": 17,
                "conv4_2": 21,
                "relu4_2": 22,
                "conv5_1": 28,
                "relu5_1": 29,
                "relu5_4": 35,
            },
        ),
        (
            "squeezenet1_0",
            {
                "conv1": 0,
                "relu1": 1,
                "pool1": 2,
                "fire2": 3,
                "fire4": 5,
                "pool2": 6,
                "fire8": 10,
                "pool3": 11,
                "fire9": 12,
                "features.7": 7,
            },
        ),
        (
            "squeezenet1_1",
            {"conv1": 0, "relu1": 1, "pool1": 2, "fire2": 3, "fire3": 4, "pool2": 5, "fire5": 7, "pool3": 8, "fire6": 9, "fire9": 12},
        ),
    ],
)
def test_features_are_torchvisions(network, layers, downloads):
    torch.manual_seed(0)  # of 40 seeds all are within the bound, the nearest by a fifth of it
    reference = torchvision_features(network, max(layers.values()) + 1)
    downloads[f"{type_of_weights(network)}.IMAGENET1K_V1"] = state_of(reference) | {"classifier.1.bias": torch.zeros(1)}
    images = torch.rand(2, 3, 48, 67)
    x = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = []
    with torch.no_grad():
        for module in reference:
            x = module(x.clone())  # the clone saves what the in-place ReLU behind would overwrite
            expected.append(x)
        ours = load_loss_network(LossNetworkConfig(network=network, weights="imagenet"), layers)(images)
    assert list(ours) == list(layers)
    for layer, index in layers.items():
        assert torch.allclose(ours[layer], expected[index], rtol=1e-4, atol=1e-4), layer
    for convolution in [layer for layer in layers if layer.startswith("conv")]:
        assert ours[convolution].min() < 0, f"{convolution} was overwritten by its ReLU"


def type_of_weights(network: str) -> str:
    return {
        "vgg16": "VGG16_Weights",
        "vgg19": "VGG19_Weights",
        "squeezenet1_0": "SqueezeNet1_0_Weights",
        "squeezenet1_1": "SqueezeNet1_1_Weights",
    }[network]


@pytest.mark.parametrize(
    "network, layers", [("vgg16", ["conv1_1", "relu1_1", "conv1_2"]), ("vgg19", ["relu1_1"]), ("squeezenet1_1", ["conv1", "relu1"])]
)
def test_convolution_is_what_its_relu_receives(network, layers):
    features = load_loss_network(LossNetworkConfig(network=network, weights="random"), layers)(torch.rand(1, 3, 20, 20))
    for convolution in [layer for layer in layers if layer.startswith("conv")]:
        assert features[convolution].min() < 0
        relu = convolution.replace("conv", "relu")
        if relu in features:
            assert torch.equal(features[convolution].relu(), features[relu])


def test_features_n_is_the_same_layer():
    features = load_loss_network(LossNetworkConfig(weights="random"), ["relu1_2", "features.3"])(torch.rand(1, 3, 16, 16))
    assert torch.equal(features["relu1_2"], features["features.3"])


def test_computes_no_deeper_than_asked():
    network = LossNetwork("vgg16", ["relu1_1", "relu2_2"])
    assert len(network.features) == 9
    network.features[2].register_forward_pre_hook(lambda *_: pytest.fail("went past relu1_1"))
    assert list(network(torch.rand(1, 3, 16, 16), ["relu1_1"])) == ["relu1_1"]


@pytest.mark.parametrize("name, layers", [("vgg16", ["relu2_1", "conv1_1", "relu1_2"]), ("vgg19_slim", ["relu2_1", "relu1_2"])])
def test_a_layer_is_given_before_what_lies_deeper_is_computed(name, layers):
    network, seen = LossNetwork(name, layers), []
    for index, module in enumerate(network.features):
        module.register_forward_hook(lambda module, given, result, index=index: seen.append(index))
    features = network(torch.rand(1, 3, 16, 16), each=lambda layer, feature: seen.append((layer, feature)))
    given = [(seen[at - 1], layer) for at, (layer, _) in ((at, each) for at, each in enumerate(seen) if isinstance(each, tuple))]
    assert given == sorted((layer_index(name, layer), layer) for layer in layers)
    assert list(features) == layers and all(features[layer] is feature for layer, feature in (each for each in seen if isinstance(each, tuple)))


def test_no_layers_asked_gives_nothing():
    assert LossNetwork("vgg16", ["relu1_1"])(torch.rand(1, 3, 16, 16), []) == {}


def test_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        LossNetwork("vgg16", [])


def test_is_frozen_but_lets_the_gradient_through_to_the_image():
    network = LossNetwork("vgg16", ["relu1_2"])
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(image)["relu1_2"].square().mean().backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


def test_image_is_not_changed_by_in_place_layers():
    image = torch.rand(1, 3, 16, 16)
    before = image.clone()
    LossNetwork("vgg16", ["relu1_1"])(image)
    assert torch.equal(image, before)


def test_average_pooling_averages():
    features = load_loss_network(LossNetworkConfig(weights="random", pooling="average"), ["relu1_2", "pool1"])(torch.rand(1, 3, 16, 16))
    blocks = features["relu1_2"].unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.allclose(features["pool1"], blocks.mean(dim=(-1, -2)), atol=1e-6)


def test_random_weights_are_the_same_each_time():
    first, second = (load_loss_network(LossNetworkConfig(weights="random"), ["relu1_2"]).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("layer, index", [("conv1_1", 0), ("relu4_3", 22), ("pool5", 30), ("features.0", 0), ("features.30", 30)])
def test_layer_index_of_vgg16(layer, index):
    assert layer_index("vgg16", layer) == index


@pytest.mark.parametrize(
    "network, layer, nearest",
    [
        ("vgg16", "relu4_4", "relu4_3"),
        ("vgg16", "relu_3_3", "relu3_3"),
        ("vgg19", "Relu5_4", "relu5_4"),
        ("squeezenet1_0", "fire10", "fire"),
        ("vgg16", "features.31", "features.0 ... features.30"),
        ("vgg16", "features.x", "it has"),
    ],
)
def test_unknown_layer_names_the_nearest(network, layer, nearest):
    with pytest.raises(ValueError, match=f"{network} has no layer '{layer}'; nearest: .*{nearest}"):
        layer_index(network, layer)


@pytest.mark.parametrize(
    "network, weights",
    [
        ("vgg16", "imagenet_features"),
        ("vgg19", "imagenet"),
        ("squeezenet1_0", "imagenet"),
        ("squeezenet1_1", "imagenet"),
        ("vgg19_slim", "embedded"),
    ],
)
def test_auto_takes_the_weights_that_exist(network, weights):
    assert LossNetworkConfig(network=network).resolved_weights == weights


@pytest.mark.parametrize("network, weights", [("vgg19", "imagenet_features"), ("vgg16", "embedded"), ("vgg19_slim", "imagenet")])
def test_weights_that_do_not_exist_are_refused(network, weights):
    with pytest.raises(ConfigError, match=f"weights: {weights} exist for .*, not for {network}; use weights: auto or a path"):
        validate_config(LossNetworkConfig, {"network": network, "weights": weights})


@pytest.mark.parametrize(
    "data, key", [({"std": [1, 0, 1]}, "std"), ({"mean": [1, 2]}, "mean"), ({"network": "vgg13"}, "network"), ({"weights": ""}, "weights")]
)
def test_impossible_config_is_refused(data, key):
    with pytest.raises(ConfigError, match=key):
        validate_config(LossNetworkConfig, data)


def stats(network: LossNetwork) -> tuple[list[float], list[float]]:
    return network.mean.flatten().tolist(), network.std.flatten().tolist()


def test_caffe_weights_bring_their_mean_and_std(downloads, toy_state):
    downloads["VGG16_Weights.IMAGENET1K_FEATURES"] = toy_state
    mean, std = stats(load_loss_network(LossNetworkConfig(), ["relu1_2"]))
    assert mean == pytest.approx(CAFFE_MEAN, abs=1e-5)
    assert std == pytest.approx(CAFFE_STD, rel=1e-5)


def test_imagenet_weights_bring_their_mean_and_std(downloads, toy_state):
    downloads["VGG16_Weights.IMAGENET1K_V1"] = toy_state
    mean, std = stats(load_loss_network(LossNetworkConfig(weights="imagenet"), ["relu1_2"]))
    assert (mean, std) == (pytest.approx(IMAGENET_MEAN), pytest.approx(IMAGENET_STD))


@pytest.mark.parametrize("text", ["0.1,0.2,0.3", "[0.1, 0.2, 0.3]", "(0.1, 0.2, 0.3)"])
def test_safetensors_metadata_gives_mean_and_std(tmp_path, toy_state, text):
    save_file(toy_state, tmp_path / "cut.safetensors", {"mean": text, "std": "0.5,0.25,0.125"})
    mean, std = stats(load_loss_network(LossNetworkConfig(weights=str(tmp_path / "cut.safetensors")), ["relu1_2"]))
    assert (mean, std) == (pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.5, 0.25, 0.125]))


def test_config_overrules_the_files_mean_and_std(tmp_path, toy_state):
    save_file(toy_state, tmp_path / "cut.safetensors", {"mean": "1,1,1", "std": "1,1,1"})
    config = LossNetworkConfig(weights=str(tmp_path / "cut.safetensors"), mean=(0, 0.5, 0), std=(2, 2, 2))
    assert stats(load_loss_network(config, ["relu1_2"])) == ([0, 0.5, 0], [2, 2, 2])


@pytest.mark.parametrize(
    "metadata, key", [({"mean": "half"}, "mean"), ({"std": "1,2"}, "std"), ({"std": "0,0,0"}, "std"), ({"mean": "nan,nan,nan"}, "mean")]
)
def test_unusable_metadata_names_file_and_key(tmp_path, toy_state, metadata, key):
    save_file(toy_state, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(ValueError, match=f"cut\\.safetensors: metadata {key}"):
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "cut.safetensors")), ["relu1_2"])


@pytest.fixture(params=["cut.safetensors", "cut.pth", "wrapped.pth"])
def cut_file(request, tmp_path, toy_state) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".safetensors":
        save_file(toy_state, path)
    else:
        torch.save({"state_dict": toy_state} if path.stem == "wrapped" else toy_state, path)
    return path


def test_cut_off_file_serves_the_layers_it_has(cut_file, toy_state):
    network = load_loss_network(LossNetworkConfig(weights=str(cut_file)), ["relu1_2"])
    assert torch.equal(network.features[2].weight, toy_state["features.2.weight"])
    assert stats(network) == (pytest.approx(IMAGENET_MEAN), pytest.approx(IMAGENET_STD))


def test_layer_missing_from_a_cut_off_file_is_named(cut_file):
    with pytest.raises(ValueError) as raised:
        load_loss_network(LossNetworkConfig(weights=str(cut_file)), ["relu1_1", "relu2_2"])
    message = str(raised.value)
    assert str(cut_file) in message
    assert "lacks features.5.weight (conv2_1), needed for relu1_1, relu2_2" in message
    assert "convolutions up to conv1_2" in message


def test_half_precision_file_is_read_into_float32(tmp_path, toy_state):
    torch.save({key: value.half() for key, value in toy_state.items()}, tmp_path / "half.pth")
    network = load_loss_network(LossNetworkConfig(weights=str(tmp_path / "half.pth")), ["relu1_2"])
    assert network.features[0].weight.dtype == torch.float32


def test_file_of_another_network_is_named(tmp_path):
    torch.save(state_of(torchvision_features("squeezenet1_0", 3)), tmp_path / "squeeze.pth")
    with pytest.raises(
        ValueError, match=r"squeeze\.pth: features\.0\.weight \(conv1_1\) has shape \(96, 3, 7, 7\), vgg16 needs \(64, 3, 3, 3\); is it"
    ):
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "squeeze.pth")), ["relu1_2"])


def slim(path: Path, layers: list[str]) -> LossNetwork:
    """A slim VGG-19 with random weights, also written to ``path``."""
    network = load_loss_network(LossNetworkConfig(network="vgg19_slim", weights="random"), layers)
    save_file(network.state_dict(), path, {"mean": "0.1,0.2,0.3", "std": "0.5,0.5,0.5"})
    return network


def test_embedded_weights_are_read_from_the_package(tmp_path, monkeypatch):
    layers = ["relu1_1", "relu2_1"]
    reference = slim(tmp_path / "slim.safetensors", layers)
    monkeypatch.setattr("fastnst.loss_network.SLIM_WEIGHTS", tmp_path / "slim.safetensors")
    network = load_loss_network(LossNetworkConfig(network="vgg19_slim"), layers)
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in network.state_dict().items())
    assert stats(network)[0] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "layer, channels, scale", [("relu1_2", 64, 1), ("relu2_2", 128, 2), ("relu3_4", 256, 4), ("relu4_1", 512, 8), ("relu5_1", 512, 16)]
)
def test_slim_features_have_the_shape_of_vgg19(tmp_path, layer, channels, scale):
    network = load_loss_network(LossNetworkConfig(network="vgg19_slim", weights="random"), [layer])
    features = network(torch.rand(1, 3, 32, 48))[layer]
    assert features.shape == (1, channels, 32 // scale, 48 // scale)
    assert features.min() == 0 < features.max()


def test_slim_layer_that_has_no_head_is_refused():
    with pytest.raises(ValueError, match="vgg19_slim has no layer 'relu4_2'; nearest: relu4_1; it has relu1_1, "):
        layer_index("vgg19_slim", "relu4_2")


def test_slim_file_without_a_head_is_named(tmp_path):
    slim(tmp_path / "slim.safetensors", ["relu2_1"])
    with pytest.raises(ValueError, match=r"slim\.safetensors: lacks heads\.relu1_1\.weight"):
        load_loss_network(LossNetworkConfig(network="vgg19_slim", weights=str(tmp_path / "slim.safetensors")), ["relu1_1"])


def test_file_with_other_names_says_so(tmp_path):
    torch.save({"conv11.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: lacks features\.0\.weight \(conv1_1\).*1 other tensors, none named features\.N"):
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "other.pth")), ["relu1_1"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x80\x02}q\x00", b"PK\x03\x04" + b"\0" * 50])
def test_damaged_file_is_named(tmp_path, data, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"broken\\{suffix}"):
        load_loss_network(LossNetworkConfig(weights=str(path)), ["relu1_1"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_pth_is_named(tmp_path, toy_state, zipped, part):
    path = tmp_path / "cut.pth"
    torch.save(toy_state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        load_loss_network(LossNetworkConfig(weights=str(path)), ["relu1_2"])


@pytest.mark.parametrize("content", [[1, 2], {"features.0.weight": "text"}, torch.zeros(3)])
def test_file_without_a_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: holds .*need a state dict of tensors"):
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "other.pth")), ["relu1_1"])


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_weight_file_is_named_without_advice_to_load_it_as_code(tmp_path):
    synthetic_photo(1).save(tmp_path / "wave.jpg")
    with pytest.raises(ValueError, match=r"loss\.weights: .*wave\.jpg is not a state dict of tensors, or damaged; need a \.pth or \.safetensors file") as error:
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "wave.jpg")), ["relu1_1"])
    assert "weights_only" not in str(error.value)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path):
    torch.save({"features.0.weight": _Malicious(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth is not a state dict of tensors, or damaged; need a .pth or .safetensors file, whole pickled modules are not loaded"):
        load_loss_network(LossNetworkConfig(weights=str(tmp_path / "bad.pth")), ["relu1_1"])
    assert not (tmp_path / "executed").exists()


def test_missing_file_says_what_can_be_given():
    with pytest.raises(FileNotFoundError, match=r"loss\.weights: no file at .*nowhere\.pth; give auto, imagenet, imagenet_features"):
        load_loss_network(LossNetworkConfig(weights="nowhere.pth"), ["relu1_1"])


def test_path_may_begin_with_the_home_folder(tmp_path, monkeypatch, toy_state):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(toy_state, tmp_path / "cut.pth")
    assert load_loss_network(LossNetworkConfig(weights="~/cut.pth"), ["relu1_1"]).network == "vgg16"


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), ConnectionResetError("reset"), RuntimeError('invalid hash value (expected "397923af")')]
)
def test_impossible_download_gives_advice(tmp_path, monkeypatch, error):
    def no_download(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    with pytest.raises(OSError) as raised:
        load_loss_network(LossNetworkConfig(weights="imagenet"), ["relu1_1"])
    message = str(raised.value)
    assert "vgg16-397923af.pth" in message  # the file to fetch
    assert str(tmp_path / "hub" / "checkpoints") in message  # where to put it
    assert "give its path: loss.weights=PATH" in message


def test_advice_for_an_impossible_download_works(tmp_path, monkeypatch, toy_state):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(toy_state, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloads"))
    network = load_loss_network(LossNetworkConfig(weights="imagenet"), ["relu1_2"])
    assert torch.equal(network.features[0].weight, toy_state["features.0.weight"])


@pytest.mark.parametrize("data", [b"", b"<html>login required</html>", b"PK\x03\x04" + b"\0" * 50])
def test_damaged_file_in_the_download_folder_is_named(tmp_path, monkeypatch, data):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth").write_bytes(data)
    with pytest.raises((OSError, ValueError), match="vgg16-397923af.pth"):
        load_loss_network(LossNetworkConfig(weights="imagenet"), ["relu1_1"])


def test_constructor_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloads"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert LossNetwork("vgg16", ["relu1_1"]).mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)


@pytest.mark.parametrize(
    "network, file, layer, beyond",
    [
        ("vgg19", "vgg19_to_relu3_4", "relu3_4", "relu4_1"),
        ("squeezenet1_0", "squeezenet1_0_features", "fire9", None),
    ],
)
def test_real_weights(shared, network, file, layer, beyond):
    config = LossNetworkConfig(network=network, weights=str(shared / "weights" / f"{file}.safetensors"))
    features = load_loss_network(config, [layer])(torch.rand(1, 3, 64, 64))[layer]
    assert features.isfinite().all() and features.max() > 0
    if beyond:
        with pytest.raises(ValueError, match="lacks features.19.weight .conv4_1."):
            load_loss_network(config, [beyond])


def test_the_embedded_network_loads_without_a_download_and_knows_all_its_layers(monkeypatch):
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda *_: pytest.fail("must not be asked"))
    assert SLIM_WEIGHTS.stat().st_size <= 4e6
    network = load_loss_network(LossNetworkConfig(network="vgg19_slim"), list(SLIM_HEADS))
    features = network(torch.rand(1, 3, 64, 64))
    assert {layer: feature.shape[1] for layer, feature in features.items()} == SLIM_HEADS
    assert all(feature.isfinite().all() and feature.max() > 0 for feature in features.values())


def test_the_embedded_network_is_near_vgg19(shared):
    from PIL import Image

    from fastnst.image import to_tensor

    layers = ["relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_3"]
    exact = load_loss_network(LossNetworkConfig(network="vgg19", weights=str(shared / "weights" / "vgg19_to_relu3_4.safetensors")), layers)
    slim = load_loss_network(LossNetworkConfig(network="vgg19_slim"), layers)
    photo = to_tensor(Image.open(shared / "images" / "chicago.jpg").convert("RGB").resize((192, 128)))
    wanted, found = exact(photo), slim(photo)
    errors = {layer: float((found[layer] - wanted[layer]).square().sum() / wanted[layer].square().sum()) for layer in layers}
    assert errors["relu1_1"] < 0.02 and max(errors.values()) < 0.25, errors


@pytest.mark.parametrize("network, layer", [("vgg16", "relu3_1"), ("squeezenet1_1", "fire3"), ("vgg19_slim", "relu3_1")])
def test_reflection_makes_no_edge_around_a_picture_and_zeros_do(network, layer):
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 48, 48)
    spreads = []
    for padding in ("reflect", "zeros"):
        config = LossNetworkConfig(network=network, weights="embedded" if network == "vgg19_slim" else "random", padding=padding)
        features = load_loss_network(config, [layer])(red)[layer]
        spreads.append(float((features - features[..., 5:6, 5:6]).abs().max() / features.abs().max()))
    assert spreads[0] < 1e-4 and spreads[1] > 0.05
