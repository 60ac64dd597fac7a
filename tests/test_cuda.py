"""What only a GPU can show; skipped, saying so, where there is none."""

import numpy as np
import pytest
import torch
from test_gradient import cut, objective, photos

from fastnst import Stylizer
from fastnst.benchmark_inference import psnr
from fastnst.checkpoint import save_model
from fastnst.config import validate_config
from fastnst.data import DataConfig, PhotoStream, list_photos, training_batches
from fastnst.engine import load_engine, load_network
from fastnst.gradient import Gradient
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.train import TrainConfig, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:.*going on slower"),  # neither Triton nor a CUDA graph may fail
]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_model(path, TransformNetwork(NetworkConfig(width=8, residual_blocks=2)), step=1, recipe={})
    return path


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 64, 48, 3), (3, 37, 51, 3)])
def test_recorded_passes_are_the_eager_ones_and_near_those_of_the_cpu(model, precision, shape):
    engine = load_engine(load_network(model), "cuda", "torch", precision)
    wanted = load_engine(load_network(model), "cpu", "torch", "float32")
    for seed in range(12):  # the first are eager, the eighth records, the others replay what it recorded
        pictures = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        found = engine.run(pictures)
        eager = engine.compute(torch.from_numpy(pictures).cuda(), "uint8").cpu().numpy()
        assert (psnr(found, eager) or 99) > {"float32": 60, "float16": 50, "bfloat16": 40}[precision]
        assert (psnr(found, wanted.run(pictures)) or 99) > {"float32": 60, "float16": 45, "bfloat16": 35}[precision]


def test_recording_leaves_the_libraries_settings_and_uses_them(model, monkeypatch):
    engine = load_engine(load_network(model), "cuda", "torch")
    seen, compute = [], engine.compute_fast
    monkeypatch.setattr(engine, "compute_fast", lambda *given: seen.append(torch.backends.cudnn.enabled) or compute(*given))
    for _ in range(9):
        engine.run(np.zeros((1, 32, 32, 3), np.uint8))
    assert engine._recording is not None and all(seen) and not torch.backends.cudnn.benchmark


def test_tensors_on_the_gpu_are_stylized_there(model):
    engine = load_engine(load_network(model), "cuda", "torch")
    images = [torch.rand(2, 3, 33, 40, device="cuda") for _ in range(12)]
    found = [engine.run_tensor(one, "float") for one in images]
    assert all(one.is_cuda and (one - engine.compute(other, "float")).abs().max() < 0.02 for one, other in zip(found, images))


def test_grain_is_that_of_the_cpu_eager_and_recorded(model):
    here, there, without = (Stylizer.from_file(model, device, "torch", "float32", grain=grain) for device, grain in (("cpu", 0.5), ("cuda", 0.5), ("cuda", 0.0)))
    down, across = np.mgrid[:48, :64]
    pictures = [(2 * down + across + 5 * step).astype(np.uint8)[..., None].repeat(3, axis=2) // 64 * 64 for step in range(12)]
    found = [there(picture) for picture in pictures]
    for picture, stylized in zip(pictures, found):
        assert np.abs(stylized.astype(int) - here(picture)).mean() < 0.1 < np.abs(stylized.astype(int) - without(picture)).mean()
    tensors = [torch.from_numpy(picture).cuda().permute(2, 0, 1)[None] / 255 for picture in pictures]
    for tensor, stylized in zip([there(tensor) for tensor in tensors], found):
        assert np.abs((tensor[0].permute(1, 2, 0) * 255).cpu().numpy() - stylized).max() <= 1.01


def test_results_are_not_overwritten_by_the_next_pass(model):
    engine = load_engine(load_network(model), "cuda", "torch")
    pictures = [np.random.default_rng(seed).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8) for seed in range(12)]
    found = [engine.run(one) for one in pictures]
    assert all(np.abs(engine.run(one).astype(int) - result).max() <= 1 for one, result in zip(pictures, found))


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 0.1}], ids=str)
@pytest.mark.parametrize("network", [{}, {"upsampling": "transposed"}, {"upsampling": "subpixel", "stem": "half"}, {"upsampling": "bilinear"}], ids=str)
def test_recorded_gradients_are_the_eager_ones(network, options):
    said: list[str] = []
    eager, recorded = (Gradient(objective("cuda", **network), 4, record=record, say=said.append, **options) for record in (False, True))
    for step in range(6):  # with a cut and without, at other places of other photos
        logged = [dict(zip(names, numbers.tolist())) for names, numbers in (each(photos(step), cut(step)) for each in (eager, recorded))]
        assert logged[1] == pytest.approx(logged[0], rel=0.01, abs=1e-4)
        flat = [torch.cat([parameter.grad.flatten() for parameter in each.objective.network.parameters()]) for each in (eager, recorded)]
        assert (flat[0] - flat[1]).norm() < 0.01 * flat[0].norm()
    assert len(recorded._recordings) == 2 and not said


def test_two_recordings_share_their_memory():
    gradient, reserved = Gradient(objective("cuda", width=32), 4), []
    for step in (0, 1):
        gradient(torch.zeros(4, 3, 256, 256, dtype=torch.uint8), cut(step))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] < 1.3 * reserved[0]


def test_photos_are_copied_to_the_gpu_ahead_and_whole(photos):
    config = DataConfig(content=photos, crop_size=32, workers=0)
    source = PhotoStream(list_photos(config).train, config, seed=7)
    with training_batches(source, 0, 3, 12) as batches:
        wanted = [images for images, _ in batches]
    with training_batches(source, 0, 3, 12, torch.device("cuda")) as batches:
        found = [images * 1 for images, _ in batches]
    assert len(found) == 12 and all(one.is_cuda and torch.equal(one.cpu(), other) for one, other in zip(found, wanted))


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "learning_rate": {"initial": 4e-3}}, {"precision": "bfloat16"}, {"compile": "on"}], ids=str)
def test_training_on_the_gpu_goes_as_on_the_cpu(train_data, tmp_path, changes):
    train_data["train"] |= {"steps": 6} | changes
    config = validate_config(TrainConfig, train_data)
    ends = [train(config, tmp_path / device, torch.device(device)).validation["validation/total"] for device in ("cpu", "cuda")]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
