"""What runs a staged network: OpenVINO or ONNX Runtime on a CPU, without torch; torch on a GPU, or where nothing else is installed.

All engines take and give the same arrays, ``(N, H, W, 3)`` uint8 or ``(N, 3, H, W)`` float32 in [0, 1], and the same pictures.
"""

import importlib.util
from functools import cache, cached_property
from typing import Any, Literal, Protocol

import numpy as np

from fastnst.runtime import cpu_flags, cpu_threads, gpu_is_likely, resolve_device
from fastnst.stages import EPSILON, PIXEL_SHIFT, Stage, StagedNetwork

ENGINES = ("auto", "openvino", "onnxruntime", "torch")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
Pixels = Literal["uint8", "float"]


class Engine(Protocol):
    """A network on a device; thread-safe for one caller at a time."""

    name: str
    device: str
    precision: str
    network: StagedNetwork

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        """Stylize ``(N, H, W, 3)`` uint8 (``pixels`` uint8), or ``(N, 3, H, W)`` float32 in [0, 1] (float): the same kind and size."""

    def stage(self, index: int, rows: np.ndarray, gain: np.ndarray | None, shift: np.ndarray | None, above: int, below: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One stage's convolution on rows of a picture, for tiles.

        ``rows``, ``(1, C, h, W)``, are not normalized yet: ``gain`` and ``shift``, ``(C,)``, then the ReLU of the stage before
        come first (None: they are as they should be). The picture ends at their top where ``above`` is the stage's padding (else 0),
        and ``below`` likewise. Gives the convolution's output, not normalized, and its channels' means and variances, ``(C,)``.
        """


def load_engine(network: StagedNetwork, device: str = "auto", engine: str = "auto", precision: str = "auto") -> Engine:
    """The engine asked for; ``auto`` is the one that measures best of those installed, in the fastest precision of at least 45 dB.

    That is torch on a GPU in float16; on a CPU OpenVINO, in bfloat16 where the CPU multiplies it, then ONNX Runtime, then torch.
    Raises ``ValueError`` naming what is not there and how to mend it.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine: got {engine!r}, need one of {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: got {precision!r}, need one of {', '.join(PRECISIONS)}")
    on_cpu = device == "cpu" or (device == "auto" and (engine in ("openvino", "onnxruntime") or not gpu_is_likely()))
    if engine == "auto":
        engine = next((name for name in ("openvino", "onnxruntime") if on_cpu and is_installed(name)), "torch")
    if engine == "torch":
        return TorchEngine(network, "cpu" if on_cpu else device, precision)
    if not on_cpu:
        raise ValueError(f"--engine {engine} computes on the CPU, got --device {device}; use --engine torch, or --device cpu")
    if not is_installed(engine):
        raise ValueError(f"--engine {engine} is not installed; install it with: pip install 'fastnst[{engine}]'")
    return (OpenVinoEngine if engine == "openvino" else OnnxRuntimeEngine)(network, precision)


def is_installed(engine: str) -> bool:
    """Whether all that an engine needs can be imported."""
    return all(importlib.util.find_spec(package) for package in ([engine] if engine == "torch" else [engine, "onnx"]))


class OpenVinoEngine:
    """OpenVINO on a CPU."""

    name, device = "openvino", "cpu"

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        import openvino

        self.network = network
        self.precision = _cpu_precision(self.name, precision)
        self._core = openvino.Core()
        self._run = cache(self._whole)
        self._stage = cache(self._alone)

    def _compile(self, model: Any) -> Any:
        hint = {"float32": "f32", "bfloat16": "bf16"}[self.precision]
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cpu_threads(), "PERFORMANCE_HINT": "LATENCY"}
        return self._core.compile_model(self._core.read_model(model.SerializeToString()), "CPU", options).create_infer_request()

    def _whole(self, pixels: Pixels) -> Any:
        from fastnst.onnx_graph import network_graph

        return self._compile(network_graph(self.network, pixels))

    def _alone(self, index: int) -> Any:
        from fastnst.onnx_graph import stage_graph

        return self._compile(stage_graph(self.network.stages[index], self.network.stages[index - 1] if index else None))

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        return self._run(pixels).infer({"pixels": np.ascontiguousarray(pictures)}, share_inputs=True)["stylized"]

    def stage(self, index, rows, gain, shift, above, below):
        found = self._stage(index).infer(_stage_inputs(self.network.stages[index], rows, gain, shift, above, below, bool(index)), share_inputs=True)
        return found["raw"], found["mean"].ravel(), found["variance"].ravel()


class OnnxRuntimeEngine:
    """ONNX Runtime on a CPU."""

    name, device = "onnxruntime", "cpu"

    def __init__(self, network: StagedNetwork, precision: str = "auto") -> None:
        self.network = network
        self.precision = _cpu_precision(self.name, precision)
        self._run = cache(self._whole)
        self._stage = cache(self._alone)

    def _session(self, model: Any) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        options.log_severity_level = 3  # it warns of constants that it folded itself
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _whole(self, pixels: Pixels) -> Any:
        from fastnst.onnx_graph import network_graph

        return self._session(network_graph(self.network, pixels))

    def _alone(self, index: int) -> Any:
        from fastnst.onnx_graph import stage_graph

        return self._session(stage_graph(self.network.stages[index], self.network.stages[index - 1] if index else None))

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        return self._run(pixels).run(["stylized"], {"pixels": np.ascontiguousarray(pictures)})[0]

    def stage(self, index, rows, gain, shift, above, below):
        inputs = _stage_inputs(self.network.stages[index], rows, gain, shift, above, below, bool(index))
        raw, mean, variance = self._stage(index).run(["raw", "mean", "variance"], inputs)
        return raw, mean.ravel(), variance.ravel()


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
        elif precision == "auto":
            precision = "float16" if self._device.type == "cuda" else "float32"
        self.precision = precision
        self._dtype = getattr(torch, precision)
        self._layout = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format

    @cached_property
    def _stages(self) -> list[dict[str, Any]]:
        """The stages' arrays on the device."""
        import torch

        found = []
        for stage in self.network.stages:
            arrays = {name: getattr(stage, name) for name in ("weight", "bias", "norm_weight", "norm_bias")}
            tensors = {name: None if array is None else torch.from_numpy(array).to(self._device, self._dtype) for name, array in arrays.items()}
            tensors["weight"] = tensors["weight"].contiguous(memory_format=self._layout)
            found.append(tensors)
        return found

    def run(self, pictures: np.ndarray, pixels: Pixels = "uint8") -> np.ndarray:
        import torch

        x = torch.from_numpy(np.ascontiguousarray(pictures)).to(self._device, non_blocking=True)
        return self.run_tensor(x, pixels).cpu().numpy()

    def run_tensor(self, x: Any, pixels: Pixels) -> Any:
        """``run`` for tensors on the device of the engine."""
        import torch
        import torch.nn.functional as F

        config = self.network.info.network
        with torch.inference_mode():
            x = x.permute(0, 3, 1, 2).float() if pixels == "uint8" else x * 255
            height, width = x.shape[-2:]
            x = (x - PIXEL_SHIFT).to(self._dtype)
            missing = [max(0, config.smallest_side - side) for side in (width, height)]
            if any(missing):
                x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
            if config.start_padding:
                x = F.pad(x, [config.start_padding] * 4, mode="reflect")
            before, x = None, x.contiguous(memory_format=self._layout)
            for stage, tensors in zip(self.network.stages, self._stages):
                after = self._convolve(stage, tensors, x, stage.padding, stage.padding)
                if stage.norm_weight is not None:
                    after = F.instance_norm(after, weight=tensors["norm_weight"], bias=tensors["norm_bias"], eps=EPSILON)
                if stage.relu:
                    after = after.relu_()
                if stage.skip:
                    s = stage.shave
                    after = after.add_(before[..., s:-s, s:-s] if s else before)
                before, x = x, after
            x = x[..., :height, :width].float()
            if config.output == "tanh":
                x = 127.5 + 150 * torch.tanh(x)
            elif config.output == "sigmoid":
                x = 255 * torch.sigmoid(x)
            x = x.clamp_(0, 255)
            return x.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous() if pixels == "uint8" else x / 255

    def _convolve(self, stage: Stage, tensors: dict[str, Any], x: Any, above: int, below: int) -> Any:
        import torch.nn.functional as F

        if stage.padding:
            amounts = [stage.padding, stage.padding, above, below]
            x = F.pad(x, amounts, mode=stage.padding_mode, **({"value": stage.value} if stage.padding_mode == "constant" else {}))
        if stage.transposed:
            return F.conv_transpose2d(x, tensors["weight"], tensors["bias"], stride=2, padding=1 + 2 * stage.padding)
        x = F.conv2d(x, tensors["weight"], tensors["bias"], stride=stage.stride)
        return F.pixel_shuffle(x, stage.shuffle) if stage.shuffle > 1 else x

    def stage(self, index, rows, gain, shift, above, below):
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(rows).to(self._device)
            if gain is not None:
                gain, shift = (torch.from_numpy(array).to(self._device)[:, None, None] for array in (gain, shift))
                x = x * gain + shift
                x = x.relu_() if self.network.stages[index - 1].relu else x
            x = self._convolve(self.network.stages[index], self._stages[index], x.to(self._dtype), above, below).float()
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            return x.cpu().numpy(), mean.cpu().numpy(), variance.cpu().numpy()


def _stage_inputs(stage: Stage, rows: np.ndarray, gain: np.ndarray | None, shift: np.ndarray | None, above: int, below: int, normed: bool) -> dict[str, np.ndarray]:
    inputs = {"rows": rows, "padding": np.array([0, 0, above, stage.padding, 0, 0, below, stage.padding], np.int64)}
    if normed:
        count = rows.shape[1]
        inputs["gain"] = (np.ones(count, np.float32) if gain is None else gain).reshape(1, -1, 1, 1)
        inputs["shift"] = (np.zeros(count, np.float32) if shift is None else shift).reshape(1, -1, 1, 1)
    return inputs


def _cpu_precision(engine: str, precision: str) -> str:
    if precision == "auto":
        return "bfloat16" if engine != "onnxruntime" and {"avx512_bf16", "amx_bf16"} & cpu_flags() else "float32"
    if precision == "float16" or (precision == "bfloat16" and engine == "onnxruntime"):
        raise ValueError(f"--precision {precision} is not there on a CPU with --engine {engine}; use auto, float32{'' if engine == 'onnxruntime' else ' or bfloat16'}")
    return precision
