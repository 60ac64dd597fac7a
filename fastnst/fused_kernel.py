"""A kernel of the project's own for NVIDIA GPUs, in Triton; those that a computation starts, compiled together ahead of it."""

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton

from fastnst.runtime import cpu_threads

_LONGEST = 60  # seconds that compiling waits for: then something else's kernel is waited for
_ahead: ContextVar["set[Kernel] | None"] = ContextVar("ahead", default=None)  # those asked for while they are to be compiled alone


class Kernel:
    """Started by ``kernel[grid](...)``, where it is compiled if it has not been for such arguments; ``jit`` is Triton's own."""

    def __init__(self, function: Callable, **options: Any) -> None:
        self.jit = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        asked = _ahead.get()
        if asked is not None:
            asked.add(self)
        return partial(self.jit.run, grid=grid, warmup=asked is not None)

    def unstarted(self) -> list[Any]:
        """What has been compiled, and not started."""
        made = [each for kept, *_ in self._caches() for each in list(kept.values()) if not isinstance(each, triton.FutureKernel)]
        return [each for each in made if getattr(each, "module", None) is None]

    def forget_futures(self) -> None:
        """Of kernels that could not be compiled, which then raise where they are started: a future in their place raises something else."""
        for kept, *_ in self._caches():
            for key, value in list(kept.items()):
                if isinstance(value, triton.FutureKernel):
                    kept.pop(key, None)

    def _caches(self) -> list[tuple]:
        return list(getattr(self.jit, "device_caches", {}).values())  # none where it is interpreted


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Makes a ``Kernel`` of a function, with ``triton.jit``'s options."""
    return partial(Kernel, **options) if function is None else Kernel(function, **options)


def can_compile_ahead() -> bool:
    """Whether this Triton can."""
    mode = getattr(triton, "AsyncCompileMode", None)
    return mode is not None and "ignore_errors" in inspect.signature(mode).parameters


def compile_ahead(compute: Callable[[], Any]) -> None:
    """Let threads compile, side by side, all kernels that ``compute`` starts; it is called for that alone, and starts none: what they were to write is whatever
    lies there. The rest of it is done.

    It does nothing with a Triton before 3.6, where each kernel is compiled when it is first started. One that cannot be compiled raises its error then, too.
    """
    if not can_compile_ahead():
        return
    known = threading.Event()  # beside threads that compile, libraries would time kernels of their own wrongly
    threads = ThreadPoolExecutor(cpu_threads(), "compiling", known.wait, (_LONGEST,))
    asked: set[Kernel] = set()
    try:
        with threads:
            # What is compiled beside, and that nothing starts, is a setting of this thread: gradients are to be found in it, too.
            with triton.AsyncCompileMode(threads, ignore_errors=True), torch.autograd.set_multithreading_enabled(False):
                before = _ahead.set(asked)
                try:
                    compute()
                finally:
                    _ahead.reset(before)
                    known.set()
            threads.map(_build_launcher, [each for one in asked for each in one.unstarted()])  # of none is asked whether it could be
    except BaseException:  # such as Ctrl-C
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        for one in asked:
            one.forget_futures()


def _build_launcher(compiled: Any) -> None:
    """What starts a kernel, which Triton 3.6 lets a C compiler make and keeps on disk for those of such arguments: else that is done when each is first started."""
    triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
