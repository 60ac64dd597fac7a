"""A network as it is trained on a CPU is the network: its output and all of its gradients."""

import pytest
import torch
from test_fused_network import distances, made

from fastnst import cpu_network, winograd
from fastnst.cpu_network import cpu_layers
from fastnst.network import plainly

pytestmark = pytest.mark.usefixtures("native_however_small")


@pytest.mark.parametrize("height, width", [(16, 20), (17, 22)])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"padding": "zeros"}, {"padding": "start"}, {"padding": "replicate"}, {"upsampling": "subpixel"}, {"upsampling": "transposed"},
        {"upsampling": "bilinear"}, {"stem": "half"}, {"residual_blocks": 0},
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_are_those_of_the_layers(options, height, width):
    network = made(**options)
    images = torch.rand(2, 3, height // network.config.multiple * network.config.multiple, width)
    output = cpu_layers(network.double(), images.double(), torch.float64)
    pull = torch.randn(output.shape)
    output.backward(pull.double())
    assert max(distances(network, output, images, pull)) < 1e-8


def test_it_is_taken_in_training_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_network, "cpu_layers", lambda *given: asked.append(given[2]) or cpu_layers(*given))
    network, images = made(), torch.rand(1, 3, 17, 23)
    with torch.no_grad():
        exact = network.eval()(images)
        with torch.autocast("cpu", torch.bfloat16):
            network(images)
        plainly(made().train())(images)
        made(norm="batch").train()(images)
        made().double().train()(images.double())
        assert not asked
        for dtype, distance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = network.train()(images)
            assert asked.pop() == dtype and found.dtype == torch.float32
            assert float((found - exact).abs().max()) < distance


def test_channels_that_suit_are_convolved_natively(monkeypatch):
    """Those of 3x3 kernels and 16 channels or more, there and back; all others by torch."""
    natively = []
    monkeypatch.setattr(winograd, "_convolve", lambda *given, real=winograd._convolve: natively.append(given[1].shape[1]) or real(*given))
    network, images = made(width=8), torch.rand(2, 3, 18, 20)
    output = cpu_layers(network, images, torch.float32)
    assert natively == [32, 32, 32, 16]  # a block's two, and those next to the upsamplings, which give 4 x 16 and 4 x 8
    pull = torch.randn(output.shape)
    output.backward(pull)
    assert natively[4:] == [32, 64, 32, 32]
    assert max(distances(network, output, images, pull)) < 1e-3  # a ReLU or two more or less


def test_a_norm_leaves_the_bias_before_it_without_gradient_but_not_without_one():
    network = made()
    cpu_layers(network, torch.rand(1, 3, 16, 16), torch.bfloat16).sum().backward()
    assert not network.layers[0].bias.grad.any()  # ranks wait for all of them
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in network.parameters())
