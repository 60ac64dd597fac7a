"""What runs a staged network: the engine in C, OpenVINO or ONNX Runtime on a CPU, without torch; torch on a GPU, or where nothing else is installed.

All engines take and give the same arrays, ``(N, H, W, 3)`` uint8 or ``(N, 3, H, W)`` float32 in [0, 1], and the same pictures.
"""

import importlib.util
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fastnst.model import damaged, read_model
from fastnst.native_library import multiplies_pairs
from fastnst.runtime import cpu_precision, gpu_is_likely, multiplies_bfloat16
from fastnst.stages import StagedNetwork, fold

ENGINES = ("auto", "native", "openvino", "onnxruntime", "torch")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
Pixels = Literal["uint8", "float"]


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
        """Stylize ``(N, H, W, 3)`` uint8 (``pixels`` uint8), or ``(N, 3, H, W)`` float32 in [0, 1] (float): the same kind and size.

        On another device than the CPU it also takes ``grain``, which is added there."""

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
        from fastnst.onnx_graph import load_onnx

        return load_onnx(model)
    weights, info = read_model(model)
    try:
        return fold(weights, info)
    except (KeyError, ValueError, IndexError) as error:
        raise damaged(Path(model), error) from error


def load_engine(network: StagedNetwork, device: str = "auto", engine: str = "auto", precision: str = "auto") -> Engine:
    """The engine asked for; ``auto`` is the one that measures best of those installed, in the fastest precision of at least 45 dB for photos.

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
        from fastnst.torch_engine import TorchEngine

        return TorchEngine(network, "cpu" if on_cpu else device, precision)
    if not on_cpu:
        raise ValueError(f"--engine {engine} computes on the CPU, got --device {device}; use --engine torch, or --device cpu")
    if not is_installed(engine):
        if engine == "native":
            raise ValueError("--engine native was not compiled when fastnst was installed, or has changed since; install a C compiler (gcc or clang; Windows needs none), then fastnst again")
        raise ValueError(f"--engine {engine} is not installed; install it with: pip install 'fastnst[{engine}]'")
    if engine == "native":
        from fastnst.native import NativeEngine

        return NativeEngine(network, cpu_precision(engine, ("float32", "bfloat16") if multiplies_pairs() else ("float32",), precision))
    from fastnst.graph_engine import OnnxRuntimeEngine, OpenVinoEngine

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
