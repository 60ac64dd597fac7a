"""What 8-bit numbers stand for, and what pictures lose by them: by hand, and as the engine that multiplies them has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine import photo
from test_stages import staged

from fastnst import engine as engines
from fastnst.eight_bits import eight_bits
from fastnst.engine import load_engine
from fastnst.fidelity import int8_psnr, psnr
from fastnst.model import ModelInfo
from fastnst.onnx_graph import network_graph
from fastnst.stages import StagedNetwork, fold


def folded(network: torch.nn.Module) -> StagedNetwork:
    return fold({name: tensor.numpy() for name, tensor in network.state_dict().items()}, ModelInfo(network.config, 0, {}, {}, None))


def spans(numbers) -> list:
    """From the least to the largest number of each stage's input."""
    return [None if one is None else (round(-float(one.zero * one.scale), 1), round(float((255 - one.zero) * one.scale), 1)) for one in numbers]


def test_ranges_by_hand():
    # Norms of mean 0.5 and deviation 2 everywhere: after a ReLU 0 to 0.5 + 12 * 2 = 24.5. Sums of blocks, whose input is the stem's after its ReLU:
    # means 0.5 + 0.5 a block, variances 4 + 4 a block: after the second 1.5 and 12, after the third 2 and 16: 1.5 -+ 12 * 3.464 = -40.1 to
    # 43.1, in steps of 83.1 / 255 = 0.326 (zero at 123: -40.1 to 43.0); 2 -+ 48 = -46 to 50, in steps of 0.376 (zero at 122: -45.9 to 50.1).
    network, _ = staged(width=1, residual_blocks=3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 and not isinstance(network.get_submodule(name.rsplit(".", 1)[0]), torch.nn.Conv2d):
                parameter.fill_(2.0 if name.endswith("weight") else 0.5)
    stages = folded(network)
    # three of the stem and four of two blocks are left; the third block, two that enlarge, the last
    assert spans(eight_bits(stages, blocks_alone=False)) == [None] * 7 + [(-40.1, 43.0), (0, 24.5), (-45.9, 50.1), (0, 24.5), (0, 24.5)]
    assert spans(eight_bits(stages, blocks_alone=True)) == [None] * 7 + [(-40.1, 43.0), (0, 24.5)] + [None] * 3


@pytest.mark.parametrize("options, begin", [({"residual_blocks": 1}, 5), ({"residual_blocks": 0}, 3), ({"stem": "half", "residual_blocks": 3}, 6)])
def test_small_networks_have_fewer_in_8_bits(options, begin):
    _, stages = staged(**options)
    numbers = eight_bits(stages, blocks_alone=False)
    assert [index for index, one in enumerate(numbers) if one is not None] == list(range(begin, len(stages.stages)))


def test_each_output_channel_spans_the_whole_numbers():
    _, stages = staged(residual_blocks=3)
    for stage, numbers in zip(stages.stages, eight_bits(stages, blocks_alone=False)):
        if numbers is not None:
            axis = 1 if stage.transposed else 0
            flat = np.moveaxis(numbers.weight, axis, 0).reshape(stage.weight.shape[axis], -1)
            assert (np.abs(flat.astype(int)).max(axis=1) == 127).all()
            off = np.abs(numbers.rounded_weight() - stage.weight)
            assert (np.moveaxis(off, axis, 0).reshape(len(flat), -1).max(axis=1) <= numbers.weight_scales * 0.5001).all()


@pytest.mark.parametrize("blocks_alone", [True, False])
def test_the_graph_multiplies_8_bits_where_it_should(blocks_alone):
    _, stages = staged(residual_blocks=3)
    numbers = eight_bits(stages, blocks_alone)
    kinds = [node.op_type for node in network_graph(stages, int8=numbers).graph.node]
    assert kinds.count("QuantizeLinear") == (2 if blocks_alone else 5) == sum(one is not None for one in numbers)


@pytest.mark.parametrize("options", [{}, {"upsampling": "transposed", "padding": "zeros"}, {"stem": "half"}, {"upsampling": "subpixel", "padding": "start"}], ids=str)
def test_what_is_measured_is_what_an_engine_makes(monkeypatch, options):
    monkeypatch.setattr(engines, "multiplies_bfloat16", lambda: False)  # so that nothing else is rounded
    torch.manual_seed(1)
    _, stages = staged(**{"width": 8, "residual_blocks": 3, "output_scale": 0.5} | options)
    pictures = photo(64, 80, 3)
    exact, rounded = (load_engine(stages, "cpu", "openvino", precision) for precision in ("float32", "int8"))
    made = min(psnr(rounded.run(picture), exact.run(picture)) for picture in pictures[:, None])
    assert 20 < made < 60  # something is rounded
    assert int8_psnr(stages, pictures) == pytest.approx(made, abs=0.5)


def test_the_worst_picture_counts():
    _, stages = staged(residual_blocks=3)
    pictures = photo(48, 48, 4)
    assert int8_psnr(stages, pictures) == min(int8_psnr(stages, pictures[[index]]) for index in range(4))


@pytest.mark.parametrize("measured, flags, expected", [(52.0, {"avx2"}, "int8"), (52.0, {"avx2", "avx512_bf16"}, "int8"), (45.9, {"avx2", "avx512_bf16"}, "bfloat16"), (None, {"avx2"}, "float32"), (52.0, set(), "float32")])
def test_auto_is_int8_where_the_file_allows_it(monkeypatch, measured, flags, expected):
    monkeypatch.setattr(engines, "cpu_flags", lambda: frozenset(flags))
    _, stages = staged()
    stages = replace(stages, info=replace(stages.info, int8_psnr=measured))
    assert load_engine(stages, "cpu", "openvino").precision == expected
    assert load_engine(stages, "cpu", "onnxruntime").precision == "float32"
    assert load_engine(stages, "cpu", "torch").precision in ("float32", "bfloat16")
    assert load_engine(stages, "cpu", "openvino", "float32").precision == "float32"


def test_memory_is_that_of_what_is_beside_the_8_bits(monkeypatch):
    _, stages = staged()
    taken = []
    for flags in ({"avx2", "avx512_bf16"}, {"avx2"}):
        monkeypatch.setattr(engines, "cpu_flags", lambda flags=flags: frozenset(flags))
        taken.append(load_engine(stages, "cpu", "openvino", "int8").bytes_per_pixel)
    assert taken[1] == 2 * taken[0]


def test_it_wants_instance_norm():
    _, stages = staged(norm="batch")
    with pytest.raises(ValueError, match="--precision int8 needs a network with instance norm"):
        load_engine(stages, "cpu", "openvino", "int8").run(photo(20, 20))
    with pytest.raises(ValueError, match="needs a network with instance norm"):
        int8_psnr(stages, photo(20, 20))


def test_psnr_by_hand():
    assert psnr(np.full((2, 2), 10), np.full((2, 2), 10)) is None
    assert psnr(np.full((2, 2), 10), np.full((2, 2), 11)) == pytest.approx(48.13, abs=0.01)  # 10 log10(255^2 / 1)
