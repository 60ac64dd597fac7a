"""Device, precision, and being asked to stop."""

import platform
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from fastnst import runtime
from fastnst.runtime import StopRequest, autocast, first_line, in_one_line, in_words, keep_freed_memory, resolve_device, resolve_precision


@pytest.fixture
def machine(monkeypatch):
    """Pretends to a machine with so many CUDA devices and perhaps an Apple GPU."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize("have, device", [({"cuda": 1}, "cuda"), ({"cuda": 1, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")])
def test_auto_takes_the_best_device(machine, have, device):
    machine(**have)
    assert resolve_device().type == device


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_device_asked_for_is_given(machine, name):
    machine(cuda=2)
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize(
    "name, have, complaint",
    [
        ("cuda", {}, "device 'cuda' asked for, but this torch .* sees 0 CUDA devices; use --device auto"),
        ("cuda:2", {"cuda": 2}, "device 'cuda:2' asked for, but .* sees 2 CUDA devices"),
        ("mps", {}, "no Apple GPU"),
        ("gpu", {}, "device 'gpu' is not known; use one of auto, cpu, cuda, mps"),
        ("", {}, "is not known"),
        ("meta", {}, "device 'meta' is not known"),
        ("xla", {}, "device 'xla' is not known"),
    ],
)
def test_device_that_is_not_there_is_refused(machine, name, have, complaint):
    machine(**have)
    with pytest.raises(ValueError, match=complaint):
        resolve_device(name)


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_asked_for_is_given(precision, dtype):
    assert resolve_precision(precision, torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    "flags, dtype", [("flags: avx2 avx512f avx512_bf16", torch.bfloat16), ("flags: avx2 avx512f", torch.float32), ("", torch.float32)]
)
def test_auto_precision_on_the_cpu_follows_its_flags(monkeypatch, flags, dtype):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset(flags.split()))
    assert resolve_precision("auto", torch.device("cpu")) == dtype


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_on_cuda_wants_real_bfloat16(monkeypatch, fast, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == dtype


def test_auto_precision_on_mps_is_float32():
    assert resolve_precision("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_sets_the_dtype_of_convolutions(dtype):
    with autocast(torch.device("cpu"), dtype):
        assert torch.nn.Conv2d(1, 1, 1)(torch.rand(1, 1, 2, 2)).dtype == dtype


def test_keep_freed_memory_takes_effect_on_glibc():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_keep_freed_memory_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_asks_for_a_stop(number, code):
    with StopRequest() as stop:
        assert not stop() and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop() and stop.exit_code == code


def test_second_signal_kills():
    with pytest.raises(KeyboardInterrupt, match="130"), StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        signal.raise_signal(signal.SIGINT)


def test_a_signal_ahead_of_the_first_request_kills():
    with pytest.raises(KeyboardInterrupt, match="143"), StopRequest():
        signal.raise_signal(signal.SIGTERM)


def test_none_of_several_processes_kills():
    with StopRequest(repeats=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.exit_code == 143


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_works_outside_the_main_thread_without_signals():
    asked = []

    def body() -> None:
        with StopRequest() as stop:
            asked.append(stop())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert asked == [False]


def _machine(root, monkeypatch, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(runtime, "Path", lambda path: root / str(path).lstrip("/"))


@pytest.mark.parametrize("where, limit, used, own", [
    ("sys/fs/cgroup/user/app", "memory.max", "memory.current", "0::/user/app"),  # version 2, the process's own group
    ("sys/fs/cgroup/user", "memory.max", "memory.current", "0::/user/app"),  # one around it
    ("sys/fs/cgroup", "memory.max", "memory.current", "0::/docker/of_the_host"),  # a container that sees the host's path
    ("sys/fs/cgroup/memory/app", "memory.limit_in_bytes", "memory.usage_in_bytes", "5:cpu,cpuacct:/\n4:memory:/app"),  # version 1
])
def test_free_memory_is_what_the_cgroups_leave(tmp_path, monkeypatch, where, limit, used, own):
    # 1000 of which 400 are used, 100 of these by files that could go: 700. The system has 2 kB.
    _machine(tmp_path, monkeypatch, {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2 kB\n", "proc/self/cgroup": own + "\n",
        f"{where}/{limit}": "1000", f"{where}/{used}": "400", f"{where}/memory.stat": "anon 3\ninactive_file 100\n",
    })
    assert runtime.free_memory() == 700


def test_free_memory_without_a_limit_is_the_systems(tmp_path, monkeypatch):
    _machine(tmp_path, monkeypatch, {
        "proc/meminfo": "MemAvailable: 2 kB\n", "proc/self/cgroup": "0::/app\n",
        "sys/fs/cgroup/app/memory.max": "max", "sys/fs/cgroup/app/memory.current": "400", "sys/fs/cgroup/app/memory.stat": "inactive_file 1\n",
    })
    assert runtime.free_memory() == 2048
    (tmp_path / "proc/meminfo").unlink()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert runtime.free_memory() == 2 * 2**30
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=4096)))  # Windows, macOS
    assert runtime.free_memory() == 4096


@pytest.mark.parametrize("own, files", [
    ("0::/app", {"app/cpu.max": "50000 100000"}),  # half a core
    ("3:cpu,cpuacct:/app", {"cpu/app/cpu.cfs_quota_us": "50000\n", "cpu/app/cpu.cfs_period_us": "100000\n"}),  # version 1
])
def test_threads_are_not_more_than_the_quota(tmp_path, monkeypatch, own, files):
    _machine(tmp_path, monkeypatch, {"proc/self/cgroup": f"{own}\n"} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert runtime.cpu_threads() == 1
    for name in files:
        (tmp_path / "sys/fs/cgroup" / name).write_text("-1" if name.endswith("quota_us") else "100000" if name.endswith("period_us") else "max 100000")
    assert runtime.cpu_threads() == 4


def test_what_an_error_says_is_short():
    error = RuntimeError("failed:\n    no such\tkernel\n  frame #0")
    assert (in_one_line(error), in_one_line(error, 10)) == ("failed: no such kernel frame #0", "failed: no")
    assert (first_line(error), first_line(EOFError())) == ("failed:", "EOFError")
    assert (in_words(OSError(28, "cannot write a: full")), in_words(PermissionError(13, "Permission denied", "a")), in_words(OSError("a: damaged"))) == (
        "cannot write a: full",
        "a: Permission denied",
        "a: damaged",
    )
    assert (in_words(MemoryError()), in_words(MemoryError("7 GB"))) == ("not enough memory", "7 GB")
