"""The objective of a batch is that of the loss by hand, compiled or not."""

import functools

import pytest
import torch
from conftest import TOY_LOSS

from fastnst import winograd
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork, plainly
from fastnst.objective import Cut, Objective

PHOTOS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def parts() -> tuple[TransformNetwork, PerceptualLoss]:
    torch.manual_seed(0)
    config = LossConfig(**TOY_LOSS)
    loss_network = load_loss_network(config, config.layers)
    return TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), PerceptualLoss(loss_network, config, torch.rand(1, 3, 32, 32))


def test_the_terms_are_those_of_the_loss_by_hand(parts):
    network, loss = parts
    content = PHOTOS / 255
    wanted = loss(network(content), loss.content_targets(content)).scalars()
    found = Objective(network, loss, torch.float32)(PHOTOS)[0].scalars()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_bfloat16_is_near_float32(parts):
    wanted, found = (float(Objective(*parts, precision)(PHOTOS)[0].total.detach()) for precision in (torch.float32, torch.bfloat16))
    assert found != wanted and found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_eager_agree_in_value_and_gradient(parts, monkeypatch, precision):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plainly(parts[0])  # as compilers see them
    plainly(parts[1].loss_network)
    gradients = []
    for compile in ("off", "on"):
        total = Objective(*parts, precision, compile)(PHOTOS)[0].total
        gradients.append([total.detach(), *torch.autograd.grad(total, list(parts[0].parameters()))])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize("setting, compiled", [("auto", False), ("off", False), ("on", True)])
def test_only_what_was_asked_for_is_compiled(parts, monkeypatch, setting, compiled):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or function)
    Objective(*parts, torch.float32, setting)(PHOTOS)
    assert bool(asked) == compiled


@pytest.mark.parametrize("cut", [None, Cut(torch.tensor(3), torch.tensor(1), 24)], ids=["whole", "with a cut"])
@pytest.mark.parametrize("precision, natively, bound", [(torch.float32, False, 1e-4), (torch.float32, True, 0.005), (torch.bfloat16, True, 0.05)], ids=str)
def test_a_photo_of_one_color_gives_no_gradient(monkeypatch, parts, precision, natively, bound, cut):
    """All of its deviations are 0, which each norm would divide by the root of its epsilon, there and back. The other photo's gradient is what it is alone, in a mean of two."""
    network, loss = parts
    if not natively:
        monkeypatch.setattr(winograd, "_suit", lambda *_: False)
    loss.config = loss.config.model_copy(update={"stability_weight": 10.0})
    flat = torch.stack([torch.full_like(PHOTOS[1], 255), PHOTOS[1]])
    gradients = []
    for photos in (flat, PHOTOS[1:]):
        total = Objective(network, loss, precision)(photos, cut)[0].total
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(total, list(network.parameters()))]))
    assert torch.isfinite(gradients[0]).all() and gradients[1].norm() > 0
    # natively 1e-6 lies between the pictures of two photos and those of one, by which a ReLU or a pooling or two of 32x32 pixels decide otherwise
    assert (gradients[0] - gradients[1] / 2).norm() < bound * gradients[1].norm()


def cut_at(top: int, left: int, share: float = 1.0) -> Cut:
    return Cut(torch.tensor(top), torch.tensor(left), 24, share)


def stability(network, loss, photos, cut) -> float:
    loss.config = loss.config.model_copy(update={"stability_weight": 10.0})
    with torch.no_grad():
        return float(Objective(network, loss, torch.float32)(photos, cut)[0].stability)


def test_stability_is_the_change_of_the_picture_where_the_photo_is_cut(parts):
    network, loss = parts
    stylized, cut = network(PHOTOS / 255), network(PHOTOS[:, :, 3:27, 1:25] / 255)
    wanted = 10 * 4 * (cut - stylized[:, :, 3:27, 1:25]).square().mean()
    assert stability(network, loss, PHOTOS, cut_at(3, 1, share=4)) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert wanted.detach() > 0


def test_a_network_that_sees_single_pixels_alone_is_stable(parts):
    class Darker(torch.nn.Module):
        def forward(self, images):
            return images * 0.7

    assert stability(Darker(), parts[1], PHOTOS, cut_at(3, 1)) == 0


def test_without_a_cut_there_is_no_stability_term(parts):
    assert stability(*parts, PHOTOS, None) == 0


def test_cuts_at_any_place_are_compiled_once(parts, monkeypatch):
    graphs = []
    compile = functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", compile)
    network, loss = parts
    loss.config = loss.config.model_copy(update={"stability_weight": 10.0})
    compiled, plain = (Objective(network, loss, torch.float32, how) for how in ("on", "off"))
    for cut in (cut_at(0, 3), None, cut_at(5, 1), cut_at(2, 8), None, cut_at(8, 0)):
        assert torch.allclose(compiled(PHOTOS, cut)[0].total, plain(PHOTOS, cut)[0].total, rtol=1e-4)
    assert len(graphs) == 2  # a cut, and none
