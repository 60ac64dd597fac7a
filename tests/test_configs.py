"""Every shipped config is valid, and says the numbers of its source. Expected values are written by hand from the sources."""

import pytest
from conftest import REPOSITORY

from fastnst.config import flatten, load_config
from fastnst.distill import DistillConfig
from fastnst.network import TransformNetwork
from fastnst.optimize import OptimizeConfig, scale_plan
from fastnst.schedule import learning_rate_at
from fastnst.train import TrainConfig

CONFIGS = REPOSITORY / "configs"
OPTIMIZE = {"gatys", "gatys_adam", "squeezenet", "rmse", "multiscale"}
DISTILL = {"distill"}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
GIVEN = ["style.image=painting.jpg", "data.content=photos"]


def load(name: str):
    if name in OPTIMIZE:
        return load_config(OptimizeConfig, CONFIGS / f"{name}.yaml")
    if name in DISTILL:
        return load_config(DistillConfig, CONFIGS / f"{name}.yaml", ["teacher.vgg19=vgg19.pth", "data.content=photos"])
    return load_config(TrainConfig, CONFIGS / f"{name}.yaml", GIVEN)


def each(weight: float, *layers: str) -> dict[str, float]:
    return {layer: weight for layer in layers}


VGG16_STYLE = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
FIVE_BLOCKS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
# 2 epochs of COCO's 82,783 photos by 4: 2 x 20,696 batches, the last of each epoch of 3 photos.
TWO_EPOCHS = 41_392
# Johnson et al.'s strength counts half the squares and a batch of 4: an image has 4 / 2 times it.
TV_1E6, TV_1E5, TV_1E4 = 2e-6, 2e-5, 2e-4

# What every feed-forward recipe has unless it says otherwise.
FEED_FORWARD = {
    "network.width": 32,
    "network.residual_blocks": 5,
    "network.norm": "instance",
    "data.crop_size": 256,
    "train.batch_size": 4,
    "train.learning_rate.initial": 1e-3,
    "train.learning_rate.decay": "constant",
    "train.learning_rate.warmup_steps": 0,
    "train.clip_gradient": None,
    "loss.distance": "mse",
    "loss.gram": "chw",
    "loss.statistics": "gram",
    "loss.pooling": "max",
}
# Johnson et al.'s loss, which their released models share.
JOHNSON_LOSS = {
    "loss.network": "vgg16",
    "loss.weights": "imagenet_features",
    "loss.content_layers": {"relu3_3": 1},
    "loss.content_weight": 1,
    "loss.style_layers": each(1, *VGG16_STYLE),
    "loss.style_weight": 5,
    "loss.tv_power": 2,
    "loss.tv_reduction": "sum",
    "loss.tv_units": "network",
}

