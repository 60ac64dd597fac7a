"""What is compiled, for which sizes, how it is kept, and that the pictures are the same."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_engine import eager, photo
from test_stages import staged

from fastnst import graph_engine, runtime
from fastnst.engine import load_engine
from fastnst.onnx_graph import onnx_session
from fastnst.runtime import WORTH_COMPILING


def test_openvino_that_cannot_be_loaded_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OSError, match="--engine openvino: .*cannot be loaded .*another --engine"):
        graph_engine.openvino_core.__wrapped__()


def test_a_size_that_comes_again_is_compiled_for_and_gives_the_same(monkeypatch):
    network, stages = staged()
    engine = load_engine(stages, "cpu", "openvino", "float32")
    compiled, load = [], engine._load
    monkeypatch.setattr(engine, "_load", lambda model, shape=None: compiled.append(shape) or load(model, shape))
    for size in [(20, 30)] * (WORTH_COMPILING - 1) + [(24, 30)] + [(20, 30)] * (WORTH_COMPILING - 1):
        engine.run(photo(*size))
    assert compiled == [None]  # not often enough in a row
    for size in [(20, 30), (20, 30), (24, 30), (20, 30)]:
        picture = photo(*size)
        assert np.abs(engine.run(picture) - eager(network, picture)).max() <= 0.51
    assert compiled == [None, (1, 20, 30, 3)]
    monkeypatch.setattr(graph_engine, "_LARGE", 1000)
    picture = photo(25, 31)
    assert np.abs(engine.run(picture) - eager(network, picture)).max() <= 0.51
    assert compiled[2:] == [(1, 25, 31, 3)]
    first = engine.run(picture)
    kept = first.copy()
    assert not np.array_equal(engine.run(255 - picture), kept) and np.array_equal(first, kept)  # each its own memory
    images = np.ascontiguousarray(picture.transpose(0, 3, 1, 2), np.float32) / 255
    assert np.abs(engine.run(images, "float").transpose(0, 2, 3, 1) * 255 - eager(network, picture)).max() <= 0.02
    assert compiled[3:] == [(1, 3, 25, 31)]


@pytest.mark.parametrize("upsampling", ["nearest", "transposed"])
def test_where_transposed_convolutions_copy_large_pictures_go_without_them(monkeypatch, upsampling):
    network, stages = staged(upsampling=upsampling)
    monkeypatch.setattr(graph_engine, "_LARGE", 500)
    picture = photo(33, 44)
    asked, graph = [], graph_engine.OpenVinoEngine._graph
    monkeypatch.setattr(graph_engine.OpenVinoEngine, "_graph", lambda engine, pixels, shuffled=False: asked.append(shuffled) or graph(engine, pixels, shuffled))
    for flags, precision, expected in (({"amx_bf16"}, "float32", False), ({"avx512_bf16"}, "bfloat16", False), ({"amx_bf16"}, "bfloat16", True)):
        monkeypatch.setattr(runtime, "cpu_flags", lambda flags=flags: flags)
        load_engine(stages, "cpu", "openvino", precision).run(picture)
        assert asked.pop() == expected
    exact = load_engine(stages, "cpu", "onnxruntime", "float32")
    monkeypatch.setattr(exact, "_graph", lambda pixels: graph(exact, pixels, True))
    assert not any(stage.shuffled.transposed for stage in stages.stages) and any(stage.transposed for stage in stages.stages)
    assert np.abs(exact.run(picture) - eager(network, picture)).max() <= 0.51


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ever_new_sizes_do_not_take_ever_more_memory():
    # OpenVINO keeps what it made for each size: without a limit these 240 take some 35 MB more
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import numpy as np; from test_stages import staged; from fastnst.engine import load_engine\n"
        "engine, taken = load_engine(staged()[1], 'cpu', 'openvino'), []\n"
        "for index in range(480):\n"
        "    engine.run(np.zeros((1, 24 + index // 24, 24 + index % 24, 3), np.uint8))\n"
        "    taken.append(int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize())\n"
        "assert taken[-1] - taken[239] < 15e6, taken[::40]"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="where its identifiers lie is known for Linux")
@pytest.mark.parametrize("command", [["stylize", "--device", "cpu", "--engine", "onnxruntime", "--input", "in.png", "--output", "out.png"], ["export", "--output", "out.onnx"]], ids=lambda command: command[0])
def test_onnx_runtime_sends_nothing_home(tmp_path, command):
    """With its telemetry on, it leaves a machine's identifier and a data base of events in the home folder."""
    Image.fromarray(photo(20, 30)[0]).save(tmp_path / "in.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")} | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    done = subprocess.run([sys.executable, "-m", "fastnst", command[0], "--style", "wave", *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "home").rglob("*") if "onnx" in path.name or "Microsoft" in path.name]


def test_on_windows_events_of_sessions_are_off(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: told.append("off"))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: told.append("session"))
    onnx_session(b"")
    assert told == ["off", "session"]


def test_openvino_needs_no_home_and_tells_nobody_of_it(tmp_path):
    """With its telemetry, importing it leaves a client's identifier for Google Analytics in the home folder, and fails without one."""
    code = "import sys; from fastnst.graph_engine import openvino_core; openvino_core(); sys.exit('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr, [*tmp_path.iterdir()]) == (0, "", [])


def test_threads_may_load_openvino_together():
    code = """
import threading
from fastnst.graph_engine import openvino_core
together = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (together.wait(), openvino_core())) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def test_what_was_imported_already_stays():
    with graph_engine._without("json"):
        import json
    assert sys.modules["json"] is json
