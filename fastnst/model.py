"""The model file: weights for inference, and what they are. Without torch.

A model file explains itself: network config, recipe, step, versions and a thumbnail of the style stand in its metadata.
It is written atomically and read without executing code.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastnst import __version__
from fastnst.config import Config, ConfigError, validate_config
from fastnst.files import atomic_write
from fastnst.runtime import in_one_line

MODEL_FORMAT = "fastnst-model-1"
MODEL_NAME = "model.safetensors"


class NetworkConfig(Config):
    """Size and shape of a ``TransformNetwork``; stored in the model file."""

    width: int = Field(32, ge=1, le=512, description="filters of the first layer; the blocks have 4 times as many")
    residual_blocks: int = Field(5, ge=0, le=32)
    norm: Literal["instance", "batch"] = "instance"
    padding: Literal["reflect", "replicate", "zeros", "start"] = "reflect"
    upsampling: Literal["nearest", "bilinear", "transposed", "subpixel"] = "nearest"
    stem: Literal["full", "half"] = Field("full", description="resolution of the first and last layer; half is the lean network")
    output: Literal["tanh", "sigmoid", "linear"] = "tanh"
    output_scale: float = Field(0.125, gt=0, description="multiplies the last convolution, ahead of `output`")

    @property
    def start_padding(self) -> int:
        """Pixels that the blocks shave off each side with ``padding: start``, two 3x3 convolutions at quarter size each; else 0."""
        return 2 * 4 * self.residual_blocks if self.padding == "start" else 0

    @property
    def smallest_side(self) -> int:
        """Smaller images are padded to this side, so that reflection and instance statistics are defined."""
        return max(16, self.start_padding + 2)

    @property
    def multiple(self) -> int:
        """Sides are padded by replication to a multiple of this, so that no row or column is lost to a stride."""
        return 2 if self.stem == "half" else 1

    def missing(self, side: int) -> int:
        """Pixels that a side of an image lacks to both, by which it is padded at its end by replication."""
        return max(self.smallest_side - side, -side % self.multiple)


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself. ``recipe`` is the resolved training config, with paths cut to file names."""

    network: NetworkConfig
    step: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    thumbnail: Image.Image | None


def write_model(path: str | Path, weights: dict[str, np.ndarray], info: ModelInfo) -> None:
    """Write the model file, its thumbnail as JPEG. Raises ``OSError`` naming it."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(weights, model_metadata(info)))  # by Python, so that a full disk is an OSError


def read_model(path: str | Path) -> tuple[dict[str, np.ndarray], ModelInfo]:
    """The weights of a model file, floats as float32, and what the file says of itself.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the model file, such as {path / MODEL_NAME}")
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the latter for types that numpy lacks
        raise ValueError(f"{path}: not a readable safetensors file ({error}); is it damaged, or another project's .pth?") from error
    info = parse_metadata(metadata, path)
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in weights.items()}, info


def model_metadata(info: ModelInfo) -> dict[str, str]:
    """What a model file, in whichever format, says of itself."""
    metadata = {
        "format": MODEL_FORMAT,
        "network": info.network.model_dump_json(),
        "step": str(info.step),
        "recipe": json.dumps(info.recipe),
        "versions": json.dumps(info.versions),
    }
    if info.thumbnail is not None:
        buffer = io.BytesIO()
        info.thumbnail.save(buffer, "JPEG", quality=85)
        metadata["style_thumbnail"] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return metadata


def parse_metadata(metadata: dict[str, str], path: Path) -> ModelInfo:
    """What ``model_metadata`` wrote. Raises ``ValueError`` naming ``path``."""
    if metadata.get("format") != MODEL_FORMAT:
        raise ValueError(f"{path}: not a fastnst model file: its metadata has format {metadata.get('format')!r}, need {MODEL_FORMAT!r}")
    try:
        config = validate_config(NetworkConfig, json.loads(metadata["network"]), source="network")
        thumbnail = Image.open(io.BytesIO(base64.b64decode(metadata["style_thumbnail"]))) if "style_thumbnail" in metadata else None
        recipe, versions = (json.loads(metadata[name]) for name in ("recipe", "versions"))
        if not (isinstance(recipe, dict) and isinstance(versions, dict)):
            raise ValueError("its recipe or versions are no maps")
        return ModelInfo(config, int(metadata["step"]), recipe, versions, thumbnail)
    except (KeyError, ValueError, ConfigError, OSError, RecursionError, Image.DecompressionBombError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a model file whose parts do not fit together."""
    return ValueError(f"{path}: the model file is damaged or of a newer fastnst than {__version__} ({in_one_line(error, 300)})")
