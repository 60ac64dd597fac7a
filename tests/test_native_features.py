"""ReLU and pooling of a loss network on a CPU, through native_features.c: torch's, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from fastnst import loss_network
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig
from fastnst.native_features import Rectified, can_rectify
from fastnst.network import plainly

LAST = torch.channels_last
SHAPES = [(2, 16, 12, 10), (1, 7, 9, 11), (3, 64, 2, 2), (1, 33, 2, 5)]


def rounded(shape, dtype):
    """Of few different numbers: many of four are alike, many 0."""
    torch.manual_seed(0)
    return torch.randn(shape).mul(2).round().to(dtype).contiguous(memory_format=LAST).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["once", "to be followed by another gradient"])
def test_it_is_torchs_there_and_back(shape, dtype, again):
    x = rounded(shape, dtype)
    found, leaf = Rectified.apply(x, True), x.detach().clone().requires_grad_()
    out = F.relu(leaf)
    wanted = out, F.max_pool2d(out, 2)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    for which in ([0], [1], [0, 1]):
        pulls = [torch.randn(wanted[one].shape).to(dtype) for one in which]
        gradient, expected = (
            torch.autograd.grad([each[one] for one in which], start, pulls, retain_graph=True, create_graph=again)[0] for each, start in ((found, x), (wanted, leaf))
        )
        assert torch.equal(gradient, expected)


def test_alone_it_is_the_relu():
    x = rounded((2, 12, 5, 1), torch.float32)
    out, pooled = Rectified.apply(x, False)
    assert pooled is None and torch.equal(out, F.relu(x))
    out.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def test_what_is_no_number_is_not_hidden():
    x = torch.full((1, 8, 4, 4), -1.0).contiguous(memory_format=LAST)
    for row, column in ((0, 0), (1, 3), (2, 0), (3, 3)):  # each of four places
        x[0, :, row, column] = torch.nan
    x.requires_grad_()
    out, pooled = Rectified.apply(x, True)
    assert pooled.isnan().all() and out.isnan().sum() == 4 * 8
    pooled.sum().backward()
    assert torch.equal(x.grad, out.isnan().float())


def test_code_for_each_cpu_gives_the_same(monkeypatch, library):
    monkeypatch.setattr("fastnst.native_features.native_library", lambda: library)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            test_it_is_torchs_there_and_back(shape, dtype, False)


def loss_networks(**options):
    """As it is, and in torch's own steps."""
    layers = ["fire2", "fire4"] if options.get("network") == "squeezenet1_1" else ["relu1_1", "relu3_1"]
    config = LossConfig(**{"network": "vgg16", "weights": "random", "content_layers": dict.fromkeys(layers, 1.0), "style_layers": {}} | options)
    return load_loss_network(config, layers), plainly(load_loss_network(config, layers))


@pytest.fixture
def taken(monkeypatch):
    """For each ReLU whether it was of ours."""
    asked = []
    monkeypatch.setattr(loss_network, "can_rectify", lambda x: asked.append(can_rectify(x)) or asked[-1])
    return asked


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"pooling": "average"}, {"network": "squeezenet1_1"}], ids=str)
def test_a_loss_network_gives_what_it_gives_in_torchs_steps(taken, precision, options):
    torch.manual_seed(0)
    images, gradients = torch.rand(2, 3, 40, 36), []
    for one in loss_networks(**options):
        leaf = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found = one(leaf)
        sum(each.float().square().mean() for each in found.values()).backward()
        gradients.append((leaf.grad, *found.values()))
    # Of SqueezeNet's the first lies not within a fire, and has channels last in bfloat16 alone: in float32 it would be slower so.
    assert taken == ([precision == "bfloat16"] if options.get("network") else [True] * 5)
    distances = [float(((one - other).norm() / other.norm()).detach()) for one, other in zip(*gradients)]
    assert distances[0] < {"float32": 0.01, "bfloat16": 0.2}[precision]  # a ReLU or a pooling may go the other way
    assert max(distances[1:]) < {"float32": 1e-4, "bfloat16": 0.03}[precision]


def test_hooks_are_called_where_there_are_some(taken):
    network, _ = loss_networks()
    images, called = torch.rand(1, 3, 32, 32), []
    expected = network(images)["relu3_1"]
    assert taken == [True] * 5
    handle = network.features[3].register_forward_hook(lambda module, given, result: called.append(type(module)))
    torch.testing.assert_close(network(images)["relu3_1"], expected, atol=1e-3, rtol=1e-3)
    assert called == [torch.nn.ReLU] and len(taken) == 5
    handle.remove()
    network(images)
    assert taken == [True] * 10


def test_tensors_without_numbers_are_left_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    network, _ = loss_networks(network="squeezenet1_1")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.rand(1, 3, 64, 64))["fire2"].shape[0] == 1
        assert not can_rectify(torch.rand(1, 8, 4, 4).contiguous(memory_format=LAST))
