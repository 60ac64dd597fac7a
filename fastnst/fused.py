"""Whether the project's own kernels for NVIDIA GPUs run here: Triton comes with torch on Linux alone, and needs a GPU of 2018 or later."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from fastnst.runtime import in_one_line, is_out_of_memory


def on_device(device: torch.device) -> AbstractContextManager:
    """In here Triton starts kernels on ``device``: it takes the current one, whatever the tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def triton_works(device: torch.device) -> bool:
    """Whether they do on ``device``, tried out once; a warning says why not where they should."""
    if device.type != "cuda":
        return False
    try:
        from fastnst.fused_norm import fused_norm

        with on_device(device):
            ones = torch.ones(1, 8, 4, 4, device=device)
            fused_norm(ones, ones[0, :, 0, 0], ones[0, :, 0, 0])
            torch.accelerator.synchronize(device)
    except Exception as error:  # compilers raise many kinds
        if is_out_of_memory(error):
            raise
        warn_of(error)
        return False
    return True


def warn_of(error: Exception) -> None:
    """Say that the kernels failed, and that it goes on without."""
    warnings.warn(f"Triton failed, going on slower without ({in_one_line(error)})", stacklevel=3)
