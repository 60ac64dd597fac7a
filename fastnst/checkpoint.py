"""The network as a model file, for inference, and as a training state, for resuming.

Both are written atomically and read without executing code.
"""

import io
import pickle
import platform
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from fastnst import __version__
from fastnst.files import atomic_write
from fastnst.model import ModelInfo, damaged, read_model, write_model
from fastnst.network import TransformNetwork
from fastnst.runtime import first_line, in_one_line

STATE_NAME = "training_state.pt"


class Optimizer(Protocol):
    """What a training asks of one: torch's are such, and ours, which are none of torch's."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_model(
    path: str | Path,
    network: TransformNetwork,
    step: int,
    recipe: dict[str, Any],
    thumbnail: Image.Image | None = None,
    half: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the model file; ``thumbnail`` is a small picture of the style; ``half`` halves the file; ``weights`` are those of a ``snapshot``, none: as they are now."""
    dtype = torch.float16 if half else torch.float32
    arrays = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous().numpy() for name, tensor in (weights or network.state_dict()).items()}
    versions = {"fastnst": __version__, "torch": torch.__version__, "python": platform.python_version()}
    write_model(path, arrays, ModelInfo(network.config, step, recipe, versions, thumbnail))


def load_model(path: str | Path) -> tuple[TransformNetwork, ModelInfo]:
    """The network of a model file, in evaluation mode on the CPU, and what the file says of itself. Raises as ``read_model``."""
    weights, info = read_model(path)
    network = TransformNetwork(info.network)
    try:
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    except RuntimeError as error:
        raise damaged(Path(path), error) from error
    return network.eval(), info


def snapshot(network: nn.Module, optimizer: Optimizer, step: int, watchdog: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run has learned up to ``step``, and the numbers by which it is watched: a copy on the CPU, which the next steps do not change."""
    state = {"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict(), "watchdog": watchdog}
    tensors = list(_tensors(state))
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return _replaced(state, iter([tensor.detach().clone() for tensor in tensors] if on_cpu else _moved(tensors)))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from _tensors(value)


def _moved(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU, by one transfer for each type: the 250 tensors of a training took 60 ms one by one."""
    copies: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        alike = {index: tensor for index, tensor in enumerate(tensors) if tensor.dtype == dtype}
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in alike.values()])
        copies |= {index: part.view(tensor.shape) for (index, tensor), part in zip(alike.items(), parts)}
    return [copies[index] for index in range(len(tensors))]


def _replaced(state: Any, by: Iterator[Tensor]) -> Any:
    """The same, its tensors one after the other ``by`` others."""
    if isinstance(state, Tensor):
        return next(by)
    if isinstance(state, dict):
        return {key: _replaced(value, by) for key, value in state.items()}
    return [_replaced(value, by) for value in state] if isinstance(state, list) else state


def save_training_state(
    path: str | Path,
    learned: dict[str, Any],
    unreadable: dict[str, str],
    loss: dict[str, Any] | None = None,
    photos: tuple[int, str] | None = None,
    style: str | None = None,
) -> None:
    """Write all that a run needs to go on exactly: what it has ``learned`` (``snapshot``), the unreadable photos met, the loss as calibrated,
    how many photos it learns from, with what tells these from others, and what tells its ``style`` image from another.

    There is no random state to keep: photo order and crops are functions of the seed and the step.
    """
    buffer = io.BytesIO()
    torch.save(learned | {"unreadable": unreadable, "loss": loss, "photos": photos, "style": style}, buffer)  # into a file it would raise no OSError where the disk is full
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_training_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save_training_state`` wrote. Raises ``FileNotFoundError``, ``PermissionError``, or ``ValueError`` naming the file when it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no training state at {path}; a training leaves it beside the model, and is neither resumed nor published without")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        kinds = {"step": int, "network": dict, "optimizer": dict, "unreadable": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
        if wrong:
            raise ValueError(f"no usable {', '.join(wrong)}")
        with zipfile.ZipFile(path) as written:
            if written.testzip():  # which torch does not ask
                raise ValueError("its bytes are not those that were written")
        if not all(tensor.isfinite().all() for tensor in _tensors([state["network"], state["optimizer"]])):
            raise ValueError("it holds numbers that are not finite")
    except PermissionError:
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"  # torch then advises to load it as code
        raise ValueError(f"{path}: damaged or not a training state{why}; choose another --run-dir") from error
    return state


def restore(path: Path, state: dict[str, Any], network: nn.Module, optimizer: Optimizer) -> None:
    """Put a loaded training state into ``network`` and ``optimizer``. Raises ``ValueError`` naming the file where it does not fit."""
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit this network ({in_one_line(error)}); choose another --run-dir to begin anew") from error
