"""Applying a model: every kind of picture in and out, and files as a user has them."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAIRS_ALONE, moving_frames, synthetic_photo, write_clip
from PIL import Image
from test_stages import staged

import fastnst
from fastnst.checkpoint import save_model
from fastnst.cli import run
from fastnst.image import to_tensor
from fastnst.jobs import Job
from fastnst.engine import load_engine
from fastnst.grain import GRAIN, add_grain
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.picture import ImageSize
from fastnst.stylize import Stylizer, _shows_rounding, stylize_files


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model file with random weights."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    save_model(path, TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), 7, {})
    return path


@pytest.fixture(scope="module")
def stylizer(model) -> Stylizer:
    return Stylizer.from_file(model, "cpu", precision="float32")


@pytest.mark.parametrize(
    "engine, precision",
    [
        ("native", "float32"),
        pytest.param("native", "bfloat16", marks=PAIRS_ALONE),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
        ("openvino", "int8"),
        ("onnxruntime", "float32"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    ],
)
def test_a_picture_of_one_color_stays_one(engine, precision):
    """Its deviations are rounding, which a network's norms would make a pattern of, 30 levels deep in bfloat16; its neighbours in a batch are untouched."""
    from fastnst.cli import shipped_styles

    stylizer = Stylizer.from_file(shipped_styles()["mosaic_sun"], "cpu", engine, precision)
    photo, gray, black = np.asarray(synthetic_photo(0, 80, 64)), np.full((64, 80, 3), 200, np.uint8), np.zeros((64, 80, 3), np.uint8)
    pictures = np.stack([photo, gray, black, black])
    stylized = stylizer(pictures)
    assert not stylized[1:].std(axis=(1, 2)).any()
    add_grain(pictures[0], GRAIN)
    assert np.array_equal(stylized[0], stylizer.engine.run(pictures)[0])
    flat = [[value.std() for value in one] for one in stylizer(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)]
    assert min(flat[0]) > 0.01 and np.max(flat[1:]) < 1e-6
    assert np.abs(np.subtract(stylized[1], Stylizer.from_file(shipped_styles()["mosaic_sun"], "cpu", "native", "float32")(gray), dtype=float)).max() <= 1


RAMP = np.repeat(np.arange(0, 256, 2, np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)  # (64, 128, 3), 2 levels a pixel


def test_what_shows_rounding_is_told_from_photos():
    photo, plain = np.asarray(synthetic_photo(0, 80, 64)), np.full((64, 80, 3), 200, np.uint8)
    plain[8:16, 20:30] = 90  # a thing on a plain ground
    half = plain.copy()
    half[:, 20:40] = photo[:, 20:40]  # a quarter of it a photo
    blurred = np.asarray(Image.fromarray(photo).resize((4, 3)).resize((160, 120), Image.Resampling.BICUBIC))
    stripes, squares = np.zeros((2, 64, 80, 3), np.uint8)
    stripes[:, ::2], squares[::2, ::2], squares[1::2, 1::2] = 255, 255, 255
    threes, fours = (np.resize(np.array(levels, np.uint8), 80)[None, :, None].repeat(64, axis=0).repeat(3, axis=2) for levels in ((30, 90, 220), (127, 227, 127, 27)))
    smooth = [threes, fours, plain, plain.astype(np.float32), plain[:, :2], plain[:1], RAMP, RAMP.transpose(1, 0, 2), RAMP[:, :40] * np.float32(0.3), blurred, stripes, squares]
    assert [_shows_rounding(picture) for picture in smooth] == [True] * len(smooth)
    assert [_shows_rounding(picture) for picture in (photo, half, photo * np.float32(0.5))] == [False] * 3
    # A wave of 16 px bends by |2 cos(pi / 4) - 2| = 0.586 of itself over 2 px to either side, RMS 0.414 of its amplitude: 1.7 and 3.3 levels.
    waves = [np.float32(128 + amplitude * np.cos(np.arange(80) * np.pi / 8))[None, :, None].repeat(64, axis=0).repeat(3, axis=2) for amplitude in (4, 8)]
    assert [_shows_rounding(picture) for picture in waves] == [True, False]


@pytest.mark.parametrize("engine", [pytest.param("native", marks=PAIRS_ALONE), "openvino", "torch"])
def test_what_shows_rounding_is_float32(engine):
    """To a level, where bfloat16 by itself is some 40 off; alone, beside a photo, as a tensor, and in strips."""
    from fastnst.cli import shipped_styles

    path = shipped_styles()["mosaic_sun"]
    stylizer, exact = (Stylizer.from_file(path, "cpu", engine, precision) for precision in ("bfloat16", "float32"))
    photo = np.asarray(synthetic_photo(0, 128, 64))
    expected, of_photo = exact(RAMP), stylizer(photo)
    for found in (stylizer(RAMP), stylizer(np.stack([photo, RAMP, photo]))[1], Stylizer(stylizer.engine, tile=32)(RAMP)):
        assert np.abs(found.astype(int) - expected).max() <= 1
    both = torch.from_numpy(np.stack([photo, RAMP])).permute(0, 3, 1, 2) / 255
    of_both = (stylizer(both) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(of_both[1] - expected).max() <= 1.01
    grained = both.permute(0, 2, 3, 1).numpy() * 255
    add_grain(grained[0], GRAIN)
    assert np.array_equal(stylizer(both)[0].numpy(), stylizer.engine.run(grained.transpose(0, 3, 1, 2) / 255, "float")[0])
    assert np.abs(of_photo.astype(int) - exact(photo)).max() > 1  # which is not


@pytest.mark.parametrize("engine", ["native", "openvino", "onnxruntime", "torch"])
def test_tensors_may_be_written_to_and_learned_from(model, engine):
    stylized = Stylizer.from_file(model, "cpu", engine)(torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0)))
    weight = torch.ones(1, requires_grad=True)
    (stylized.mul_(2) * weight).sum().backward()
    assert weight.grad == stylized.sum()


