"""Distances as an NVIDIA GPU computes them are those of torch, there and back; where there is no GPU, Triton's interpreter runs the kernels."""

import pytest
import torch
from conftest import TOY_LOSS
from test_fused_norm import DEVICE
from test_losses import image

from fastnst import losses
from fastnst.fused_distances import mean_squares
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, gram_matrix

LAST = torch.channels_last
PRECISION = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # of what is rounded twice on the way back


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """Interpreted, each takes a millisecond; the fewer there are the more turns they take."""
    monkeypatch.setattr("fastnst.fused_distances._PROGRAMS", 3)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(generator, *shape: int, dtype=torch.float32, layout=LAST) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)


def by_torch(features, content, gram, divisor):
    """Mean squares in double precision, and the gradient, of three times the first and 20,000 times the second."""
    x = features.double().requires_grad_()
    squares = []
    if content is not None:
        squares.append(3 * (x - content.double()).square().mean())
    if gram is not None:
        flat = x.flatten(2)
        squares.append(2e4 * (flat @ flat.transpose(1, 2) / divisor - gram.double()).square().mean())
    return squares, torch.autograd.grad(sum(squares), x)[0]


def compared(features, content, gram, divisor):
    """The same, with the factors as weights of the one and as a gradient that comes of the other."""
    x = features.clone(memory_format=torch.preserve_format).to(DEVICE).requires_grad_()
    content, gram = (None if target is None else target.to(DEVICE) for target in (content, gram))
    found = [each for each in mean_squares(x, content, gram, divisor, 3.0, 0.5) if each is not None]
    factors = [factor for factor, target in ((1, content), (4e4, gram)) if target is not None]
    weighted = [factor * each for factor, each in zip(factors, found)]
    return [each.detach().cpu().double() for each in weighted], torch.autograd.grad(sum(weighted), x)[0]


def close(features, content, gram, divisor) -> None:
    wanted, pull = by_torch(features, content, gram, divisor)
    found, own = compared(features, content, gram, divisor)
    torch.testing.assert_close(found, [each.detach() for each in wanted], rtol=1e-5, atol=0)
    assert own.dtype == features.dtype and own.is_contiguous(memory_format=LAST if features.is_contiguous(memory_format=LAST) else torch.contiguous_format)
    assert (own.cpu().double() - pull).norm() < PRECISION[features.dtype] * pull.norm()


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("content, style", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
def test_mean_squares_are_those_of_torch(generator, dtype, content, style, layout):
    features, target = (made(generator, 2, 16, 5, 6, dtype=dtype, layout=layout) for _ in range(2))
    close(features, target if content else None, gram_matrix(made(generator, 1, 16, 4, 4)) if style else None, 16 * 5 * 6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 4, 4), (1, 33, 7, 9), (3, 96, 3, 2)], ids=str)  # counts that are multiples of nothing; more than a program takes
def test_any_shape_is_compared(generator, shape):
    features = made(generator, *shape)
    close(features, made(generator, *shape), gram_matrix(made(generator, *shape), "hw"), shape[2] * shape[3])  # a target for each image


@pytest.mark.parametrize("programs", [1, 32])
def test_programs_share_what_there_is(generator, monkeypatch, programs):
    monkeypatch.setattr("fastnst.fused_distances._PROGRAMS", programs)
    features = made(generator, 2, 80, 16, 9)  # 23,040 numbers, 6,400 of a Gram
    close(features, made(generator, 2, 80, 16, 9), gram_matrix(made(generator, 1, 80, 4, 4)), 80 * 16 * 9)


def test_parts_of_grams_are_added_up(generator, monkeypatch):
    def in_parts(flat):  # as on a GPU
        pieces = flat.float().unflatten(2, (8, -1))
        return torch.einsum("ncpk,ndpk->npcd", pieces, pieces).contiguous()

    monkeypatch.setattr("fastnst.fused_distances.product_in_parts", in_parts)
    close(made(generator, 2, 24, 8, 8), None, gram_matrix(made(generator, 1, 24, 4, 4)), 24 * 8 * 8)


