"""Where we run: device, precision, ranks, memory allocator, and being asked to stop. Imports torch only where it is asked about."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate; the CPU's allocator has no exception of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "not enough memory" in str(error))


def largest_that_fits(attempt: Callable[[int], object], too_large: int) -> int:
    """The largest number below ``too_large`` whose ``attempt`` does not run out of memory, found by trying; 0 where none."""
    fits = 0
    while too_large - fits > 1:
        size = (fits + too_large) // 2
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large = size
        else:
            fits = size
    return fits


class RankFailed(ValueError):
    """What failed on one rank, as all of them know."""


class RankLost(RuntimeError):
    """The ranks cannot go on together; ``here`` is true on the rank whose error it was."""

    def __init__(self, message: str, here: bool = False) -> None:
        super().__init__(message)
        self.here = here


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started, each with a device of its own; alone, all of this does nothing.

    Small things (flags, Python values) go by way of the CPU, so that asking each other at every step does not wait for a GPU.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """The one rank that writes, logs and prints."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up on any rank."""
        if self.size == 1:
            return list(flags)
        import torch
        import torch.distributed

        raised = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return raised.bool().tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` added up over the ranks."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main rank has for ``value``."""
        return self.gather(value if self.main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def average_gradients(self, network: torch.nn.Module) -> torch.nn.Module:
        """``network`` so wrapped that a backward pass through it leaves the mean gradient of the ranks in each of them."""
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        device = next(network.parameters()).device
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def averaging(self, module: torch.nn.Module, now: bool) -> contextlib.AbstractContextManager:
        """Around a forward and backward pass: gradients are averaged over the ranks only ``now``, else added up at home."""
        return contextlib.nullcontext() if now or self.size == 1 else module.no_sync()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on the main rank and then on the others; an error on one of them is an error on all, none is left waiting."""
        if self.size == 1:
            yield
            return
        error = None
        if not self.main:
            first = self.from_main(None)
            if first is not None:
                raise RankFailed(first)
        try:
            yield
        except Exception as mine:
            error = mine
        if self.main:
            self.from_main(None if error is None else str(error))
            if error is not None:
                raise error
        errors = self.gather(None if error is None else f"rank {self.rank} on {socket.gethostname()}: {error}")
        if any(errors):
            raise RankFailed(next(filter(None, errors))) from error

    @contextlib.contextmanager
    def apart(self, agreed: type[Exception]) -> Iterator[None]:
        """A block in which an error of one rank leaves the others waiting: it ends the run. ``agreed`` errors are those of all ranks."""
        try:
            yield
        except agreed:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            import torch.distributed

            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error):
                lost = f"rank {self.rank} has lost another rank, whose error stands beside this one"
                raise RankLost(f"{lost}; the same command goes on from the last saved state") from error
            raise RankLost(f"rank {self.rank} on {socket.gethostname()}: {error}", here=True) from error


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and the device of this one; without torchrun, a single rank on ``device``."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Ranks(), device
        return
    import torch
    import torch.distributed

    if device.type == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None or index >= count:
            started = os.environ.get("LOCAL_WORLD_SIZE")
            raise ValueError(f"--device {device}: torchrun starts {started} processes here, on {count} GPUs; use --device cuda and --nproc-per-node={count} at most")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"--device {device}: several processes can train on CUDA or the CPU only; start one without torchrun")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        yield ranks, device
        torch.distributed.barrier()  # leave together, as torchrun ends all when the first leaves with an exit code; after an error the others may be gone
    finally:
        torch.distributed.destroy_process_group()


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop instead of killing; a second Ctrl-C kills.

    ``request()`` is true once a signal came; ``exit_code`` is then 128 + its number, as shells count. ``repeats``: signals come
    more than once, as from torchrun, which passes on to its processes what they have got from the terminal already.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.signal: int | None = None
        self._repeats = repeats
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
        if self.signal is not None and not self._repeats:
            raise KeyboardInterrupt
        self.signal = number


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as cpuinfo:
            return next((line for line in cpuinfo if line.startswith("flags")), "")
    except OSError:
        return ""
