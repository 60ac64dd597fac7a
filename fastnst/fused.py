"""Whether the project's own kernels for NVIDIA GPUs run here: Triton comes with torch on Linux alone, and needs a GPU of 2018 or later."""

import warnings
from functools import cache

import torch


@cache
def triton_works(device: torch.device) -> bool:
    """Whether they do on ``device``, tried out once; a warning says why not where they should."""
    if device.type != "cuda":
        return False
    try:
        from fastnst.fused_norm import fused_norm

        ones = torch.ones(1, 8, 4, 4, device=device)
        fused_norm(ones, ones[0, :, 0, 0], ones[0, :, 0, 0])
        torch.accelerator.synchronize(device)
    except Exception as error:  # compilers raise many kinds
        warnings.warn(f"Triton failed, going on slower without ({' '.join(str(error).split())[:200]})", stacklevel=2)
        return False
    return True