def test_targets_laid_out_otherwise_are_the_same_targets(generator):
    features, target = made(generator, 2, 8, 5, 6), made(generator, 2, 8, 5, 6, layout=torch.contiguous_format)
    close(features, target, None, 1.0)
    close(features, target[:1].expand_as(features), None, 1.0)


def test_small_gradients_of_float16_do_not_vanish(generator):
    features, gram = made(generator, 1, 16, 8, 8, dtype=torch.float16), torch.zeros(1, 16, 16)
    x = features.to(DEVICE).requires_grad_()
    _, found = mean_squares(x, None, gram.to(DEVICE), 2.0**20)
    (2.0**34 * found).backward()  # a matrix of 4 / 256 / 2^20 / 2^20 F F^T 2^34: 2^-12 F F^T; without the factor far below 6e-8
    wanted = by_torch(features, None, gram, 2.0**20)[1] * 2.0**34 / 2e4
    assert (x.grad.cpu().double() - wanted).norm() < 2**-9 * wanted.norm()


def test_what_no_gradient_comes_from_gives_none(generator):
    one, other = (made(generator, 1, 8, 4, 4).to(DEVICE).requires_grad_() for _ in range(2))
    (content, style), (nothing, further) = mean_squares(one, one.detach() + 1, gram_matrix(other.detach())), mean_squares(other, None, gram_matrix(one.detach()))
    assert nothing is None
    by_style = torch.autograd.grad(style, one, retain_graph=True)[0]
    (content + further).backward()
    torch.testing.assert_close(one.grad, 2 * (one.detach() - (one.detach() + 1)) / one.numel())  # of the content alone
    assert by_style.norm() > 0 and other.grad is not None


@pytest.mark.parametrize(
    "options", [{}, {"content_layers": {}}, {"style_layers": {}}, {"gram": "sqrt_chw", "tv_weight": 0.1, "content_layers": {"relu2_2": 2.0, "relu1_1": 0.0}}], ids=str
)
def test_the_loss_is_the_same_by_kernels(options, monkeypatch):
    """With weights and without, and its gradient."""
    config = LossConfig(**TOY_LOSS | options)
    loss = PerceptualLoss(load_loss_network(config, config.layers).to(DEVICE), config, image(5).to(DEVICE))
    images, targets = image(1, 2).to(DEVICE).requires_grad_(), loss.content_targets(image(2, 2).to(DEVICE))

    def found():
        terms = loss(images, targets)
        return (terms.scalars(), loss.measure(images, targets).scalars()), torch.autograd.grad(terms.total, images)[0]

    monkeypatch.setattr(losses, "_fuses", lambda features, *targets: False)
    wanted, pull = found()
    monkeypatch.setattr(losses, "_fuses", lambda features, *targets: True)
    asked = []
    monkeypatch.setattr("fastnst.fused_distances.mean_squares", lambda *given: asked.append(given) or mean_squares(*given))
    terms, own = found()
    assert len(asked) == 2 * len(config.layers) and terms[0].keys() == wanted[0].keys()
    torch.testing.assert_close(terms, wanted, rtol=1e-4, atol=1e-9)
    assert (own - pull).norm() < 1e-4 * pull.norm()


def test_the_distance_is_the_same_by_kernels(generator, monkeypatch):
    a, b = made(generator, 3, 5, 4, 4).to(DEVICE), made(generator, 1, 5, 4, 4).to(DEVICE)
    monkeypatch.setattr(losses, "_fuses", lambda features, *targets: False)
    wanted = [losses.distance(*pair) for pair in ((a, b), (a[..., 0], b[..., 0]))]
    monkeypatch.setattr(losses, "_fuses", lambda features, *targets: True)
    torch.testing.assert_close([losses.distance(*pair) for pair in ((a, b), (a[..., 0], b[..., 0]))], wanted)
