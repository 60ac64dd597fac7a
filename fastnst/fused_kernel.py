"""A kernel of the project's own for NVIDIA GPUs, in Triton; those that a computation starts, compiled together ahead of it."""

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
_ahead: ContextVar[bool] = ContextVar("ahead", default=False)


class Kernel:
    """Started by ``kernel[grid](...)``, where it is compiled if it has not been for such arguments; ``jit`` is Triton's own."""

    def __init__(self, function: Callable, **options: Any) -> None:
        self.jit = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.jit.run, grid=grid, warmup=_ahead.get())


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Makes a ``Kernel`` of a function, with ``triton.jit``'s options."""
    return partial(Kernel, **options) if function is None else Kernel(function, **options)


def compile_ahead(compute: Callable[[], Any]) -> None:
    """Let threads compile, side by side, all kernels that ``compute`` starts; it is called for that alone, and starts none: what they were to write is whatever
    lies there. The rest of it is done.

    It does nothing with a Triton before 3.4, where each kernel is compiled when it is first started. One that cannot be compiled raises its error then, too.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return
    known = threading.Event()  # beside threads that compile, libraries would time kernels of their own wrongly
    threads = ThreadPoolExecutor(cpu_threads(), "compiling", known.wait, (_LONGEST,))
    # What is compiled beside, and that nothing starts, is a setting of this thread: gradients are to be found in it, too.
    with threads, triton.AsyncCompileMode(threads, ignore_errors=True), torch.autograd.set_multithreading_enabled(False):
        before = _ahead.set(True)
        try:
            compute()
        finally:
            _ahead.reset(before)
            known.set()
