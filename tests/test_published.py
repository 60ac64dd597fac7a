"""The step to beat takes photos and losses as pytorch/examples does."""

import numpy as np
import torch
import torch.nn.functional as F
from conftest import TOY_LOSS, synthetic_photo

from fastnst.losses import LossConfig
from fastnst.model import NetworkConfig
from fastnst.published import PUBLISHED, CenterCrops, PublishedStep, Task


def test_photos_are_the_middle_of_the_short_side(tmp_path):
    photo = synthetic_photo(3, 96, 32)
    photo.save(tmp_path / "a.png")
    assert np.array_equal(CenterCrops([tmp_path / "a.png"], 32)[0].permute(1, 2, 0), np.asarray(photo)[:, 32:64])


def test_the_loss_is_that_of_neural_style_py(tmp_path):
    """By its own formulas: mse_loss of features, of Grams F F^T / (C H W), in turn weighted; before the step."""
    loss = LossConfig(**TOY_LOSS | {"content_weight": 3.0})
    step = PublishedStep(Task(NetworkConfig(width=4, residual_blocks=1, output="linear", output_scale=1), loss, tmp_path, size=32, batch=2), PUBLISHED)
    photos = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def gram(features):
        n, c, h, w = features.shape
        return torch.stack([one.reshape(c, -1) @ one.reshape(c, -1).T / (c * h * w) for one in features])

    with torch.no_grad():
        x = photos.float() / 255
        of_y, of_x, of_style = (step.loss_network(images, step.layers) for images in (step.network(x), x, step.task.style().expand(2, -1, -1, -1)))
        wanted = 3 * F.mse_loss(of_y["relu2_2"], of_x["relu2_2"]) + 100 * sum(F.mse_loss(gram(of_y[layer]), gram(of_style[layer])) for layer in ("relu1_2", "relu2_2"))
    before = [parameter.clone() for parameter in step.network.parameters()]
    assert abs(step(photos) / float(wanted) - 1) < 1e-4
    assert all(0 < (now - then).abs().max() < 1.001e-3 for now, then in zip(step.network.parameters(), before))  # Adam's first step: the rate, 1e-3, at most
