"""What a GPU computes again and again over tensors of one shape, recorded as a CUDA graph: its kernels need not be launched one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # as torch's documentation has it


def can_record(device: torch.device) -> bool:
    """Whether the device is one for graphs."""
    return device.type == "cuda"


class Recording:
    """``compute`` over tensors of the shapes and types of ``inputs``, which lie on a GPU, recorded; each call is the same work on other numbers.

    ``compute`` is called some times here. It may depend on nothing but its inputs and on what stays at its place, such as a network's weights,
    and must not wait for the GPU. ``beside``: a recording whose memory for intermediate results this one may use, too. Raises what
    libraries and compilers raise where that cannot be.
    """

    def __init__(self, compute: Callable[..., Any], *inputs: Tensor, beside: "Recording | None" = None) -> None:
        self._device = inputs[0].device
        cudnn, self._graph, aside = torch.backends.cudnn, torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        chooses = cudnn.benchmark
        try:
            cudnn.benchmark = True
            with torch.cuda.device(self._device):
                self._inputs = [given.clone() for given in inputs]
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):  # libraries choose their kernels and take their memory now: it may not happen while recording
                    for _ in range(_WARM_UP):
                        compute(*self._inputs)
                torch.cuda.current_stream().wait_stream(aside)
                pool = None if beside is None else beside._graph.pool()
                with torch.cuda.graph(self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self._outputs = compute(*self._inputs)
        finally:
            cudnn.benchmark = chooses

    def __call__(self, *inputs: Tensor) -> Any:
        """What ``compute`` gives for ``inputs``, on any device; the next call overwrites it."""
        with torch.cuda.device(self._device):
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._outputs
