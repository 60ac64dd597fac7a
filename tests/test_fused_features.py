"""The loss network as an NVIDIA GPU computes it is the loss network, there and back; where there is no GPU, Triton's interpreter runs it."""

import copy
import gc
import weakref

import pytest
import torch
from test_fused_norm import DEVICE

from fastnst.fused_features import _kept, can_fuse, fused_features
from fastnst.loss_network import LossNetwork

pytestmark = pytest.mark.usefixtures("whole_float32")


def made(name: str, layers: list[str], **options) -> LossNetwork:
    torch.manual_seed(0)
    network = LossNetwork(name, layers, **options)
    for parameter in network.parameters():
        if parameter.ndim == 1:  # biases, which start at 0
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("size", [(16, 20), (17, 19)], ids=str)  # by places of four pixels, and not; sides that pooling cuts
@pytest.mark.parametrize(
    "name, layers, padding",
    [("vgg16", ["relu1_2", "relu2_2", "relu3_1"], "zeros"), ("vgg19_slim", ["relu1_2", "relu2_1", "relu3_1"], "reflect"), ("vgg16", ["conv1_1", "relu1_1", "conv2_1"], "reflect")],
)
def test_features_and_gradients_are_those_of_the_layers(name, layers, padding, size):
    network, images = made(name, layers, padding=padding), torch.rand(2, 3, *size)
    assert can_fuse(network)

    def gradient(compute, images):
        features = compute(images.requires_grad_())
        return features, torch.autograd.grad(list(features.values()), images, [pulls[layer].to(features[layer]) for layer in features])[0]

    pulls = {layer: torch.randn_like(feature) for layer, feature in network(images).items()}
    wanted, pull = gradient(made(name, layers, padding=padding).double(), images.double())
    network.to(DEVICE)
    given: list[str] = []
    wanted_here = {layer: network._index[layer] for layer in layers}
    found, own = gradient(lambda images: fused_features(network, images, wanted_here, torch.float32, lambda layer, features: given.append(layer)), images.to(DEVICE))
    assert given == layers
    for layer in layers:
        torch.testing.assert_close(found[layer].detach().cpu().double(), wanted[layer].detach(), atol=1e-4, rtol=1e-4)
    assert (own.cpu().double() - pull).norm() < (1e-4 if DEVICE == "cpu" else 2e-4) * pull.norm()  # 1.4e-4 on an H200, in one of eight


def test_weights_written_to_are_laid_out_anew():
    network, images = made("vgg16", ["relu1_1"]).to(DEVICE), torch.rand(1, 3, 16, 16, device=DEVICE)
    wanted = {"relu1_1": network._index["relu1_1"]}
    before = fused_features(network, images, wanted, torch.float32)["relu1_1"]
    with torch.no_grad():
        network.features[0].weight.mul_(2)
        network.features[0].bias.mul_(2)
    torch.testing.assert_close(fused_features(network, images, wanted, torch.float32)["relu1_1"], 2 * before)
    with torch.no_grad():
        network.features[0].bias.add_(1)
    assert (fused_features(network, images, wanted, torch.float32)["relu1_1"] > 2 * before).any()


def test_what_is_laid_out_goes_with_the_network():
    network, images = made("vgg16", ["relu1_1"]).to(DEVICE), torch.rand(1, 3, 16, 16, device=DEVICE)
    fused_features(network, images, {"relu1_1": network._index["relu1_1"]}, torch.float32)
    assert list(_kept[network]) == ["first"] and copy.deepcopy(network) not in _kept
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_networks_without_kernels_are_known():
    assert not can_fuse(made("squeezenet1_0", ["relu1"])) and not can_fuse(made("vgg16", ["relu2_1"], pooling="average"))
    trained = made("vgg16", ["relu1_1"])
    trained.requires_grad_(True)
    assert not can_fuse(trained)
