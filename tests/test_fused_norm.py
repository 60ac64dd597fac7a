"""The norm's kernels for NVIDIA GPUs give what torch gives; where there is no GPU, Triton's interpreter runs them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_engine import ARCHITECTURES, eager, photo
from test_stages import staged

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
from fastnst import fused_norm as fused_norms  # noqa: E402
from fastnst import wide  # noqa: E402
from fastnst.cli import shipped_folder  # noqa: E402
from fastnst.engine import load_network  # noqa: E402
from fastnst.fused_norm import FusedNorm, fused_norm  # noqa: E402
from fastnst.nvidia import NvidiaPass  # noqa: E402

pytestmark = pytest.mark.usefixtures("whole_float32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where it is interpreted: conftest.py


def normed(x, weight, bias, relu=False, skip=None, padding=0, mode="constant"):
    if skip is not None:
        tensor, inset = skip[0].to(DEVICE), skip[1]
        skip = tensor[..., inset : tensor.shape[2] - inset, inset : tensor.shape[3] - inset]
    return fused_norm(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), relu, skip, padding, mode).cpu()


def norm_by_torch(x, weight, bias, relu, skip, padding, mode):
    after = F.instance_norm(x.double(), weight=weight.double(), bias=bias.double(), eps=1e-5)
    after = after.relu() if relu else after
    if skip is not None:
        tensor, inset = skip
        after = after + tensor[..., inset : tensor.shape[2] - inset, inset : tensor.shape[3] - inset].double()
    return F.pad(after, [padding] * 4, mode=mode)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("inset, relu", [(None, True), (0, False), (3, False)])
def test_norm_relu_sum_and_padding_are_those_of_torch(mode, padding, inset, relu):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 9, 7) + 10).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(5), torch.randn(5)
    skip = None
    if inset is not None:
        skip = torch.randn(2, 5, 9 + 2 * inset, 7 + 2 * inset).contiguous(memory_format=torch.channels_last), inset
    found = normed(x, weight, bias, relu, skip, padding, mode)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == x.dtype
    torch.testing.assert_close(found.double(), norm_by_torch(x, weight, bias, relu, skip, padding, mode), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("channels, height, width", [(32, 60, 70), (24, 3, 300), (128, 1, 1), (3, 100, 1)])
def test_pictures_of_many_programs_and_of_a_pixel(channels, height, width):
    x = torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(channels), torch.rand(channels)
    found = normed(x, weight, bias, True)
    if height * width == 1:  # of one pixel the norm is its bias
        assert torch.equal(found, bias[None, :, None, None])
    else:
        torch.testing.assert_close(found.double(), norm_by_torch(x, weight, bias, True, None, 0, "reflect"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("margin, height, width", [(0, 5, 7), (1, 6, 4)])  # 140 and 60 pixels: 17 and 7 blocks of 8, and half of one
def test_every_pixel_counts_once_where_programs_have_many_blocks(margin, height, width, monkeypatch):
    monkeypatch.setattr(fused_norms, "_SUMMING", (128, 3, 2, 4))  # two numbers of float32 for one of two bytes, of 8 channels; three programs
    torch.manual_seed(0)
    x = torch.randn(1, 32, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(8), torch.rand(8)
    found = fused_norm(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), shuffle=2, margin=margin).cpu()
    pixels = F.pad(wide.in_pixels(x, 2), [-margin] * 4)
    torch.testing.assert_close(found.double(), norm_by_torch(pixels, weight, bias, False, None, 0, "reflect"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("away", ["a pixel", "a row", "everything"])
def test_moments_are_exact_where_numbers_lie_far_from_zero_or_from_each_other(away):
    torch.manual_seed(0)
    x = torch.randn(1, 8, 64, 90) + 10
    x[..., : {"a pixel": 1, "a row": 1, "everything": 64}[away], : 1 if away == "a pixel" else 90] += 300
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(8), torch.zeros(8)
    tolerance = 4e-5 if away == "everything" else 1e-5  # float32 numbers lie 3e-5 apart at 310, the mean's, too
    torch.testing.assert_close(normed(x, weight, bias).double(), norm_by_torch(x, weight, bias, False, None, 0, "reflect"), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_in_half_precision_only_the_result_is_rounded(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(1, 16, 20, 20) + 30).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(16, dtype=dtype), torch.rand(16, dtype=dtype)
    found = normed(x, weight, bias, padding=1, mode="reflect")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), norm_by_torch(x, weight, bias, False, None, 1, "reflect"), atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize(
    "mode, padding, shuffle, places, margin",
    [
        *((mode, padding, shuffle, 1, margin) for mode, padding in (("reflect", 0), ("reflect", 1), ("reflect", 4), ("replicate", 1), ("constant", 2)) for shuffle, margin in ((1, 0), (2, 0), (2, 1))),
        *(("reflect", 1, 4, 1, 0), ("reflect", 4, 2, 4, 0), ("constant", 4, 2, 4, 0), ("reflect", 2, 1, 2, 0), ("reflect", 0, 2, 4, 0), ("reflect", 5, 2, 4, 1)),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_are_those_of_torch(relu, mode, padding, shuffle, places, margin):
    torch.manual_seed(0)
    height, width = (5, 7) if places == 1 else (6, 8)  # and sides that are multiples of the places'
    x = 3 * torch.randn(2, 3, height * shuffle, width * shuffle) + 10
    if margin:  # whatever lies there
        x[:, :, [0, -1]], x[:, :, :, [0, -1]] = torch.nan, torch.inf
    x = wide.in_places(x, shuffle).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(3), torch.randn(3)
    skip = None if relu or shuffle > 1 else torch.randn(2, 3, height + 2, width + 2).contiguous(memory_format=torch.channels_last)

    def by_torch(x, weight, bias, skip):
        pixels = F.pad(wide.in_pixels(x, shuffle), [-margin] * 4)
        after = F.instance_norm(pixels, weight=weight, bias=bias, eps=1e-5)
        after = after.relu() if relu else after
        after = after if skip is None else after + skip[:, :, 1:-1, 1:-1]
        out = F.pad(after, [padding] * 4, mode=mode)
        if places == 1:
            return out, after
        return (wide.in_places(out, places),)

    def by_kernels(x, weight, bias, skip):
        found = FusedNorm.apply(x, weight, bias, None if skip is None else skip[:, :, 1:-1, 1:-1], relu, padding, mode, shuffle, places, margin)
        return found if places == 1 else found[:1]

    pulls = [torch.randn_like(each) for each in by_torch(x, weight, bias, skip)]

    def gradients(compute, *inputs):
        inputs = [None if each is None else each.requires_grad_() for each in inputs]
        outputs = compute(*inputs)
        return outputs, torch.autograd.grad(outputs, [each for each in inputs if each is not None], [pull.to(outputs[0]) for pull in pulls])

    inputs = (x, weight, bias, skip)
    wanted = gradients(by_torch, *(None if each is None else each.double() for each in inputs))
    found = gradients(by_kernels, *(None if each is None else each.to(DEVICE) for each in inputs))
    for one, other in zip((*found[0], *found[1]), (*wanted[0], *wanted[1])):
        torch.testing.assert_close(one.cpu().double(), other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda options: "-".join(map(str, options.values())))
def test_a_network_with_its_own_norms_is_the_network(architecture):
    network, stages = staged(**architecture)
    pictures = photo(17, 20, 2)
    found = NvidiaPass(stages, torch.device(DEVICE), torch.float32)(torch.from_numpy(pictures).to(DEVICE), "uint8")
    assert np.abs(found.cpu().numpy() - eager(network, pictures)).max() <= 0.51  # rounding to whole levels


@pytest.mark.parametrize("width", [20, 22])  # by places of four pixels, and not
def test_several_pictures_of_numbers_are_stylized_as_well(width):
    network, stages = staged()
    pictures = photo(18, width, 2)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(DEVICE) / 255
    found = NvidiaPass(stages, torch.device(DEVICE), torch.float32)(images, "float")
    assert np.abs(found.permute(0, 2, 3, 1).cpu().numpy() * 255 - eager(network, pictures)).max() <= 0.02


@pytest.mark.parametrize("name, dtype", [("wave", torch.float16), ("composition_vii", torch.float32)])
def test_a_picture_of_one_color_comes_out_as_one(name, dtype):
    """What rounding leaves of a variance of 0 grows by a factor of up to 316 with each norm."""
    stages = load_network(shipped_folder("checkpoints") / name / "model.safetensors")
    pictures = np.stack([np.full((16, 16, 3), 200, np.uint8), photo(16, 16, 1)[0]])
    found = NvidiaPass(stages, torch.device(DEVICE), dtype)(torch.from_numpy(pictures).to(DEVICE), "uint8").cpu().numpy()
    assert not found[0].astype(int).std(axis=(0, 1)).any()
    assert found[1].std() > 20  # what lies beside it is none of that
