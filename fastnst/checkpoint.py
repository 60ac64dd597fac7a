"""The two artefacts of a training: the model file for inference and the training state for resuming.

A model file explains itself: network config, recipe, step, versions and a thumbnail of the style stand in its metadata.
Both are written atomically and read without executing code.
"""

import base64
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastnst import __version__
from fastnst.config import ConfigError, validate_config
from fastnst.files import atomic_write
from fastnst.network import NetworkConfig, TransformNetwork

MODEL_FORMAT = "fastnst-model-1"
MODEL_NAME, STATE_NAME = "model.safetensors", "training_state.pt"


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself. ``recipe`` is the resolved training config, with paths cut to file names."""

    network: NetworkConfig
    step: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    thumbnail: Image.Image | None


def save_model(path: str | Path, network: TransformNetwork, step: int, recipe: dict[str, Any], thumbnail: Image.Image | None = None, half: bool = False) -> None:
    """Write the model file; ``thumbnail`` is a small picture of the style, stored as JPEG; ``half`` halves the file."""
    metadata = {
        "format": MODEL_FORMAT,
        "network": network.config.model_dump_json(),
        "step": str(step),
        "recipe": json.dumps(recipe),
        "versions": json.dumps({"fastnst": __version__, "torch": torch.__version__, "python": platform.python_version()}),
    }
    if thumbnail is not None:
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG", quality=85)
        metadata["style_thumbnail"] = base64.b64encode(buffer.getvalue()).decode("ascii")
    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous() for name, tensor in network.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # by Python, so that a full disk is an OSError


def load_model(path: str | Path) -> tuple[TransformNetwork, ModelInfo]:
    """The network of a model file, in evaluation mode on the CPU, and what the file says of itself.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the model file, such as {path / MODEL_NAME}")
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); is it damaged, or another project's .pth?") from error
    if metadata.get("format") != MODEL_FORMAT:
        raise ValueError(f"{path}: not a fastnst model file: its metadata has format {metadata.get('format')!r}, need {MODEL_FORMAT!r}")
    try:
        config = validate_config(NetworkConfig, json.loads(metadata["network"]), source="network")
        info = ModelInfo(config, int(metadata["step"]), json.loads(metadata["recipe"]), json.loads(metadata["versions"]), _thumbnail(metadata))
        network = TransformNetwork(config)
        network.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    except (KeyError, ValueError, ConfigError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: the model file is damaged or of a newer fastnst than {__version__} ({' '.join(str(error).split())[:300]})") from error
    return network.eval(), info


def _thumbnail(metadata: dict[str, str]) -> Image.Image | None:
    if "style_thumbnail" not in metadata:
        return None
    return Image.open(io.BytesIO(base64.b64decode(metadata["style_thumbnail"])))


def save_training_state(
    path: str | Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, unreadable: dict[str, str], loss: dict[str, Any] | None = None
) -> None:
    """Write all that a run needs to go on exactly: weights, optimizer, step, the unreadable photos met, the loss as calibrated.

    There is no random state to keep: photo order and crops are functions of the seed and the step.
    """
    state = {"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict(), "unreadable": unreadable, "loss": loss}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_training_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save_training_state`` wrote. Raises ``ValueError`` naming the file when it is damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        kinds = {"step": int, "network": dict, "optimizer": dict, "unreadable": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
        if wrong:
            raise ValueError(f"no usable {', '.join(wrong)}")
    except Exception as error:  # torch raises many kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged or not a training state ({reason}); choose another --run-dir to begin anew") from error
    return state


def restore(path: Path, state: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a loaded training state into ``network`` and ``optimizer``. Raises ``ValueError`` naming the file where it does not fit."""
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit this network ({reason}); choose another --run-dir to begin anew") from error
