"""Known answers, with the arithmetic beside them."""

import math

import pytest
import torch
from conftest import TOY_LOSS

from fastnst import self_product
from fastnst.config import ConfigError, validate_config
from fastnst.loss_network import load_loss_network
from fastnst.losses import (
    NETWORK_TERMS,
    LossConfig,
    LossTerms,
    PerceptualLoss,
    calibrate,
    distance,
    gaussian_wasserstein,
    gram_matrix,
    mean_covariance,
    total_variation,
)
from fastnst.texture import log_spectrum, regular_grid, spectrum_distance

# Two channels of three positions: F F^T = [[1 + 4, 3 + 8], [3 + 8, 9 + 16 + 1]] = [[5, 11], [11, 26]].
FEATURES = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]]).view(1, 2, 1, 3)
BARE_GRAM = torch.tensor([[[5.0, 11.0], [11.0, 26.0]]])


@pytest.mark.parametrize("divisor, number", [("none", 1), ("hw", 1 * 3), ("chw", 2 * 1 * 3), ("sqrt_chw", math.sqrt(6))])
def test_gram_matrix(divisor, number):
    assert torch.allclose(gram_matrix(FEATURES, divisor), BARE_GRAM / number)


def test_the_gradient_of_a_gram_matrix_is_that_of_the_formula():
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(gram_matrix, features)


