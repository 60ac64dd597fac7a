"""A training step as pytorch/examples' ``neural_style.py`` takes it, written anew to be measured against; each thing that we do otherwise may be given to it alone."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork, plainly
from fastnst.runtime import autocast, resolve_precision


@dataclass(frozen=True)
class Task:
    """What both sides train: one network, one objective, one folder of photos."""

    network: NetworkConfig
    loss: LossConfig
    content: Path
    size: int = 256
    batch: int = 4
    device: str = "cpu"

    def style(self) -> Tensor:
        """A painting of random colours, ``(1, 3, S, S)``: no speed depends on which."""
        coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return F.interpolate(coarse, size=(self.size, self.size), mode="bicubic").clamp(0, 1)

    def start(self) -> TransformNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TransformNetwork(self.network)


@dataclass(frozen=True)
class Way:
    """Which of ours a step has: none is the published step, all is ours."""

    name: str
    precision: str = "float32"
    keep_memory: bool = False
    ours: bool = False  # our step: objective, network and everything compiled for them
    compile: bool = False
    channels_last: bool = False
    fused_adam: bool = False
    kept_photos: bool = False


PUBLISHED = Way("published")


class PublishedStep:
    """pytorch/examples' ``neural_style.py``, written anew: the whole loss network over both images, all of its layers taken, the
    style's Grams repeated over the batch, ``.item()`` at every step."""

    def __init__(self, task: Task, way: Way) -> None:
        self.task, self.device, self.precision = task, torch.device(task.device), resolve_precision(way.precision, torch.device(task.device))
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self.network = task.start().to(self.device, memory_format=layout)
        plainly(self.network)
        for module in self.network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # theirs are not
        self.layers = task.loss.layers
        self.loss_network = plainly(load_loss_network(task.loss, self.layers).to(self.device, memory_format=layout))
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3, fused=True if way.fused_adam else None)
        with torch.no_grad():
            features = self.loss_network(task.style().to(self.device).repeat(task.batch, 1, 1, 1), self.layers)
            self.style_grams = {layer: self._gram(features[layer]) for layer in task.loss.style_layers}
        self.losses = torch.compile(self._losses) if way.compile else self._losses

    def __call__(self, photos: Tensor) -> float:
        """uint8 ``(N, 3, S, S)`` -> the loss before this step."""
        self.optimizer.zero_grad()
        with autocast(self.device, self.precision):
            content, style = self.losses(photos.to(self.device).float() / 255)
        total = content + style
        total.backward()
        self.optimizer.step()
        return content.item() + style.item()

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.task.loss
        y = self.network(x)
        features_y, features_x = self.loss_network(y, self.layers), self.loss_network(x, self.layers)
        content = sum(loss.content_weight * weight * F.mse_loss(features_y[layer], features_x[layer]) for layer, weight in loss.content_layers.items())
        style = 0.0
        for layer, weight in loss.style_layers.items():
            style = style + weight * F.mse_loss(self._gram(features_y[layer]), self.style_grams[layer][: len(x)])
        return content, loss.style_weight * style

    @staticmethod
    def _gram(features: Tensor) -> Tensor:
        n, c, h, w = features.shape
        with torch.autocast(features.device.type, enabled=False):
            flat = features.view(n, c, h * w) if features.is_contiguous() else features.reshape(n, c, h * w)
            flat = flat.float()
            return flat.bmm(flat.transpose(1, 2)) / (c * h * w)


class CenterCrops(Dataset):
    """As pytorch/examples loads photos: Pillow, the short side to ``size``, and the middle of it; here uint8 ``(3, S, S)``."""

    def __init__(self, photos: list[Path], size: int) -> None:
        self.photos, self.transform = photos, Compose([Resize(size), CenterCrop(size), PILToTensor()])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.photos[index]) as file:
            return self.transform(file.convert("RGB"))
