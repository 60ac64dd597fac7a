"""The exact rewrites: other arithmetic, the same function."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastnst.model import ModelInfo, NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.stages import Stage, _split_stride, _summed_kernels, describe, fold, restore_stages


def staged(**options):
    """A network with random weights, and its stages."""
    torch.manual_seed(0)
    config = NetworkConfig(**{"width": 4, "residual_blocks": 1, **options})
    network = TransformNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer += 0.3 * torch.rand_like(buffer)
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return network.eval(), fold(weights, ModelInfo(config, 0, {}, {}, None))


def test_summed_kernels_by_hand():
    # A kernel of rows 1, 10, 100 (columns only the middle): on an image upsampled by nearest, small row s is large rows 2s and
    # 2s + 1. Large row 2i sees small rows i-1 (kernel row 0: 1), i (rows 1 and 2: 110); row 2i + 1 sees i (rows 0 and 1: 11) and
    # i + 1 (row 2: 100). In the transposed kernel row x takes small row s to large row 2s - 1 + x.
    kernel = np.zeros((1, 1, 3, 3), np.float32)
    kernel[0, 0, :, 1] = 1, 10, 100
    transposed = _summed_kernels(kernel)[0, 0]
    assert transposed[:, 1].tolist() == [100, 110, 11, 1]  # s reaches 2s - 1 (as i + 1: 100), 2s (110), 2s + 1 (11), 2s + 2 (as i - 1: 1)
    assert transposed[:, 2].tolist() == [100, 110, 11, 1]  # the middle column lies in both columns of the small pixel
    assert not transposed[:, [0, 3]].any()


@pytest.mark.parametrize("height, width", [(5, 7), (4, 4), (1, 6)])
def test_nearest_upsampling_and_a_convolution_are_one_transposed_convolution(height, width):
    generator = torch.Generator().manual_seed(height)
    x, kernel = torch.randn(1, 3, height, width, generator=generator), torch.randn(2, 3, 3, 3, generator=generator)
    large = F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), [1] * 4, mode="reflect")
    small = F.pad(x, [1] * 4, mode="replicate")
    rewritten = F.conv_transpose2d(small, torch.from_numpy(_summed_kernels(kernel.numpy())), stride=2, padding=3)
    torch.testing.assert_close(rewritten, F.conv2d(large, kernel), atol=1e-5, rtol=0)


def test_a_convolution_is_one_of_stride_2_and_a_shuffle():
    generator = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(1, 4, 16, 14, generator=generator), torch.randn(3, 4, 9, 9, generator=generator)
    rewritten = F.pixel_shuffle(F.conv2d(x, torch.from_numpy(_split_stride(kernel.numpy())), stride=2), 2)
    torch.testing.assert_close(rewritten, F.conv2d(x, kernel), atol=1e-4, rtol=0)


def test_the_last_stage_by_pixel_is_what_it_was_made_of():
    kernel, bias = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((3, 4, 9, 9), 3))
    stage = Stage(_split_stride(kernel), bias.repeat(4), padding=4, stride=2, shuffle=2).by_pixel
    assert np.array_equal(stage.weight, kernel) and np.array_equal(stage.bias, bias)
    assert (stage.stride, stage.shuffle, stage.size(18)) == (1, 1, 18)
    assert all(stage.by_pixel is stage for stage in staged(stem="half")[1].stages)


def test_the_count_of_stages_and_what_they_drop():
    _, network = staged(residual_blocks=5)
    assert len(network.stages) == 3 + 2 * 5 + 2 + 1
    assert all(stage.bias is None for stage in network.stages[:-1])  # free under an instance norm
    assert network.stages[-1].weight.shape == (12, 4, 10, 10)
    _, batch = staged(norm="batch")
    assert all(stage.norm_weight is None and stage.bias is not None for stage in batch.stages)


@pytest.mark.parametrize("side, stage, expected", [
    (17, Stage(np.zeros((8, 4, 3, 3)), padding=1, stride=2), 9),  # (17 + 2 - 3) // 2 + 1
    (9, Stage(np.zeros((8, 4, 4, 4)), padding=1, transposed=True), 18),
    (18, Stage(np.zeros((12, 4, 10, 10)), padding=4, stride=2, shuffle=2), 18),  # ((18 + 8 - 10) // 2 + 1) * 2
    (9, Stage(np.zeros((8, 8, 3, 3)), shave=2), 7),
])
def test_sizes(side, stage, expected):
    assert stage.size(side) == expected


def test_stages_taken_apart_come_back():
    _, network = staged(upsampling="subpixel", padding="zeros")
    again = restore_stages(*describe(network), network.info)
    for one, other in zip(network.stages, again.stages, strict=True):
        for name in Stage.__dataclass_fields__:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("index, name, value", [(4, "shave", 100_000), (4, "shave", -30_000), (0, "skip", True), (1, "skip", True), (1, "stride", 0), (0, "stride", 2),
    (0, "padding", 10**6), (0, "padding_mode", "zzz"), (0, "value", None), (1, "transposed", True), (3, "shuffle", 2), (-1, "relu", True), (2, "weight", None)])
def test_stages_that_do_not_fit_are_named(index, name, value):
    """A file may be damaged, or made to do harm: code in C would read beside an array."""
    _, network = staged()
    arrays, rest = describe(network)
    stages = json.loads(rest)
    stages[index][name] = value
    with pytest.raises(ValueError, match=f"stage {index % len(stages)} is .*, need "):
        restore_stages(arrays, json.dumps(stages), network.info)


# Of width 4: 9x9 (3 to 4 channels), two of stride 2 (to 8, to 16), a block of two, two transposed ones (to 8, to 4), the last 10x10 to 12 channels.
@pytest.mark.parametrize("layer, damage, complaint", [
    ("0.weight", lambda a: a[..., :2, :2], "stage 0: its weight is .4, 3, 2, 2., need .4, 3, 9, 9."),
    ("0.weight", lambda a: a.ravel(), "stage 0: its weight is"),
    ("0.weight", lambda a: a.repeat(2, 1), "stage 0: its weight is .4, 6, 9, 9., need"),
    ("3.weight", lambda a: a[:5], "stage 1: its weight is .5, 4, 3, 3., need .8, 4, 3, 3."),
    ("4.weight", lambda a: a[:0], "stage 1: its norm_weight is .0,., need .8,."),
    ("9.layers.3.weight", lambda a: np.pad(a, ((0, 0), (0, 0), (0, 2), (0, 2))), "stage 4: its weight is .16, 16, 5, 5., need .16, 16, 3, 3."),
    ("18.bias", lambda a: a[:2], "stage 7: its bias is .8,., need .12,."),
    ("18.weight", lambda a: a[:2], "stage 7: its weight is .8, 4, 10, 10., need .12, 4, 10, 10."),
    ("6.weight", lambda a: a * np.nan, "stage 2: its weight holds what is no number"),
    ("6.weight", lambda a: a.astype(float) * 1e300, "stage 2: its weight holds what is no number"),  # in float32
])
def test_weights_that_do_not_fit_are_named(layer, damage, complaint):
    network, _ = staged()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    weights[f"layers.{layer}"] = damage(weights[f"layers.{layer}"])
    with pytest.raises(ValueError, match=complaint):
        fold(weights, ModelInfo(network.config, 0, {}, {}, None))


def test_a_batch_norm_s_arrays_are_not_spread_over_each_other():
    """150,000 by 150,000 numbers would be 90 GB."""
    network, _ = staged(norm="batch")
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    weights["layers.1.running_var"] = weights["layers.1.running_var"][:, None]
    with pytest.raises(ValueError, match="the arrays of layers.1 are not of one length"):
        fold(weights, ModelInfo(network.config, 0, {}, {}, None))


def test_more_or_fewer_stages_are_an_error():
    _, network = staged()
    arrays, rest = describe(network)
    for stages in ([], json.loads(rest)[:-1], [*json.loads(rest), {}]):
        with pytest.raises(ValueError, match=f"got {len(stages)} stages, need 8"):
            restore_stages(arrays, json.dumps(stages), network.info)


def test_missing_weights_are_named():
    network, _ = staged()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items() if name != "layers.3.weight"}
    with pytest.raises(KeyError, match="layers.3.weight"):
        fold(weights, ModelInfo(network.config, 0, {}, {}, None))
