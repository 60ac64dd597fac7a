"""What 8-bit numbers stand for, by hand, and pictures made with them."""

import numpy as np
import pytest
import torch
from test_engine import photo, psnr
from test_stages import staged

from fastnst import runtime
from fastnst.cli import shipped_styles
from fastnst.eight_bits import eight_bits
from fastnst.engine import load_engine, load_network
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
            flat, exact = (np.moveaxis(weight, axis, 0).reshape(stage.weight.shape[axis], -1) for weight in (numbers.weight, stage.weight))
            assert (np.abs(flat.astype(int)).max(axis=1) == 127).all()
            scales = numbers.weight_scales[:, None]
            assert (np.abs(flat * scales - exact) <= scales * 0.5001).all()


@pytest.mark.parametrize("blocks_alone", [True, False])
def test_the_graph_multiplies_8_bits_where_it_should(blocks_alone):
    _, stages = staged(residual_blocks=3)
    numbers = eight_bits(stages, blocks_alone)
    kinds = [node.op_type for node in network_graph(stages, int8=numbers).graph.node]
    assert kinds.count("QuantizeLinear") == (2 if blocks_alone else 5) == sum(one is not None for one in numbers)


@pytest.mark.parametrize("floats", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"upsampling": "transposed", "padding": "zeros"}, {"stem": "half"}, {"upsampling": "subpixel", "padding": "start"}], ids=str)
def test_pictures_of_8_bits_are_near(monkeypatch, options, floats):
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda: floats == "bfloat16")
    torch.manual_seed(1)
    _, stages = staged(**{"width": 8, "residual_blocks": 3, "output_scale": 0.5} | options)
    pictures = photo(64, 80, 3)
    exact, rounded = (load_engine(stages, "cpu", "openvino", precision).run(pictures) for precision in (floats, "int8"))
    assert 25 < psnr(rounded, exact) < 60  # random weights; something is rounded


def test_shipped_styles_in_int8():
    from skimage import data

    picture = data.astronaut()[None, 100:300, 100:340]
    for path in shipped_styles().values():
        exact, rounded = (load_engine(load_network(path), "cpu", "openvino", precision).run(picture) for precision in ("float32", "int8"))
        assert psnr(rounded, exact) > 45, path


def test_memory_is_that_of_what_is_beside_the_8_bits(monkeypatch):
    _, stages = staged(residual_blocks=3)
    taken = []
    for flags in ({"avx2", "avx512_bf16"}, {"avx2"}):
        monkeypatch.setattr(runtime, "cpu_flags", lambda flags=flags: frozenset(flags))
        taken.append(load_engine(stages, "cpu", "openvino", "int8").needed_memory(1, 1, 1))
    assert taken[1] == 2 * taken[0]


@pytest.mark.parametrize("options, message", [({"norm": "batch"}, "needs a network with instance norm"), ({"residual_blocks": 2}, "more than 2 residual blocks, got 2; use --precision auto")])
def test_what_cannot_be_in_8_bits_is_refused_at_once(monkeypatch, options, message):
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda: True)
    _, stages = staged(**{"residual_blocks": 3} | options)
    with pytest.raises(ValueError, match=f"--precision int8 .*{message}"):
        load_engine(stages, "cpu", "openvino", "int8")
    assert load_engine(stages, "cpu", "openvino").precision == "bfloat16"
