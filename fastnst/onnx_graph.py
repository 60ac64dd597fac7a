"""Stages as ONNX graphs: the whole network, or one stage alone for tiles; and ONNX model files that explain themselves."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastnst.eight_bits import EightBits
from fastnst.files import atomic_write
from fastnst.model import model_metadata, parse_metadata
from fastnst.runtime import cpu_threads, in_one_line
from fastnst.stages import EPSILON, PAD_MODES, PIXEL_SHIFT, Stage, StagedNetwork, describe, less_flat, minds_ground, restore_stages, rounding

_OPSET = 17  # the first with everything used here; ONNX Runtime from 1.12 on reads it


def onnx_session(model: str | bytes) -> Any:
    """ONNX Runtime's session on the CPU for a file, or for what it holds. It sends nothing home, unless the user has set ``ORT_DISABLE_TELEMETRY`` otherwise."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on it gave each machine an identifier and told Microsoft of sessions; read when it is imported
    import onnxruntime

    if sys.platform == "win32":  # where the variable does nothing, and earlier versions tell of sessions, too, by the system's events
        onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_threads()
    options.log_severity_level = 3  # it warns of constants that it folded itself
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _Graph:
    """Nodes and constants, named as they come."""

    def __init__(self, arrays: dict[str, np.ndarray] | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.names = {id(array): name for name, array in (arrays or {}).items()}

    def constant(self, array: np.ndarray) -> str:
        name = self.names.get(id(array), f"constant.{len(self.constants)}")
        self.constants[name] = np.asarray(array)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def float(self, value: float) -> str:
        return self.constant(np.float32(value))

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes) -> str:
        output = output or f"{kind.lower()}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def finish(self, inputs: list, outputs: list, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "fastnst", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8, producer_name="fastnst")
        helper.set_model_props(model, metadata or {})
        return model


def network_graph(network: StagedNetwork, pixels: str = "uint8", metadata: dict[str, str] | None = None, int8: list[EightBits | None] | None = None, norms_by_rows: bool = False) -> onnx.ModelProto:
    """The whole network, any batch, height and width from 1 up.

    ``pixels``: ``uint8`` takes and gives ``(N, H, W, 3)`` of 0..255 named ``pixels`` and ``stylized``; ``float`` takes and
    gives ``(N, 3, H, W)`` in [0, 1]. ``int8``: of the convolutions that multiply 8-bit numbers, what these stand for. ``norms_by_rows``:
    norms are spelled out, with sums of rows first, for engines that would lose digits by adding all numbers to one.
    """
    stages = less_flat(network)
    arrays, _ = describe(network)
    g, config = _Graph(arrays), network.info.network
    if pixels == "uint8":
        x = g.add("Cast", "pixels", to=TensorProto.FLOAT)
        x = g.add("Transpose", x, perm=[0, 3, 1, 2])
    else:
        x = g.add("Mul", "pixels", g.float(255))
    x = g.add("Sub", x, g.float(PIXEL_SHIFT))
    size = g.add("Slice", g.add("Shape", x), g.ints(2), g.ints(4))
    missing = g.add("Max", g.add("Sub", g.ints(config.smallest_side), size), g.add("Mod", g.add("Neg", size), g.ints(config.multiple)))
    x = g.add("Pad", x, g.add("Concat", g.ints(0, 0, 0, 0, 0, 0), missing, axis=0), mode="edge")
    if config.start_padding:
        s = config.start_padding
        x = g.add("Pad", x, g.ints(0, 0, s, s, 0, 0, s, s), mode="reflect")
    if not minds_ground(network):
        x = g.add("Sub", x, g.add("Round", _mean(g, x)))  # still whole numbers
    values = [x]  # what went into each stage, and out of the last
    for stage, numbers, least in zip(stages, int8 or [None] * len(network.stages), rounding(network)):
        x = _convolution(g, stage, values[-1], numbers=numbers)
        if stage.norm_weight is not None:
            x = _norm_by_rows(g, x, stage, least) if norms_by_rows else _norm(g, x, stage.norm_weight, stage.norm_bias)
        if stage.relu:
            x = g.add("Relu", x)
        if stage.skip:
            s, skipped = stage.shave, values[-2]
            x = g.add("Add", x, g.add("Slice", skipped, g.ints(s, s), g.ints(-s, -s), g.ints(2, 3)) if s else skipped)
        values.append(x)
    x = g.add("Slice", x, g.ints(0, 0), size, g.ints(2, 3))
    x = _output(g, config.output, x)
    if pixels == "uint8":
        x = g.add("Cast", g.add("Round", x), to=TensorProto.UINT8)
        g.add("Transpose", x, perm=[0, 2, 3, 1], output="stylized")
    else:
        g.add("Div", x, g.float(255), output="stylized")
    kind, shape = (TensorProto.UINT8, ["batch", "height", "width", 3]) if pixels == "uint8" else (TensorProto.FLOAT, ["batch", 3, "height", "width"])
    return g.finish([helper.make_tensor_value_info("pixels", kind, shape)], [helper.make_tensor_value_info("stylized", kind, shape)], metadata)


