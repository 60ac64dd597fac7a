"""The transform network: its size, its output size for any input, its start and its gradients."""

import itertools

import pytest
import torch

from fastnst.config import ConfigError, validate_config
from fastnst.model import NetworkConfig
from fastnst.network import LastConv, ResidualBlock, TransformNetwork

PADDINGS = ("reflect", "replicate", "zeros", "start")
UPSAMPLINGS = ("nearest", "transposed", "subpixel")


def small(**options) -> TransformNetwork:
    torch.manual_seed(0)
    return TransformNetwork(NetworkConfig(**{"width": 2, "residual_blocks": 1} | options)).eval()


def parameters(**options) -> int:
    return sum(parameter.numel() for parameter in TransformNetwork(NetworkConfig(**options)).parameters())


def test_default_has_the_published_number_of_parameters():
    # Convolutions, k * k * in * out + out: 9x9 3>32 7,808; 3x3 32>64 18,496; 64>128 73,856; ten 128>128 1,475,840;
    # 128>64 73,792; 64>32 18,464; 9x9 32>3 7,779: 1,676,035. Norms, 2 * (32 + 64 + 128 + 10 * 128 + 64 + 32): 3,200.
    assert parameters() == 1_676_035 + 3_200 == 1_679_235


@pytest.mark.parametrize(
    "options, count",
    [
        ({"norm": "batch"}, 1_679_235),
        ({"padding": "start"}, 1_679_235),
        ({"upsampling": "transposed"}, 1_679_235),
        ({"upsampling": "subpixel"}, 1_679_235 + 3 * (73_792 + 18_464)),  # four times the filters before each shuffle
        ({"residual_blocks": 0}, 1_679_235 - 1_475_840 - 10 * 2 * 128),
    ],
)
def test_options_change_the_parameters_as_they_should(options, count):
    assert parameters(**options) == count


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (37, 53), (16, 18), (64, 64)])
@pytest.mark.parametrize("padding, upsampling", list(itertools.product(PADDINGS, UPSAMPLINGS)))
def test_output_size_is_input_size(padding, upsampling, size):
    network = small(padding=padding, upsampling=upsampling)
    with torch.inference_mode():
        output = network(torch.rand(1, 3, *size))
    assert output.shape == (1, 3, *size)
    assert output.isfinite().all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_very_long_and_thin_image(padding):
    with torch.inference_mode():
        assert small(padding=padding)(torch.rand(1, 3, 3, 2000)).shape == (1, 3, 3, 2000)


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_start_padding_makes_up_for_the_blocks(blocks):
    with torch.inference_mode():
        assert small(padding="start", residual_blocks=blocks)(torch.rand(1, 3, 1, 45)).shape == (1, 3, 1, 45)


def test_published_start_padding_is_40_pixels():
    assert NetworkConfig(padding="start").start_padding == 40  # Johnson et al. 2016, supplement