RECIPES = {
    "johnson": FEED_FORWARD
    | JOHNSON_LOSS
    | {
        "style.long_side": 256,
        "data.crop": "squash",
        "data.flip": False,
        "data.shuffle": False,
        "network.padding": "start",
        "network.upsampling": "transposed",
        "network.output": "tanh",
        "loss.tv_weight": TV_1E6,
        "train.steps": 40_000,
    },
    "pytorch_examples": FEED_FORWARD
    | {
        "style.long_side": None,
        "style.short_side": None,
        "data.crop": "center",
        "data.flip": False,
        "data.shuffle": False,
        "network.padding": "reflect",
        "network.upsampling": "nearest",
        "network.output": "linear",
        "loss.network": "vgg16",
        "loss.weights": "imagenet",
        "loss.content_layers": {"relu2_2": 1},
        "loss.content_weight": 1e5,
        "loss.style_layers": each(1, *VGG16_STYLE),
        "loss.style_weight": 1e10,
        "loss.tv_weight": 0,
        "train.steps": TWO_EPOCHS,
    },
    "lengstrom": FEED_FORWARD
    | {
        "style.long_side": None,
        "data.crop": "squash",
        "data.flip": False,
        "network.padding": "zeros",
        "network.upsampling": "transposed",
        "network.output": "tanh",
        "loss.network": "vgg19",
        "loss.weights": "imagenet",
        "loss.content_layers": {"relu4_2": 1},
        "loss.content_weight": 7.5,
        "loss.style_layers": each(1, *FIVE_BLOCKS),
        "loss.style_weight": 100,
        "loss.tv_weight": 200,
        "loss.tv_reduction": "mean",
        "train.steps": TWO_EPOCHS,
    },
    "rrmina": FEED_FORWARD
    | {
        "style.long_side": None,
        "data.crop": "center",
        "data.shuffle": True,
        "loss.network": "vgg16",
        "loss.weights": "imagenet_features",
        "loss.content_layers": {"relu2_2": 1},
        "loss.content_weight": 17,  # x the weight of the layer, 1: their product counts
        "loss.style_layers": each(1, *VGG16_STYLE),
        "loss.style_weight": 50,
        "loss.tv_weight": 0,
        "train.steps": 10_000,
    },
    "gordicaleksa": FEED_FORWARD
    | {
        "style.long_side": None,
        "data.crop": "center",
        "data.shuffle": False,
        "loss.network": "vgg16",
        "loss.weights": "imagenet",
        "loss.content_layers": {"relu2_2": 1},
        "loss.content_weight": 1,
        "loss.style_layers": each(0.25, *VGG16_STYLE),
        "loss.style_weight": 4e5,
        "loss.tv_weight": 0,
        "train.steps": TWO_EPOCHS,
    },
    "ulyanov": FEED_FORWARD
    | {
        "loss.network": "vgg19",
        "loss.weights": "imagenet",
        "loss.content_layers": {"relu4_2": 1},
        "loss.content_weight": 1,
        "loss.style_layers": each(1, "relu1_1", "relu2_1", "relu3_1", "relu4_1"),
        "loss.style_weight": 1,
        "loss.tv_weight": 0,
        "train.steps": 50_000,
        "train.batch_size": 1,
        "train.learning_rate.decay": "step",
        "train.learning_rate.decay_every": 2_000,
        "train.learning_rate.decay_factor": 0.8,
    },
    "wave": FEED_FORWARD | JOHNSON_LOSS | {"style.long_side": 512, "loss.tv_weight": TV_1E4, "train.steps": 40_000},
    "starry_night": FEED_FORWARD
    | JOHNSON_LOSS
    | {"style.long_side": 512, "loss.style_weight": 3, "loss.tv_weight": TV_1E5, "train.steps": 40_000},
    "the_scream": FEED_FORWARD
    | JOHNSON_LOSS
    | {"style.long_side": 384, "loss.style_weight": 20, "loss.tv_weight": TV_1E5, "train.steps": 60_000},
    "composition_vii": FEED_FORWARD | JOHNSON_LOSS | {"style.long_side": 512, "train.steps": 60_000},
    "gatys": {
        "content.long_side": 512,
        "loss.network": "vgg19",
        "loss.weights": "imagenet",
        "loss.content_layers": {"relu4_2": 1},
        "loss.content_weight": 5,
        "loss.style_layers": each(1, *FIVE_BLOCKS),
        "loss.style_weight": 100,
        "loss.tv_weight": 1e-3,
        "optimize.init": "noise",
        "optimize.optimizer": "lbfgs",
        "optimize.history": 100,
        "optimize.steps": 1_000,
    },
    "gatys_adam": {
        "content.long_side": 512,
        "style.long_side": 512,
        "loss.network": "vgg19",
        "loss.weights": "imagenet",
        "loss.distance": "mse",
        "loss.gram": "sqrt_chw",
        "loss.content_layers": each(1, *FIVE_BLOCKS),
        "loss.content_weight": 1e-2,
        "loss.style_layers": each(1, *FIVE_BLOCKS),
        "loss.style_weight": 1e4,
        "loss.tv_weight": 0,
        "optimize.init": "content",
        "optimize.optimizer": "adam",
        "optimize.learning_rate.initial": 0.02,
        "optimize.betas": (0.99, 0.999),
        "optimize.steps": 2_000,
        "optimize.log_every": 400,
    },
    "squeezenet": {
        "content.short_side": 192,
        "style.short_side": 192,
        "loss.network": "squeezenet1_1",
        "loss.weights": "imagenet",
        "loss.distance": "sse",
        "loss.gram": "chw",
        "loss.content_layers": {"features.3": 1},
        "loss.content_weight": 5e-2,
        "loss.style_layers": {"features.1": 2e4, "features.4": 500, "features.6": 12, "features.7": 1},
        "loss.style_weight": 1,
        "loss.tv_weight": 5e-2,
        "loss.tv_power": 2,
        "loss.tv_reduction": "sum",
        "optimize.optimizer": "adam",
        "optimize.clamp": True,
        "optimize.steps": 200,
    },
    "rmse": {"loss.network": "vgg19", "loss.weights": "imagenet", "loss.distance": "rmse", "optimize.init": "noise"},
    "multiscale": {
        "content.long_side": 512,
        "loss.network": "vgg19",
        "loss.weights": "imagenet",
        "loss.statistics": "mean_covariance",
        "loss.content_layers": {"relu4_2": 1},
        "loss.content_weight": 0.015,
        "loss.tv_weight": 2,
        "optimize.optimizer": "adam",
        "optimize.learning_rate.initial": 0.02,
        "optimize.clamp": True,
        "optimize.average": 0.99,
        "optimize.first_side": 128,
        "optimize.first_steps": 1_000,
        "optimize.steps": 500,
    },
}


