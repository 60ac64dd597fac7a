"""Shared fixtures: tiny synthetic photos, a painting, a toy objective without downloads, and the optional shared folder."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(min(2, torch.get_num_threads()))

REPOSITORY = Path(__file__).resolve().parents[1]

# A loss network with random filters: no download, a few milliseconds.
TOY_LOSS = {
    "network": "vgg16",
    "weights": "random",
    "content_layers": {"relu2_2": 1.0},
    "style_layers": {"relu1_2": 1.0, "relu2_2": 1.0},
    "style_weight": 100.0,
}


def synthetic_photo(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture with one random rectangle: reproducible, unlike any other seed's."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    phases = rng.uniform(0, 6.28, size=(3, 1, 1))
    waves = np.sin(columns / rng.uniform(4, 20) + phases) + np.cos(rows / rng.uniform(4, 20) + phases)
    pixels = ((waves + 2) * 63.75).transpose(1, 2, 0)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    pixels[top : top + height // 3, left : left + width // 3] = rng.uniform(0, 255, size=3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where photo caches go while testing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "fastnst"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 12 photos of different sizes and formats, one in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index in range(11):
        synthetic_photo(index, 60 + 3 * index, 50 + index).save(folder / f"photo_{index:02d}.{('jpg', 'png', 'webp')[index % 3]}")
    synthetic_photo(11, 40, 90).save(folder / "more" / "photo_11.bmp")
    return folder


@pytest.fixture
def painting(tmp_path: Path) -> Path:
    """A colourful style image."""
    path = tmp_path / "painting.png"
    rng = np.random.default_rng(99)
    Image.fromarray(rng.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)).resize((128, 96), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def train_data(photos: Path, painting: Path) -> dict:
    """A complete training config as plain data, with all sizes tiny: 0.1 s a step."""
    return {
        "style": {"image": str(painting), "long_side": 64},
        "data": {"content": str(photos), "crop_size": 32, "workers": 0, "validation_photos": 2},
        "network": {"width": 4, "residual_blocks": 1},
        "loss": dict(TOY_LOSS),
        "train": {"steps": 6, "batch_size": 2, "log_every": 2, "validate_every": 3, "save_every": 2, "precision": "float32"},
    }


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, photos and paintings that ``FASTNST_SHARED`` names; skips where there is none."""
    folder = os.environ.get("FASTNST_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real weights and photos: set FASTNST_SHARED to their folder")
    return Path(folder).resolve()
