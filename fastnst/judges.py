"""Neutral judges: how near a picture is to painting and photo, as loss networks see it that the model was not trained against.

A network that learned to please its own loss network may please it alone (as Goodhart has it).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst.loss_network import LossNetwork, LossNetworkConfig, load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, calibrate

# The content layer and the style layers of each network: those of the recipes, but for vgg19_slim, which recipes train against: there others, as far as it has them.
_VGG = ("relu3_3", ("relu1_2", "relu2_2", "relu3_3"))
_SQUEEZENET = ("fire4", ("relu1", "fire3", "fire5", "fire7"))
JUDGE_LAYERS = {
    "vgg16": _VGG,
    "vgg19": _VGG,
    "vgg19_slim": ("relu3_1", ("relu1_1", "relu2_1", "relu3_1", "relu4_1")),
    "squeezenet1_0": _SQUEEZENET,
    "squeezenet1_1": _SQUEEZENET,
}


@dataclass(frozen=True)
class Judge:
    """A loss network with its standing layers; see ``load_judge``."""

    config: LossConfig
    loss_network: LossNetwork

    @property
    def name(self) -> str:
        return self.config.network

    @torch.no_grad()
    def distances(self, photo: Tensor, painting: Tensor, stylized: Tensor) -> dict[str, float]:
        """Of one picture ``(1, 3, H, W)``. ``style``: 0 for the painting's own statistics, 1 for the photo as it was, averaged over
        the layers. ``content``: 0 for the photo, 1 for the photo moved by half its size, a like photo of other content.
        """
        loss = PerceptualLoss(self.loss_network, self.config, painting)
        loss.config = calibrate(loss, photo)
        terms = loss(stylized, loss.content_targets(photo))
        return {"style": float(sum(terms.style.values())), "content": float(sum(terms.content.values()))}


def load_judge(config: LossNetworkConfig, device: torch.device = torch.device("cpu")) -> Judge:
    """The judge that looks through this loss network. Raises as ``load_loss_network``."""
    content, style = JUDGE_LAYERS[config.network]
    # Calibration at strength 5 multiplies style by 10: 0.1 makes the photo's own distance 1.
    loss = LossConfig(**config.model_dump(), strength=5, style_weight=0.1, content_layers={content: 1.0}, style_layers=dict.fromkeys(style, 1.0))
    return Judge(loss, load_loss_network(loss, loss.layers, f"--judge {config.network}").to(device))