def test_a_fade_is_computed_once(monkeypatch):
    """What a network with norms makes of one color is the same for all, where padding is no constant."""
    from fastnst import stylize

    computed, tiled = [], stylize.stylize_tiled
    monkeypatch.setattr(stylize, "stylize_tiled", lambda *given: computed.append(1) or tiled(*given))
    for options, expected in (({}, 1), ({"padding": "zeros"}, 3)):
        network = staged(**options)[1]
        stylizer = Stylizer(load_engine(network, "cpu", "native", "float32"))
        frames = [stylizer(np.full((20, 24, 3), level, np.uint8)) for level in (0, 90, 200)]
        assert len(computed) == expected
        computed.clear()
        assert np.array_equal(frames[2], load_engine(network, "cpu", "native", "float32").run(np.full((1, 20, 24, 3), 200, np.uint8))[0])


def stylize_file(stylizer, source, target, size=ImageSize()):
    (done,) = stylize_files(stylizer, [Job(source, target)], size)
    if done.error:
        raise done.error


@pytest.fixture
def stylize_command(model):
    """The command in this process: ``stylize_command("--input", ...)`` gives its exit code."""
    main = importlib.import_module("fastnst.scripts.stylize").main
    return lambda *arguments: run(main, ["--model", str(model), "--device", "cpu", *map(str, arguments)])


# What comes out


@pytest.mark.parametrize("height, width", [(48, 64), (37, 53), (1, 1), (2, 301), (17, 16)])
def test_any_size_comes_out_as_it_went_in(stylizer, height, width):
    images = torch.rand(1, 3, height, width)
    stylized = stylizer(images)
    assert stylized.shape == images.shape
    assert stylized.isfinite().all() and stylized.min() >= 0 and stylized.max() <= 1


def test_the_picture_given_is_left_alone(stylizer):
    images = torch.rand(1, 3, 20, 20)
    before = images.clone()
    stylizer(images)
    assert torch.equal(images, before)


def test_a_batch_is_stylized_as_its_pictures_one_by_one(stylizer):
    images = torch.rand(3, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    singly = torch.cat([stylizer(image[None]) for image in images])
    torch.testing.assert_close(stylizer(images), singly, atol=1e-5, rtol=0)


def test_the_package_offers_the_stylizer(model):
    stylizer = fastnst.Stylizer.from_file(model, "cpu")
    assert stylizer.info.step == 7
    with pytest.raises(AttributeError, match="Trainer"):
        fastnst.Trainer


def test_a_file_holds_what_the_network_gave(stylizer, tmp_path):
    synthetic_photo(0).save(tmp_path / "in.png")
    stylize_file(stylizer, tmp_path / "in.png", tmp_path / "out.png")
    expected = stylizer(to_tensor(synthetic_photo(0))).mul(255).round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected.astype(np.uint8))