def test_zero_weights_make_a_block_the_identity():
    block = ResidualBlock(NetworkConfig(), 4)
    torch.nn.init.zeros_(block.layers[-1].weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_block_without_padding_shaves_two_pixels_off_its_skip():
    block = ResidualBlock(NetworkConfig(padding="start"), 4)
    torch.nn.init.zeros_(block.layers[-1].weight)
    x = torch.randn(2, 4, 8, 9)
    assert torch.equal(block(x), x[..., 2:-2, 2:-2])


# The last convolution outputs its bias everywhere: 0.5 + 150 / 255 * tanh(1) = 0.948, 1 / (1 + exp(-1)) = 0.731, 1 / 255.
@pytest.mark.parametrize("output, value", [("tanh", 0.94800), ("sigmoid", 0.73106), ("linear", 0.0039216)])
def test_output_curve(output, value):
    network = small(output=output, output_scale=1)
    torch.nn.init.zeros_(network.layers[-1].weight)
    torch.nn.init.ones_(network.layers[-1].bias)
    assert torch.allclose(network(torch.rand(1, 3, 20, 20)), torch.tensor(value), atol=1e-4)


def test_output_scale_multiplies_the_last_convolution():
    plain, scaled = small(output="linear", output_scale=1), small(output="linear", output_scale=3)  # of one seed
    image = torch.rand(1, 3, 20, 20)
    assert torch.allclose(scaled(image), 3 * plain(image), atol=1e-6)


def test_subpixel_starts_without_a_checkerboard():
    network = small(upsampling="subpixel")
    shuffled = []
    for module in network.modules():
        if isinstance(module, torch.nn.PixelShuffle):
            module.register_forward_hook(lambda _module, _inputs, output: shuffled.append(output))
    network(torch.rand(1, 3, 32, 32))
    assert len(shuffled) == 2
    for x in shuffled:  # each 2x2 block of one value, and not all blocks of the same
        coarse = x[..., ::2, ::2]
        assert torch.allclose(x, coarse.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)
        assert coarse.std() > 1e-3


@pytest.mark.parametrize(
    "padding, upsampling, norm",
    [
        ("reflect", "nearest", "instance"),
        ("start", "transposed", "instance"),
        ("replicate", "subpixel", "batch"),
        ("zeros", "nearest", "batch"),
    ],
)
def test_gradient_reaches_every_parameter(padding, upsampling, norm):
    network = small(padding=padding, upsampling=upsampling, norm=norm).train()
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # A bias before a norm has no effect, so only its gradient may vanish; that of the last convolution may not.
        if parameter.ndim == 4 or name.startswith(f"layers.{len(network.layers) - 1}."):
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_batch_gives_what_singles_give(norm):
    network = small(norm=norm)
    images = torch.rand(3, 3, 24, 20)
    with torch.inference_mode():
        assert torch.allclose(network(images), torch.cat([network(image[None]) for image in images]), atol=1e-5)


def test_input_is_not_changed():
    images = torch.rand(1, 3, 20, 20)
    before = images.clone()
    small()(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "data, key",
    [({"width": 0}, "width"), ({"residual_blocks": -1}, "residual_blocks"), ({"padding": "valid"}, "padding"), ({"wdth": 3}, "wdth")],
)
def test_impossible_network_is_refused(data, key):
    with pytest.raises(ConfigError, match=key):
        validate_config(NetworkConfig, data)


@pytest.mark.parametrize("options", [{"stem": "half"}, {"upsampling": "bilinear"}, {"stem": "half", "upsampling": "subpixel"}], ids=str)
@pytest.mark.parametrize("height, width", [(1, 1), (17, 30), (33, 41)])
def test_lean_and_smooth_networks_take_any_size(options, height, width):
    with torch.inference_mode():
        assert small(**options)(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


def test_the_lean_network_has_the_size_that_was_counted():
    # w 16: 10x10 3->32, 3x3 32->64, five blocks of two 3x3 64->64, 3x3 64->32, 5x5 32->12; weights, biases, and two a channel of norms
    convolutions = (300 * 32 + 32) + (9 * 32 * 64 + 64) + 10 * (9 * 64 * 64 + 64) + (9 * 64 * 32 + 32) + (25 * 32 * 12 + 12)
    norms = 2 * (32 + 64 + 10 * 64 + 32)
    network = TransformNetwork(NetworkConfig(width=16, stem="half"))
    assert sum(parameter.numel() for parameter in network.parameters()) == convolutions + norms


def test_a_flat_picture_stays_flat_inside_whatever_the_upsampling():
    """Nearest, bilinear and sub-pixel upsampling draw no grid of their own on a flat picture."""
    for upsampling in ("nearest", "bilinear", "subpixel"):
        with torch.inference_mode():
            out = small(upsampling=upsampling)(torch.full((1, 3, 64, 64), 0.3))[..., 24:40, 24:40]
        assert (out.amax(dim=(2, 3)) - out.amin(dim=(2, 3))).max() < 1e-4


@pytest.mark.parametrize("mode, padding, size", [("reflect", 4, (12, 16)), ("replicate", 4, (8, 10)), ("zeros", 4, (10, 8)), ("zeros", 0, (20, 22)), ("reflect", 4, (11, 16))])
def test_the_last_convolution_sums_the_same_in_training(mode, padding, size):
    torch.manual_seed(0)
    conv = LastConv(5, 3, 9, padding=padding, padding_mode=mode).double()
    images = torch.rand(2, 5, *size, dtype=torch.float64, requires_grad=True)
    found = []
    for training in (True, False):
        out = conv.train(training)(images)
        found.append([out, *torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape)).sum(), [images, conv.weight, conv.bias])])
    assert found[0][0].shape == found[1][0].shape
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found))
