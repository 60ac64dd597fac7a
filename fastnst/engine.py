"""What runs a staged network: the engine in C, OpenVINO or ONNX Runtime on a CPU, without torch; torch on a GPU, or where nothing else is installed.

All engines take and give the same arrays, ``(N, H, W, 3)`` uint8 or ``(N, 3, H, W)`` float32 in [0, 1], and the same pictures.
"""

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from fastnst.eight_bits import eight_bits
from fastnst.model import damaged, read_model
from fastnst.native_library import multiplies_pairs
from fastnst.runtime import cpu_threads, free_memory, give_back_memory, gpu_is_likely, has_matrix_unit, in_one_line, is_out_of_memory, keep_freed_memory, multiplies_bfloat16, resolve_device
from fastnst.stages import EPSILON, PIXEL_SHIFT, Stage, StagedNetwork, fold, less_flat, minds_ground

if TYPE_CHECKING:
    from fastnst.recording import Recording

ENGINES = ("auto", "native", "openvino", "onnxruntime", "torch")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
Pixels = Literal["uint8", "float"]
Compiled = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
WORTH_COMPILING = 8  # pictures of one shape in a row: a video, not a folder that happens to hold two
_LARGE = 3 * 1_000_000  # numbers of a picture of a megapixel


class Engine(Protocol):
    """A network on a device, for one caller at a time."""

    name: str
    device: str
    precision: str
    network: StagedNetwork
    batch: int  # how many small pictures at once pay

    def free_memory(self) -> int:
        """Bytes that the device has free."""

    def needed_memory(self, count: int, height: int, width: int) -> int:
        """Bytes that pictures take on it while they are stylized, measured."""

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        """Stylize ``(N, H, W, 3)`` uint8 (``pixels`` uint8), or ``(N, 3, H, W)`` float32 in [0, 1] (float): the same kind and size."""

    def stage(
        self, index: int, rows: np.ndarray, gain: np.ndarray | None, shift: np.ndarray | None, above: int, below: int, statistics: bool
    ) -> tuple[np.ndarray, ...]:
        """One stage's convolution on rows of a picture, for tiles.

        ``rows``, ``(1, C, h, W)``, are not normalized yet: ``gain`` and ``shift``, ``(C,)``, then the ReLU of the stage before
        come first (None: they are as they should be). The picture ends at their top where ``above`` is the stage's padding (else 0),
        and ``below`` likewise. Gives the convolution's output, not normalized (where a norm follows, less the same number for each channel at every call), and for
        ``statistics`` its channels' means and variances, ``(C,)``.
        """


def load_network(model: str | Path) -> StagedNetwork:
    """The network of a model file, ready for an engine. Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong."""
    if Path(model).suffix.lower() == ".onnx":
        return onnx_graph().load_onnx(model)
    weights, info = read_model(model)
    try:
        return fold(weights, info)
    except (KeyError, ValueError, IndexError) as error:
        raise damaged(Path(model), error) from error