def test_transparency_is_kept(stylizer, tmp_path):
    picture = synthetic_photo(0)
    alpha = Image.linear_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    picture.save(tmp_path / "in.png")
    stylize_file(stylizer, tmp_path / "in.png", tmp_path / "out.png")
    out = Image.open(tmp_path / "out.png")
    assert out.mode == "RGBA"
    assert np.array_equal(np.asarray(out.getchannel("A")), np.asarray(alpha))


def test_transparency_is_scaled_with_the_picture(stylizer, tmp_path):
    picture = synthetic_photo(0, 64, 48)
    picture.putalpha(Image.new("L", picture.size, 100))
    picture.save(tmp_path / "in.png")
    stylize_file(stylizer, tmp_path / "in.png", tmp_path / "out.png", ImageSize(short_side=24))
    out = Image.open(tmp_path / "out.png")
    assert out.size == (32, 24)
    assert out.getchannel("A").getextrema() == (100, 100)


def test_too_little_memory_goes_on_in_strips_and_says_so(stylizer, tmp_path, monkeypatch):
    picture = np.asarray(synthetic_photo(0, 64, 48))
    whole = stylizer(picture)

    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    said = []
    monkeypatch.setattr(stylizer.engine, "run", exhausted)
    monkeypatch.setattr(stylizer, "notice", said.append)
    assert np.abs(stylizer(picture).astype(int) - whole).max() <= 1
    assert len(said) == 1 and "64x48 pixels did not fit" in said[0]
    monkeypatch.setattr(stylizer, "tile", "off")
    with pytest.raises(MemoryError, match="64x48 .*--tile auto, or --short-side"):
        stylizer(picture)


def test_a_picture_too_large_even_in_strips_is_named_and_the_others_are_done(stylizer, tmp_path, monkeypatch):
    for name, width in (("small.png", 32), ("large.png", 64)):
        synthetic_photo(0, width, 48).save(tmp_path / name)
    run, stage = stylizer.engine.run, stylizer.engine.stage

    def up_to(most, compute):
        def limited(index, pixels, *rest):
            if max(pixels.shape) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return compute(index, pixels, *rest)

        return limited

    monkeypatch.setattr(stylizer.engine, "run", lambda pixels, *rest: up_to(48, lambda _, *given: run(*given))(0, pixels, *rest))
    monkeypatch.setattr(stylizer.engine, "stage", up_to(0, stage))
    done = list(stylize_files(stylizer, [Job(tmp_path / name, tmp_path / f"of_{name}") for name in ("large.png", "small.png")]))
    assert [one.error is None for one in done] == [False, True]
    assert "large.png: 64x48 pixels do not fit into the memory of cpu, not even in strips; use --short-side N" in str(done[0].error)
    assert (tmp_path / "of_small.png").exists()


