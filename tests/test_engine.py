"""Every engine gives the pictures of TransformNetwork in eager float32, whatever the architecture and the size."""

import itertools
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import PAIRS_ALONE
from test_stages import staged

from fastnst import engine as engines
from fastnst import graph_engine, native_library, runtime
from fastnst.engine import ENGINES, is_installed, load_engine, load_network
from fastnst.grain import GRAIN, add_grain
from fastnst.stylize import Stylizer
from fastnst.tiles import stylize_tiled

ARCHITECTURES = [
    {"norm": norm, "padding": padding, "upsampling": upsampling}
    for norm, padding, upsampling in itertools.product(("instance", "batch"), ("reflect", "replicate", "zeros", "start"), ("nearest", "bilinear", "transposed", "subpixel"))
] + [{"output": "sigmoid"}, {"output": "linear", "output_scale": 20.0}, {"residual_blocks": 0}, {"stem": "half"}, {"stem": "half", "padding": "zeros", "upsampling": "bilinear", "norm": "batch"}]
NAMES = [name for name in ENGINES if name != "auto"]
PAIRS = pytest.param("native", marks=PAIRS_ALONE)


def photo(height: int, width: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def eager(network: torch.nn.Module, pictures: np.ndarray) -> np.ndarray:
    """``(N, H, W, 3)`` in 0..255, not rounded."""
    with torch.inference_mode():
        return network(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((picture.astype(float) - reference) ** 2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda options: "-".join(map(str, options.values())))
def test_an_engine_is_the_network(name, architecture):
    network, stages = staged(**architecture)
    engine = load_engine(stages, "cpu", name, "float32")
    for height, width in ((37, 53), (3, 20)):
        pictures = photo(height, width, 2)
        assert np.abs(engine.run(pictures) - eager(network, pictures)).max() <= 0.51  # rounding to whole levels
    images = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32) / 255
    assert np.abs(engine.run(images, "float").transpose(0, 2, 3, 1) * 255 - eager(network, pictures)).max() <= 0.02


@pytest.mark.parametrize("name", ["openvino", "torch", PAIRS])
def test_bfloat16_is_above_45_db(name):
    network, stages = staged(width=16, residual_blocks=3, output_scale=0.125)
    picture = photo(64, 96)
    engine = load_engine(stages, "cpu", name, "bfloat16")
    assert engine.precision == "bfloat16"
    assert psnr(engine.run(picture), eager(network, picture)) > 45


def test_shipped_styles_are_above_45_db_in_what_auto_chooses():
    from skimage import data

    from fastnst.checkpoint import load_model
    from fastnst.cli import shipped_styles

    picture = data.astronaut()[None, 100:300, 100:340]
    for path in shipped_styles().values():
        engine = load_engine(load_network(path), "cpu")
        assert psnr(engine.run(picture), eager(load_model(path)[0], picture)) > 48, path


def test_float32_keeps_its_digits_in_large_pictures(monkeypatch):
    """OpenVINO's own norm, sums of 262,144 numbers, gives 78 dB here."""
    from skimage import data

    from fastnst.checkpoint import load_model
    from fastnst.cli import shipped_styles

    path = shipped_styles()["wave"]
    network = load_model(path)[0]
    picture = data.astronaut()[None]
    expected = np.round(eager(network, picture))
    assert psnr(load_engine(load_network(path), "cpu", "native", "float32").run(picture), expected) > 88
    engine = load_engine(load_network(path), "cpu", "openvino", "float32")
    assert psnr(engine.run(picture), expected) > 88
    monkeypatch.setattr(graph_engine, "_LARGE", 1000)  # compiled for the size
    assert psnr(engine.run(picture), expected) > 88


def dot(side: int, ground: int, value: int, radius: int) -> np.ndarray:
    """A disc on a plain ground."""
    down, across = np.mgrid[:side, :side] - side * 2 // 5
    return np.where(down**2 + across**2 <= radius**2, value, ground).astype(np.uint8)[None, ..., None].repeat(3, axis=3)


@pytest.mark.parametrize("style", ["wave", "mosaic_sun"])
@pytest.mark.parametrize(
    "picture",
    [photo(200, 300) * 0 + 200, photo(200, 300) // 128 + 200, dot(256, 255, 0, 1), dot(256, 200, 190, 20), dot(256, 0, 255, 3)],
    ids=["one color", "noise of a level", "dot", "gray on gray", "moon"],
)
def test_a_thing_on_a_plain_ground(picture, style):
    """The norms' deviations are those of a few pixels then, all others lie together: float32 keeps the digits of both, bfloat16 (auto) those of what stands out."""
    from fastnst.checkpoint import load_model
    from fastnst.cli import shipped_styles

    path = shipped_styles()[style]
    expected = eager(load_model(path)[0], picture)
    for name in ("native", "openvino"):
        engine = load_engine(load_network(path), "cpu", name, "float32")
        assert np.abs(engine.run(picture) - expected).max() <= 1.5
        assert np.abs(stylize_tiled(engine, picture[0], 64, 10**12) - expected).max() <= 1.5
    for name in ("openvino", "torch", *(["native"] if native_library.multiplies_pairs() else [])):
        engine = load_engine(load_network(path), "cpu", name, "bfloat16")
        if picture.std():
            assert psnr(engine.run(picture), expected) > (40 if name == "torch" else 50)
        else:  # a `Stylizer` asks strips in float32, of one color
            assert np.abs(Stylizer(engine).pictures(picture) - expected).max() <= 1.5


@pytest.mark.parametrize("style", ["wave", "mosaic_sun"])
@pytest.mark.parametrize("picture", ["rows", "columns", "squares", "a line"])
def test_what_strides_leave_one_color_of(picture, style):
    """Stripes or squares of a pixel are constant from the second convolution on, but for rounding, which each norm would multiply by 316; a line's norms multiply it by 14."""
    from fastnst.checkpoint import load_model
    from fastnst.cli import shipped_styles

    down, across = np.mgrid[:80, :96]
    is_white = {"rows": down % 2, "columns": across % 2, "squares": (down + across) % 2, "a line": down > 0}[picture]
    pixels = np.where(is_white, 255, 0).astype(np.uint8)[None, ..., None].repeat(3, axis=3)
    path = shipped_styles()[style]
    expected = eager(load_model(path)[0], pixels)
    network = load_network(path)
    for name in ("native", "openvino"):
        engine = load_engine(network, "cpu", name, "float32")
        assert np.abs(engine.run(pixels) - expected).max() <= 0.6, name
        assert np.abs(stylize_tiled(engine, pixels[0], 32, 10**12) - expected).max() <= 0.6, name
    grained = pixels.copy()
    add_grain(grained[0], GRAIN)
    expected = eager(load_model(path)[0], grained)
    for name in ("openvino", *(["native"] if native_library.multiplies_pairs() else [])):  # a `Stylizer` asks for float32
        assert np.abs(Stylizer(load_engine(network, "cpu", name, "bfloat16")).pictures(pixels) - expected).max() <= 0.6, name


def test_strips_of_one_color_are_flat_however_wide():
    """Sums of 1,920 numbers in float32 are rounded by more than those of 300; each stage's are of numbers near 0."""
    from fastnst.cli import shipped_styles

    network, picture = load_network(shipped_styles()["mosaic_sun"]), np.full((64, 1920, 3), 90, np.uint8)
    expected = load_engine(network, "cpu", "native", "float32").run(picture[None])[0]
    assert not expected.std(axis=(0, 1)).any()
    for name in ("openvino", "onnxruntime", "torch"):
        assert np.abs(stylize_tiled(load_engine(network, "cpu", name, "float32"), picture, 64, 10**12) - expected.astype(float)).max() <= 1, name


@pytest.mark.parametrize("flags, expected", [(frozenset({"avx512_bf16"}), "bfloat16"), (frozenset({"amx_bf16"}), "bfloat16"), (frozenset({"avx2"}), "float32")])
def test_auto_precision_follows_the_cpu(monkeypatch, flags, expected):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: flags)
    _, stages = staged()
    assert load_engine(stages, "cpu", "openvino").precision == expected
    assert load_engine(stages, "cpu", "torch").precision == expected
    assert load_engine(stages, "cpu", "onnxruntime").precision == "float32"  # it has no bfloat16 convolutions


@pytest.mark.parametrize(
    "flags, pairs, precision, missing, expected",
    [
        ({"avx2"}, False, "auto", (), "native float32"),
        ({"avx2"}, False, "auto", ("native",), "openvino float32"),
        ({"avx2"}, False, "auto", ("native", "openvino"), "onnxruntime float32"),
        ({"avx2"}, False, "auto", ("native", "onnx"), "torch float32"),
        ({"avx2"}, False, "int8", (), "openvino int8"),
        ({"avx512_bf16"}, True, "auto", (), "native bfloat16"),
        ({"avx512_bf16"}, True, "bfloat16", (), "native bfloat16"),
        ({"avx512_bf16"}, True, "float32", (), "native float32"),
        ({"avx512_bf16"}, True, "auto", ("native",), "openvino bfloat16"),
        ({"avx512_bf16"}, False, "auto", (), "openvino bfloat16"),  # an old compiler
        ({"avx512_bf16"}, False, "auto", ("openvino",), "native float32"),
        ({"avx512_bf16"}, False, "bfloat16", ("openvino",), "torch bfloat16"),
        ({"avx512_bf16", "amx_bf16"}, True, "auto", (), "openvino bfloat16"),
        ({"avx512_bf16", "amx_bf16"}, True, "auto", ("openvino",), "native float32"),
    ],
)
def test_auto_takes_the_best_engine_that_is_installed(monkeypatch, flags, pairs, precision, missing, expected):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset(flags))
    library = None if "native" in missing else types.SimpleNamespace(fastnst_halves=lambda: pairs, fastnst_lanes=lambda: 16)
    monkeypatch.setattr(native_library, "native_library", lambda: library)
    _, stages = staged()
    engine = load_engine(stages, "cpu", precision=precision)
    assert f"{engine.name} {engine.precision}" == expected