def load_engine(network: StagedNetwork, device: str = "auto", engine: str = "auto", precision: str = "auto") -> Engine:
    """The engine asked for; ``auto`` is the one that measures best of those installed, in the fastest precision of at least 45 dB.

    That is torch on a GPU in float16; on a CPU our own, in bfloat16 where its vectors multiply it, or OpenVINO where AMX does; then ONNX Runtime, then torch.
    Raises ``ValueError`` naming what is not there and how to mend it.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine: got {engine!r}, need one of {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: got {precision!r}, need one of {', '.join(PRECISIONS)}")
    on_cpu = device == "cpu" or (device == "auto" and (engine in ("native", "openvino", "onnxruntime") or not gpu_is_likely()))
    if engine == "auto":
        engine = next((name for name in _in_order(precision) if on_cpu and is_installed(name)), "torch")
    if engine == "torch":
        return TorchEngine(network, "cpu" if on_cpu else device, precision)
    if not on_cpu:
        raise ValueError(f"--engine {engine} computes on the CPU, got --device {device}; use --engine torch, or --device cpu")
    if not is_installed(engine):
        if engine == "native":
            raise ValueError("--engine native was not compiled when fastnst was installed, or has changed since; install a C compiler (gcc or clang), then fastnst again")
        raise ValueError(f"--engine {engine} is not installed; install it with: pip install 'fastnst[{engine}]'")
    if engine == "native":
        from fastnst.native import NativeEngine

        return NativeEngine(network, _cpu_precision(engine, precision))
    return (OpenVinoEngine if engine == "openvino" else OnnxRuntimeEngine)(network, precision)


def _in_order(precision: str) -> tuple[str, ...]:
    """Engines for CPUs that have a precision, the fastest first; torch comes last."""
    if precision == "int8" or (precision == "bfloat16" and not multiplies_pairs()):
        return ("openvino",)
    if precision == "auto" and multiplies_bfloat16() and not multiplies_pairs():
        return "openvino", "native", "onnxruntime"
    return "native", "openvino", "onnxruntime"


def is_installed(engine: str) -> bool:
    """Whether all that an engine other than torch needs is there."""
    if engine == "native":
        from fastnst.native_library import native_library

        return native_library() is not None
    return all(importlib.util.find_spec(package) for package in (engine, "onnx"))


class _GraphEngine:
    """What OpenVINO and ONNX Runtime share: both run ONNX graphs of the network, or of a stage, made when they are first needed."""

    device, batch = "cpu", 1
    free_memory = staticmethod(free_memory)

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        self.network = network
        self.precision = _cpu_precision(self.name, precision)
        self._floats = _cpu_precision(self.name, "auto") if self.precision == "int8" else self.precision  # what is not in 8 bits
        self._numbers = eight_bits(network, blocks_alone=self._floats == "bfloat16") if self.precision == "int8" else None
        # Compiled graphs by what they are for. No functools.cache of methods: it would make a cycle of the engine, which the garbage
        # collector might find in a forked process, such as one that loads photos, where a runtime's threads are gone: it crashed there.
        self._compiled: dict[Any, Compiled] = {}

    def _graph(self, pixels: Pixels, shuffled: bool = False) -> bytes:
        network = replace(self.network, stages=tuple(stage.shuffled for stage in self.network.stages)) if shuffled else self.network
        # OpenVINO's own norm adds up a picture in float32, one number after the other: 73 dB at 1024 px instead of 93
        by_rows = self.name == "openvino" and self.precision == "float32"
        return onnx_graph().network_graph(network, pixels, int8=self._numbers, norms_by_rows=by_rows).SerializeToString()

    def _load_stage(self, index: int, statistics: bool) -> Compiled:
        before = self.network.stages[index - 1] if index else None
        stage = less_flat(self.network)[index]
        return self._load(onnx_graph().stage_graph(stage, before, statistics).SerializeToString())

    def needed_memory(self, count, height, width):
        return count * height * width * self.network.stages[0].channels * self._bytes[self._floats]

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
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

    name, _bytes = "openvino", {"bfloat16": 5, "float32": 10}

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        super().__init__(network, precision)
        self._last: tuple[Any, ...] = ()  # what the last pictures were: kind and shape
        self._in_a_row = 0  # pictures of that kind and shape
        self._fixed: tuple[Any, Compiled | None] = ((), None)  # the kind and shape that was compiled for last

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
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

    name, _bytes = "onnxruntime", {"float32": 46}

    def _load(self, model):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        options.log_severity_level = 3  # it warns of constants that it folded itself
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)


class TorchEngine:
    """torch, on any device that it has; statistics of norms and the output are float32 in every precision."""

    name = "torch"

    def __init__(self, network: StagedNetwork, device: str = "auto", precision: str = "auto") -> None:
        import torch

        self.network = network
        self._device = resolve_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            precision = _cpu_precision(self.name, precision)
            keep_freed_memory()
        elif precision == "int8":
            raise ValueError("--precision int8 is there on a CPU with --engine openvino only; use --precision auto")
        elif precision == "auto":
            precision = "float16" if self._device.type == "cuda" else "float32"
        self.precision = precision
        self._dtype = getattr(torch, precision)
        self.batch = 1 if self._device.type == "cpu" else 16
        self._layout = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        self._last: tuple[Any, ...] = ()  # kind and shape of the last pictures
        self._in_a_row = 0  # pictures of that kind and shape
        self._so_far = 0  # pictures of all kinds
        self._recording: Recording | None = None  # a pass over them
        self._fast: Any = None  # a `NvidiaPass`; False where it failed

    def needed_memory(self, count, height, width):
        return count * height * width * self.network.stages[0].channels * (17 if self.precision == "float32" else 10)

    def free_memory(self) -> int:
        import torch

        if self._device.type != "cuda":
            return free_memory()
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(self._device)[0] + held

    @cached_property
    def _stages(self) -> list[dict[str, Any]]:
        """The stages' arrays on the device."""
        import torch

        found = []
        for stage in less_flat(self.network):
            arrays = {name: getattr(stage, name) for name in ("weight", "bias", "norm_weight", "norm_bias")}
            tensors = {name: None if array is None else torch.from_numpy(array).to(self._device, self._dtype) for name, array in arrays.items()}
            tensors["weight"] = tensors["weight"].contiguous(memory_format=self._layout)
            found.append(tensors)
        return found

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        import torch

        x = torch.from_numpy(np.require(pictures, requirements=["C", "W"]))  # torch warns of what is read-only
        if self._device.type != "cuda":
            return self.run_tensor(x.to(self._device), pixels).cpu().numpy()
        stylized = self.run_tensor(x.pin_memory().to(self._device, non_blocking=True), pixels).to("cpu", non_blocking=True)  # pinned, too
        torch.cuda.current_stream(self._device).synchronize()
        return stylized.numpy()  # pinned memory, which torch keeps for the next picture once this one is gone

    def run_tensor(self, x: Any, pixels: Pixels) -> Any:
        """``run`` for tensors on the device of the engine."""
        import torch

        this = (pixels, x.shape)
        if this != self._last:
            self._last, self._in_a_row, self._recording = this, 0, None  # the memory of a recorded pass is for the new ones
        self._in_a_row += 1
        self._so_far += 1
        with torch.inference_mode():
            if self._device.type == "cuda" and self._in_a_row == WORTH_COMPILING:
                self._recording = self._record(x, pixels)
            if self._recording is None:
                return self.compute_fast(x, pixels) if self._device.type == "cuda" and self._so_far > WORTH_COMPILING else self.compute(x, pixels)
            stylized = self._recording(x)
        return stylized.clone()  # which the next pass overwrites

    def _record(self, x: Any, pixels: Pixels) -> "Recording | None":
        """A pass over pictures like ``x``, as fast as this machine can; None where it can do nothing about it."""
        from fastnst.recording import Recording

        try:
            return Recording(lambda given: self.compute_fast(given, pixels), x, tried_out=self.precision != "float32")
        except Exception as error:  # libraries raise many kinds; it goes without, and is not tried again
            if not is_out_of_memory(error):
                warnings.warn(f"a CUDA graph failed, going on slower without ({in_one_line(error)})", stacklevel=2)
        return None

    def compute_fast(self, x: Any, pixels: Pixels) -> Any:
        """``compute`` on an NVIDIA GPU, where the first pass takes some seconds of Triton's compiling; where that fails it goes on without, saying so."""
        from fastnst.fused import on_device, warn_of

        if self._fast is not False:
            try:
                from fastnst.nvidia import NvidiaPass

                self._fast = self._fast or NvidiaPass(self.network, self._device, self._dtype)
                with on_device(self._device):
                    return self._fast(x, pixels)
            except Exception as error:  # compilers raise many kinds
                if is_out_of_memory(error):
                    raise
                self._fast = False
                warn_of(error)
        return self.compute(x, pixels)

    def compute(self, x: Any, pixels: Pixels) -> Any:
        """A pass in torch's own steps, neither counted nor recorded."""
        import torch
        import torch.nn.functional as F

        config = self.network.info.network
        with torch.inference_mode():
            x = x.permute(0, 3, 1, 2).float() if pixels == "uint8" else x * 255
            x = (x - (PIXEL_SHIFT if minds_ground(self.network) else x.mean(dim=(2, 3), keepdim=True).round())).to(self._dtype)  # whole numbers are exact
            height, width = x.shape[-2:]
            missing = [config.missing(width), config.missing(height)]
            if any(missing):
                x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
            if config.start_padding:
                x = F.pad(x, [config.start_padding] * 4, mode="reflect")
            x = self._pad(0, x).contiguous(memory_format=self._layout)
            before: tuple[Any, int] = (x, 0)  # the input of the stage before, and by how much it is padded
            for stage, tensors, following in zip(self.network.stages, self._stages, [*self.network.stages[1:], None]):
                skip = (before[0], before[1] + stage.shave) if stage.skip else None
                before, x = (x, stage.padding), self._convolve(stage, tensors, x)
                padding = (following.padding, following.padding_mode) if following else (0, "constant")
                x = _norm(x, tensors["norm_weight"], tensors["norm_bias"], stage.relu, skip, *padding)
            x = x[..., :height, :width].float()
            if config.output == "tanh":
                x = 127.5 + 150 * torch.tanh(x)
            elif config.output == "sigmoid":
                x = 255 * torch.sigmoid(x)
            x = x.clamp_(0, 255)
            return x.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous() if pixels == "uint8" else x / 255

    def _pad(self, index: int, x: Any, above: int | None = None, below: int | None = None) -> Any:
        """A tensor as a stage's convolution takes it."""
        import torch.nn.functional as F

        stage = self.network.stages[index]
        if not stage.padding:
            return x
        sides = [stage.padding if side is None else side for side in (above, below)]
        return F.pad(x, [stage.padding] * 2 + sides, mode=stage.padding_mode, **({"value": stage.value} if stage.padding_mode == "constant" else {}))

    def _convolve(self, stage: Stage, tensors: dict[str, Any], x: Any) -> Any:
        """Of what is padded already."""
        import torch.nn.functional as F

        if stage.transposed:
            return F.conv_transpose2d(x, tensors["weight"], tensors["bias"], stride=2, padding=1 + 2 * stage.padding)
        x = F.conv2d(x, tensors["weight"], tensors["bias"], stride=stage.stride)
        return F.pixel_shuffle(x, stage.shuffle) if stage.shuffle > 1 else x

    def stage(self, index, rows, gain, shift, above, below, statistics):
        import torch

        self._last, self._recording = (), None  # whose memory nothing else may use
        with torch.inference_mode():
            x = torch.from_numpy(rows).to(self._device)
            if gain is not None:
                gain, shift = (torch.from_numpy(array).to(self._device)[:, None, None] for array in (gain, shift))
                x = x * gain + shift
                x = x.relu_() if self.network.stages[index - 1].relu else x
            x = self._convolve(self.network.stages[index], self._stages[index], self._pad(index, x.to(self._dtype), above, below)).float()
            if not statistics:
                return (x.cpu().numpy(),)
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            return x.cpu().numpy(), mean.cpu().numpy(), variance.cpu().numpy()


