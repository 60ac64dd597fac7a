"""Write a model as ONNX, and run the file that was written beside torch."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastnst.checkpoint import load_model
from fastnst.engine import Pixels, load_network
from fastnst.files import atomic_write, check_output
from fastnst.onnx_graph import onnx_session, save_onnx

PARITY_SIZES = ((64, 64), (123, 201), (257, 130))  # height and width; odd ones among them
_LEVELS = 1.0  # of 255: where a value lies between two, float32 may round it either way


@dataclass(frozen=True)
class Parity:
    """How the exported file compares with torch at one size: the largest difference in levels of 255, and milliseconds of both."""

    height: int
    width: int
    difference: float
    onnx_ms: float
    torch_ms: float


def export(model: str | Path, output: str | Path, pixels: Pixels = "uint8", overwrite: bool = False) -> list[Parity]:
    """Write ``output`` (ONNX, any batch, height and width) and compare it with torch's eager float32 at ``PARITY_SIZES``.

    ``pixels`` as in ``network_graph``. Raises as ``check_output``, and ``ArithmeticError`` (nothing is written) when the two differ by more than a level.
    """
    output = Path(output)
    if output.suffix.lower() != ".onnx":
        raise ValueError(f"--output {output}: need a name that ends in .onnx")
    check_output(output, [model], overwrite)
    network, _ = load_model(model)
    with atomic_write(output) as temporary:  # what differs never takes the place of what was there
        save_onnx(temporary, load_network(model), pixels)
        session = onnx_session(str(temporary))
        found = [_compare(network, session, pixels, *size) for size in PARITY_SIZES]
        worst = max(found, key=lambda parity: parity.difference)
        if not worst.difference <= _LEVELS:
            raise ArithmeticError(f"{output} would differ from torch by {worst.difference:.3g} of 255 at {worst.width}x{worst.height}, more than {_LEVELS:g}: not written")
    return found


@torch.inference_mode()
def _compare(network: torch.nn.Module, session, pixels: Pixels, height: int, width: int) -> Parity:
    picture = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255
    given = picture if pixels == "uint8" else images.numpy()
    expected, torch_ms = _timed(lambda: network(images).clamp(0, 1).mul(255))
    (got,), onnx_ms = _timed(lambda: session.run(None, {"pixels": given}))
    got = torch.from_numpy(got).permute(0, 3, 1, 2).float() if pixels == "uint8" else torch.from_numpy(got) * 255
    expected = expected.round() if pixels == "uint8" else expected
    return Parity(height, width, float((got - expected).abs().max()), onnx_ms, torch_ms)


def _timed(call):
    call()
    began = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - began) * 1000
