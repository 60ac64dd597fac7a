"""A model, with the painting and the very loss that it was trained under: what it takes to judge it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnst.checkpoint import STATE_NAME, load_model, load_training_state
from fastnst.config import Config, parse_config
from fastnst.data import DataConfig, load_validation
from fastnst.image import load_image
from fastnst.loss_network import LossNetwork, LossNetworkConfig, load_loss_network
from fastnst.losses import LossConfig, PerceptualLoss, calibrate
from fastnst.network import TransformNetwork
from fastnst.picture import ImageSize


METRICS_NAME = "metrics.json"


class Painting(ImageSize):
    """The style image and its size, as the recipe in a model file has them."""

    image: Path


class Recipe(Config):
    """The part of a model's recipe that judges it."""

    style: Painting
    loss: LossConfig
    crop_size: int


@dataclass(frozen=True)
class Contender:
    """``painting``: ``(1, 3, H, W)`` at the recipe's size. ``weights_from`` says where the loss's raw weights were found."""

    label: str
    file: Path
    network: TransformNetwork
    step: int
    recipe: Recipe
    painting: Tensor
    loss: PerceptualLoss
    weights_from: str


def load_contenders(
    models: Sequence[Path], painting: Path | None, overrides: Sequence[str], photos: Sequence[Path], device: torch.device = torch.device("cpu")
) -> list[Contender]:
    """The models side by side; those with the same loss network share it.

    ``painting``: of all, or a folder that holds them by the names in the recipes; without it they lie beside the models.
    ``overrides``: of the recipes, as ``loss.weights=FILE``. ``photos``: to measure raw weights on where no run noted them.
    Raises ``ValueError`` or ``OSError`` naming the file or the key.
    """
    contenders: list[Contender] = []
    loss_networks: dict[str, LossNetwork] = {}
    for file in models:
        network, info = load_model(file)
        if not {"style", "loss", "data"} <= set(info.recipe):
            raise ValueError(f"{file}: the model file holds no recipe, so there is no loss to judge it by; evaluate a model that `fastnst train` wrote")
        recorded = json.dumps({"style": info.recipe["style"], "loss": info.recipe["loss"], "crop_size": info.recipe["data"]["crop_size"]})
        recipe, trained = (parse_config(Recipe, recorded, changes, source=str(file)) for changes in (overrides, ()))
        source = painting or file.parent
        source = source / recipe.style.image if source.is_dir() else source
        if not source.is_file():
            raise FileNotFoundError(f"{file}: its painting is not at {source}; give it with --style PAINTING, or the folder of several with --style FOLDER")
        style = load_image(source, recipe.style).to(device)
        key = json.dumps([recipe.loss.model_dump(include=set(LossNetworkConfig.model_fields)), recipe.loss.layers])
        if key not in loss_networks:
            try:
                loss_networks[key] = load_loss_network(recipe.loss, recipe.loss.layers).to(device)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{file}: {error}; say where it lies with --set loss.weights=FILE") from error
        loss = PerceptualLoss(loss_networks[key], recipe.loss, style)
        same = recipe.loss.model_copy(update={"weights": ""}) == trained.loss.model_copy(update={"weights": ""})
        raw, weights_from = _raw_weights(file, loss, same, photos, recipe.crop_size)
        loss.config = raw.for_pictures
        name = file.resolve().parent.name if file.stem == "model" else file.stem
        label = name if all(name != other.label for other in contenders) else f"{name} ({len(contenders) + 1})"
        contenders.append(Contender(label, file, network.to(device), info.step, recipe, style, loss, weights_from))
    return contenders


def note_weights(raw: LossConfig) -> dict[str, Any]:
    """The weights of a calibrated loss as a published style's ``metrics.json`` holds them under ``raw_weights``, where ``load_contenders`` finds them."""
    return {"content": raw.content_weight, "style": {layer: raw.style_weight * weight for layer, weight in raw.style_layers.items()}, "tv": raw.tv_weight}


def _read_noted(noted: dict[str, Any], asked: LossConfig) -> LossConfig:
    layers = {layer: float(weight) for layer, weight in noted["style"].items()}
    return asked.model_copy(update={"strength": None, "content_weight": float(noted["content"]), "style_weight": 1.0, "style_layers": layers, "tv_weight": float(noted["tv"])})


def _raw_weights(file: Path, loss: PerceptualLoss, as_trained: bool, photos: Sequence[Path], crop_size: int) -> tuple[LossConfig, str]:
    """What ``loss.strength`` stood for in training: as the run noted it, else measured anew, as training does."""
    if loss.config.strength is None:
        return loss.config, "the recipe"
    state, published = file.parent / STATE_NAME, file.parent / METRICS_NAME
    if as_trained and state.is_file() and (noted := load_training_state(state).get("loss")):
        return LossConfig(**{**noted, "weights": loss.config.weights}), state.name
    if as_trained and published.is_file():
        try:
            return _read_noted(json.loads(published.read_text(encoding="utf-8"))["raw_weights"], loss.config), published.name
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{published}: no raw_weights to judge by ({error!r}); mend or remove it") from error
    crops, _ = load_validation(list(photos[:8]), DataConfig(content=Path("."), crop_size=crop_size))
    return calibrate(loss, crops.to(loss.loss_network.mean.device).float() / 255), "measured anew on these photos"
