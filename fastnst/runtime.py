"""Where we run: device, precision, memory allocator, and being asked to stop. Imports torch only where it is asked about."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, else Apple's MPS, else the CPU; ``cuda:1`` and the like choose one of several.

    Raises ``ValueError`` when the device asked for is not there.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; use one of {', '.join(DEVICES)}, or cuda:N") from None
    if device.type not in DEVICES:
        raise ValueError(f"device {name!r} is not known; use one of {', '.join(DEVICES)}, or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ValueError(f"device {name!r} asked for, but this torch ({torch.__version__}) sees {count} CUDA devices; use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' asked for, but this machine has no Apple GPU that torch can use; use --device auto")
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions in training: ``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    import torch

    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and "avx512_bf16" in _cpu_flags()
    return torch.bfloat16 if fast else torch.float32


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on CUDA, whose half-precision convolutions want it; elsewhere instance norm would copy it back (0.84 times as fast)."""
    import torch

    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def autocast(device: torch.device, dtype: torch.dtype):
    """Autocast to ``dtype``; for float32 a no-op of the same shape."""
    import torch

    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory in the process instead of giving each large block back to the kernel.

    Activations of tens of megabytes are otherwise unmapped and faulted in again at every layer: on two CPU cores that
    took a quarter of a float32 training step at 256 px and half of a 1024 px stylization; at 128 px and in bfloat16 it took
    nothing (our measurements). Returns whether it took effect; elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop instead of killing; a second Ctrl-C kills.

    ``request()`` is true once a signal came; ``exit_code`` is then 128 + its number, as shells count.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal is not None else 0

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def leave_signals_to_parent(_worker: int = 0) -> None:
    """For loading processes: Ctrl-C and a terminated process group reach them too, and the parent needs them to save and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as cpuinfo:
            return next((line for line in cpuinfo if line.startswith("flags")), "")
    except OSError:
        return ""
