"""The gradient that a step follows is the same whether it is recorded and replayed or not, and nothing in it waits for a GPU."""

import pytest
import torch
from conftest import TOY_LOSS
from test_stages import staged
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnst import gradient as gradients
from fastnst import losses
from fastnst import network as networks
from fastnst.background import SideStream
from fastnst.gradient import Gradient
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.objective import Cut, Objective
from fastnst.optimizer import make_optimizer
from fastnst.torch_engine import TorchEngine

LOSS = LossConfig(**TOY_LOSS, tv_weight=1e-3, grid_weight=10.0, spectrum_weight=0.1, stability_weight=10.0)


class Replayed:
    """Stands for ``Recording`` where there is no GPU: its inputs and outputs lie where they lay, and only numbers change."""

    made = 0

    def __init__(self, compute, *inputs, beside=None) -> None:
        Replayed.made += 1
        self._compute, self._inputs = compute, [given.clone() for given in inputs]
        for _ in range(4):  # warming up, recording
            self._outputs = compute(*self._inputs)

    def __call__(self, *inputs):
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        for held, found in zip(self._outputs, self._compute(*self._inputs), strict=True):
            held.copy_(found)
        return self._outputs


@pytest.fixture
def recorded(monkeypatch):
    """As on a GPU."""
    Replayed.made = 0
    monkeypatch.setattr(gradients, "Recording", Replayed)
    monkeypatch.setattr(gradients, "can_record", lambda device: True)
    return Replayed


def objective(device: str = "cpu", **network) -> Objective:
    torch.manual_seed(0)
    loss = PerceptualLoss(load_loss_network(LOSS, LOSS.layers).to(device), LOSS, torch.rand(1, 3, 32, 32).to(device))
    return Objective(TransformNetwork(NetworkConfig(**{"width": 4, "residual_blocks": 1} | network)).to(device), loss, torch.float32)


def photos(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))


def cut(step: int) -> Cut | None:
    return None if step % 2 else Cut(torch.tensor(step), torch.tensor(8 - step), 24, 2)


def learn(gradient: Gradient, steps: int = 6, optimizer: str = "adam") -> list[dict[str, float]]:
    """What is logged of some steps, each at another place of the photo, every second without a cut."""
    logged, descent = [], make_optimizer(optimizer, gradient.objective.network)
    for step in range(steps):
        logged.append(gradient(photos(step), cut(step)))
        for group in descent.param_groups:
            group["lr"] = 1e-3
        descent.step()
    return [dict(zip(names, numbers.tolist())) for names, numbers in logged]  # read at the end, as a training logs them


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_recorded_steps_are_the_eager_ones(recorded, options, optimizer):
    eager, replayed = Gradient(objective(), 4, record=False, **options), Gradient(objective(), 4, **options)
    assert learn(eager, optimizer=optimizer) == learn(replayed, optimizer=optimizer)
    assert recorded.made == 2  # with a cut and without
    pairs = zip(eager.objective.network.parameters(), replayed.objective.network.parameters())
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_norm_is_of_the_gradient_before_it_is_clipped():
    found = {}
    for clip in (None, 0.1):
        gradient = Gradient(objective(), 4, clip=clip)
        names, numbers = gradient(photos(0))
        found[clip] = float(numbers[names.index("train/gradient_norm")])
        left = torch.cat([parameter.grad.flatten() for parameter in gradient.objective.network.parameters()]).norm()
        assert float(left) == pytest.approx(clip or found[None], rel=1e-4)
    assert found[0.1] == found[None] > 0.1


def test_another_size_is_recorded_anew(recorded):
    gradient = Gradient(objective(), 4)
    for count in (4, 2, 4, 2):
        found, wanted = (each(photos(0)[:count])[1] for each in (gradient, Gradient(objective(), 4, record=False)))
        assert torch.equal(found, wanted)
    assert recorded.made == 2


def test_batch_norm_and_eigenvalues_are_not_recorded(recorded):
    eigenvalues = objective()
    eigenvalues.loss.config = LOSS.model_copy(update={"statistics": "mean_covariance", "style_layers": {}})
    for one in (objective(norm="batch"), eigenvalues):
        learn(Gradient(one, 4), steps=1)
    assert recorded.made == 0