def test_auto_on_a_gpu_is_torch(monkeypatch):
    monkeypatch.setattr(engines, "gpu_is_likely", lambda: True)
    _, stages = staged()
    assert load_engine(stages).name == "torch"
    assert load_engine(stages, "cpu").name != "torch"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cpu", "steam"), "--engine: got 'steam', need one of auto, native, openvino"),
        (("cpu", "auto", "int3"), "--precision: got 'int3'"),
        (("cpu", "openvino", "float16"), "--precision float16 is not there on a CPU .*use auto, float32, bfloat16 or int8"),
        (("cpu", "torch", "int8"), "--precision int8 is not there on a CPU with --engine torch"),
        (("cpu", "onnxruntime", "bfloat16"), "--precision bfloat16 .*use auto or float32$"),
        (("cpu", "native", "bfloat16"), "--precision bfloat16 .*use auto or float32$"),
        (("cuda", "native"), "--engine native computes on the CPU, got --device cuda"),
        (("cuda", "openvino"), "--engine openvino computes on the CPU, got --device cuda"),
        (("toaster",), "device 'toaster' is not known"),
    ],
)
def test_what_is_not_there_is_named(monkeypatch, arguments, message):
    monkeypatch.setattr(engines, "multiplies_pairs", lambda: False)
    _, stages = staged()
    with pytest.raises(ValueError, match=message):
        load_engine(stages, *arguments)


