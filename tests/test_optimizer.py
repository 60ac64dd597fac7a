"""Steps of the optimizers, against arithmetic and against torch's own."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.optimizer import Muon, adam, make_optimizer, orthogonalized

SMALL = NetworkConfig(width=4, residual_blocks=1)


def copy_of(network: TransformNetwork) -> TransformNetwork:
    other = TransformNetwork(network.config)
    other.load_state_dict(network.state_dict())
    return other


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))  # laid out as autograd does


def test_adam_in_one_kernel_steps_as_plain_adam_does():
    network = TransformNetwork(SMALL)
    plain = copy_of(network)
    for one, optimizer in ((network, adam(list(network.parameters()))), (plain, torch.optim.Adam(plain.parameters()))):
        for step in range(3):
            give_gradients(one, step)
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(network.parameters(), plain.parameters()))


@pytest.mark.parametrize("fused", [True, False])
def test_adam_and_torchs_go_on_from_each_others_state(fused):
    network = TransformNetwork(SMALL)
    plain = copy_of(network)
    ours, theirs = adam(list(network.parameters())), torch.optim.Adam(plain.parameters(), fused=fused)
    for step in range(2):
        for one, optimizer in ((network, ours), (plain, theirs)):
            give_gradients(one, step)
            optimizer.step()
    swapped = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    assert swapped[0]["param_groups"][0].keys() == swapped[1]["param_groups"][0].keys()
    for one, optimizer, state in ((network, ours, swapped[1]), (plain, theirs, swapped[0])):
        optimizer.load_state_dict(state)
        give_gradients(one, 2)
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(network.parameters(), plain.parameters()))
    assert {float(its["step"]) for its in ours.state.values()} == {3.0}


def test_a_state_is_copied_and_one_that_does_not_fit_is_refused():
    network = nn.Linear(3, 2)
    optimizer = adam(list(network.parameters()))
    give_gradients(network, 0)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(kept)
    optimizer.step()
    assert kept["state"][0]["step"] == 1 and optimizer.state[network.weight]["step"] == 2
    with pytest.raises(ValueError, match="of 2 parameters, need that of 1"):
        adam([network.weight]).load_state_dict(kept)
    with pytest.raises(ValueError, match="an Adam with weight_decay"):
        optimizer.load_state_dict({**kept, "param_groups": [kept["param_groups"][0] | {"weight_decay": 0.1}]})
    for index in (7, -1):
        with pytest.raises(ValueError, match=f"of a parameter {index}, need 0 to 1"):
            optimizer.load_state_dict({**kept, "state": kept["state"] | {index: kept["state"][0]}})
    with pytest.raises(ValueError, match=r"moments of \(1,\) for a parameter of \(2,\)"):
        optimizer.load_state_dict({**kept, "state": {0: kept["state"][0], 1: kept["state"][1] | {"exp_avg": torch.ones(1)}}})
    assert optimizer.state[network.weight]["step"] == 2


def test_a_state_of_muon_that_does_not_fit_changes_nothing():
    network = TransformNetwork(SMALL)
    optimizer = Muon(network)
    give_gradients(network, 0)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    for spoil in (lambda momenta: momenta.pop(1), lambda momenta: momenta[1].update(momentum_buffer=torch.ones(1, 1, 1, 1))):
        bad = copy.deepcopy(kept)
        bad["adam"]["state"][0]["exp_avg"] += 7
        bad["muon"]["state"][0]["momentum_buffer"] += 7
        spoil(bad["muon"]["state"])
        with pytest.raises((KeyError, ValueError)):
            optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        assert torch.equal(now["adam"]["state"][0]["exp_avg"], kept["adam"]["state"][0]["exp_avg"])
        assert torch.equal(now["muon"]["state"][0]["momentum_buffer"], kept["muon"]["state"][0]["momentum_buffer"])


def test_a_training_does_not_import_torchs_compiler():
    """Which takes seconds."""
    program = """