def test_what_was_recorded_can_be_forgotten_and_is_recorded_anew(recorded):
    gradient = Gradient(objective(), 4)
    before = gradient(photos(0))[1]
    gradient.forget()
    assert all(parameter.grad is None for parameter in gradient.objective.network.parameters())
    assert torch.equal(gradient(photos(0))[1], before) and recorded.made == 2


@pytest.mark.parametrize("error, why", [("operation not permitted\nwhen stream is capturing", "operation not permitted when stream is capturing"), ("CUDA out of memory", "no memory for it")])
def test_where_recording_fails_it_goes_on_without(recorded, monkeypatch, error, why):
    def fail(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(gradients, "Recording", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)  # as torch before 2.13 does after it
    told: list[str] = []
    assert learn(Gradient(objective(), 4, say=told.append)) == learn(Gradient(objective(), 4, record=False))
    assert told == [f"a CUDA graph failed, going on slower without ({why})"]


@pytest.mark.parametrize("distance", ["mse", "rmse"])
def test_no_stream_is_waited_for_that_had_no_part(monkeypatch, distance):
    """What is recorded may not: the recording would fail."""
    seen: list[tuple[str, int]] = []

    class Seen(SideStream):
        def beside(self):
            seen.append(("beside", id(self)))
            return super().beside()

        def wait(self):
            seen.append(("wait", id(self)))

    monkeypatch.setattr("fastnst.objective.SideStream", Seen)
    one = objective()
    one.loss.config = LOSS.model_copy(update={"distance": distance})
    seen.clear()
    Gradient(one, 4)(photos(0), cut(0))
    waited = [index for index, (what, _) in enumerate(seen) if what == "wait"]
    assert len({seen[index][1] for index in waited}) == 2
    assert all(("beside", seen[index][1]) in seen[:index] for index in waited)


def test_a_first_step_that_took_long_says_why(recorded, monkeypatch):
    told: list[str] = []
    gradient, clock = Gradient(objective(), 4, say=told.append), iter([0.0, 17.4, 20.0, 22.0])
    monkeypatch.setattr(gradients.time, "monotonic", lambda: next(clock))
    for step in range(4):  # with a cut and without, each recorded once
        gradient(photos(step), cut(step))
    assert told == ["the first step of its kind took 17 s, in which kernels were compiled for this GPU; they are kept for the next training"]


def move_to_pretended_gpu(module: torch.nn.Module) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(there, tensor.requires_grad) if tensors is part._parameters else there


@pytest.mark.parametrize("changes", [{}, {"tv_power": 1, "gram": "hw"}, {"distance": "rmse", "gram": "none"}], ids=str)
def test_the_objective_stays_on_the_gpu_and_does_not_wait_for_it(changes, monkeypatch):
    """With tensors that have a device and no numbers: asking for one, or adding what lies elsewhere, is an error."""
    for module in (networks, losses):
        monkeypatch.setattr(module, "triton_works", lambda device: False)
    config = LOSS.model_copy(update=changes)
    loss_network, network = load_loss_network(config, config.layers), TransformNetwork(NetworkConfig(width=4, residual_blocks=1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_pretended_gpu(loss_network)
        move_to_pretended_gpu(network)
        loss = PerceptualLoss(loss_network, config, torch.empty(1, 3, 32, 32, device="cuda"))
        terms, stylized = Objective(network, loss, torch.float32)(photos(0), cut(0))
    assert stylized.device.type == "cuda"
    assert {number.device.type for number in terms.scalars().values()} == {"cuda"}


@pytest.mark.parametrize("pixels, shape", [("uint8", (2, 37, 50, 3)), ("float", (1, 3, 37, 50))])
@pytest.mark.parametrize("architecture", [{}, {"padding": "start"}, {"stem": "half", "output": "sigmoid"}, {"upsampling": "subpixel", "norm": "batch"}], ids=str)
def test_a_pass_stays_on_the_gpu_and_does_not_wait_for_it(architecture, pixels, shape):
    engine = TorchEngine(staged(**architecture)[1], "cpu", "float32")
    engine._device, engine._dtype, engine._layout = torch.device("cuda"), torch.float16, torch.channels_last
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = engine.compute(torch.empty(shape, dtype=torch.uint8 if pixels == "uint8" else torch.float32, device="cuda"), pixels)
    assert (found.device.type, tuple(found.shape)) == ("cuda", shape)