def test_every_shipped_recipe_has_its_numbers_checked_here():
    assert set(RECIPES) | {"smoke", "shipwreck", "own", "lean", "quickstart"} | DISTILL == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_valid(name):
    assert isinstance(load(name), OptimizeConfig if name in OPTIMIZE else DistillConfig if name in DISTILL else TrainConfig)


@pytest.mark.parametrize("name", sorted(set(NAMES) - OPTIMIZE - DISTILL))
@pytest.mark.parametrize("given, missing", [(GIVEN[:1], "data"), (GIVEN[1:], "style")])
def test_a_training_config_leaves_painting_and_photos_to_the_user(name, given, missing):
    with pytest.raises(ValueError, match=f"{missing}.* not given"):
        load_config(TrainConfig, CONFIGS / f"{name}.yaml", given)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_has_the_numbers_of_its_source(name):
    config = load(name)
    found = flatten(config) | {"loss.weights": config.loss.resolved_weights}
    assert {key: found[key] for key in RECIPES[name]} == RECIPES[name]


def test_johnson_pads_40_pixels_at_the_start_and_has_the_published_size():
    network = TransformNetwork(load("johnson").network)
    assert network.config.start_padding == 40
    # Their 1,679,235 parameters with a scale and a shift for each channel of the norms, and nothing else.
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_679_235


@pytest.mark.parametrize("step, rate", [(0, 3.0), (179, 3.0), (180, 0.1), (199, 0.1)])
def test_squeezenet_learns_at_3_and_after_step_180_at_a_tenth(step, rate):
    descent = load("squeezenet").optimize
    assert learning_rate_at(descent.learning_rate, step, descent.steps) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("step, rate", [(1_999, 1e-3), (2_000, 8e-4), (4_000, 6.4e-4), (49_999, 1e-3 * 0.8**24)])
def test_ulyanov_takes_four_fifths_every_2000_steps(step, rate):
    loop = load("ulyanov").train
    assert learning_rate_at(loop.learning_rate, step, loop.steps) == pytest.approx(rate)


def test_multiscale_weighs_its_layers_256_64_16_4_1_summing_to_one():
    loss = load("multiscale").loss
    weights = [loss.style_weight * loss.style_layers[layer] for layer in FIVE_BLOCKS]
    assert weights == pytest.approx([256 / 341, 64 / 341, 16 / 341, 4 / 341, 1 / 341], rel=1e-6)


def test_multiscale_grows_from_128_to_512_by_the_root_of_2():
    plan = scale_plan(load("multiscale"), 768, 1024)
    assert [round(512 * scale) for scale, _ in plan] == [128, 181, 256, 362, 512]
    assert [steps for _, steps in plan] == [1000, 500, 500, 500, 500]


def test_rmse_has_one_content_layer_and_several_style_layers():
    loss = load("rmse").loss
    assert len(loss.content_layers) == 1 and len(loss.style_layers) > 1