def test_the_gradient_through_bfloat16_features_is_that_of_float32():
    exact = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16().float().requires_grad_()
    half = exact.detach().bfloat16().requires_grad_()
    for features in (exact, half):
        gram_matrix(features).square().sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert (half.grad.float() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_gram_matrix_takes_each_image_alone():
    grams = gram_matrix(torch.cat([FEATURES, 2 * FEATURES]), "none")
    assert torch.allclose(grams, torch.cat([BARE_GRAM, 4 * BARE_GRAM]))


def test_gram_matrix_forgets_where():
    features = torch.rand(1, 4, 6, 5)
    assert torch.allclose(gram_matrix(features), gram_matrix(features.flip(2).transpose(2, 3)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_of_half_precision_is_formed_in_float32(dtype):
    # 4096 positions of 200 * 200 sum to 1.6e8; float16 ends at 65504.
    gram = gram_matrix(torch.full((1, 2, 64, 64), 200.0, dtype=dtype), "none")
    assert gram.dtype == torch.float32
    assert gram.unique().tolist() == [4096 * 200.0 * 200.0]


def test_gram_is_exact_within_autocast():
    features = torch.rand(1, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram_matrix(features)
    assert torch.equal(inside, gram_matrix(features))


# Differences 1, 2 / 3, 4 of two images: squares 1 + 4 = 5 and 9 + 16 = 25, two values each.
@pytest.mark.parametrize(
    "kind, value",
    [
        ("mse", (5 / 2 + 25 / 2) / 2),
        ("sse", (5 + 25) / 2),
        ("rmse", (math.sqrt(5 / 2) + math.sqrt(25 / 2)) / 2),
    ],
)
def test_distance(kind, value):
    a = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert distance(a, torch.zeros(2, 1, 2), kind).item() == pytest.approx(value)
    assert distance(a, torch.zeros(1, 1, 2), kind).item() == pytest.approx(value)  # one target for all


@pytest.mark.parametrize("kind", ["mse", "sse", "rmse"])
def test_distance_of_a_batch_is_the_mean_of_the_singles(kind):
    a, b = torch.rand(4, 3, 5, 2), torch.rand(4, 3, 5, 2)
    singles = [distance(a[i : i + 1], b[i : i + 1], kind) for i in range(4)]
    assert distance(a, b, kind).item() == pytest.approx(sum(singles).item() / 4)


@pytest.mark.parametrize("kind", ["mse", "sse", "rmse"])
def test_gradients_of_a_distance_are_those_of_the_formula_whatever_the_layout(kind):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
    for images in (1, 2):
        b = torch.randn(images, 3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: distance(a, b, kind), (a, b))


@pytest.mark.parametrize("kind", ["mse", "sse", "rmse"])
def test_gradient_is_finite_at_distance_zero(kind):
    a = torch.ones(2, 3, requires_grad=True)
    distance(a, torch.ones(2, 3), kind).backward()
    assert a.grad.abs().max() == 0


def test_distance_in_half_precision_does_not_overflow():
    a = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert distance(a, torch.zeros_like(a), "sse").item() == 4 * 300.0**2  # 360,000 > 65,504


# [[0, 1], [3, 7]]: to the right 1 and 4, below 3 and 6; squares 1 + 16 + 9 + 36 = 62, absolute 14; four pixels.
@pytest.mark.parametrize("power, reduction, value", [(2, "sum", 62), (1, "sum", 14), (2, "mean", 62 / 4), (1, "mean", 14 / 4)])
def test_total_variation(power, reduction, value):
    image = torch.tensor([[0.0, 1.0], [3.0, 7.0]]).view(1, 1, 2, 2)
    assert total_variation(image, power, reduction).item() == pytest.approx(value)
    with_flat = torch.cat([image, torch.ones_like(image)])  # a flat image has none: half as much on average
    assert total_variation(with_flat, power, reduction).item() == pytest.approx(value / 2)


def test_total_variation_sums_over_channels():
    image = torch.rand(1, 1, 4, 5)
    assert total_variation(image.expand(1, 3, 4, 5)).item() == pytest.approx(3 * total_variation(image).item(), rel=1e-5)


def cross(a: float, b: float, mean: tuple[float, float]) -> torch.Tensor:
    """Two channels over four positions, with this mean and the covariance diag(a^2, b^2)."""
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    return (signs * torch.tensor([[a], [b]]) + torch.tensor(mean)[:, None]).view(1, 2, 2, 2)


def test_mean_and_covariance():
    mean, covariance = mean_covariance(cross(2, 3, (5, -1)), epsilon=0.5)
    assert torch.allclose(mean, torch.tensor([[5.0, -1.0]]))
    assert torch.allclose(covariance, torch.tensor([[[4.5, 0.0], [0.0, 9.5]]]), atol=1e-5)


def test_wasserstein_between_diagonal_gaussians():
    # Closed form: |m - m'|^2 + sum (s - s')^2 = (5 - 4)^2 + (-1 - 1)^2 + (2 - 5)^2 + (3 - 1)^2 = 18; per channel 9.
    target_mean, target_covariance = mean_covariance(cross(5, 1, (4, 1)), epsilon=0)
    root = target_covariance.sqrt()  # of a diagonal matrix
    value = gaussian_wasserstein(*mean_covariance(cross(2, 3, (5, -1)), epsilon=0), target_mean, root)
    assert value.item() == pytest.approx(9, rel=1e-4)


def test_wasserstein_between_correlated_gaussians():
    # Equal means, S = 4 S': W2^2 = tr(S + S' - 2 * 2 S') = tr(S'), as (R S R)^(1/2) = 2 S'.
    features = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features -= features.mean(dim=(2, 3), keepdim=True)
    _, target = mean_covariance(features, epsilon=0)
    values, vectors = torch.linalg.eigh(target)
    root = vectors * values.sqrt()[:, None, :] @ vectors.transpose(1, 2)
    value = gaussian_wasserstein(*mean_covariance(2 * features, epsilon=0), torch.zeros(1, 3, dtype=torch.float64), root)
    assert value.item() == pytest.approx(target.diagonal(dim1=1, dim2=2).sum().item() / 3)


def toy_loss(style=None, **options) -> PerceptualLoss:
    config = LossConfig(**TOY_LOSS | options)
    style = torch.rand(1, 3, 40, 32, generator=torch.Generator().manual_seed(5)) if style is None else style
    return PerceptualLoss(load_loss_network(config, config.layers), config, style)


def image(seed: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


STATISTICS = [{"statistics": "gram"}, {"statistics": "mean_covariance"}]


@pytest.mark.parametrize("options", STATISTICS)
def test_style_term_vanishes_at_the_style_itself(options):
    style = image(1)
    loss = toy_loss(style, **options)
    targets = loss.content_targets(style)
    at_style, elsewhere = loss(style, targets), loss(image(2), targets)
    for layer in ("relu1_2", "relu2_2"):
        assert abs(at_style.style[layer]) < 1e-3 * elsewhere.style[layer]
    assert at_style.content["relu2_2"] == 0 < elsewhere.content["relu2_2"]


@pytest.mark.parametrize(
    "options", [{"distance": d, "gram": g} for d in ("mse", "sse", "rmse") for g in ("chw", "sqrt_chw")] + STATISTICS[1:]
)
def test_terms_of_a_batch_are_the_mean_of_the_singles(options):
    loss = toy_loss(tv_weight=0.1, **options)
    images, contents = image(1, 3), image(2, 3)
    batch = loss(images, loss.content_targets(contents)).scalars()
    singles = [loss(images[i : i + 1], loss.content_targets(contents[i : i + 1])).scalars() for i in range(3)]
    for name, value in batch.items():
        assert value.item() == pytest.approx(sum(single[name].item() for single in singles) / 3, rel=1e-3), name


def test_weights_multiply_their_terms():
    images, content = image(1), image(2)
    plain = toy_loss(tv_weight=1.0, style_weight=1.0)
    weighted = toy_loss(
        content_weight=2.0, content_layers={"relu2_2": 3.0}, style_weight=5.0, style_layers={"relu1_2": 7.0, "relu2_2": 0.0}, tv_weight=11.0
    )
    a, b = plain(images, plain.content_targets(content)), weighted(images, weighted.content_targets(content))
    assert b.content["relu2_2"].item() == pytest.approx(6 * a.content["relu2_2"].item())
    assert b.style["relu1_2"].item() == pytest.approx(35 * a.style["relu1_2"].item())
    assert b.style["relu2_2"] == 0
    assert b.tv.item() == pytest.approx(11 * a.tv.item())


def test_terms_are_built_from_the_features_named():
    images, content, style = image(1), image(2), image(3)
    loss = toy_loss(style)
    x, c, s = (loss.loss_network(i) for i in (images, content, style))
    terms = loss(images, loss.content_targets(content))
    assert terms.content["relu2_2"].item() == pytest.approx((x["relu2_2"] - c["relu2_2"]).square().mean().item())
    expected = 100 * (gram_matrix(x["relu1_2"]) - gram_matrix(s["relu1_2"])).square().mean()
    assert terms.style["relu1_2"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_total_is_the_sum_of_the_terms():
    one, two, three, four, five, six, seven = (torch.tensor(float(value)) for value in range(1, 8))
    terms = LossTerms({"relu3_3": one}, {"relu1_2": two, "relu2_2": three}, four, five, six, seven)
    assert terms.total == 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert {name: value.item() for name, value in terms.scalars().items()} == {
        "loss/total": 28,
        "loss/content": 1,
        "loss/style": 5,
        "loss/tv": 4,
        "loss/grid": 5,
        "loss/spectrum": 6,
        "loss/stability": 7,
        "loss_content/relu3_3": 1,
        "loss_style/relu1_2": 2,
        "loss_style/relu2_2": 3,
    }


def test_scalars_are_detached_and_terms_are_not():
    loss = toy_loss(tv_weight=1.0)
    terms = loss(image(1).requires_grad_(), loss.content_targets(image(2)))
    assert terms.total.requires_grad
    assert not any(value.requires_grad for value in terms.scalars().values())


@pytest.mark.parametrize("units, factor", [("pixels", 1), ("network", 2**2)])
def test_tv_units(units, factor):
    loss = toy_loss(tv_weight=1.0, tv_units=units, mean=(0.3, 0.3, 0.3), std=(0.5, 0.5, 0.5))  # differences over 0.5: twice
    images = image(1)
    assert loss(images, loss.content_targets(images)).tv.item() == pytest.approx(factor * total_variation(images).item(), rel=1e-4)


def test_covariances_of_bfloat16_features_lose_nothing_where_means_are_large(monkeypatch):
    monkeypatch.setattr(self_product, "_HAS_MATRIX_UNIT", True)
    torch.manual_seed(0)
    features = (8 + torch.randn(1, 6, 40, 30) / 8).bfloat16()  # the mean's square is 4096 times the variance
    assert torch.equal(mean_covariance(features)[1], mean_covariance(features.float())[1])
    features = (features.float() - 4).bfloat16()  # 1024 times: roundings of float32, in the order of sums that a CPU has, are 1e-4 or so each; 2^-17 of the second moment would be 8e-3
    wanted = torch.cov(features[0].double().flatten(1), correction=0)
    found = mean_covariance(features, epsilon=0.0)[1][0].double()
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("matrix_unit", [True, False], ids=["AMX", "any CPU"])
@pytest.mark.parametrize("shape", [(2, 24, 40, 30), (1, 3, 5, 1)], ids=str)
def test_grams_of_bfloat16_features_are_float32(shape, matrix_unit, monkeypatch):
    """bfloat16, in which a CPU's product comes out, has 8 bits: rounded once, the largest would be up to 0.4 % off."""
    monkeypatch.setattr(self_product, "_HAS_MATRIX_UNIT", matrix_unit)
    torch.manual_seed(0)
    features = torch.randn(shape).relu().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = gram_matrix(features, "none")
    flat = features.detach().double().flatten(2)
    wanted = flat @ flat.transpose(1, 2)
    assert found.dtype == torch.float32
    assert (found.double() - wanted).abs().max() < (3e-5 if matrix_unit else 1e-6) * wanted.abs().max()
    pull = torch.randn(wanted.shape)
    found.backward(pull)
    expected = ((pull + pull.transpose(1, 2)).double() @ flat).view(shape)
    assert (features.grad.double() - expected).abs().max() < 2e-2 * expected.abs().max()  # which is bfloat16's
    features.data[0, 0, 0, 0] = torch.nan
    assert gram_matrix(features, "none")[0, 0].isnan().any()


def test_terms_for_networks_alone_are_none_of_pictures():
    config = LossConfig(strength=3, tv_weight=2.0)
    own = config.model_copy(update=dict.fromkeys(NETWORK_TERMS, 1.0))
    assert own.for_pictures == config != own


@pytest.mark.parametrize("options", [{}, {"tv_weight": 1.0, "grid_weight": 2.0}, {"content_layers": {}}], ids=str)
def test_the_pull_is_the_gradient_of_the_total(options):
    loss = toy_loss(**options)
    images = [image(1, 2).requires_grad_() for _ in range(2)]
    whole, parts = (loss(each, loss.content_targets(image(2, 2))) for each in images)
    (0.5 * whole.total).backward()
    parts.pull(0.5)
    torch.testing.assert_close(images[1].grad, images[0].grad)


@pytest.mark.parametrize("options", [*STATISTICS, {"distance": "rmse"}, {"content_layers": {}}, {"style_layers": {}, "tv_weight": 1.0}])
def test_gradient_reaches_the_image(options):
    loss = toy_loss(**options)
    images = image(1, 2).requires_grad_()
    loss(images, loss.content_targets(image(2, 2))).total.backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("options", STATISTICS)
def test_gradient_is_finite_for_flat_images(options):
    loss = toy_loss(torch.full((1, 3, 24, 24), 0.5), **options)
    images = torch.full((1, 3, 24, 24), 0.2, requires_grad=True)
    loss(images, loss.content_targets(torch.zeros(1, 3, 24, 24))).total.backward()
    assert images.grad.isfinite().all()


def test_targets_carry_no_gradient():
    loss = toy_loss()
    assert not any(target.requires_grad for target in loss.content_targets(image(1).requires_grad_()).values())


def test_default_layers_and_distances_are_those_of_johnson():
    config = LossConfig()
    assert (config.network, config.resolved_weights, config.content_layers) == ("vgg16", "imagenet_features", {"relu3_3": 1.0})
    assert (config.content_weight, config.style_weight, list(config.style_layers)) == (
        1.0,
        1.0,
        ["relu1_2", "relu2_2", "relu3_3", "relu4_3"],
    )


def test_layers_are_listed_once():
    assert LossConfig().layers == ["relu3_3", "relu1_2", "relu2_2", "relu4_3"]


@pytest.mark.parametrize(
    "data, complaint",
    [
        ({"style_layers": {"relu9_9": 1}}, r"style_layers: vgg16 has no layer 'relu9_9'; nearest: relu"),
        ({"content_layers": {"relu3_3": -1}}, r"content_layers\.relu3_3: got -1"),
        ({"content_layers": {}, "style_layers": {}}, "both empty: nothing to minimize"),
        ({"network": "squeezenet1_0", "weights": "imagenet"}, r"content_layers: squeezenet1_0 has no layer 'relu3_3'"),
        ({"distance": "l1"}, r"distance: got 'l1'"),
        ({"tv_power": 3}, r"tv_power: got 3"),
    ],
)
def test_impossible_objective_is_refused(data, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate_config(LossConfig, data)


def strength_of(strength, **changes):
    return validate_config(LossConfig, {**TOY_LOSS, "style_weight": 1.0, "strength": strength, **changes})


def calibrated(config, photos, style):
    loss = PerceptualLoss(load_loss_network(config, config.layers), config, style)
    loss.config = calibrate(loss, photos)
    return loss


@pytest.fixture
def pictures():
    """Two photos and a painting."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 3, 32, 32, generator=generator), torch.rand(1, 3, 24, 40, generator=generator)


def test_at_strength_5_an_unstyled_photo_has_style_10_and_one_of_other_content_has_content_1(pictures):
    photos, style = pictures
    loss = calibrated(strength_of(5), photos, style)
    terms = loss(photos, loss.content_targets(photos.roll((16, 16), dims=(2, 3))))
    # Each of the two layers is 1 in its own unit, they share the weight 10 x 2^(5 - 5) = 10.
    assert [float(term) for term in terms.style.values()] == pytest.approx([5, 5], rel=1e-4)
    assert sum(float(term) for term in terms.content.values()) == pytest.approx(1, rel=1e-4)


def test_each_step_of_strength_doubles_the_style(pictures):
    photos, style = pictures
    weights = [calibrated(strength_of(strength), photos, style).config.style_weight for strength in (0, 4, 5, 10)]
    assert weights == pytest.approx([10 / 32, 5, 10, 320])


def test_strength_means_the_same_whatever_the_loss_network_measures_in(pictures):
    photos, style = pictures
    losses = [calibrated(strength_of(5, std=[std] * 3), photos, style) for std in (1.0, 0.1)]
    totals = [float(loss(photos * 0.9, loss.content_targets(photos)).total) for loss in losses]
    # Features of a ReLU network without biases grow with its input: 10 times the input, 100 times content, 10,000 times style.
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)


def test_strength_has_to_be_calibrated_first(pictures):
    photos, style = pictures
    config = strength_of(5)
    loss = PerceptualLoss(load_loss_network(config, config.layers), config, style)
    with pytest.raises(ValueError, match="calibrate"):
        loss(photos, loss.content_targets(photos))


def test_raw_weights_are_left_as_they_are(pictures):
    photos, style = pictures
    config = strength_of(None)
    assert calibrate(PerceptualLoss(load_loss_network(config, config.layers), config, style), photos) is config


def test_the_spectrum_term_is_part_of_the_objective():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with_spectrum, without = (toy_loss(spectrum_weight=weight) for weight in (0.5, 0.0))
    terms, bare = (loss(images, loss.content_targets(images)) for loss in (with_spectrum, without))
    assert float(terms.total) == pytest.approx(float(bare.total) + float(terms.spectrum), rel=1e-5)
    style = torch.rand(1, 3, 40, 32, generator=torch.Generator().manual_seed(5))
    assert float(terms.spectrum) == pytest.approx(0.5 * float(spectrum_distance(images, log_spectrum(style))))
    assert float(terms.scalars()["loss/spectrum"]) == float(terms.spectrum) > 0 and "loss/spectrum" not in bare.scalars()
    small = images[..., :20]
    assert float(with_spectrum(small, with_spectrum.content_targets(small)).spectrum) == 0
    with pytest.raises(ValueError, match="spectrum_weight: got a style image of 20x64, need 32 px"):
        toy_loss(style=small, spectrum_weight=0.5)


def test_the_grid_term_is_part_of_the_objective():
    images = torch.zeros(1, 3, 64, 64)
    images[..., ::4] = 0.5
    with_grid, without = (toy_loss(grid_weight=weight) for weight in (100.0, 0.0))
    terms, bare = (loss(images, loss.content_targets(images)) for loss in (with_grid, without))
    assert float(terms.grid) == pytest.approx(100 * float(regular_grid(images)))
    assert float(terms.total) == pytest.approx(float(bare.total) + float(terms.grid), rel=1e-5)
    assert float(terms.scalars()["loss/grid"]) == float(terms.grid) > 0 and "loss/grid" not in bare.scalars()