def test_an_engine_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    _, stages = staged()
    assert not is_installed("openvino")
    with pytest.raises(ValueError, match=r"pip install 'fastnst\[openvino\]'"):
        load_engine(stages, "cpu", "openvino")
    monkeypatch.setattr(native_library, "native_library", lambda: None)
    with pytest.raises(ValueError, match="--engine native was not compiled .*install a C compiler"):
        load_engine(stages, "cpu", "native", "float32")


@pytest.mark.parametrize("name", ["native", "openvino", "onnxruntime"])
def test_a_photo_is_stylized_without_importing_torch(name, tmp_path):
    code = (
        "import sys; from fastnst.cli import run, shipped_styles; from fastnst.scripts import stylize; import numpy as np; from PIL import Image\n"
        f"Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(r'{tmp_path}/in.png')\n"
        f"code = run(stylize.main, ['--style', 'wave', '--device', 'cpu', '--engine', '{name}', '--input', r'{tmp_path}/in.png', '--output', r'{tmp_path}/out.png'])\n"
        "assert code == 0 and not {'torch', 'torchvision', 'tensorboard'} & set(sys.modules), code"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_is_freed_at_once_and_not_by_the_garbage_collector(name):
    """A collector that ran in a forked process would free what belongs to threads that are not there: it crashed."""
    import gc
    import weakref

    _, stages = staged()
    engine = load_engine(stages, "cpu", name, "float32")
    for _ in range(2):
        engine.run(photo(20, 20))
    engine.stage(0, np.zeros((1, 3, 20, 20), np.float32), None, None, 4, 4, True)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()
