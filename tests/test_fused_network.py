"""A network as it is trained on an NVIDIA GPU is the network: its output and all of its gradients; where there is no GPU, Triton's interpreter runs it."""

import pytest
import torch
from test_fused_norm import DEVICE

from fastnst import fused_network, fused_weights
from fastnst.fused_network import Aside, can_fuse, fused_layers, weights_aside
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork

pytestmark = pytest.mark.usefixtures("whole_float32")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Triton's interpreter takes as long for a small program as for a large one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fused_weights, "_ROWS", 8192)


def made(**options) -> TransformNetwork:
    torch.manual_seed(0)
    network = TransformNetwork(NetworkConfig(**{"width": 4, "residual_blocks": 1} | options))
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def distances(network, output, images, pull) -> list[float]:
    """Of the gradients that ``network`` got from ``output`` to those of its layers in double precision, relatively."""
    wanted = made(**network.config.model_dump()).double()
    after = wanted.layers(images.double())
    torch.testing.assert_close(output.detach().cpu().double(), after.detach(), atol=1e-4, rtol=1e-4)
    after.backward(pull.double())
    pairs = [(each.grad.cpu().double(), other.grad) for each, other in zip(network.parameters(), wanted.parameters())]
    return [float((one - other).norm() / other.norm()) if other.norm() > 1e-6 else float(one.norm()) for one, other in pairs]


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "zeros"}, {"padding": "start"}, {"upsampling": "subpixel"}, {"upsampling": "transposed"}, {"upsampling": "bilinear"}, {"stem": "half"}, {"residual_blocks": 0}],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_layers(options):
    network = made(**options).to(DEVICE, memory_format=torch.channels_last)
    images = torch.rand(1, 3, 12, 16)
    output = fused_layers(network, images.to(DEVICE), torch.float32)
    pull = torch.randn(output.shape)
    output.backward(pull.to(DEVICE))
    assert max(distances(network, output, images, pull)) < 1e-4


def test_a_width_that_is_no_multiple_of_four_is_trained_on_too():
    network = made().to(DEVICE)
    images = torch.rand(1, 3, 18, 22)
    output = fused_layers(network, images.to(DEVICE), torch.float32)
    pull = torch.randn(output.shape)
    output.backward(pull.to(DEVICE))
    assert max(distances(network, output, images, pull)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"upsampling": "subpixel"}], ids=str)
def test_weights_gradients_computed_aside_are_the_same_and_add_up(options):
    network = made(**options).to(DEVICE, memory_format=torch.channels_last)
    images = torch.rand(1, 3, 12, 16)
    pull = torch.randn(1, 3, 12, 16)
    aside = Aside(torch.device(DEVICE))
    with weights_aside(network, aside):
        output = fused_layers(network, images.to(DEVICE), torch.float32)
        output.backward(0.25 * pull.to(DEVICE))
    with weights_aside(network, aside):
        fused_layers(network, images.to(DEVICE), torch.float32).backward(0.75 * pull.to(DEVICE))
    assert network.aside is None and not aside._held
    assert max(distances(network, output, images, pull)) < 1e-4


def test_what_is_held_for_weights_is_let_go_where_a_pass_fails(monkeypatch):
    network, aside = made().to(DEVICE), Aside(torch.device(DEVICE))
    monkeypatch.setattr(fused_network, "pull", lambda *given: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"), weights_aside(network, aside):
        output = fused_layers(network, torch.rand(1, 3, 16, 16, device=DEVICE), torch.float32)
        torch.autograd.grad(output.sum(), list(network.parameters()), allow_unused=True)
    assert network.aside is None and not aside._held


def test_networks_without_kernels_are_known():
    assert can_fuse(NetworkConfig()) and can_fuse(NetworkConfig(stem="half"))
    assert not can_fuse(NetworkConfig(norm="batch")) and not can_fuse(NetworkConfig(padding="replicate"))
