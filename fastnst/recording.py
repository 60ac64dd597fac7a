"""What a GPU computes again and again over tensors of one shape, recorded as a CUDA graph: its kernels need not be launched one by one."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # as torch's documentation has it
_one_at_a_time = threading.Lock()  # which is all that a process may record


def can_record(device: torch.device) -> bool:
    """Whether the device is one for graphs."""
    return device.type == "cuda"


def _compile_ahead(compute: Callable[[], Any]) -> None:
    """The kernels of our own in it, where there is a Triton."""
    try:
        from fastnst.fused_kernel import compile_ahead
    except ImportError:
        return
    compile_ahead(compute)


class Recording:
    """``compute`` over tensors of the shapes and types of ``inputs``, which lie on a GPU, recorded; each call is the same work on other numbers.

    ``compute`` is called some times here. It may depend on nothing but its inputs and on what stays at its place, such as a network's weights,
    and must not wait for the GPU. ``beside``: a recording whose memory for intermediate results this one may use, too. ``tried_out``, for what has no
    float32 in it: cuDNN keeps its choice of kernels for each of its settings; with ``allow_tf32``, which float32 alone minds, switched off, it times them anew
    where it had guessed one before. Raises what libraries and compilers raise where that cannot be.
    """

    def __init__(self, compute: Callable[..., Any], *inputs: Tensor, beside: "Recording | None" = None, tried_out: bool = False) -> None:
        device = self._device = inputs[0].device
        cudnn, self._graph = torch.backends.cudnn, torch.cuda.CUDAGraph()
        # Memory is shared within a stream alone. What `compute` does beside, on other streams, makes way for what it does on this one.
        self._aside = torch.cuda.Stream(device, priority=-1) if beside is None else beside._aside
        with _one_at_a_time, torch.cuda.device(device):
            chooses, current, tf32 = cudnn.benchmark, torch.cuda.current_stream(), cudnn.allow_tf32
            try:
                cudnn.benchmark, cudnn.allow_tf32 = True, tf32 and not tried_out
                self._inputs = [given.clone() for given in inputs]
                self._aside.wait_stream(current)
                with torch.cuda.stream(self._aside):  # libraries choose their kernels and take their memory now: it may not happen while recording
                    _compile_ahead(lambda: compute(*self._inputs))
                    for _ in range(_WARM_UP):
                        compute(*self._inputs)
                current.wait_stream(self._aside)
                pool = None if beside is None else beside._graph.pool()
                with torch.cuda.graph(self._graph, pool=pool, stream=self._aside, capture_error_mode="thread_local"):
                    self._outputs = compute(*self._inputs)
            finally:
                cudnn.benchmark, cudnn.allow_tf32 = chooses, tf32
                torch.cuda.set_stream(current)  # which torch before 2.13 leaves where recording failed

    def __call__(self, *inputs: Tensor) -> Any:
        """What ``compute`` gives for ``inputs``, on any device; the next call overwrites it."""
        with torch.cuda.device(self._device):
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._outputs