import sys, torch
from fastnst.optimizer import make_optimizer
from fastnst.network import TransformNetwork
from fastnst.model import NetworkConfig
import fastnst.train
for name in ("adam", "muon"):
    network = TransformNetwork(NetworkConfig(width=4, residual_blocks=1))
    optimizer = make_optimizer(name, network)
    network(torch.rand(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_muon_moves_kernels_along_the_nearest_orthogonal_matrix():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1))
    optimizer = Muon(network)
    before = network[0].weight.detach().clone()
    give_gradients(network, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    step = (network[0].weight.detach() - before)[:, :, 0, 0]
    # A 3x2 gradient U S V^T makes a step of -0.01 x 0.2 sqrt(3) x U S' V^T, where S' is between 0.68 and 1.21, not 1 exactly.
    u, _, v = torch.linalg.svd(network[0].weight.grad[:, :, 0, 0], full_matrices=False)
    along = -(u.T @ step @ v.T) / (0.01 * 0.2 * 3**0.5)
    assert along.diagonal().min() > 0.6 and along.diagonal().max() < 1.25
    assert (along - along.diagonal().diag()).abs().max() < 1e-4


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """As Jordan et al. write it down, in double precision."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("rows, columns, smallest", [(32, 243, 1.0), (32, 243, 1e-3), (64, 64, 1e-6)])
def test_orthogonalized_is_the_published_iteration(rows, columns, smallest):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, rows, generator=generator))[0] for side in (rows, columns))
    matrix = u * torch.logspace(0, math.log10(smallest), rows) @ v.T
    found, published = orthogonalized(matrix[None])[0], newton_schulz(matrix)
    assert float((found - published).norm() / published.norm()) < 1e-3  # in bfloat16 0.1
    assert float(torch.linalg.svdvals(found)[0]) < 1.21
    assert float(torch.linalg.svdvals(found)[-1]) > (0.68 if smallest == 1 else 0)


def test_orthogonalized_of_matrices_filled_up_with_zeros_is_of_each_alone():
    small, large = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    both = orthogonalized(torch.stack([nn.functional.pad(small, (0, 10, 0, 3)), large]))
    assert torch.allclose(both[0, :5, :20], orthogonalized(small[None])[0], atol=1e-5)
    assert torch.allclose(both[1], orthogonalized(large[None])[0], atol=1e-5)
    assert not both[0, 5:].any() and not both[0, :, 20:].any()
    assert not orthogonalized(torch.zeros(1, 3, 4)).any()  # a gradient of zeros


def test_muon_steps_as_torch_s_own_does():
    network = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 3, 1), nn.Conv2d(3, 3, 3))  # 8x75, 16x72, 3x16
    other = copy.deepcopy(network)
    matrices = [nn.Parameter(layer.weight.detach().flatten(1).clone()) for layer in other[:3]]
    optimizer, published = Muon(network), torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizer.param_groups[0]["lr"] = 0.02
    for step in range(3):
        give_gradients(network, step)
        for matrix, layer in zip(matrices, network):
            matrix.grad = layer.weight.grad.flatten(1).clone()
        optimizer.step()
        published.step()
    for matrix, layer, before in zip(matrices, network, other):
        moved, expected = layer.weight.detach().flatten(1) - before.weight.detach().flatten(1), matrix.detach() - before.weight.detach().flatten(1)
        assert float((moved - expected).norm() / expected.norm()) < 0.02  # torch's is in bfloat16


def test_muon_leaves_the_last_convolution_norms_and_biases_to_adam():
    network = TransformNetwork(SMALL)
    by_adam = copy_of(network)
    for one, optimizer in ((network, Muon(network)), (by_adam, adam(list(by_adam.parameters())))):
        give_gradients(one, 0)
        optimizer.step()
    same = {name: torch.equal(a, dict(by_adam.named_parameters())[name]) for name, a in network.named_parameters()}
    last = max(int(name.split(".")[1]) for name in same)
    kernels = {name for name, parameter in network.named_parameters() if parameter.ndim == 4}
    assert {name for name, equal in same.items() if not equal} == kernels - {f"layers.{last}.weight"}


@pytest.mark.parametrize("name", ["adam", "muon"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resumed_is_uninterrupted_in_every_layout(name, layout):
    network = TransformNetwork(SMALL)
    interrupted = copy_of(network)
    plain = copy_of(network)
    network.to(memory_format=layout)
    optimizer = make_optimizer(name, network)
    for step in range(4):
        give_gradients(network, step)
        optimizer.step()
    state: dict = {}
    for start in (0, 2):  # a new optimizer after two steps, with the state of the first
        resumed = make_optimizer(name, interrupted.to(memory_format=layout))
        if start:
            resumed.load_state_dict(state)
        for step in range(start, start + 2):
            give_gradients(interrupted, step)
            resumed.step()
        state = resumed.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), interrupted.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters()))


@pytest.mark.parametrize("name", ["adam", "muon"])
@pytest.mark.parametrize("layouts", [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_run_goes_on_where_weights_are_laid_out_otherwise(name, layouts):
    """As one begun on a GPU does on a CPU: each moment stays with its weight."""
    began = TransformNetwork(SMALL).to(memory_format=layouts[0])
    optimizer = make_optimizer(name, began)
    for step in range(3):
        give_gradients(began, step)
        optimizer.step()
    ended = copy_of(began).to(memory_format=layouts[1])
    elsewhere = make_optimizer(name, ended)
    state = copy.deepcopy(optimizer.state_dict())
    elsewhere.load_state_dict(state)
    for network, its in ((began, optimizer), (ended, elsewhere)):
        give_gradients(network, 3)
        its.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(began.parameters(), ended.parameters()))


def test_muon_and_adam_do_not_take_each_others_state():
    network = TransformNetwork(SMALL)
    with pytest.raises(KeyError):
        Muon(network).load_state_dict(adam(list(network.parameters())).state_dict())
    with pytest.raises(KeyError):
        adam(list(network.parameters())).load_state_dict(Muon(network).state_dict())
