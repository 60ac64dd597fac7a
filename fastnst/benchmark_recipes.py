"""Which recipe is better: networks trained by several on the same paintings, photos and seeds, judged by one loss and by neutral judges."""

import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastnst import metrics
from fastnst.checkpoint import load_model
from fastnst.config import to_yaml
from fastnst.data import DataConfig, load_validation
from fastnst.files import write_text
from fastnst.image import load_image, to_pil
from fastnst.judges import Judge
from fastnst.loss_network import load_loss_network
from fastnst.losses import NETWORK_TERMS, PerceptualLoss, calibrate
from fastnst.model import MODEL_NAME
from fastnst.report import LOOKS
from fastnst.task import TrainConfig

# Of the loss, what each recipe keeps for itself: terms that make networks better, by which none is judged.
OWN_TERMS = ("tv_weight", *NETWORK_TERMS)
_FIGURES = (("content", "its content", 1, 3), ("style", "its style", 1, 3), *LOOKS)


def share_loss(settings: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The loss settings of a recipe that is to lower the loss of the ``first``: all of that one's but the recipe's own terms."""
    return {**first, **{name: settings[name] for name in OWN_TERMS}}


@dataclass(frozen=True)
class Contest:
    """What all networks are judged on and by, besides the first recipe's loss: central squares of ``photos``, of each of ``sizes`` px, and ``judges``.

    Trainings are kept in folders of ``runs``, each with what it took and what was found, so that nothing is done twice.
    """

    runs: Path
    photos: Sequence[Path]
    sizes: Sequence[int]
    judges: Sequence[Judge]
    device: torch.device

    def run(
        self, name: str, config: TrainConfig, seed: int, first: TrainConfig, train: Callable[..., Any], should_stop: Callable[[], bool]
    ) -> tuple[Path, list[dict[str, Any]]] | None:
        """The folder of one training, and its ``size``, ``seconds`` and ``figures`` (``judge_network``) at each size; None when stopped.

        ``name`` is the recipe's; ``first`` is the config whose loss judges; ``train`` is that of ``fastnst.train``, handed in. Raises as it does.
        """
        config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed, "keep": "last"})})
        folder = self.runs / _folder_name(name, config)
        clock, kept = folder / "seconds.json", folder / "figures.json"
        by = json.loads(first.loss.model_dump_json()) | {"at": first.data.crop_size}  # the loss is calibrated at that size
        judges = [judge.name if judge.config.weights == "auto" else f"{judge.name}={judge.config.weights}" for judge in self.judges]
        asked = {"sizes": list(self.sizes), "photos": [[str(path), path.stat().st_size] for path in self.photos], "judges": judges, "loss": by}
        if kept.is_file() and (read := json.loads(kept.read_text(encoding="utf-8")))["asked"] == asked:
            return folder, read["figures"]

        legs = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {"finished": False, "seconds": 0.0}
        if not legs["finished"]:
            began = time.monotonic()
            result = train(config, folder, self.device, should_stop=should_stop)
            legs = {"finished": result.finished, "seconds": legs["seconds"] + time.monotonic() - began}
            write_text(clock, json.dumps(legs))
            if not result.finished:
                return None
        network = load_model(folder / MODEL_NAME)[0].to(self.device)
        painting = load_image(config.style.image, config.style).to(self.device)
        loss = PerceptualLoss(load_loss_network(first.loss, first.loss.layers).to(self.device), first.loss, painting)
        calibrated = calibrate(loss, self._squares(first.data.crop_size)[:8].to(self.device).float() / 255)
        loss.config = calibrated.model_copy(update=dict.fromkeys(OWN_TERMS, 0.0))
        found = []
        for size in self.sizes:
            if should_stop():
                return None
            photos = self._squares(size)
            figures, pictures = judge_network(network, loss, painting, self.judges, photos)
            found.append({"size": size, "seconds": legs["seconds"], "figures": figures})
        for index, picture in enumerate(pictures):
            to_pil(photos[index][None].float() / 255).save(folder / f"photo_{index}.png")
            picture.save(folder / f"stylized_{index}.png")
        write_text(kept, json.dumps({"asked": asked, "figures": found}))
        return folder, found

    def _squares(self, size: int) -> Tensor:
        return load_validation(list(self.photos), DataConfig(content=Path("."), crop="center", crop_size=size))[0]


def _folder_name(name: str, config: TrainConfig) -> str:
    """Of recipe, painting and seed, and of all that decides, so that another config is another run."""
    decides = config.model_copy(update={"data": config.data.model_copy(update={"workers": None, "cache": "auto", "cache_gb": None})})
    digest = hashlib.sha256(to_yaml(decides).encode()).hexdigest()[:10]
    safe = re.sub(r"[^\w.-]", "_", Path(name).name)[:60]
    return f"{safe}_{config.style.image.stem}_{config.train.seed}_{digest}"


@torch.inference_mode()
def judge_network(network: nn.Module, loss: PerceptualLoss, painting: Tensor, judges: Sequence[Judge], photos: Tensor) -> tuple[dict[str, float], list[Image.Image]]:
    """Means over ``photos``, uint8 ``(N, 3, S, S)``, of the clamped pictures' content and style by ``loss`` (whose own terms are not
    looked at) and by ``judges``, and of their looks; and the first four pictures."""
    device = painting.device
    rows, pictures = [], []
    for photo in photos:
        content = (photo[None].float() / 255).to(device)
        stylized = network(content).clamp(0, 1)
        terms = loss(stylized, loss.content_targets(content))
        row = {"content": float(sum(terms.content.values())), "style": float(sum(terms.style.values()))}
        row["objective"] = row["content"] + row["style"]
        for judge in judges:
            row |= {f"{kind}/{judge.name}": value for kind, value in judge.distances(content, painting, stylized).items()}
        row["ssim"] = float(metrics.structural_similarity(content, stylized))
        row |= {name: float(value) for name, value in metrics.judgement(network, content, stylized).items()}
        rows.append(row)
        if len(pictures) < 4:
            pictures.append(to_pil(stylized))
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}, pictures


def markdown(runs: Sequence[dict[str, Any]], head: str, recipes: Sequence[str], diverged: Sequence[str] = ()) -> str:
    """Tables of ``runs``: each has ``recipe``, ``style``, ``seed``, ``seconds``, ``size``, and ``figures`` as ``judge_network`` found them.

    ``diverged`` says which of the runs of ``recipes`` are missing; ratios are over the paintings and seeds that both recipes have.
    """
    styles, sizes = (list(dict.fromkeys(run[key] for run in runs)) for key in ("style", "size"))
    judges = [name for name in runs[0]["figures"] if "/" in name]
    lines = ["# Recipes side by side", "", head, "", *(f"- diverged, and in no mean: {what}" for what in diverged), *([""] if diverged else [])]
    for size in sizes:
        at_size = [run for run in runs if run["size"] == size]

        def of(recipe: str, name: str, style: str | None = None, seed: int | None = None) -> list[float]:
            return [run["figures"][name] for run in at_size if run["recipe"] == recipe and style in (None, run["style"]) and seed in (None, run["seed"])]

        lines += [f"## {size} px", "", f"| recipe | objective | of the first's | {' | '.join([*judges, *(heading for _, heading, _, _ in _FIGURES)])} | s to train |"]
        lines += ["|---" * (len(judges) + len(_FIGURES) + 4) + "|"]

        def pairs(recipe: str) -> dict[tuple[str, int], float]:
            return {(run["style"], run["seed"]): run["figures"]["objective"] for run in at_size if run["recipe"] == recipe}

        firsts = pairs(recipes[0])
        for recipe in recipes:
            mine = pairs(recipe)
            if not mine:
                lines += [f"| {recipe} | diverged {'| ' * (len(judges) + len(_FIGURES) + 2)}|"]
                continue
            seeds = dict.fromkeys(run["seed"] for run in at_size if run["recipe"] == recipe)
            by_seed = [statistics.fmean(of(recipe, "objective", seed=seed)) for seed in seeds]
            cells = [f"{statistics.fmean(by_seed):.3f} ({min(by_seed):.3f} to {max(by_seed):.3f})"]
            both = [pair for pair in mine if pair in firsts]
            cells += [f"{sum(mine[pair] for pair in both) / sum(firsts[pair] for pair in both):.2f}" if both else ""]
            cells += [f"{statistics.fmean(of(recipe, name)):.3f}" for name in judges]
            cells += [f"{statistics.fmean(of(recipe, name)) * factor:.{decimals}f}" for name, _, factor, decimals in _FIGURES]
            cells += [f"{statistics.fmean(run['seconds'] for run in at_size if run['recipe'] == recipe):.0f}"]
            lines += [f"| {recipe} | {' | '.join(cells)} |"]
        lines += ["", f"| objective | {' | '.join(styles)} |", "|---" * (len(styles) + 1) + "|"]
        for recipe in recipes:
            found = [of(recipe, "objective", style) for style in styles]
            cells = [f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "diverged" for values in found]
            lines += [f"| {recipe} | {' | '.join(cells)} |"]
        lines += [""]
    lines += [
        "Means over paintings, photos and seeds; in brackets from the best to the worst seed. objective: content + style of the first recipe's loss, "
        "of the clamped pictures, under which all recipes were trained. NAME/JUDGE: by loss networks that none was trained against (but vgg19_slim, where it is the "
        "recipes' own); style 0 is the painting's own statistics and 1 the photo untouched, content 0 is the photo and 1 a like photo of other content. "
        "flicker, border, grid: in levels of 255, as `fastnst evaluate` has them.",
        "",
    ]
    return "\n".join(lines)
