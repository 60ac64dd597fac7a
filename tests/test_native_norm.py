"""Instance norm in training on a CPU, and what lies between two convolutions, through native_norm.c: torch's, there and back."""

import pytest
import torch
import torch.nn.functional as F
from test_fused_network import made
from torch import Tensor

from fastnst import cpu_network
from fastnst.cpu_network import cpu_layers
from fastnst.native_norm import NativeNorm, can_norm

LAST = torch.channels_last


def between(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, relu: bool, padding: int, mode: str, shuffle: int) -> tuple[Tensor, Tensor]:
    """In torch's own steps: of places of shuffle x shuffle pixels, the norm, the ReLU, the sum, the padding."""
    if shuffle > 1:
        images, channels, height, width = x.shape
        places = x.permute(0, 2, 3, 1).reshape(images, height, width, shuffle, shuffle, channels // shuffle**2)
        x = places.permute(0, 5, 1, 3, 2, 4).reshape(images, -1, height * shuffle, width * shuffle)
    x = F.instance_norm(x.contiguous(), weight=weight, bias=bias)
    x = F.relu(x) if relu else x
    x = x if skip is None else x + skip
    return F.pad(x, [padding] * 4, mode=mode) if padding else x, x


CASES = {
    "a ReLU, reflected": ((2, 32, 17, 23), True, False, 1, "reflect", 1),
    "a sum, by 4, from places": ((2, 24, 8, 10), False, True, 4, "reflect", 2),
    "replicated by 2": ((1, 12, 9, 11), False, False, 2, "replicate", 1),
    "zeros around few channels": ((3, 3, 6, 5), True, False, 4, "constant", 1),
    "rows of one part each": ((1, 8, 3, 2100), False, True, 1, "reflect", 1),
    "no padding": ((2, 20, 5, 4), True, False, 0, "constant", 1),
}


@pytest.mark.parametrize("dtype, near", [(torch.float32, 3e-6), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize("shape, relu, skips, padding, mode, shuffle", CASES.values(), ids=CASES)
def test_it_is_torchs_there_and_back(shape, relu, skips, padding, mode, shuffle, dtype, near):
    torch.manual_seed(0)
    images, channels, height, width = shape
    x = (3 * torch.randn(images, channels * shuffle**2, height, width) + 5).to(dtype).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.randn(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
    beside = torch.randn(images, channels, height * shuffle + 2, width * shuffle + 2).to(dtype).contiguous(memory_format=LAST).requires_grad_()
    given = [x, weight, bias] + [beside] * skips
    exact = [each.detach().double().requires_grad_() for each in given]

    def compute(function, x, weight, bias, *beside):
        return function(x, weight, bias, *(each[:, :, 1:-1, 1:-1] for each in beside))

    found = compute(lambda x, weight, bias, skip=None: NativeNorm.apply(x, weight, bias, None, skip, relu, padding, mode, shuffle), *given)
    wanted = compute(lambda x, weight, bias, skip=None: between(x, weight, bias, skip, relu, padding, mode, shuffle), *exact)
    pulls = [torch.randn(each.shape).to(dtype) for each in found]
    gradients = torch.autograd.grad(found, given, pulls)
    expected = torch.autograd.grad(wanted, exact, [pull.double() for pull in pulls])
    for one, other in zip((*found, *gradients), (*wanted, *expected)):
        assert one.shape == other.shape and float(((one.double() - other).norm() / other.norm()).detach()) < near
    assert found[0].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("which", [0, 1])
def test_each_of_both_gradients_may_come_alone(which):
    torch.manual_seed(0)
    x, ones = torch.randn(2, 8, 6, 7).contiguous(memory_format=LAST).requires_grad_(), torch.ones(8)
    exact = x.detach().double().requires_grad_()
    found = NativeNorm.apply(x, ones, ones, None, None, True, 1, "reflect", 1)[which]
    wanted = between(exact, ones.double(), ones.double(), None, True, 1, "reflect", 1)[which]
    pull = torch.randn(found.shape)
    found.backward(pull)
    wanted.backward(pull.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_by_hand():
    # 1, 3 and 5, 7 of one channel: mean 4, squares of the distances 9 + 1 + 1 + 9, variance 5. Gain 2 and shift 1: 2 (x - 4) / root 5 + 1, from which the ReLU takes what is below 0.
    x = torch.tensor([1.0, 3, 5, 7]).view(1, 1, 2, 2)
    out, within = NativeNorm.apply(x, torch.tensor([2.0]), torch.tensor([1.0]), None, None, True, 1, "reflect", 1)
    root = (5 + 1e-5) ** 0.5
    expected = torch.tensor([[0, 1 - 2 / root], [1 + 2 / root, 1 + 6 / root]])
    torch.testing.assert_close(within[0, 0], expected)
    torch.testing.assert_close(out[0, 0, 0], torch.stack([expected[1, 1], expected[1, 0], expected[1, 1], expected[1, 0]]))  # the mirrored second row


def test_moments_do_not_suffer_from_a_large_mean():
    x = torch.randn(1, 16, 64, 64).contiguous(memory_format=LAST) + 1000
    out, _ = NativeNorm.apply(x, torch.ones(16), torch.zeros(16), None, None, False, 0, "constant", 1)
    wanted = F.instance_norm(x.double().contiguous())
    assert float((out - wanted).abs().max()) < 1e-3  # rounding of the numbers themselves: 1000 / 2^24 = 6e-5


def test_one_pixel_unlike_all_others_spoils_no_moments():
    x = torch.randn(1, 16, 64, 64).contiguous(memory_format=LAST)
    x[:, :, 0, 0] += 10_000  # where a part begins
    out, _ = NativeNorm.apply(x, torch.ones(16), torch.zeros(16), None, None, False, 0, "constant", 1)
    wanted = F.instance_norm(x.double().contiguous())
    assert float((out - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_nearly_the_same_everywhere_leaves_nearly_none(dtype):
    # The norm minds no constant, so that the mean of its input's gradient is 0: sums are of what is subtracted from, however it is rounded.
    torch.manual_seed(0)
    x = torch.randn(1, 16, 64, 64).to(dtype).contiguous(memory_format=LAST).requires_grad_()
    bias = torch.zeros(16, requires_grad=True)
    both = NativeNorm.apply(x, torch.ones(16), bias, None, None, False, 0, "constant", 1)
    pulls = [(1.003 + 0.01 * torch.randn(x.shape)).to(dtype) for _ in both]  # whose sum is rounded where it is kept
    torch.autograd.backward(both, pulls)
    assert float(x.grad.double().mean().abs() / x.grad.double().abs().mean()) < 1e-3
    torch.testing.assert_close(bias.grad.double(), sum(pulls).double().sum(dim=(0, 2, 3)), rtol=1e-6, atol=0)


def test_a_pixel_that_is_no_number_is_not_hidden():
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=LAST)
    x[0, 3, 2, 2] = torch.nan
    x.requires_grad_()
    out, _ = NativeNorm.apply(x, torch.ones(8), torch.zeros(8), None, None, True, 1, "reflect", 1)
    assert out[0, 3].isnan().all() and not out[0, [0, 1, 2, 4, 5, 6, 7]].isnan().any()
    out.sum().backward()
    assert x.grad[0, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    x = torch.randn(2, 16, 70, 50).to(dtype).contiguous(memory_format=LAST)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf, weight, bias = x.clone().requires_grad_(), torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
            out, _ = NativeNorm.apply(leaf, weight, bias, None, None, True, 1, "reflect", 1)
            out.backward(torch.ones_like(out))
            results.append((out, leaf.grad, weight.grad, bias.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_code_for_each_cpu_gives_the_same(monkeypatch, library):
    monkeypatch.setattr("fastnst.native_norm.native_library", lambda: library)
    for dtype, near in ((torch.float32, 3e-6), (torch.bfloat16, 6e-3)):
        for case in CASES.values():
            test_it_is_torchs_there_and_back(*case, dtype, near)


def test_no_photos_at_all_have_a_gradient():
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    NativeNorm.apply(x, torch.ones(8), torch.zeros(8), None, None, True, 1, "reflect", 1)[0].sum().backward()
    assert x.grad.shape == x.shape


def test_a_relu_and_a_sum_at_once_are_refused():
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match="got a ReLU and a sum, need one of them or none"):
        NativeNorm.apply(x, torch.ones(8), torch.zeros(8), None, x, True, 1, "reflect", 1)


def test_where_nothing_is_compiled_torch_does_the_same(monkeypatch):
    network, images = made(width=8), torch.rand(2, 3, 18, 20)
    assert can_norm(torch.zeros(1, 8, 4, 4), torch.zeros(8)) and not can_norm(torch.zeros(1, 8, 4, 4).double(), torch.zeros(8).double()) and not can_norm(torch.zeros(1, 8, 4, 0), torch.zeros(8))
    monkeypatch.setattr("fastnst.winograd.native_library", lambda: None)
    outputs = []
    for compiled in (True, False):
        monkeypatch.setattr(cpu_network, "can_norm", lambda *given, compiled=compiled: compiled)
        outputs.append(cpu_layers(network, images, torch.float32))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("x, dtype", [(torch.zeros(1, 8, 4, 4).double(), torch.float64), (torch.zeros(1, 8, 4, 4), torch.bfloat16), (torch.zeros(1, 8, 4, 0), torch.float32)])
def test_numbers_of_other_kinds_are_refused(x, dtype):
    with pytest.raises(ValueError, match=f"got {x.dtype} of shape .* and weights of {dtype}"):
        NativeNorm.apply(x, torch.ones(8, dtype=dtype), torch.ones(8, dtype=dtype), None, None, True, 1, "constant", 1)
