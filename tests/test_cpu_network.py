"""A network as it is trained on a CPU in bfloat16 is the network: its output and all of its gradients."""

import pytest
import torch
from test_fused_network import distances, made

from fastnst import cpu_network
from fastnst.cpu_network import cpu_layers
from fastnst.network import plainly


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
    output = cpu_layers(network, images, torch.float32)
    pull = torch.randn(output.shape)
    output.backward(pull)
    assert max(distances(network, output, images, pull)) < 1e-4


def test_bfloat16_goes_this_way_in_training_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_network, "cpu_layers", lambda *given: asked.append(given[2]) or cpu_layers(*given))
    network, images = made(), torch.rand(1, 3, 17, 23)
    with torch.autocast("cpu", torch.bfloat16):
        fast = network.train()(images)
        assert asked == [torch.bfloat16] and fast.shape == images.shape and fast.dtype == torch.float32
        network.eval()(images)
        plainly(network.train())(images)
    made().train()(images)
    with torch.autocast("cpu", torch.bfloat16):
        made(norm="batch").train()(images)
    assert len(asked) == 1
    assert float((fast - made()(images)).detach().abs().max()) < 0.02


def test_a_norm_leaves_the_bias_before_it_without_gradient_but_not_without_one():
    network = made()
    cpu_layers(network, torch.rand(1, 3, 16, 16), torch.bfloat16).sum().backward()
    assert not network.layers[0].bias.grad.any()  # ranks wait for all of them
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in network.parameters())
