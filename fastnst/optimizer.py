"""What turns gradients into steps: Adam, as every published recipe has it, or Muon."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnst.adam import Adam
from fastnst.fused import triton_works

OptimizerName = Literal["adam", "muon"]

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def make_optimizer(name: OptimizerName, network: nn.Module) -> "Adam | torch.optim.Adam | Muon":
    """Over the weights of ``network``; its learning rate is for the caller to set before each step."""
    return adam(list(network.parameters())) if name == "adam" else Muon(network)


def adam(parameters: list[nn.Parameter]) -> Adam | torch.optim.Adam:
    """Adam over ``parameters``, all in one kernel where the device has it."""
    device = parameters[0].device
    if triton_works(device):
        from fastnst.fused_adam import FusedAdam

        return FusedAdam(parameters)
    return Adam(parameters) if device.type in ("cpu", "cuda") else torch.optim.Adam(parameters)


class Muon:
    """Muon (Jordan et al. 2024) for the kernels of all convolutions but the last, Adam for the rest; used as a torch optimizer is.

    A kernel's momentum is made orthogonal as a matrix of its first dimension by all others, so that every direction of it moves as far
    as the strongest, and is scaled to the length of Adam's steps (Liu et al. 2025): one learning rate serves both. All kernels go
    through it in one batch, filled up with zeros, which change nothing: one by one, a GPU waits longer for their launches than it takes for the rest of a step.
    """

    def __init__(self, network: nn.Module) -> None:
        self._kernels = [parameter for parameter in network.parameters() if parameter.ndim == 4][:-1]
        if not self._kernels:
            raise ValueError("train.optimizer: muon needs a network of two convolutions or more; use adam")
        taken = set(map(id, self._kernels))
        self._adam = adam([parameter for parameter in network.parameters() if id(parameter) not in taken])
        self._group = {"lr": 1e-3}
        self._matrices = [_as_matrix(kernel.detach()) for kernel in self._kernels]  # the same memory
        rows, columns = (max(matrix.shape[side] for matrix in self._matrices) for side in (0, 1))
        self._gradient = self._matrices[0].new_zeros(len(self._matrices), rows, columns)
        self._momentum = torch.zeros_like(self._gradient)
        lengths = [0.2 * max(matrix.shape) ** 0.5 for matrix in self._matrices]
        self._lengths = torch.tensor(lengths, device=self._gradient.device)[:, None, None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [self._group, *self._adam.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        for kernel, place in zip(self._kernels, self._places(self._gradient)):
            place.copy_(_as_matrix(kernel.grad, like=kernel))
        self._momentum.lerp_(self._gradient, 1 - _MOMENTUM)
        along = orthogonalized(self._gradient.lerp(self._momentum, _MOMENTUM)).mul_(self._lengths)
        for matrix, step in zip(self._matrices, self._places(along)):
            matrix.add_(step, alpha=-self._group["lr"])
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        momenta = {index: {"momentum_buffer": _as_kernel(place, kernel)} for index, (place, kernel) in enumerate(zip(self._places(self._momentum), self._kernels))}
        return {"muon": {"state": momenta}, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``KeyError`` or ``ValueError`` where it is another optimizer's, and is then as before."""
        momenta = [state["muon"]["state"][index]["momentum_buffer"] for index in range(len(self._kernels))]
        for momentum, kernel in zip(momenta, self._kernels):
            if momentum.shape != kernel.shape:
                raise ValueError(f"got a momentum of {tuple(momentum.shape)} for a kernel of {tuple(kernel.shape)}")
        self._adam.load_state_dict(state["adam"])
        for place, momentum, kernel in zip(self._places(self._momentum), momenta, self._kernels):
            place.copy_(_as_matrix(momentum, like=kernel))

    def _places(self, batch: Tensor) -> list[Tensor]:
        """Where each kernel's matrix is in ``batch``."""
        return [filled[: matrix.shape[0], : matrix.shape[1]] for filled, matrix in zip(batch, self._matrices)]


def orthogonalized(matrices: Tensor) -> Tensor:
    """``(N, R, C)``, R <= C: each matrix U S V^T as U S' V^T, with S' between 0.68 and 1.21 where S is 0.0015 of the matrix's length or more, and less
    below (five steps of the iteration of Jordan et al. 2024).

    Each step X -> (a + b X X^T + c (X X^T)^2) X is a polynomial of X X^T times X, so that only the polynomials are multiplied, which are R x R, and X
    at the end. In float32, which that needs: the usual way is in bfloat16, which CPUs that lack it multiply some 20 times as slowly.
    """
    matrices = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    square, product = matrices @ matrices.mT, None
    for _ in range(5):
        step = torch.baddbmm(square, square, square, beta=_NEWTON_SCHULZ[1], alpha=_NEWTON_SCHULZ[2])
        step.diagonal(dim1=1, dim2=2).add_(_NEWTON_SCHULZ[0])
        product = step if product is None else step @ product
        square = step @ square @ step
    return product @ matrices


def _as_matrix(kernel: Tensor, like: Tensor | None = None) -> Tensor:
    """``(O, I, k, k)`` -> ``(O, I k k)``, or that turned where it is taller than wide, in the order of memory of ``like`` (itself): a view of it, where
    it is laid out so."""
    like = kernel if like is None else like
    if not like.is_contiguous():  # channels-last
        kernel = kernel.permute(0, 2, 3, 1)
    matrix = kernel.reshape(kernel.shape[0], -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _as_kernel(matrix: Tensor, like: Tensor) -> Tensor:
    """The ``(O, I, k, k)`` of which ``_as_matrix`` makes ``matrix``."""
    kernel = torch.empty_like(like, requires_grad=False)
    _as_matrix(kernel).copy_(matrix)
    return kernel