def stage_graph(stage: Stage, before: Stage | None, statistics: bool) -> onnx.ModelProto:
    """One stage's convolution on rows of a picture, for tiles: ``rows``, ``gain``, ``shift``, ``padding`` -> ``raw``, ``mean``, ``variance``.

    ``rows`` is ``(1, C, h, W)``; ``gain`` and ``shift``, ``(1, C, 1, 1)``, apply the norm of the stage ``before``, whose ReLU follows;
    ``padding``, where the stage has some, is the 8 amounts of ONNX's Pad; ``raw`` is not normalized; ``mean`` and ``variance``, given for ``statistics``, are its
    channels', ``(1, C, 1, 1)``.
    """
    g = _Graph()
    x = "rows"
    if before is not None:
        x = g.add("Add", g.add("Mul", x, "gain"), "shift")
        x = g.add("Relu", x) if before.relu else x
    x = _convolution(g, stage, x, "padding")
    g.add("Identity", x, output="raw")
    if statistics:
        _mean(g, x, output="mean")
        _mean_square(g, g.add("Sub", x, "mean"), output="variance")
    inputs = stage.weight.shape[0 if stage.transposed else 1]
    f, rows = TensorProto.FLOAT, [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, inputs, "height", "width"])]
    if before is not None:
        rows += [helper.make_tensor_value_info(name, f, [1, inputs, 1, 1]) for name in ("gain", "shift")]
    if stage.padding:
        rows.append(helper.make_tensor_value_info("padding", TensorProto.INT64, [8]))
    outputs = [helper.make_tensor_value_info("raw", f, [1, stage.channels, "rows_out", "columns_out"])]
    if statistics:
        outputs += [helper.make_tensor_value_info(name, f, [1, stage.channels, 1, 1]) for name in ("mean", "variance")]
    return g.finish(rows, outputs)


def _convolution(g: _Graph, stage: Stage, x: str, padding: str | None = None, numbers: EightBits | None = None) -> str:
    crop = 1 + 2 * stage.padding  # of a transposed convolution
    if stage.transposed and stage.padding_mode == "constant" and padding is None:
        crop = 1  # zeros beyond the border are what it sees anyway; OpenVINO 2026.4 folds a Pad of zeros into it wrongly
    elif stage.padding:
        p = stage.padding
        x = g.add("Pad", x, padding or g.ints(0, 0, p, p, 0, 0, p, p), g.float(stage.value), mode=PAD_MODES[stage.padding_mode])
    x, weight = (x, g.constant(stage.weight)) if numbers is None else _quantized(g, numbers, x)
    inputs = [x, weight] + ([g.constant(stage.bias)] if stage.bias is not None else [])
    if stage.transposed:
        return g.add("ConvTranspose", *inputs, strides=[2, 2], pads=[crop] * 4)
    x = g.add("Conv", *inputs, strides=[stage.stride, stage.stride])
    return g.add("DepthToSpace", x, blocksize=stage.shuffle, mode="CRD") if stage.shuffle > 1 else x


