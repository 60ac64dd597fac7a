"""The runs of explicit optimization that a model is measured against, kept on disk: made once, found ever after.

A run is named after everything that decides it (photo, painting, loss and its network's weights, start, iterations) and after
no file, so that any model of the same painting and loss is measured by it.
"""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastnst.files import write_text
from fastnst.image import save_image
from fastnst.loss_network import LossNetwork
from fastnst.losses import LossConfig, PerceptualLoss


class Optimize(Protocol):
    """Lower ``loss`` over the pixels of ``content``, starting there or from ``noise``, keeping them in [0, 1].

    ``report`` gets ``step``, ``losses`` and ``seconds`` at every iteration from 0 to the last.
    """

    def __call__(
        self,
        content: Tensor,
        style: Tensor,
        loss_network: LossNetwork,
        loss: LossConfig,
        start: str,
        iterations: int,
        report: Callable,
        should_stop: Callable[[], bool],
    ) -> Tensor: ...


@dataclass(frozen=True)
class OptimizerRun:
    """``objective[k]`` and ``seconds[k]`` after k iterations, from 0 to the last; ``picture`` is the file of the last image."""

    objective: list[float]
    seconds: list[float]
    machine: str
    picture: Path


@dataclass(frozen=True)
class PlannedRun:
    """A run, made or not. ``photo``: ``(3, H, W)`` uint8; ``painting`` is the style image that ``loss`` aims at."""

    photo: Tensor
    painting: Tensor
    loss: PerceptualLoss
    start: str
    iterations: int
    cache: Path

    @cached_property
    def file(self) -> Path:
        loss, network = self.loss.config.model_dump(exclude={"weights"}), self.loss.loss_network
        for name in ("grid_weight", "spectrum_weight", "stability_weight", "padding"):  # runs from before there were these are found as ever
            if loss[name] == LossConfig.model_fields[name].default:
                del loss[name]
        settings = [loss, network.mean.tolist(), network.std.tolist(), self.start, self.iterations, list(self.photo.shape), list(self.painting.shape)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for tensor in (self.photo, self.painting, *network.state_dict().values()):
            digest.update(tensor.cpu().numpy().tobytes())
        return self.cache / f"{self.photo.shape[-1]}px_{self.start}_{self.iterations}_{digest.hexdigest()[:20]}.json"

    @property
    def cost(self) -> int:
        """Iterations times thousands of pixels."""
        return self.iterations * self.photo[0].numel() // 1000

    def make(self, optimize: Optimize, progress: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
        """Optimize and write the file and its picture; false, and nothing written, when stopped on the way."""
        objective: dict[int, float] = {}
        seconds: dict[int, float] = {}

        def watch(seen) -> None:
            if seen.losses:
                objective[seen.step] = seen.losses["loss/total"]  # of the image after so many steps ...
                seconds[min(seen.step + 1, self.iterations)] = round(seen.seconds, 4)  # ... told when the step that follows is done
                progress(seen.step * self.photo[0].numel() // 1000)

        device = self.painting.device
        content = self.photo[None].to(device).float() / 255
        picture = optimize(content, self.painting, self.loss.loss_network, self.loss.config, self.start, self.iterations, watch, should_stop)
        if self.iterations not in objective:
            return False
        save_image(picture, self.file.with_suffix(".png"))
        kept = {"objective": [objective[k] for k in range(self.iterations + 1)], "seconds": [0.0, *(seconds[k] for k in range(1, self.iterations + 1))]}
        write_text(self.file, json.dumps(kept | {"machine": machine(device)}))
        return True


def read_run(file: Path) -> OptimizerRun:
    """What ``PlannedRun.make`` wrote. Raises ``ValueError`` naming a damaged file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return OptimizerRun(data["objective"], data["seconds"], data["machine"], file.with_suffix(".png"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); remove it and run again") from error


def worth(objective: float, curve: Sequence[float]) -> float:
    """After how many iterations ``curve`` first is as low as ``objective``; ``math.inf`` where it never is.

    Interpolated on the logarithm of the iteration between the two around it; below the first iteration linearly.
    """
    for iteration, value in enumerate(curve):
        if value <= objective:
            if iteration == 0:
                return 0.0
            share = (curve[iteration - 1] - objective) / (curve[iteration - 1] - value)
            return share if iteration == 1 else (iteration - 1) * (iteration / (iteration - 1)) ** share
    return math.inf


def machine(device: torch.device) -> str:
    """Where times are taken."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}" + (f", threads: {torch.get_num_threads()}" if device.type == "cpu" else "")
