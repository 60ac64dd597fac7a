"""Mean squares of differences on a CPU, through native_distance.c."""

import pytest
import torch

from fastnst import losses
from fastnst.losses import distance
from fastnst.native_distance import MeanSquare, can_compare

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(2, 7, 9, 11), (1, 64, 70, 40), (3, 5), (1, 1, 1, 1), (8193,), (4, 8, 32, 32)]  # fewer than eight, whole parts of 8,192 numbers, and more


def pair(shape, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(shape).add(3).to(dtype) for _ in range(2))
    if len(shape) == 4:
        a, b = (each.contiguous(memory_format=torch.channels_last) for each in (a, b))
    return a.requires_grad_(), b


def test_it_is_the_mean_of_squares_by_hand():
    a, b = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True), torch.tensor([[1.0, 0.0, 6.0]])
    found = MeanSquare.apply(a, b)
    assert found.item() == pytest.approx(13 / 3)  # (0 + 4 + 9) / 3
    (5 * found).backward()
    torch.testing.assert_close(a.grad, torch.tensor([[0.0, 20 / 3, -10.0]]))  # 5 x 2 / 3 x (0, 2, -3)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_that_of_double_precision(shape, dtype):
    a, b = pair(shape, dtype)
    exact = a.detach().double().requires_grad_()
    wanted = (exact - b.double()).square().mean()
    found = MeanSquare.apply(a, b)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    wanted.backward()
    found.backward()
    assert a.grad.dtype == dtype and a.grad.stride() == a.stride()
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)  # rounded once, as it is stored


@DTYPES
def test_sums_of_many_numbers_are_exact_with_any_number_of_threads(dtype):
    a = torch.full((3_000_001,), 1.0).to(dtype)
    b = torch.zeros_like(a)
    b[::2] = 0.5
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(MeanSquare.apply(a, b).item())
    finally:
        torch.set_num_threads(before)
    assert found == [pytest.approx((1_500_001 * 0.25 + 1_500_000) / 3_000_001, rel=1e-7)] * 3 and len(set(found)) == 1


def test_what_is_no_number_is_not_hidden():
    a, b = pair((2, 8, 5, 5), torch.bfloat16)
    a.data[1, 3, 2, 2] = torch.nan
    found = MeanSquare.apply(a, b)
    assert found.isnan()
    found.backward()
    assert a.grad.isnan().any()


@DTYPES
def test_code_for_each_cpu_gives_the_same(dtype, monkeypatch, library):
    monkeypatch.setattr("fastnst.native_distance.native_library", lambda: library)
    for shape in SHAPES:
        test_it_is_that_of_double_precision(shape, dtype)


@DTYPES
def test_distances_take_it_where_both_are_alike_and_are_the_same_otherwise(dtype, monkeypatch):
    a, b = pair((2, 16, 12, 10), dtype)
    assert can_compare(a, b)
    others = {
        "another order": b.contiguous(),
        "one for all": b[:1],
        "with a gradient": b.clone().requires_grad_(),
        "of another kind": b.double(),
        "with gaps": torch.stack([b, b], -1)[..., 0],
        "of negated memory": torch._neg_view(-b),
    }
    own = distance(a, b)
    for name, other in others.items():
        assert not can_compare(a, other), name
        if name != "one for all":
            torch.testing.assert_close(distance(a, other).float(), own, rtol=1e-5, atol=0, msg=name)
    gaps = torch.stack([a, b, b], -1)
    assert not can_compare(gaps[..., 0], gaps[..., 1]) and not can_compare(a[:0], b[:0]) and not can_compare(torch.nn.Parameter(a.detach()), b)
    with torch.inference_mode():
        target = b.clone()
        assert can_compare(a.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(distance(a, target), a), torch.autograd.grad(distance(a, b), a), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    monkeypatch.setattr(losses, "can_compare", lambda a, b: False)
    before, after = (torch.autograd.grad(each, a)[0] for each in (own, distance(a, b)))
    torch.testing.assert_close(before, after, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