def _norm(g: _Graph, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
    return g.add("InstanceNormalization", x, g.constant(weight), g.constant(bias), epsilon=EPSILON)


def _norm_by_rows(g: _Graph, x: str, stage: Stage, least: np.ndarray) -> str:
    """``least``: the variance of what is more than rounding, ``(C,)``."""
    weight, bias = stage.norm_weight, stage.norm_bias
    mean = _mean(g, x)
    variance = g.add("Max", g.add("Sub", _mean_square(g, x), g.add("Mul", mean, mean)), g.float(0))
    gain = g.add("Div", g.constant(weight[:, None, None]), g.add("Sqrt", g.add("Add", variance, g.float(EPSILON))))
    if least.any():
        gain = g.add("Where", g.add("Less", variance, g.constant(least[:, None, None].astype(np.float32))), g.float(0), gain)
    return g.add("Add", g.add("Mul", x, gain), g.add("Sub", g.constant(bias[:, None, None]), g.add("Mul", mean, gain)))


def _mean(g: _Graph, x: str, output: str | None = None) -> str:
    """Of each channel, ``(N, C, 1, 1)``, rows first: sums of a thousand numbers keep the digits that a sum of a million loses. Means of rows are *added up* and divided:
    a mean of means OpenVINO makes one over all."""
    rows = g.add("ReduceMean", x, axes=[3], keepdims=1)
    return g.add("Div", g.add("ReduceSum", rows, g.ints(2), keepdims=1), _side(g, x, 2), output=output)


def _mean_square(g: _Graph, x: str, output: str | None = None) -> str:
    """Likewise."""
    lengths = g.add("ReduceL2", x, axes=[3], keepdims=1)
    return g.add("ReduceMean", g.add("Div", g.add("Mul", lengths, lengths), _side(g, x, 3)), axes=[2], keepdims=1, output=output)


def _side(g: _Graph, x: str, axis: int) -> str:
    return g.add("Cast", g.add("Shape", x, start=axis, end=axis + 1), to=TensorProto.FLOAT)


def _quantized(g: _Graph, numbers: EightBits, x: str) -> tuple[str, str]:
    """Input and weight as what 8-bit numbers stand for."""
    input_is = [g.constant(numbers.scale), g.constant(numbers.zero)]
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", x, *input_is), *input_is)
    scales = numbers.weight_scales
    return x, g.add("DequantizeLinear", g.constant(numbers.weight), g.constant(scales), g.constant(np.zeros(scales.size, np.int8)), axis=numbers.axis)


def _output(g: _Graph, kind: str, x: str) -> str:
    if kind == "tanh":
        x = g.add("Add", g.add("Mul", g.add("Tanh", x), g.float(150)), g.float(127.5))
    elif kind == "sigmoid":
        x = g.add("Mul", g.add("Sigmoid", x), g.float(255))
    return g.add("Clip", x, g.float(0), g.float(255))


def save_onnx(path: str | Path, network: StagedNetwork, pixels: str = "uint8") -> None:
    """Write the whole network with the model's metadata, atomically."""
    _, rest = describe(network)
    model = network_graph(network, pixels, model_metadata(network.info) | {"stages": rest, "pixels": pixels})
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def load_onnx(path: str | Path) -> StagedNetwork:
    """The network of a file that ``save_onnx`` wrote. Raises ``FileNotFoundError``, or ``ValueError`` naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own kinds
        raise ValueError(f"{path}: not a readable ONNX file ({in_one_line(error)})") from error
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    info = parse_metadata(metadata, path)
    try:
        return restore_stages({constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}, metadata["stages"], info)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not an ONNX file that this fastnst exported ({error})") from error
