"""Adam on an NVIDIA GPU, the step of all parameters in one launch, in Triton.

Torch's own fused kernel gives each block 65,536 numbers of one tensor: for a network's 1.7 million that makes some 80 blocks in two launches, which
leave most of a large GPU idle (75 us on an H200, where the 47 MB that are read and written take 12).
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastnst.adam import Adam, same_order
from fastnst.fused import on_device
from fastnst.fused_kernel import kernel
from fastnst.runtime import is_dense

_TABLES = 4  # that are kept: two recorded passes have gradients of their own each
_NUMBERS = 2048  # that a program steps: a network takes some 900, all of which a large GPU runs at once


class FusedAdam(Adam):
    """``Adam`` in a kernel of our own.

    Where parameters have not all had as many steps, or are no dense float32 ones, it steps by torch's. Its state changes by steps and
    ``load_state_dict`` alone: where it lies, and how many steps it has had, is not asked for again at each step.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self._forget()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget()

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        parameters, gradients = group["params"], self._gradients()
        places = len(self.state), *((parameter.data_ptr(), gradient is not None and gradient.data_ptr()) for parameter, gradient in zip(parameters, gradients))
        if places not in self._tables:
            if len(self._tables) == _TABLES:
                self._tables.clear()
            self._tables[places] = self._tabulate(parameters, gradients)
        table = self._tables[places]
        if table is None:
            self._steps = None  # which it no longer counts
            self._tables.clear()
            super().step()
            return
        self._steps += 1
        (beta1, beta2), steps = group["betas"], self._steps
        rate, correction = group["lr"] / (1 - beta1**steps), (1 - beta2**steps) ** -0.5
        with on_device(parameters[0].device):
            _step[(len(table),)](table, float(steps), rate, 1 - beta1, 1 - beta2, correction, group["eps"], NUMBERS=_NUMBERS, num_warps=8)

    def _forget(self) -> None:
        self._tables: dict[tuple, Tensor | None] = {}  # `_rows`, if the kernel may, by how many have moments, and where parameters and gradients lie
        self._steps: int | None = None  # that each parameter has had

    def _tabulate(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> Tensor | None:
        """``_rows`` on the device, copied there without waiting for it; ``None`` where torch is to step."""
        states = [self.state.get(parameter) for parameter in parameters]
        if not all(states) or any(gradient is None for gradient in gradients):  # at the first step torch makes the state
            return None
        stepped = list(zip(parameters, gradients, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))))
        if not all(is_dense(each[0]) and all(one.dtype == torch.float32 and same_order(one, each[0]) for one in each) for each in stepped):
            return None
        counts = [state["step"] for state in states]
        if self._steps is None:
            steps = set(torch.stack(counts).tolist())  # sync point, once after a state was loaded
            if len(steps) > 1:
                return None
            self._steps = int(steps.pop())
        rows = torch.from_numpy(_rows(stepped, counts))
        device = parameters[0].device
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def _rows(stepped: list[tuple[Tensor, ...]], counts: list[Tensor]) -> np.ndarray:
    """For each program where its numbers of a parameter, the gradient and both moments begin, where the parameter's steps are counted, and how many
    numbers there are."""
    sizes = np.array([each[0].numel() for each in stepped])
    programs = -(-sizes // _NUMBERS)
    which = np.repeat(np.arange(len(sizes)), programs)
    begins = _NUMBERS * (np.arange(len(which)) - np.repeat(np.cumsum(programs) - programs, programs))
    places = np.array([[tensor.data_ptr() for tensor in each] for each in stepped])[which] + 4 * begins[:, None]
    counted = np.array([count.data_ptr() for count in counts])[which]
    return np.column_stack([places, counted, np.minimum(sizes[which] - begins, _NUMBERS)])


_FLOATS = ["steps", "rate", "change1", "change2", "correction", "epsilon"]


@kernel(do_not_specialize=_FLOATS)
def _step(table, steps, rate, change1, change2, correction, epsilon, NUMBERS: tl.constexpr):
    """Those of a row; in steps of 16 bytes, where they are a program's full share and begin at such."""
    row = table + tl.program_id(0) * 6
    parameter, gradient, moment1, moment2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    count = tl.load(row + 5).to(tl.int32)
    tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), steps)
    if ((parameter | gradient | moment1 | moment2) % 16 == 0) & (count == NUMBERS):
        _descend(parameter, gradient, moment1, moment2, count, rate, change1, change2, correction, epsilon, NUMBERS, WHOLE=True)
    else:
        _descend(parameter, gradient, moment1, moment2, count, rate, change1, change2, correction, epsilon, NUMBERS, WHOLE=False)


@triton.jit
def _numbers(place, number, WHOLE: tl.constexpr):
    place = place.to(tl.pointer_type(tl.float32))
    if WHOLE:
        place = tl.multiple_of(place, 16)
    return place + number


@triton.jit
def _descend(parameter, gradient, moment1, moment2, count, rate, change1, change2, correction, epsilon, NUMBERS: tl.constexpr, WHOLE: tl.constexpr):
    number = tl.arange(0, NUMBERS)
    there = None if WHOLE else number < count
    parameter, gradient = _numbers(parameter, number, WHOLE), _numbers(gradient, number, WHOLE)
    moment1, moment2 = _numbers(moment1, number, WHOLE), _numbers(moment2, number, WHOLE)
    value, slope, mean, square = tl.load(parameter, there), tl.load(gradient, there), tl.load(moment1, there), tl.load(moment2, there)
    mean += change1 * (slope - mean)
    square += change2 * (slope * slope - square)
    tl.store(moment1, mean, there)
    tl.store(moment2, square, there)
    tl.store(parameter, value - rate * mean / (tl.sqrt(square) * correction + epsilon), there)
