"""The engine of the project's own: what test_engine.py does not see of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PAIRS_ALONE
from test_engine import ARCHITECTURES, eager, photo, psnr
from test_stages import staged

from fastnst import native, native_library
from fastnst.benchmark_inference import operations
from fastnst.engine import load_engine
from fastnst.native import NativeEngine
from fastnst.native_library import Activation, Packed, aligned
from fastnst.stages import Stage
from fastnst.tiles import stylize_tiled


@pytest.mark.parametrize("transform, step", [(native_library._G6, 6), (native_library._G4, 4), (native_library._G3, 3)])
def test_kernels_of_ones_by_hand(transform, step):
    # A polynomial's values at the points, infinity last: of taps (1, 1, 1), that is 1 + p + p^2, over the product of the differences to the other points.
    points = [0, 1, -1, 2, -2, 1 / 2, -1 / 2] if step == 6 else [0, 2 / 3, -2 / 3, 3 / 2, -3 / 2][: step + 1]
    expected = [(1 + p + p * p) / np.prod([p - other for other in points if other != p]) for p in points] + [1]
    assert np.allclose(transform @ np.ones(3), expected)


@pytest.mark.parametrize("kernel, stride, inputs, outputs", [(3, 1, 8, 16), (3, 1, 20, 12), (9, 1, 3, 8), (9, 1, 3, 40), (9, 1, 8, 12), (3, 2, 16, 24), (10, 2, 3, 8), (5, 1, 8, 12), (1, 1, 8, 8)])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=PAIRS_ALONE)])
def test_a_convolution_is_torchs(kernel, stride, inputs, outputs, mode, threads, half):
    """With the norm and the ReLU that its input still owes, and with moments of what it gives, at sizes that no tile divides."""
    rng = np.random.default_rng(kernel)
    height, width, padding = 29, 43, kernel // 2
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((height, width, inputs), (outputs, inputs, kernel, kernel), (outputs,)))
    gain, shift = rng.normal(size=(2, inputs)).astype(np.float32)
    packed = Packed.of(Stage(weight, bias, stride=stride, padding=padding, padding_mode=mode, value=0.25), inputs == 3, False, half)
    lying = aligned((height, width, inputs if inputs == 3 else native_library.whole_vectors(inputs)))
    lying[:] = 0
    lying[..., :inputs] = x
    given = Activation.of(lying, relu=True)
    given.gain[:inputs], given.shift[:inputs] = gain, shift
    pad = {"reflect": "reflect", "replicate": "edge", "constant": "constant"}[mode]
    rows, columns = (np.pad(np.arange(side), padding, mode=pad, **({"constant_values": -1} if mode == "constant" else {})) for side in (height, width))
    output = aligned((*packed.size(rows, columns), packed.channels))
    mean, variance = packed.convolve(given, rows, columns, np.full(native_library.whole_vectors(inputs), 0.25, np.float32), output, True, threads)

    normalized = torch.from_numpy(np.maximum(x * gain + shift, 0)).permute(2, 0, 1)[None].double()
    padded = F.pad(normalized, [padding] * 4, mode=mode, **({"value": 0.25} if mode == "constant" else {}))
    expected = F.conv2d(padded, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), stride=stride)[0].permute(1, 2, 0).numpy()
    assert output.shape[:2] == expected.shape[:2]
    assert packed.half == (half and inputs > 3)
    if packed.half and packed.kind == native_library._DIRECT:  # the same but for the order of its sums, once what is multiplied was rounded
        rounded, kernels = (what.float().bfloat16().double() for what in (padded, torch.from_numpy(weight)))
        expected = F.conv2d(rounded, kernels, torch.from_numpy(bias).double(), stride=stride)[0].permute(1, 2, 0).numpy()
    if packed.half and packed.kind != native_library._DIRECT:  # 8 bits; the transforms round 2 to 3 times as much as the convolution itself
        assert 0.001 < np.sqrt(np.mean((output[..., :outputs] - expected) ** 2) / expected.var()) < 0.012
    else:
        assert np.abs(output[..., :outputs] - expected).max() < 1e-5 * np.abs(expected).max()
    expected = output[..., :outputs].astype(float) if packed.half else expected  # moments are those of what was written
    assert np.allclose(mean[:outputs], expected.mean(axis=(0, 1)), atol=1e-5 * np.abs(expected).max())
    assert np.allclose(variance[:outputs], expected.var(axis=(0, 1)), rtol=1e-4)


def test_a_kernel_that_is_too_large_is_named():
    Packed.of(Stage(np.zeros((8, 8, 16, 16), np.float32)), False, False)
    with pytest.raises(ValueError, match="got a convolution of 17x17 pixels, --engine native takes 16x16 at most"):
        Packed.of(Stage(np.zeros((8, 8, 17, 17), np.float32)), False, False)


def test_moments_far_from_zero_keep_their_digits():
    # 1,000 and a noise of 0.01: the squares' sum in float32 would have no digit of the variance, 1e-4
    noise = np.random.default_rng(0).normal(scale=0.01, size=(64, 64, 8))
    x = aligned((64, 64, 8), 1000 + noise)
    packed = Packed.of(Stage(np.eye(8, dtype=np.float32)[:, :, None, None]), False, False)
    output = aligned((64, 64, 8))
    mean, variance = packed.convolve(Activation.of(x), np.arange(64), np.arange(64), np.zeros(8, np.float32), output, True, 2)
    assert np.allclose(mean, x.astype(np.float64).mean(axis=(0, 1)), rtol=1e-9)
    assert np.allclose(variance, x.astype(np.float64).var(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda options: "-".join(map(str, options.values())))
def test_what_is_not_kept_but_made_twice_is_the_same(monkeypatch, architecture):
    network, stages = staged(**architecture)
    engine, pictures = load_engine(stages, "cpu", "native", "float32"), photo(75, 38)
    whole = engine.run(pictures)
    bands, convolve = [], engine._convolve
    monkeypatch.setattr(engine, "_convolve", lambda *args, **options: bands.append(args[0]) or convolve(*args, **options))
    monkeypatch.setattr(native, "_LARGE", 0)
    monkeypatch.setattr(native, "_BAND", 8)
    assert np.abs(engine.run(pictures).astype(int) - whole).max() <= 1
    assert np.abs(engine.run(pictures) - eager(network, pictures)).max() <= 0.51
    assert len(bands) > 2 * len(stages.stages)


def test_memory_is_kept_for_pictures_of_one_size_in_a_row_alone():
    engine = load_engine(staged(width=8)[1], "cpu", "native", "float32")
    first, other = photo(40, 56), photo(33, 20)
    expected = [engine.run(pictures) for pictures in (first, other)]
    assert engine._spare.bytes == 0
    kept = []
    for _ in range(4):
        assert np.array_equal(engine.run(other), expected[1])
        kept.append(engine._spare.bytes)
    assert kept[1] == kept[3] > 0 == engine._spare.taken
    assert engine.free_memory() > kept[0]
    assert np.array_equal(engine.run(first), expected[0]) and engine._spare.bytes == 0
    assert np.array_equal(engine.run(np.concatenate([first] * 3))[2], expected[0][0])
    assert engine._spare.bytes > 0
    stylize_tiled(engine, first[0], 16, 10**9)  # which needs it
    assert engine._spare.bytes == 0


@pytest.mark.parametrize("share, times", [(7, 1), (9, 2)], ids=["little is free", "much is free"])
@pytest.mark.parametrize("options", [{}, {"padding": "start", "residual_blocks": 5}, {"upsampling": "subpixel"}, {"stem": "half"}], ids=str)
def test_what_is_kept_is_within_what_was_announced_or_twice_that(monkeypatch, options, share, times):
    engine, pictures = load_engine(staged(width=16, **options)[1], "cpu", "native", "float32"), photo(120, 130)
    monkeypatch.setattr(engine, "free_memory", lambda: share * engine.needed_memory(1, 120, 130))
    held, take = [], native._Spare.take
    monkeypatch.setattr(native._Spare, "take", lambda spare, shape: (take(spare, shape), held.append(spare.taken + spare.bytes))[0])
    most = []
    for _ in range(4):
        engine.run(pictures)
        most.append(max(held))
        held.clear()
    assert max(most) <= max(most[0], times * engine.needed_memory(1, 120, 130))


def test_code_for_each_cpu_gives_the_same(monkeypatch, library):
    monkeypatch.setattr(native_library, "native_library", lambda: library)
    for options in ({}, {"width": 12}, {"width": 12, "upsampling": "subpixel"}, {"width": 8, "stem": "half"}):  # of 12 and 24 channels vectors have too much
        network, stages = staged(**options)
        pictures = photo(37, 53)
        assert np.abs(load_engine(stages, "cpu", "native", "float32").run(pictures) - eager(network, pictures)).max() <= 0.51
        if library.fastnst_halves():
            stylized = NativeEngine(stages, "bfloat16").run(pictures)
            assert 40 < psnr(stylized, eager(network, pictures)) < 65, options


def test_a_pixel_that_is_no_number_is_not_hidden():
    _, stages = staged()
    images = np.full((1, 3, 20, 30), 0.5, np.float32)
    images[0, 0, 4, 4] = np.nan
    assert np.isnan(load_engine(stages, "cpu", "native", "float32").run(images, "float")).any()


def test_it_counts_the_arithmetic_that_is_left():
    # All of a network of width 8 and one block at 32x32, in multiplications of a position of the output: the stem 225 / 9 a channel instead of 81, and so on
    _, stages = staged(width=8)
    counted = load_engine(stages, "cpu", "native", "float32").operations(32, 32)
    wide = 2 * native_library.native_library().fastnst_lanes()
    stem = 25 * 3 * max(8, wide) * 32 * 32
    down = 9 * (8 * max(16, wide) * 16 * 16 + 16 * 32 * 8 * 8)
    block = 2 * 64 / 36 * 32 * 32 * 8 * 8
    up = 64 / 36 * (32 * 4 * 16 * 8 * 8 + 16 * 4 * 8 * 16 * 16)
    last = 25 * 8 * 3 * 32 * 32
    assert counted == pytest.approx(2 * (stem + down + block + up + last), abs=20)  # each convolution's are rounded
    assert counted < operations(stages, 32, 32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_is_not_there_is_told():
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import numpy as np; from test_stages import staged; from fastnst.engine import load_engine\n"
        "from fastnst.runtime import is_out_of_memory\n"
        "engine = load_engine(staged(width=32)[1], 'cpu', 'native', 'float32')\n"
        "engine.run(np.zeros((1, 40, 40, 3), np.uint8))\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 30_000_000, -1))\n"
        "try:\n"
        "    engine.run(np.zeros((1, 900, 900, 3), np.uint8))\n"
        "except Exception as error:\n"
        "    assert is_out_of_memory(error), error\n"
        "else:\n"
        "    raise AssertionError('it fitted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
