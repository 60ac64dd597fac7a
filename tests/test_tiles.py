"""Strips of a picture make the picture: statistics over all of it, no seams."""

import itertools

import numpy as np
import pytest
from test_engine import photo
from test_stages import staged

from fastnst.engine import load_engine
from fastnst.tiles import plan_rows, stylize_tiled

PLENTY, LITTLE = 10**12, 0  # of memory: float32 between passes, float16


@pytest.mark.parametrize("name", ["native", "openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("height, width, padding", [(137, 53, "reflect"), (300, 16, "reflect"), (64, 48, "zeros"), (33, 9, "reflect"), (157, 53, "start")])
def test_strips_are_the_whole(name, height, width, padding):
    _, stages = staged(residual_blocks=2, padding=padding)
    engine = load_engine(stages, "cpu", name, "float32")
    picture = photo(height, width)[0]
    whole = engine.run(picture[None])[0].astype(int)
    for memory in (PLENTY, LITTLE):
        assert np.abs(stylize_tiled(engine, picture, 16, memory) - whole).max() <= 1


@pytest.mark.parametrize(
    "norm, padding, upsampling", list(itertools.product(("instance", "batch"), ("reflect", "replicate", "zeros", "start"), ("nearest", "bilinear", "transposed", "subpixel")))
)
def test_every_architecture(norm, padding, upsampling):
    _, stages = staged(norm=norm, padding=padding, upsampling=upsampling)
    engine = load_engine(stages, "cpu", "torch", "float32")
    picture = photo(101, 37)[0]
    assert np.abs(stylize_tiled(engine, picture, 16, PLENTY) - engine.run(picture[None])[0].astype(int)).max() <= 1


@pytest.mark.parametrize("options", [{"residual_blocks": 0}, {"residual_blocks": 5}, {"stem": "half"}, {"padding": "start", "residual_blocks": 3}, {"padding": "start", "stem": "half"}], ids=str)
def test_every_depth_and_strip(options):
    _, stages = staged(**options)
    engine = load_engine(stages, "cpu", "torch", "float32")
    picture = photo(121, 25)[0]
    whole = engine.run(picture[None])[0].astype(int)
    for rows in (16, 20, 64, 500):
        assert np.abs(stylize_tiled(engine, picture, rows, PLENTY) - whole).max() <= 1


def test_strips_without_common_statistics_would_differ():
    """The test above can fail: strips stylized one by one are another picture."""
    _, stages = staged()
    engine = load_engine(stages, "cpu", "torch", "float32")
    picture = photo(96, 32)[0]
    picture[:48] //= 4
    alone = np.concatenate([engine.run(half[None])[0] for half in (picture[:48], picture[48:])])
    assert np.abs(alone.astype(int) - engine.run(picture[None])[0]).max() > 10


def test_in_place_writes_over_the_picture_and_else_leaves_it():
    _, stages = staged()
    engine = load_engine(stages, "cpu", "torch", "float32")
    picture = photo(60, 20)[0]
    before = picture.copy()
    result = stylize_tiled(engine, picture, 16, PLENTY)
    assert np.array_equal(picture, before)
    assert stylize_tiled(engine, picture, 16, PLENTY, in_place=True) is picture
    assert np.array_equal(picture, result)


@pytest.mark.parametrize("options", [{"residual_blocks": 2}, {"padding": "start", "residual_blocks": 1}, {"upsampling": "subpixel"}], ids=str)
def test_a_strip_that_does_not_fit_is_tried_again_smaller(monkeypatch, options):
    """Also in place, after the first strips of the last pass were written."""
    _, stages = staged(**options)
    engine = load_engine(stages, "cpu", "torch", "float32")
    picture = photo(200, 24)[0]
    whole = engine.run(picture[None])[0].astype(int)
    stage, last = engine.stage, len(stages.stages) - 1
    for index, call in itertools.product(range(last + 1), (1, 2)):
        left = [call]  # calls of this stage until one fails

        def scarce(at, rows, *rest):
            left[0] -= at == index
            if at == index and left[0] == 0:
                raise MemoryError
            return stage(at, rows, *rest)

        monkeypatch.setattr(engine, "stage", scarce)
        said, shares = [], []
        result = stylize_tiled(engine, picture.copy(), 64, PLENTY, shares.append, True, said.append)
        assert np.abs(result - whole).max() <= 1, (index, call)
        assert said == ["a strip did not fit into memory; going on with 32 rows each"]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    monkeypatch.setattr(engine, "stage", lambda *rest: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        stylize_tiled(engine, picture[:64], 10_000, PLENTY, notice=said.append)  # of a strip taller than the picture, only its rows count
    rows = [int(message.split()[-3]) for message in said[1:]]
    assert rows[0] <= (64 + 2 * stages.info.network.start_padding) // 2 and rows[-1] == 16 and rows == sorted(set(rows), reverse=True)


def test_progress_goes_up_to_one():
    _, stages = staged()
    shares = []
    stylize_tiled(load_engine(stages, "cpu", "torch", "float32"), photo(60, 20)[0], 16, PLENTY, shares.append)
    assert shares == sorted(shares) and shares[0] < 0.2 and shares[-1] == pytest.approx(1)


def test_rows_of_a_strip():
    _, stages = staged(width=32)
    # 128 MiB / (3 tensors x 4 bytes x 32 channels x 12,000 px) = 29.1, a multiple of 4
    assert plan_rows(stages, 12_000) == 28
    assert plan_rows(stages, 10**6) == 16
