"""What is done beside other work: in order, to its end, and no error is lost or hides another."""

import signal
import threading

import pytest
import torch

from fastnst.background import Later, Mark, Writer


def fail() -> None:
    raise OSError("disk full")


def test_work_is_done_in_order_beside_the_caller_and_to_its_end():
    may_end, done = threading.Event(), []

    def first():
        assert may_end.wait(10)
        done.append(threading.current_thread().name)

    def second():
        threading.Event().wait(0.05)
        done.append("second")

    with Later("working") as later:
        later(first)
        assert done == []
        may_end.set()
        later(second)
        assert done == ["working"]  # no more than one is under way
        later.wait()
        assert done == ["working", "second"]
        later(second)
    assert done == ["working", "second", "second"]


@pytest.mark.parametrize("ask", ["call", "check", "wait", "leave"])
def test_an_error_is_raised_where_the_caller_comes_by_next_and_nothing_is_done_behind_it(ask):
    done = []
    with pytest.raises(OSError, match="disk full"), Later("working") as later:
        later(fail)
        if ask == "call":
            later(lambda: done.append("behind"))
        elif ask == "check":
            while True:
                later.check()
        elif ask == "wait":
            later.wait()
        done.append("left")
    assert done == (["left"] if ask == "leave" else [])


def test_work_that_could_not_begin_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    with pytest.raises(RuntimeError, match="can't start new thread"), Later("working") as later:
        later(lambda: None)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="not on Windows")
def test_ctrl_c_while_it_waits_leaves_no_work_behind():
    done, before = [], signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Later("working") as later:
            later(lambda: (threading.Event().wait(0.5), done.append("work")))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            later.wait()
        assert done == ["work"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_error_under_way_is_not_hidden_and_the_work_is_done_all_the_same():
    done = []
    with pytest.raises(KeyError), Later("working") as later:
        later(lambda: (threading.Event().wait(0.05), done.append("work")))
        raise KeyError
    assert done == ["work"]
    with pytest.raises(KeyError), Later("working") as later:
        later(fail)
        raise KeyError


def test_the_cpu_has_always_done_what_it_was_given():
    mark = Mark(torch.device("cpu"))
    mark.set()
    assert mark.passed()


def test_a_writer_keeps_the_order_and_drops_what_would_wait():
    began, may_end, written = threading.Event(), threading.Event(), []

    def write(item):
        began.set()
        assert may_end.wait(10)
        written.append((item, threading.current_thread().name))

    with Writer(write, "writing") as writer:
        writer.put(1)
        assert began.wait(10)
        writer.put(2)  # waits alone
        assert not writer.put_or_drop(3)
        may_end.set()
        writer.put(4)
    assert written == [(item, "writing") for item in (1, 2, 4)]


def test_what_a_writer_raises_is_raised_on_leaving_unless_an_error_is_under_way():
    with pytest.raises(OSError, match="disk full"), Writer(lambda item: fail(), "writing") as writer:
        writer.put(1)
    with pytest.raises(ValueError, match="of the caller"), Writer(lambda item: fail(), "writing") as writer:
        writer.put(1)
        raise ValueError("of the caller")
