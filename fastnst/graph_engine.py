"""OpenVINO and ONNX Runtime on a CPU: engines that run ONNX graphs of the network, or of a stage, made when they are first needed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fastnst.eight_bits import eight_bits
from fastnst.onnx_graph import network_graph, onnx_session, stage_graph
from fastnst.runtime import WORTH_COMPILING, cpu_precision, cpu_threads, free_memory, give_back_memory, has_matrix_unit, in_one_line
from fastnst.stages import StagedNetwork, less_flat

Compiled = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
_LARGE = 3 * 1_000_000  # numbers of a picture of a megapixel


class _GraphEngine:
    """What both share."""

    device, batch = "cpu", 1
    free_memory = staticmethod(free_memory)

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        self.network = network
        self.precision = cpu_precision(self.name, self._precisions, precision)
        self._floats = cpu_precision(self.name, self._precisions, "auto") if self.precision == "int8" else self.precision  # what is not in 8 bits
        self._numbers = eight_bits(network, blocks_alone=self._floats == "bfloat16") if self.precision == "int8" else None
        # Compiled graphs by what they are for. No functools.cache of methods: it would make a cycle of the engine, which the garbage
        # collector might find in a forked process, such as one that loads photos, where a runtime's threads are gone: it crashed there.
        self._compiled: dict[Any, Compiled] = {}

    def _graph(self, pixels: str, shuffled: bool = False) -> bytes:
        network = replace(self.network, stages=tuple(stage.shuffled for stage in self.network.stages)) if shuffled else self.network
        # OpenVINO's own norm adds up a picture in float32, one number after the other: 73 dB at 1024 px instead of 93
        by_rows = self.name == "openvino" and self.precision == "float32"
        return network_graph(network, pixels, int8=self._numbers, norms_by_rows=by_rows).SerializeToString()

    def _load_stage(self, index: int, statistics: bool) -> Compiled:
        before = self.network.stages[index - 1] if index else None
        stage = less_flat(self.network)[index]
        return self._load(stage_graph(stage, before, statistics).SerializeToString())

    def needed_memory(self, count, height, width):
        return count * height * width * self.network.stages[0].channels * self._bytes[self._floats]

    def run(self, pictures: np.ndarray, pixels: str = "uint8") -> np.ndarray:
        if pixels not in self._compiled:
            self._compiled[pixels] = self._load(self._graph(pixels))
        return self._compiled[pixels]({"pixels": np.ascontiguousarray(pictures)})[0]

    def stage(self, index, rows, gain, shift, above, below, statistics):
        side = self.network.stages[index].padding
        inputs = {"rows": rows} | ({"padding": np.array([0, 0, above, side, 0, 0, below, side], np.int64)} if side else {})
        if index:
            gain = np.ones(rows.shape[1], np.float32) if gain is None else gain
            shift = np.zeros(rows.shape[1], np.float32) if shift is None else shift
            inputs |= {"gain": gain.reshape(1, -1, 1, 1), "shift": shift.reshape(1, -1, 1, 1)}
        if (index, statistics) not in self._compiled:
            self._compiled[index, statistics] = self._load_stage(index, statistics)
        raw, *moments = self._compiled[index, statistics](inputs)
        return raw, *(moment.ravel() for moment in moments)

    def _load(self, model: bytes) -> Compiled:
        raise NotImplementedError


class OpenVinoEngine(_GraphEngine):
    """OpenVINO on a CPU. It compiles for any size, and anew for a size that comes often in a row, or is large."""

    name, _precisions, _bytes = "openvino", ("float32", "bfloat16", "int8"), {"bfloat16": 5, "float32": 10}

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        super().__init__(network, precision)
        self._last: tuple[Any, ...] = ()  # what the last pictures were: kind and shape
        self._in_a_row = 0  # pictures of that kind and shape
        self._fixed: tuple[Any, Compiled | None] = ((), None)  # the kind and shape that was compiled for last

    def run(self, pictures: np.ndarray, pixels: str = "uint8") -> np.ndarray:
        this = (pixels, pictures.shape)
        self._last, self._in_a_row = this, self._in_a_row + 1 if this == self._last else 1
        if self._in_a_row >= WORTH_COMPILING or pictures.size >= _LARGE:  # 0.15 to 0.5 s of compiling make it 5 to 9 % faster, and smaller by an eighth
            if self._fixed[0] != this:
                self._fixed = ((), None)  # frees the old one before the new one is made
                # Transposed convolutions of AMX copy what they take: without them 3 megapixels and more take 0.8 of the memory, in 1.1 times the time.
                shuffled = pictures.size >= 3 * _LARGE and self._floats == "bfloat16" and has_matrix_unit()
                self._fixed = (this, self._load(self._graph(pixels, shuffled), pictures.shape))
                give_back_memory()
            return self._fixed[1]({"pixels": np.ascontiguousarray(pictures)})[0]
        return super().run(pictures, pixels)

    def _load(self, model, shape=None):
        options = {"INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[self._floats], "INFERENCE_NUM_THREADS": cpu_threads()}
        graph = openvino_core().read_model(model)
        if shape is not None:
            graph.reshape({"pixels": list(shape)})
        request = openvino_core().compile_model(graph, "CPU", options).create_infer_request()
        del graph
        give_back_memory()  # 30 MB that compiling took
        if shape is None:
            return lambda inputs: list(request.infer(inputs, share_inputs=True).values())
        return lambda inputs: [_infer_fixed(request, inputs["pixels"])]


def _infer_fixed(request: Any, pictures: np.ndarray) -> np.ndarray:
    """What an OpenVINO request of a fixed shape makes of ``pictures``, written at once where it stays instead of copied there."""
    import openvino

    stylized = np.empty_like(pictures)
    request.set_output_tensor(openvino.Tensor(stylized, shared_memory=True))
    request.infer({"pixels": pictures}, share_inputs=True, share_outputs=True)
    return stylized


class OnnxRuntimeEngine(_GraphEngine):
    """ONNX Runtime on a CPU."""

    name, _precisions, _bytes = "onnxruntime", ("float32",), {"float32": 46}

    def _load(self, model):
        session = onnx_session(model)
        return lambda inputs: session.run(None, inputs)


@cache
def openvino_core():
    """OpenVINO's core, one for the life of the process: the last one takes its plugin out of memory, and the next fork crashed then.

    It keeps the kernels that it made for a size of picture, by default without end: 0.2 to 0.4 MB more for each new size of a folder.
    64 of them, for some three sizes, are as fast.
    """
    try:
        with _without("openvino_telemetry"):  # by which importing it would tell Google Analytics of this machine
            import openvino
    except Exception as error:  # whatever its parts raise
        raise OSError(f"--engine openvino: OpenVINO is installed, but cannot be loaded ({in_one_line(error)}); use another --engine") from error
    core = openvino.Core()
    with suppress(RuntimeError):  # not in the list of its options: a later version may do without
        core.set_property("CPU", {"CPU_RUNTIME_CACHE_CAPACITY": "64"})
    return core


@contextmanager
def _without(module: str) -> Iterator[None]:
    """In here ``module`` cannot be imported, unless it has been already."""
    hides = module not in sys.modules  # else it is there, or another thread hides it
    sys.modules.setdefault(module, None)
    try:
        yield
    finally:
        if hides:
            sys.modules.pop(module, None)
