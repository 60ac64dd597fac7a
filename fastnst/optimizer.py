"""What turns gradients into steps: Adam, as every published recipe has it, or Muon."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adam", "muon"]


def make_optimizer(name: OptimizerName, network: nn.Module) -> "torch.optim.Optimizer | Muon":
    """Over the weights of ``network``; its learning rate is for the caller to set before each step."""
    return adam(list(network.parameters())) if name == "adam" else Muon(network)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
    """Adam over ``parameters``, all in one kernel where the device has it."""
    return torch.optim.Adam(parameters, fused=parameters[0].device.type in ("cpu", "cuda"))


class Muon:
    """Muon (Jordan et al. 2024) for the kernels of all convolutions but the last, Adam for the rest; used as a torch optimizer is.

    A kernel's momentum is made orthogonal as a matrix of its first dimension by all others, so that every direction of it moves as far
    as the strongest, and is scaled to the length of Adam's steps (Liu et al. 2025): one learning rate serves both.
    """

    def __init__(self, network: nn.Module) -> None:
        self._kernels = [parameter for parameter in network.parameters() if parameter.ndim == 4][:-1]
        if not self._kernels:
            raise ValueError("train.optimizer: muon needs a network of two convolutions or more; use adam")
        taken = set(map(id, self._kernels))
        self._matrices = [nn.Parameter(_as_matrix(kernel.detach())) for kernel in self._kernels]  # the same memory
        muon = torch.optim.Muon(self._matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._optimizers = {"muon": muon, "adam": adam([parameter for parameter in network.parameters() if id(parameter) not in taken])}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for kernel, matrix in zip(self._kernels, self._matrices):
            matrix.grad = _as_matrix(kernel.grad, like=kernel)
        for optimizer in self._optimizers.values():
            optimizer.step()
        for matrix in self._matrices:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``KeyError`` or ``ValueError`` where it is another optimizer's."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def _as_matrix(kernel: Tensor, like: Tensor | None = None) -> Tensor:
    """``(O, I, k, k)`` -> ``(O, I k k)`` in the order of memory of ``like`` (itself): a view of it, where it is laid out so."""
    like = kernel if like is None else like
    if not like.is_contiguous():  # channels-last
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(kernel.shape[0], -1)
