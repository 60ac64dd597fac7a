"""Adam's kernel for NVIDIA GPUs steps as torch's Adam does; where there is no GPU, Triton's interpreter runs it."""

import copy

import pytest
import torch
from test_optimizer import SMALL, copy_of, give_gradients
from torch import nn

from fastnst import optimizer as optimizers
from fastnst.network import TransformNetwork

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
from fastnst import fused_adam  # noqa: E402
from fastnst.fused_adam import FusedAdam  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where it is interpreted: conftest.py
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def by_kernel(monkeypatch):
    """How many steps the kernel has made: each in one launch."""
    made, kernel = [], fused_adam._step

    class Counted:
        def __getitem__(self, grid):
            made.append(grid)
            return kernel[grid]

    monkeypatch.setattr(fused_adam, "_step", Counted())
    return made


@pytest.fixture(params=LAYOUTS, ids=str)
def network(request) -> TransformNetwork:
    torch.manual_seed(0)
    return TransformNetwork(SMALL).to(DEVICE, memory_format=request.param)


def plain_adam(network: nn.Module) -> tuple[nn.Module, torch.optim.Adam]:
    """Torch's, step by step, over a copy of the network, in double precision."""
    plain = copy_of(network).to(DEVICE, torch.float64)
    return plain, torch.optim.Adam(plain.parameters(), foreach=False)


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range, missing: int | None = None) -> None:
    for step in steps:
        give_gradients(network, step)
        for parameter in network.parameters():
            parameter.grad = parameter.grad * 10.0 ** (step % 3 - 2)
        if missing is not None:
            list(network.parameters())[missing].grad = None
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        optimizer.step()


def lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """As torch's fused kernel takes for granted."""
    for parameter, state in optimizer.state.items():
        state.update({name: torch.empty_like(parameter).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")})


def assert_same(network: nn.Module, other: nn.Module) -> None:
    for one, another in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.double(), another.double(), rtol=1e-6, atol=3e-7 if DEVICE == "cuda" else 1e-7)  # of steps up to 6e-3, which a GPU rounds less often


def test_steps_are_those_of_torch(network, by_kernel):
    plain, published = plain_adam(network)
    optimizer = FusedAdam(list(network.parameters()))
    for one, its in ((network, optimizer), (plain, published)):
        descend(one, its, range(6))
    assert_same(network, plain)
    assert len(by_kernel) == 5  # behind the first, which makes the state
    for state, expected in zip(optimizer.state.values(), published.state.values(), strict=True):
        assert state["step"] == 6 and (state["step"].dtype, state["step"].device.type) == (torch.float32, DEVICE)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("numbers, begin", [(1, 0), (2048, 0), (4096, 0), (4096, 1), (5003, 0), (5003, 3), (0, 0)])
def test_shares_of_programs_and_tensors_that_begin_anywhere(numbers, begin, by_kernel):
    memory = torch.randn(numbers + begin, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    network = nn.ParameterList([nn.Parameter(torch.ones(7, device=DEVICE)), nn.Parameter(memory[begin:])])
    plain = copy.deepcopy(network).double()
    for one, its in ((network, FusedAdam(list(network))), (plain, torch.optim.Adam(plain, foreach=False))):
        descend(one, its, range(3))
    assert_same(network, plain)
    assert by_kernel == [(1 + -(-numbers // 2048),)] * 2


def test_a_table_is_made_anew_only_where_something_lies_elsewhere(network, by_kernel, monkeypatch):
    tables, rows = [], fused_adam._rows
    monkeypatch.setattr(fused_adam, "_rows", lambda *tensors: tables.append(rows(*tensors)) or tables[-1])
    plain, published = plain_adam(network)
    optimizer = FusedAdam(list(network.parameters()))
    for step in range(5):  # gradients stay where they are, as those of a recorded pass do
        for one, its in ((network, optimizer), (plain, published)):
            for index, parameter in enumerate(one.parameters()):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.fill_(step - index)
            its.step()
    assert len(tables) == 1
    held = [parameter.grad for parameter in network.parameters()]  # so that others do not lie there
    for one, its in ((network, optimizer), (plain, published)):
        descend(one, its, range(2))
    assert len(tables) > 1 and held
    assert_same(network, plain)


def test_gradients_in_another_order_of_memory_are_those_of_their_weights(network, by_kernel):
    plain, published = plain_adam(network)
    optimizer = FusedAdam(list(network.parameters()))
    for step in range(3):
        for one, its in ((network, optimizer), (plain, published)):
            give_gradients(one, step)
            for parameter in one.parameters():
                if parameter.ndim == 4:
                    other = LAYOUTS[parameter.is_contiguous()]
                    parameter.grad = parameter.grad.contiguous(memory_format=other)
            its.step()
    assert_same(network, plain)
    assert len(by_kernel) == 2


def test_parameters_without_a_gradient_are_left_and_their_steps_not_counted(network, by_kernel):
    plain, published = plain_adam(network)
    optimizer = FusedAdam(list(network.parameters()))
    for one, its in ((network, optimizer), (plain, published)):
        descend(one, its, range(3))
        descend(one, its, range(3, 5), missing=2)
        descend(one, its, range(5, 7))
    assert_same(network, plain)
    assert [int(state["step"]) for state in optimizer.state.values()] == [5 if index == 2 else 7 for index in range(len(optimizer.state))]
    assert len(by_kernel) == 2


def test_what_is_not_float32_is_stepped_by_torch(by_kernel):
    network = nn.Linear(3, 2).to(DEVICE, torch.float64)
    plain = copy.deepcopy(network)
    for one, its in ((network, FusedAdam(list(network.parameters()))), (plain, torch.optim.Adam(plain.parameters()))):
        descend(one, its, range(3))
    assert_same(network, plain)
    assert not by_kernel


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_torch_and_the_kernel_go_on_from_each_others_state(network, by_kernel, fused, layout):
    """Also where weights are laid out otherwise, as on a CPU."""
    plain, published = plain_adam(network)
    descend(plain, published, range(7))

    def made(name: str, network: nn.Module) -> torch.optim.Adam:
        if name == "kernel":
            return FusedAdam(list(network.parameters()))
        optimizer = torch.optim.Adam(network.parameters(), fused=fused)
        optimizer.register_load_state_dict_post_hook(lay_out_moments)
        return optimizer

    optimizer = made("torch", network)
    descend(network, optimizer, range(2))
    for name, steps in (("kernel", range(2, 4)), ("torch", range(4, 6)), ("kernel", range(6, 7))):
        state, network = copy.deepcopy(optimizer.state_dict()), copy_of(network).to(DEVICE, memory_format=layout)
        optimizer = made(name, network)
        optimizer.load_state_dict(state)
        descend(network, optimizer, steps)
    assert_same(network, plain)
    assert len(by_kernel) == 3
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}


def test_a_step_goes_on_from_a_state_loaded_into_the_same_optimizer(network, by_kernel):
    """As a rollback does; what is taken as a snapshot stays as it was."""
    optimizer = FusedAdam(list(network.parameters()))
    descend(network, optimizer, range(3))
    good = copy.deepcopy({"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    ends = []
    for _ in range(2):
        descend(network, optimizer, range(3, 6))
        ends.append([parameter.detach().clone() for parameter in network.parameters()])
        back = copy.deepcopy(good)
        network.load_state_dict(back["network"])
        optimizer.load_state_dict(back["optimizer"])
    assert all(torch.equal(one, other) for one, other in zip(*ends))
    assert {float(state["step"]) for state in good["optimizer"]["state"].values()} == {3.0}
    assert len(by_kernel) == 8


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_both_optimizers_use_it_where_triton_works(network, by_kernel, monkeypatch, name):
    plain = copy_of(network).to(DEVICE)
    for one, works in ((plain, False), (network, True)):
        monkeypatch.setattr(optimizers, "triton_works", lambda device: works)
        optimizer = optimizers.make_optimizer(name, one)
        for step in range(3):
            give_gradients(one, step)
            optimizer.step()
    assert len(by_kernel) == 2
    assert_same(network, plain)