def _norm(x: Any, weight: Any, bias: Any, relu: bool, skip: tuple[Any, int] | None, padding: int, mode: str) -> Any:
    """Norm, ReLU, sum with what is ``skip``, padding, step by step; without a ``weight`` there is no norm."""
    import torch.nn.functional as F

    if weight is not None:
        x = F.instance_norm(x, weight=weight, bias=bias, eps=EPSILON)
    if relu:
        x = x.relu_()
    if skip:
        other, inset = skip
        x = x.add_(other[..., inset : other.shape[2] - inset, inset : other.shape[3] - inset])
    return F.pad(x, [padding] * 4, mode=mode) if padding else x


@cache
def openvino_core():
    """OpenVINO's core, one for the life of the process: the last one takes its plugin out of memory, and the next fork crashed then.

    It keeps the kernels that it made for a size of picture, by default without end: 0.2 to 0.4 MB more for each new size of a folder.
    64 of them, for some three sizes, are as fast.
    """
    import openvino

    core = openvino.Core()
    with suppress(RuntimeError):  # not in the list of its options: a later version may do without
        core.set_property("CPU", {"CPU_RUNTIME_CACHE_CAPACITY": "64"})
    return core


def onnx_graph():
    """The module, imported when it is first needed: torch alone can do without the onnx package."""
    from fastnst import onnx_graph

    return onnx_graph


def _cpu_precision(engine: str, precision: str) -> str:
    there = {"native": ("float32",), "openvino": ("float32", "bfloat16", "int8"), "onnxruntime": ("float32",), "torch": ("float32", "bfloat16")}[engine]
    if engine == "native" and multiplies_pairs():
        there = ("float32", "bfloat16")
    if precision == "auto":
        return "bfloat16" if "bfloat16" in there and multiplies_bfloat16() else "float32"
    if precision not in there:
        raise ValueError(f"--precision {precision} is not there on a CPU with --engine {engine}; use {', '.join(['auto', *there[:-1]])} or {there[-1]}")
    return precision
