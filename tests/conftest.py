"""Shared fixtures: tiny synthetic photos, a painting, a toy objective without downloads, and the optional shared folder."""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst import winograd
from fastnst.native_build import CPUS, IS_X86
from fastnst.native_library import multiplies_pairs

torch.set_num_threads(min(2, torch.get_num_threads()))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # asked for when Triton is imported: kernels for GPUs are interpreted then

REPOSITORY = Path(__file__).resolve().parents[1]
PAIRS_ALONE = pytest.mark.skipif(not multiplies_pairs(), reason="this CPU, or its compiler, has no vectors of bfloat16, or better")

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


@pytest.fixture(scope="session", params=CPUS.values(), ids=CPUS)
def library(request, tmp_path_factory):
    """The compiled code as each kind of CPU has it, one after the other; of those that this one can run."""
    if request.param and not IS_X86:
        pytest.skip("another kind of CPU")
    compiler, built = (sysconfig.get_config_var("CC") or "cc").split()[0], tmp_path_factory.mktemp("native") / "other.so"
    if sys.platform == "win32" and not shutil.which(compiler):
        pytest.skip(f"no C compiler called {compiler}")
    flags = ["-O2", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC", *request.param]
    subprocess.run([compiler, *flags, *map(str, sorted((REPOSITORY / "fastnst").glob("*.c"))), "-o", str(built)], check=True)
    found = ctypes.CDLL(str(built))
    if not found.fastnst_runs_here():
        pytest.skip("this CPU has no such instructions")
    return found


@pytest.fixture
def native_however_small(monkeypatch):
    """Convolutions of training, of which torch has the small ones, as they are small in tests."""
    monkeypatch.setattr(winograd, "_SMALLEST", 0)
    monkeypatch.setattr(winograd, "_LEAST_WORK", 0)


@pytest.fixture
def whole_float32(monkeypatch):
    """No convolution in TF32, which a GPU takes for float32 otherwise, with 10 bits instead of 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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


def write_clip(path: Path, frames, times=None, *, rate=25, codec="libx264", pix_fmt="yuv420p", sound: str | None = None, sound_until: int | None = None, **stream_attributes) -> Path:
    """A small video. ``frames``: uint8 RGB arrays, or tuples of planes as they are to be stored; ``times``: in ms, one more than frames.

    ``sound``: the codec of a 440 Hz tone as long as the video, or until ``sound_until`` ms. Quality is the best that the codec has.
    """
    av = pytest.importorskip("av")
    times = times or [round(1000 * index / rate) for index in range(len(frames) + 1)]
    options = {"libx264": {"crf": "1", "preset": "ultrafast", "bf": "0", "g": "1"}}.get(codec, {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        first = frames[0][0] if isinstance(frames[0], tuple) else frames[0]
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pix_fmt
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for name, value in stream_attributes.items():
            setattr(stream.codec_context, name, value)
        tone = container.add_stream(sound, rate=48_000, layout="mono") if sound else None
        packets = []
        for index, frame in enumerate(frames):
            if isinstance(frame, tuple):
                picture = av.VideoFrame(first.shape[1], first.shape[0], pix_fmt)
                for plane, values in zip(picture.planes, frame, strict=True):
                    rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                    rows[:, : values.shape[1]] = values
                    plane.update(rows.tobytes())
            else:
                picture = av.VideoFrame.from_ndarray(frame).reformat(format=pix_fmt)
            picture.pts, picture.time_base = times[index], Fraction(1, 1000)
            packets += stream.encode(picture)
        for packet in packets + stream.encode(None):
            index = times.index(packet.pts)
            packet.duration = times[index + 1] - times[index]
            container.mux(packet)
        if tone:
            wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(48 * ((sound_until or times[-1]) - times[0])) / 48_000)).astype(np.float32)
            for begin in range(0, len(wave), 1024):
                piece = av.AudioFrame.from_ndarray(wave[None, begin : begin + 1024], format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 48_000, begin + 48 * times[0], Fraction(1, 48_000)
                container.mux(tone.encode(piece))
            container.mux(tone.encode(None))
    return path


def moving_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A smooth picture that moves by 2 px a frame, each a little brighter than the one before."""
    wide = np.asarray(synthetic_photo(5, width + 2 * count, height)).astype(np.int16)
    return [np.clip(wide[:, 2 * index : 2 * index + width] // 2 + 2 * index, 0, 255).astype(np.uint8) for index in range(count)]
