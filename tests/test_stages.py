"""The exact rewrites: other arithmetic, the same function."""

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


def test_missing_weights_are_named():
    network, _ = staged()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items() if name != "layers.3.weight"}
    with pytest.raises(KeyError, match="layers.3.weight"):
        fold(weights, ModelInfo(network.config, 0, {}, {}, None))
