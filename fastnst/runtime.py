"""Where we run: device, precision, memory allocator, what errors of its libraries say, and being asked to stop. Imports torch only where it is asked about."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
_in_torch = threading.local()  # .process: the one in which this thread last let torch work
WORTH_COMPILING = 8  # pictures of one shape in a row, for an engine: a video, not a folder that happens to hold two


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
        fast = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_precision(engine: str, there: tuple[str, ...], precision: str) -> str:
    """That of an engine which has those ``there`` on a CPU: ``auto`` is bfloat16 where both multiply it, else float32. Raises ``ValueError`` for another."""
    if precision == "auto":
        return "bfloat16" if "bfloat16" in there and multiplies_bfloat16() else "float32"
    if precision not in there:
        raise ValueError(f"--precision {precision} is not there on a CPU with --engine {engine}; use {', '.join(['auto', *there[:-1]])} or {there[-1]}")
    return precision


def multiplies_bfloat16() -> bool:
    """Whether the CPU does: bfloat16 is slower than float32 on those that do not."""
    return has_matrix_unit() or "avx512_bf16" in cpu_flags()


def has_matrix_unit() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX), some eight times as fast as vectors do."""
    return "amx_bf16" in cpu_flags()


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on CUDA, whose half-precision convolutions want it; elsewhere instance norm would copy it back (0.84 times as fast)."""
    import torch

    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def is_dense(x: torch.Tensor) -> bool:
    """Whether its numbers lie one after the other, row by row or channels-last."""
    import torch

    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def autocast(device: torch.device, dtype: torch.dtype):
    """Autocast to ``dtype``; for float32 a no-op of the same shape."""
    import torch

    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)


def keep_freed_memory(keep: bool = True) -> bool:
    """Ask glibc to keep freed memory in the process instead of giving each large block back to the kernel, or (False) not to.

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
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # from glibc's malloc.h
    if keep:
        return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))
    done = bool(mallopt(m_mmap_max, 65_536)) and bool(mallopt(m_trim_threshold, 128 * 1024)) and bool(mallopt(m_mmap_threshold, 128 * 1024))
    give_back_memory()
    return done


def give_back_memory() -> None:
    """Ask glibc to give the kernel what the process has freed; elsewhere it does nothing."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python or in an engine, whose errors are told apart by their words alone."""
    words = ("out of memory", "not enough memory", "allocate memory", "failed to allocate", "alloc_failed", "bad_alloc", "bad alloc", "create a memory object")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What it says, ``most`` characters of it; libraries write pages."""
    return " ".join(str(error).split())[:most]


def outlive_fork() -> None:
    """Ahead of torch's work on a CPU: a forked process has not the threads that the thread which forked had let it start, and torch would wait for them for ever; it goes on in one."""
    import torch

    if getattr(_in_torch, "process", os.getpid()) != os.getpid():
        torch.set_num_threads(1)
    _in_torch.process = os.getpid()


def in_words(error: BaseException) -> str:
    """What it says, without the number that the system has for it, or what it is where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


def first_line(error: BaseException) -> str:
    return in_words(error).splitlines()[0]


def largest_that_fits(attempt: Callable[[int], object], too_large: int) -> int:
    """The largest number below ``too_large`` whose ``attempt`` does not run out of memory, found by trying; 0 where none."""
    fits = 0
    while too_large - fits > 1:
        size = (fits + too_large) // 2
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            too_large = size
        else:
            fits = size
    return fits


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop instead of killing. A second one kills, as does one ahead of the first ``request()``, which nobody would heed.

    ``request()`` is true once a signal came; ``exit_code`` is then 128 + its number, as shells count, and what a ``KeyboardInterrupt`` that
    kills holds. ``repeats``: signals come more than once, as from torchrun, which passes on to its processes what they have got from the
    terminal already, and none kills, as the others would wait for this one.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.signal: int | None = None
        self._repeats, self._asked = repeats, False
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        self._asked = True
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
        killing = not self._repeats and (self.signal is not None or not self._asked)
        self.signal = number
        if killing:
            raise KeyboardInterrupt(self.exit_code)


def leave_signals_to_parent(_worker: int = 0) -> None:
    """For loading processes: Ctrl-C and a terminated process group reach them too, and the parent needs them to save and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def fed_by_processes() -> Iterator[None]:
    """A block in which torch's loading processes work: of one that is killed torch tells by a ``RuntimeError`` anywhere in it, we by a ``ChildProcessError``."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        advice = "the same command goes on from what was saved; lower data.workers"
        raise ChildProcessError(f"a process that decodes photos was killed, perhaps as memory ran out; {advice}") from error


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU says that it can do, in the words of /proc/cpuinfo; empty where that is not there."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as cpuinfo:
            return frozenset(next((line for line in cpuinfo if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()


def cpu_threads() -> int:
    """How many threads pay on this CPU: OMP_NUM_THREADS, else the cores that this process may use, less where its cgroup has a quota."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, then 1; `max` or -1 where there is no limit
            with contextlib.suppress(OSError, ValueError):
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                cores = min(cores, math.ceil(int(quota) / int(period))) if int(quota) > 0 else cores
    return cores


def free_memory() -> int:
    """Bytes of main memory that this process may still take, by the system and by its cgroups; 2 GiB where none tells."""
    limits = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        limits.append(int(line.split()[1]) * 1024)
    if not limits:
        with contextlib.suppress(ImportError, OSError):  # on Linux it is not asked for
            import psutil

            limits.append(psutil.virtual_memory().available)
    for folder in _cgroups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                limits.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + int(cached[1] if cached else 0))
    return max(0, min(limits)) if limits else 2 * 2**30


def _cgroups(controller: str) -> list[Path]:
    """The folders of the cgroup that ``controller`` limits this process by, and of those around it; empty where there are no cgroups.

    In a container the path may be one of the host's, which is not there: the mount itself is the container's then.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") or not controllers:  # version 1, or 2
                mount = Path("/sys/fs/cgroup") / (controller if controllers else "")
                parts = [part for part in path.split("/") if part]
                found += [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return found


def arithmetic_rate(device: str, precision: torch.dtype) -> float:
    """The machine's highest rate in FLOP/s, measured: that of a large matrix product or of a convolution, in floating point."""
    import torch
    import torch.nn.functional as F

    turns, side = (1, 2048) if device == "cpu" else (20, 8192)
    with torch.inference_mode():
        a, b = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
        image = torch.randn(4, 128, 128, 128, device=device, dtype=precision).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(128, 128, 3, 3, device=device, dtype=precision).contiguous(memory_format=torch.channels_last)
        best = 0.0
        for act, flops in ((lambda: F.conv2d(image, kernel, padding=1), 2 * 9 * 128 * 128 * 128**2 * 4), (lambda: a @ b, 2 * side**3)):
            times: list[float] = []
            while len(times) < 20 and sum(times) < 10:
                began = time.perf_counter()
                for _ in range(turns):
                    act()
                if device != "cpu":
                    torch.accelerator.synchronize(torch.device(device))
                times.append(time.perf_counter() - began)
            best = max(best, flops * turns / min(times))
            if min(times) > 1:  # a CPU without this type, whose products take minutes each
                break
    return best


def gpu_is_likely() -> bool:
    """Whether this machine seems to have a GPU that torch could use, found out without importing torch."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", r"C:\Windows\System32\nvcuda.dll")))
