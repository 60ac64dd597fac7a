"""Picture <-> tensor ``(1, 3, H, W)``, RGB, float32 in [0, 1], the convention of the whole package."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastnst.picture import ImageSize, open_rgb, save_picture


def to_tensor(image: Image.Image) -> Tensor:
    """Mode RGB -> ``(1, 3, H, W)``, mode L -> ``(1, 1, H, W)``; float32 in [0, 1]."""
    return to_uint8(image)[None].float().div_(255)


def to_uint8(image: Image.Image) -> Tensor:
    """Mode RGB -> ``(3, H, W)``, mode L -> ``(1, H, W)``; uint8."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """``(1, C, H, W)`` or ``(C, H, W)``, C 3 or 1, in [0, 1] -> mode RGB or L; clamped and rounded."""
    image = image.detach()[0] if image.ndim == 4 else image.detach()
    pixels = image.float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels[0].numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def load_image(path: str | Path, size: ImageSize = ImageSize()) -> Tensor:
    """``(1, 3, H, W)`` RGB in [0, 1], scaled to ``size``; alpha is dropped. Raises as ``open_rgb``."""
    image, _ = open_rgb(path)
    return resize(to_tensor(image), size.of(image.height, image.width))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, clamped to [0, 1]; a no-op when ``size`` is ``(H, W)`` already."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write ``(1, 3, H, W)`` in [0, 1], atomically, in the format of the suffix. Raises as ``save_picture``."""
    save_picture(to_pil(image), path)
