"""Weights laid out by one kernel are what their layouts make of them, there and back; where there is no GPU, Triton's interpreter runs it."""

import pytest
import torch
import torch.nn.functional as F
from test_fused_norm import DEVICE

from fastnst import wide
from fastnst.fused_weights import LaidOut, WeightLayouts

LAYOUTS = {
    "as it is": lambda weight: weight,
    "first": lambda weight: wide.first_weight(weight / 255, 1),
    "last": wide.last_weight,
    "subpixel": wide.by_place,
    "nearest": lambda weight: wide.upsampled_weight(weight, "nearest"),  # adds up taps
    "bilinear": lambda weight: wide.upsampled_weight(weight, "bilinear"),
    "transposed": lambda weight: wide.upsampled_weight(F.pad(weight, (0, 1, 0, 1)), "transposed"),
}
SHAPES = {"first": (2, 3, 9, 9), "last": (3, 2, 9, 9), "subpixel": (8, 3, 3, 3)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("names", [*([name] for name in LAYOUTS), list(LAYOUTS)], ids=lambda names: names[0] if len(names) == 1 else "all")
def test_weights_and_gradients_are_those_of_the_layouts(names, memory_format):
    torch.manual_seed(0)
    kernels = [torch.randn(SHAPES.get(name, (4, 3, 3, 3))).contiguous(memory_format=memory_format).to(DEVICE).requires_grad_() for name in names]
    without_effect = torch.randn(5, device=DEVICE, requires_grad=True)
    layouts = WeightLayouts(kernels, [None if name == "as it is" else LAYOUTS[name] for name in names], [without_effect], torch.float32)
    found = LaidOut.apply(layouts, *layouts.parameters)
    wanted = [LAYOUTS[name](kernel.double()) for name, kernel in zip(names, kernels)]
    pulls = [torch.randn_like(each) for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one.double(), other, atol=1e-6, rtol=1e-6)
    expected = torch.autograd.grad(wanted, kernels, pulls)
    *gradients, none = torch.autograd.grad(found, [*kernels, without_effect], [pull.float() for pull in pulls])
    for kernel, one, other in zip(kernels, gradients, expected):
        assert one.stride() == kernel.stride()  # as an optimizer wants it
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(none, torch.zeros_like(without_effect))


def test_a_weight_that_is_merely_cast_is_copied_and_one_without_a_gradient_gets_zeros():
    made = [torch.randn(40, 30, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(2)]  # more numbers than a program takes
    kernels = [each.to(DEVICE).requires_grad_() for each in made]
    layouts = WeightLayouts(kernels, [None, None], [], torch.bfloat16)
    assert not layouts._forward._source.numel() and len(layouts._forward._programs) == 2 * 11  # of 10,800 numbers 1,024 each
    found = LaidOut.apply(layouts, *layouts.parameters)
    for one, kernel in zip(found, kernels):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), kernel.detach(), atol=0, rtol=2**-7)
    first, second = torch.autograd.grad(found[1].float().square().sum(), kernels)
    assert torch.equal(first, torch.zeros_like(first))
    torch.testing.assert_close(second, 2 * kernels[1].detach(), atol=0, rtol=2**-6)


def test_weights_that_were_replaced_are_noticed():
    kernel = torch.randn(4, 3, 3, 3, device=DEVICE)
    layouts = WeightLayouts([kernel], [None], [], torch.float32)
    assert layouts.holds([kernel])
    assert not layouts.holds([torch.nn.Parameter(kernel)])  # in the same memory
    kernel.data = kernel.data.as_strided(kernel.shape, (27, 1, 9, 3))
    assert not layouts.holds([kernel])