def test_auto_goes_in_strips_where_the_picture_needs_more_than_is_free(stylizer, monkeypatch):
    picture = np.asarray(synthetic_photo(0, 64, 48))
    whole = stylizer(picture)
    monkeypatch.setattr(stylizer.engine, "free_memory", lambda: stylizer.engine.needed_memory(1, 48, 64))  # four fifths of it are too little
    monkeypatch.setattr(stylizer.engine, "run", lambda *_: pytest.fail("ran whole"))
    assert np.abs(stylizer(picture).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("engine", ["native", "openvino", "onnxruntime", "torch"])
def test_threads_may_share_a_stylizer(model, engine):
    stylizer = Stylizer.from_file(model, "cpu", engine, "float32")
    sizes = [(40, 48), (40, 48), (48, 40)]  # the same ones often enough to be compiled for, and others between
    pictures = [np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed, size in enumerate(sizes)]
    expected = [stylizer(picture) for picture in pictures]

    def work(index: int) -> bool:
        results = [stylizer(pictures[index]) for _ in range(40)]
        return all(result.shape == expected[index].shape and np.abs(result.astype(int) - expected[index]).max() <= 1 for result in results)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_forked_process_waits_for_no_thread_of_its_parent(model, engine, kind):
    """Neither for those that torch started, nor for the one whose turn it was; what is computed is as large as torch shares out."""
    code = """
import os, sys, threading
import numpy as np, torch
from fastnst import Stylizer
model, engine, kind = sys.argv[1:]
stylizer = Stylizer.from_file(model, "cpu", engine, "float32")
array = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
given = array if kind == "array" else torch.from_numpy(array)[None].permute(0, 3, 1, 2) / 255
there = np.asarray(stylizer(given))
torch.rand(300, 300) @ torch.rand(300, 300)
threading.Thread(target=stylizer._turn.acquire).start()
if not os.fork():
    os._exit(int(np.abs(np.asarray(stylizer(given), float) - there).max() > (1 if kind == "array" else 1 / 255)))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, model, engine, kind], capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout == "0\n", done.stderr


def test_a_stylizer_for_another_process_is_to_be_loaded_there(stylizer):
    for take_along in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="stays in its process.*from_file"):
            take_along(stylizer)


def test_a_device_of_torch_is_one_by_its_name(model):
    assert Stylizer.from_file(model, torch.device("cpu")).engine.name == Stylizer.from_file(model, "cpu").engine.name != "torch"


@pytest.mark.parametrize("engine", ["native", "openvino", "onnxruntime", "torch"])
def test_a_picture_that_may_not_be_written_to_is_taken_without_a_warning(model, engine, recwarn):
    picture = np.zeros((20, 24, 3), np.uint8)
    picture.flags.writeable = False
    stylizer = Stylizer.from_file(model, "cpu", engine)
    assert np.array_equal(stylizer(picture), np.asarray(stylizer(Image.fromarray(picture)))) and not recwarn.list


@pytest.mark.parametrize("tile", ["often", "-4", "8", "1.5"])
def test_a_tile_that_is_none_is_named(stylizer, tile):
    with pytest.raises(ValueError, match=f"--tile: got '{tile}', need auto, off"):
        Stylizer(stylizer.engine, tile)


@pytest.mark.parametrize("engine", ["native", "openvino", "onnxruntime", "torch"])
def test_a_tensor_goes_in_strips_as_whole(model, engine):
    tensor = torch.cat([to_tensor(synthetic_photo(index, 70, 90)) for index in range(2)]).contiguous(memory_format=torch.channels_last)
    whole, strips = (Stylizer.from_file(model, "cpu", engine, "float32", tile)(tensor) for tile in ("off", 16))
    assert strips.shape == whole.shape and strips.dtype == whole.dtype and strips.is_contiguous() and whole.is_contiguous()
    assert (strips - whole).abs().max() <= 0.1 / 255  # nothing is rounded to 8 bits


def test_the_same_kind_comes_out_as_went_in(stylizer, tmp_path):
    picture = synthetic_photo(0, 40, 30)
    picture.save(tmp_path / "in.png")
    array = np.asarray(picture)
    expected = stylizer(array)
    assert (expected.shape, expected.dtype) == ((30, 40, 3), np.uint8)
    assert np.array_equal(stylizer(array[None])[0], expected)
    assert np.array_equal(np.asarray(stylizer(picture)), expected)
    assert np.array_equal(np.asarray(stylizer(tmp_path / "in.png")), expected)
    assert np.array_equal(np.asarray(stylizer(str(tmp_path / "in.png"))), expected)
    (entry,) = os.scandir(tmp_path)
    assert np.array_equal(np.asarray(stylizer(entry)), expected)
    tensor = stylizer(to_tensor(picture))
    assert tensor.shape == (1, 3, 30, 40) and tensor.dtype == torch.float32
    assert np.abs(tensor[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 0.51  # but for rounding
    transparent = picture.copy()
    transparent.putalpha(77)
    assert stylizer(transparent).mode == "RGBA" and stylizer(transparent).getchannel("A").getextrema() == (77, 77)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((4, 4, 3)), ValueError, "got an array of float64 and shape .4, 4, 3."),
        (np.zeros((4, 4), np.uint8), ValueError, "need uint8 .H, W, 3."),
        (torch.zeros(3, 4, 4), ValueError, "need floats .N, 3, H, W."),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ValueError, "torch.uint8"),
        (7, TypeError, "got a int, need a path"),
    ],
)
def test_what_is_no_picture_is_named(stylizer, image, error, message):
    with pytest.raises(error, match=message):
        stylizer(image)


def test_pictures_of_one_size_are_batched_where_that_pays(stylizer, photos, tmp_path, monkeypatch):
    sources = []
    for index, size in enumerate([(40, 30)] * 5 + [(30, 40)]):
        sources.append(tmp_path / f"{index}.png")
        synthetic_photo(index, *size).save(sources[-1])
    (tmp_path / "2.png").write_bytes(b"damaged")
    jobs = [Job(source, tmp_path / "out" / source.name) for source in sources]
    counts, run = [], stylizer.engine.run
    monkeypatch.setattr(stylizer.engine, "batch", 16)
    monkeypatch.setattr(stylizer.engine, "run", lambda pictures: counts.append(len(pictures)) or run(pictures))
    found = {done.job.source.name: done.error for done in stylize_files(stylizer, jobs)}
    assert [name for name, error in found.items() if error] == ["2.png"]
    assert sum(counts) == 5
    for index in (0, 1, 3, 4, 5):
        alone = run(np.asarray(Image.open(sources[index]).convert("RGB"))[None])[0]
        assert np.array_equal(np.asarray(Image.open(jobs[index].target)), alone)


def test_memory_stays_flat_over_many_files(stylizer, tmp_path):
    """At most a handful of decoded pictures is held: the generator has not read further than it has yielded."""
    source = tmp_path / "in.png"
    synthetic_photo(0).save(source)
    read = []

    class Jobs:
        def __iter__(self):
            for index in range(40):
                read.append(index)
                yield Job(source, tmp_path / "out" / f"{index}.png")

    for number, _ in enumerate(stylize_files(stylizer, list(Jobs())), 1):
        written = len(list((tmp_path / "out").glob("[0-9]*.png")))
        assert written - number <= 8


# The command


def test_a_folder_is_stylized_size_for_size(stylize_command, photos, tmp_path, capsys):
    assert stylize_command("--input", photos, "--output", tmp_path / "out") == 0
    for source in photos.rglob("*.*"):
        assert Image.open(tmp_path / "out" / source.relative_to(photos)).size == Image.open(source).size
    assert "12 of 12 stylized" in capsys.readouterr().out


def test_short_side_scales(stylize_command, photos, tmp_path):
    assert stylize_command("--input", photos / "photo_00.jpg", "--output", tmp_path / "out.png", "--short-side", 25) == 0
    assert Image.open(tmp_path / "out.png").size == (30, 25)  # from 60 x 50


def test_an_unreadable_file_is_reported_and_the_others_are_done(stylize_command, photos, tmp_path, capsys):
    (photos / "photo_03.jpg").write_bytes((photos / "photo_03.jpg").read_bytes()[:300])
    (photos / "empty.png").write_bytes(b"")
    assert stylize_command("--input", photos, "--output", tmp_path / "out") == 1
    assert len(list((tmp_path / "out").rglob("*.*"))) == 11
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "empty.png" in errors[0] and "photo_03.jpg" in errors[1]
    assert "11 of 13 stylized, 2 failed" in printed.out


def test_an_output_that_exists_is_kept_without_the_flag(stylize_command, photos, tmp_path, capsys):
    target = tmp_path / "out.png"
    target.write_bytes(b"precious")
    arguments = ("--input", photos / "photo_00.jpg", "--output", target)
    assert stylize_command(*arguments) == 1
    assert target.read_bytes() == b"precious"
    assert "--overwrite" in capsys.readouterr().err
    assert stylize_command(*arguments, "--overwrite") == 0
    assert Image.open(target).size == (60, 50)


def test_skip_existing_goes_on_where_a_run_stopped(stylize_command, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert stylize_command("--input", photos / "photo_00.jpg", "--output", out) == 0
    before = (out / "photo_00.jpg").stat().st_mtime_ns
    assert stylize_command("--input", photos, "--output", out, "--skip-existing") == 0
    assert "11 of 12 stylized, 1 there already" in capsys.readouterr().out
    assert (out / "photo_00.jpg").stat().st_mtime_ns == before


@pytest.mark.parametrize("tile", [16, "off", "auto"])
def test_tile_changes_no_picture(stylize_command, photos, tmp_path, tile):
    for name, flags in (("plain", []), ("tiled", ["--tile", tile])):
        assert stylize_command("--input", photos / "photo_01.png", "--output", tmp_path / f"{name}.png", "--precision", "float32", *flags) == 0
    plain, tiled = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("plain", "tiled"))
    assert np.abs(plain - tiled).max() <= 1


def test_quality_changes_the_size_of_a_jpeg(stylize_command, photos, tmp_path):
    for quality in (10, 95):
        assert stylize_command("--input", photos / "photo_00.jpg", "--output", tmp_path / f"{quality}.jpg", "--quality", quality) == 0
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nothing.jpg", "--output", "out"], "nothing.jpg"),
        (["--input", "nothing.mp4", "--output", "out.mp4"], "nothing.mp4"),
        (["--input", "in.png", "--output", "in.png"], "overwrite the input"),
        (["--input", "in.png", "--output", "out.gif"], ".gif"),
        (["--input", "in.png", "--output", "out.png", "--model", "nothing.safetensors"], "nothing.safetensors"),
        (["--input", "in.png", "--output", "out.png", "--model", "in.png"], "in.png"),
        (["--input", "in.png", "--output", "out.png", "--device", "toaster"], "toaster"),
        (["--input", "in.png", "--output", "out.png", "--engine", "steam"], "--engine: got 'steam'"),
        (["--input", "in.png", "--output", "out.png", "--precision", "int3"], "--precision: got 'int3'"),
        (["--input", "in.png", "--output", "out.png", "--tile", "3"], "--tile: got '3'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stylize_command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    synthetic_photo(0).save("in.png")
    assert stylize_command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize(
    "source, output, written",
    [
        ("50%discount.jpg", "out/", "out/50%discount.jpg"),
        ("%d.jpg", "out/", "out/%d.jpg"),
        ("20%discount", "out/", "out/photo.jpg"),
        ("20%discount/photo.jpg", "100%done.jpg", "100%done.jpg"),
    ],
)
def test_percent_signs_in_the_names_of_photos(stylize_command, tmp_path, monkeypatch, source, output, written):
    monkeypatch.chdir(tmp_path)
    Path("20%discount").mkdir()
    for name in ("50%discount.jpg", "%d.jpg", "20%discount/photo.jpg"):
        synthetic_photo(0).save(name)
    assert stylize_command("--input", source, "--output", output) == 0
    assert Path(written).is_file()


# Moving pictures


def test_a_clip_becomes_a_clip_of_its_stylized_frames(stylize_command, stylizer, tmp_path):
    frames = moving_frames(6)
    write_clip(tmp_path / "clip.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    assert stylize_command("--input", tmp_path / "clip.mkv", "--output", tmp_path / "out" / "%02d.png", "--precision", "float32") == 0
    written = sorted((tmp_path / "out").glob("*.png"))
    assert len(written) == 6
    for path, frame in zip(written, frames):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - stylizer(frame)).max() <= 12  # BT.709 is not quite lossless


@pytest.mark.parametrize("flags", [["--stabilize"], ["--crf", "40", "--preset", "ultrafast"], ["--codec", "vp9"], ["--short-side", "32"]])
def test_flags_of_clips(stylize_command, tmp_path, flags):
    write_clip(tmp_path / "clip.mp4", moving_frames(4))
    assert stylize_command("--input", tmp_path / "clip.mp4", "--output", tmp_path / "plain.mkv") == 0
    assert stylize_command("--input", tmp_path / "clip.mp4", "--output", tmp_path / "out.mkv", *flags) == 0
    assert (tmp_path / "out.mkv").read_bytes() != (tmp_path / "plain.mkv").read_bytes()
    assert stylize_command("--input", tmp_path / "clip.mp4", "--output", tmp_path / "out.mkv", *flags) == 2  # it exists


@pytest.mark.parametrize("flags", [[], ["--stabilize"]], ids=str)
def test_frames_are_made_steady_before_they_are_blended(stylize_command, tmp_path, flags):
    (tmp_path / "in").mkdir()
    frames = moving_frames(5)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "in" / f"{index:03d}.png")
    for opacity in ("0", "0.25"):
        assert stylize_command("--input", tmp_path / "in", "--output", tmp_path / opacity / "%03d.png", "--opacity", opacity, *flags) == 0
    seen = [[np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / opacity).iterdir())] for opacity in ("0", "0.25")]
    assert all(np.abs(photo - frame).max() <= 2 for photo, frame in zip(seen[0], frames, strict=True))  # nothing but the photo
    assert np.abs(seen[1][-1] - frames[-1]).mean() > 1


@pytest.mark.parametrize("flags, computed", [([], 2), (["--opacity", "0.7"], 2), (["--stabilize"], 6)], ids=str)
def test_numbered_pictures_that_are_missing_are_made_as_they_were(stylize_command, tmp_path, monkeypatch, capsys, flags, computed):
    write_clip(tmp_path / "clip.mp4", moving_frames(6))
    arguments = ("--input", tmp_path / "clip.mp4", "--output", tmp_path / "out" / "f_%04d.png", *flags)
    assert stylize_command(*arguments) == 0
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    gone = [tmp_path / "out" / f"f_{number:04d}.png" for number in (3, 5)]
    for path in gone:
        path.unlink()
    seen, call = [], Stylizer.__call__
    monkeypatch.setattr(Stylizer, "__call__", lambda self, batch: (seen.extend(batch), call(self, batch))[1])
    capsys.readouterr()
    assert stylize_command(*arguments, "--skip-existing") == 0
    assert "2 frames, 4 there already" in capsys.readouterr().out
    assert len(seen) == computed
    after = {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert {path: data for path, (_, data) in after.items()} == {path: data for path, (_, data) in before.items()}
    assert all(after[path][0] == before[path][0] for path in before if path not in gone)
    assert stylize_command(*arguments, "--skip-existing") == 0
    assert "0 frames, 6 there already" in capsys.readouterr().out
    assert stylize_command(*arguments) == 2


def test_numbered_pictures_and_a_folder_become_a_clip(stylize_command, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for index, frame in enumerate(moving_frames(5)):
        Image.fromarray(frame).save(tmp_path / "in" / f"{index:03d}.png")
    for source, rate in ((tmp_path / "in", "10"), (tmp_path / "in" / "%03d.png", "5")):
        assert stylize_command("--input", source, "--output", tmp_path / f"{rate}.gif", "--frames-per-second", rate) == 0
        assert "5 frames" in capsys.readouterr().out
        with Image.open(tmp_path / f"{rate}.gif") as gif:
            assert (gif.n_frames, gif.info["duration"]) == (5, 1000 // int(rate))


def test_a_camera_is_shown_and_recorded(stylize_command, tmp_path, capsys):
    arguments = ("--camera", "lavfi:testsrc2=duration=0.5:rate=10:size=64x48", "--output", tmp_path / "out.mp4", "--port", 0)
    assert stylize_command(*arguments) == 0
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:" in printed and "frames shown" in printed
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_a_camera_is_recorded_as_pictures_of_the_quality_asked_for(stylize_command, tmp_path):
    arguments = ("--camera", "lavfi:testsrc2=duration=0.3:rate=10:size=64x48", "--output", tmp_path / "%02d.jpg", "--port", 0)
    assert stylize_command(*arguments, "--quality", 10) == 0
    written = list(tmp_path.glob("*.jpg"))
    assert written and all(Image.open(path).quantization[0][0] == 80 for path in written)  # libjpeg: 5000 / 10 % of its table's 16


@pytest.mark.parametrize("inputs, output", [(["a.png"], "out.mp4"), (["a.mp4"], "out.png"), (["a.mp4", "b.mp4"], "out.mp4"), (["a.png"], "%d.png")])
def test_half_a_video_is_refused(stylize_command, tmp_path, monkeypatch, capsys, inputs, output):
    monkeypatch.chdir(tmp_path)
    assert stylize_command("--input", *inputs, "--output", output) == 2
    assert "give one --input that moves" in capsys.readouterr().err


def test_torchrun_shares_a_folder_out(model, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, "-m", "fastnst", "stylize", "--model", model, "--device", "cpu", "--engine", "onnxruntime", "--input", photos, "--output", tmp_path / "out"]
    done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0  # one photo is broken
    assert done.stdout.count("12 of 13 stylized, 1 failed") == 1  # one summary for both
    assert "broken.png" in done.stderr
    assert len(list((tmp_path / "out").rglob("*.*"))) == 12


def test_numbered_output_among_the_input_is_refused(stylize_command, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for index, frame in enumerate(moving_frames(3)):
        Image.fromarray(frame).save(tmp_path / "in" / f"f_{index:03d}.png")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    assert stylize_command("--input", tmp_path / "in", "--output", tmp_path / "in" / "f_%03d.png", "--overwrite") == 2
    assert "among the input's own pictures" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_a_clip_of_unknown_length_is_stylized(stylize_command, tmp_path, capsys):
    write_clip(tmp_path / "clip.h264", moving_frames(4)).rename(tmp_path / "clip.mp4")  # a bare stream tells no times
    assert stylize_command("--input", tmp_path / "clip.mp4", "--output", tmp_path / "out.mp4") == 0
    assert capsys.readouterr().out.startswith("4 frames, ")


def test_an_mp4_file_that_is_cut_off_is_told(stylize_command, tmp_path, capsys):
    """Its table of frames tells of 40; it is to come first, else nothing of it can be read."""
    import av

    write_clip(tmp_path / "clip.mp4", moving_frames(40))
    with av.open(str(tmp_path / "clip.mp4")) as clip, av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": "+faststart"}) as first:
        stream = first.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(clip.streams.video[0]):
            if packet.size:
                packet.stream = stream
                first.mux(packet)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[: (tmp_path / "cut.mp4").stat().st_size // 2])
    assert stylize_command("--input", tmp_path / "cut.mp4", "--output", tmp_path / "out.mkv") == 1
    assert "cut.mp4 ends early" in capsys.readouterr().err


def test_a_clip_that_is_cut_off_is_told(stylize_command, tmp_path, capsys):
    write_clip(tmp_path / "clip.mkv", moving_frames(40))
    whole = (tmp_path / "clip.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 4])
    assert stylize_command("--input", tmp_path / "cut.mkv", "--output", tmp_path / "out.mkv") == 1
    assert "cut.mkv ends early" in capsys.readouterr().err
    assert (tmp_path / "out.mkv").exists()
    assert stylize_command("--input", tmp_path / "clip.mkv", "--output", tmp_path / "out.mkv", "--skip-existing") == 0
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"times": [250 * index for index in range(11)], "rate": 30},
        {"times": [5000 + 40 * index for index in range(11)]},
        {"sound": "aac", "sound_until": 2000},
    ],
    ids=["uneven", "late", "sound"],
)
def test_a_whole_clip_is_not_taken_for_one_cut_off(stylize_command, tmp_path, capsys, options):
    write_clip(tmp_path / "clip.mkv", moving_frames(10), **options)
    assert stylize_command("--input", tmp_path / "clip.mkv", "--output", tmp_path / "out.mkv") == 0
    printed = capsys.readouterr()
    assert "10 frames" in printed.out and "ends early" not in printed.err


@pytest.mark.parametrize("flag, value", [("--short-side", "99999"), ("--short-side", "0"), ("--crf", "99"), ("--quality", "0"), ("--frames-per-second", "1/0"), ("--frames-per-second", "-5")])
def test_a_number_out_of_range_names_its_flag(stylize_command, flag, value, capsys):
    with pytest.raises(SystemExit) as left:
        stylize_command("--input", "in.png", "--output", "out.png", flag, value)
    assert left.value.code == 2
    assert f"argument {flag}: got {value}, need a" in capsys.readouterr().err


def test_pil_images_are_read_as_files_are(stylizer, tmp_path):
    gray = Image.fromarray(np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16))
    turned = synthetic_photo(1, 32, 24)
    exif = turned.getexif()
    exif[0x0112] = 6
    gray.save(tmp_path / "gray.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("gray.png", "turned.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.asarray(stylizer(picture)), np.asarray(stylizer(tmp_path / name)))
    assert stylizer(synthetic_photo(1).convert("LAB")).mode == "RGB"


@pytest.mark.parametrize("nothing", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.zeros(0, 3, 4, 4)])
def test_no_pictures_at_all_are_refused(stylizer, nothing):
    with pytest.raises(ValueError, match="got a"):
        stylizer(nothing)


def test_a_picture_scaled_beyond_reason_is_named(stylize_command, tmp_path, capsys):
    Image.new("RGB", (3, 500)).save(tmp_path / "thin.png")
    assert stylize_command("--input", tmp_path / "thin.png", "--output", tmp_path / "out.png", "--short-side", "3000") == 1
    assert "thin.png: scaled to 3000x500000" in capsys.readouterr().err
