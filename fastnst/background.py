"""What is done beside other work: by another thread, or on another stream of a GPU. Imports torch only where that is asked for."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def read_ahead(items: Iterable, name: str, ahead: int = 1) -> Iterator:
    """The same items, made in another thread of that name, some ahead; what it raises is raised here. To be closed where it is not read to its end."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(item: tuple) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=read, name=name, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        closed.set()
        thread.join()


class Later:
    """Work done in order by a thread of that name, beside what the caller does: each call waits until all before it is done.

    What one raises is raised by the next call, ``check`` or ``wait``, or on leaving the context, which waits for the last one; there an error that is
    under way already stays the one that is raised. Behind an error nothing more is done.
    """

    def __init__(self, name: str) -> None:
        self._name, self._idle, self._error = name, threading.Event(), None
        self._idle.set()

    def __call__(self, work: Callable[[], None]) -> None:
        self.wait()
        thread = threading.Thread(target=self._do, args=(work,), name=self._name, daemon=True)
        try:
            self._idle.clear()
            thread.start()
        except BaseException:
            if thread.ident is None:  # it never began: nobody may wait for it
                self._idle.set()
            raise

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        self._idle.wait()  # a thread's own `join` takes it for ended once Ctrl-C has broken off one
        self.check()

    def __enter__(self) -> Later:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._idle.wait()
        if error is None:
            self.check()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
        finally:
            self._idle.set()


class Writer:
    """Call ``write(item)`` in another thread of that name, in order; ``put`` waits while one item is waiting. What it raises is raised by the next call."""

    def __init__(self, write: Callable[[Any], None], name: str) -> None:
        self._write = write
        self._waiting: queue.Queue = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def put(self, item: Any) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.put(item)

    def put_or_drop(self, item: Any) -> bool:
        """Like ``put``, but leaves the item out where it would have to wait."""
        if self._error is not None:
            raise self._error
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(item)
            return True
        return False

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


class Mark:
    """A place in the work that a ``device`` was given, to be asked whether it has got there; elsewhere than on a GPU it always has."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device, self._cuda = device, torch.cuda
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """Behind all so far."""
        if self._event is not None:
            self._event.record(self._cuda.current_stream(self._device))

    def passed(self) -> bool:
        return self._event is None or self._event.query()


class SideStream:
    """A stream of a GPU beside the current one; elsewhere, and without a ``device``, all goes one after the other."""

    def __init__(self, device: torch.device | None) -> None:
        import torch

        self._cuda = torch.cuda
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" and torch.cuda.is_available() else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is done in here comes after all so far, and goes beside what follows until that has to ``wait``."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._cuda.current_stream(self._stream.device))
        with self._cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        """Let what follows come after all that was done ``beside``."""
        if self._stream is not None:
            self._cuda.current_stream(self._stream.device).wait_stream(self._stream)
