"""How good a model is: worth how many iterations of explicit optimization, how much faster, and what neutral judges say.

Johnson et al. 2016, Fig. 5 and Table 1, with a spread over photos. The optimizer is handed in, not imported.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from fastnst import metrics
from fastnst.config import Config
from fastnst.contender import Contender, load_contenders
from fastnst.data import DataConfig, load_validation
from fastnst.image import load_image, to_pil
from fastnst.judges import Judge, load_judge
from fastnst.loss_network import LossNetworkConfig
from fastnst.picture import count_kinds, find_images, open_rgb
from fastnst.report import iterations, quartiles
from fastnst.yardstick import Optimize, OptimizerRun, PlannedRun, machine, read_run, worth

STARTS = ("content", "noise")
SPEED_AT = (100, 300, 500)  # iterations, as in Johnson et al. 2016, Table 1
_SHOWN = 4  # photos on the contact sheet
_JUDGING = 20  # iterations that a photo's judging takes about as long as, for the progress bar


class EvaluateConfig(Config):
    """On what models are judged: central squares of each of ``sizes``, and by which loss networks besides their own."""

    sizes: tuple[Annotated[int, Field(ge=32, le=8192)], ...] = Field((256, 512, 1024), min_length=1, description="pixels")
    photos: int = Field(50, ge=1)
    iterations: int = Field(500, ge=1, le=10**6, description="of the optimizer")
    judges: tuple[LossNetworkConfig, ...] = (LossNetworkConfig(network="vgg19_slim"),)

    @field_validator("sizes", "judges")
    @classmethod
    def _each_once(cls, values: tuple) -> tuple:
        names = [value if isinstance(value, int) else value.network for value in values]
        if len(set(names)) < len(names):
            raise ValueError(f"got {', '.join(map(str, names))}; give each once")
        return values


@dataclass(frozen=True)
class EvaluateProgress:
    """``done`` of ``total``, in iterations times thousands of pixels; runs that are kept from before count for neither."""

    done: int
    total: int
    message: str


@dataclass(frozen=True)
class Evaluation:
    """``findings``: plain data, a figure for each photo. ``pictures``: by size, rows of (picture, what stands under it)."""

    findings: dict[str, Any]
    pictures: dict[int, list[list[tuple[Image.Image, str]]]]


def evaluate(
    models: Sequence[Path],
    content: Path,
    config: EvaluateConfig,
    optimize: Optimize,
    cache: Path,
    painting: Path | None = None,
    overrides: Sequence[str] = (),
    device: torch.device = torch.device("cpu"),
    report: Callable[[EvaluateProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Judge ``models`` side by side on photos of ``content``; ``None`` when asked to stop, with the runs made so far in ``cache``.

    ``painting`` and ``overrides`` as ``load_contenders`` has them. Raises ``ValueError`` or ``OSError`` naming the file or the key.
    """
    paths, unreadable = _choose_photos(content, config.photos)
    contenders = load_contenders(models, painting, overrides, paths, device)
    judges = [load_judge(judge, device) for judge in config.judges]
    squares = {size: load_validation(paths, DataConfig(content=content, crop="center", crop_size=size))[0] for size in config.sizes}
    plan = [
        (
            f"{size} px, photo {index + 1} of {len(paths)}, {one.label}, L-BFGS from {start}",
            PlannedRun(photo, one.painting, one.loss, start, config.iterations, cache),
        )
        for size in config.sizes
        for index, photo in enumerate(squares[size])
        for one in contenders
        for start in STARTS
    ]
    missing = {run.file: (what, run) for what, run in plan if not run.file.is_file()}
    judging = {size: _JUDGING * len(contenders) * size * size // 1000 for size in config.sizes}
    done, total = 0, sum(run.cost for _, run in missing.values()) + sum(judging.values()) * len(paths)
    for what, run in missing.values():
        if should_stop() or not run.make(optimize, lambda more: report(EvaluateProgress(done + more, total, what)), should_stop):
            return None
        done += run.cost

    findings: dict[str, Any] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "iterations": config.iterations,
        "photos": [path.name for path in paths],
        "unreadable": unreadable,
        "judges": [judge.name for judge in judges],
        "models": {one.label: _describe(one) for one in contenders},
        "sizes": {},
    }
    pictures: dict[int, list[list[tuple[Image.Image, str]]]] = {}
    smallest = [min(open_rgb(path)[0].size) for path in paths]
    for size in config.sizes:
        passes = {one.label: _time_passes(one, squares[size][:1], device) for one in contenders}  # before anything else warms this size up
        rows: list[list[tuple[Image.Image, str]]] = []
        seen: dict[str, list[dict[str, Any]]] = {one.label: [] for one in contenders}
        for index, (path, square) in enumerate(zip(paths, squares[size])):
            if should_stop():
                return None
            report(EvaluateProgress(done, total, f"{size} px, photo {index + 1} of {len(paths)}, judging"))
            photo = (square[None].float() / 255).to(device)
            row = [(to_pil(photo), path.stem)]
            for one in contenders:
                runs = {start: read_run(PlannedRun(square, one.painting, one.loss, start, config.iterations, cache).file) for start in STARTS}
                stylized, figures = _judge_photo(one, photo, runs, judges)
                seen[one.label].append(figures)
                row.append((to_pil(stylized), f"{one.label}: {figures['objective']:.4g}, worth {iterations(figures['worth']['content'], config.iterations)} iterations"))
                reached = (to_pil(load_image(runs["content"].picture)), f"L-BFGS {config.iterations}, last: {runs['content'].objective[-1]:.4g}")
                row += [reached] if reached not in row else []  # models of the same painting and loss share it
            rows += [row] if index < _SHOWN else []
            done += judging[size]
        findings["sizes"][str(size)] = {
            "enlarged": sum(side < size for side in smallest),
            "photo": _columns([_floats(metrics.looks(square[None].float() / 255)) for square in squares[size]]),
            "models": {label: _gather(figures, passes[label], config.iterations, machine(device)) for label, figures in seen.items()},
        }
        pictures[size] = rows
    report(EvaluateProgress(total, total, "done"))
    return Evaluation(findings, pictures)


def _choose_photos(folder: Path, count: int) -> tuple[list[Path], list[str]]:
    """The same ``count`` readable photos each time, and what is wrong with those passed over."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--content: no folder at {folder}; need a folder of photos that the models were not trained on")
    photos = find_images(folder)
    chosen: list[Path] = []
    unreadable: list[str] = []
    for path in random.Random(0).sample(photos, len(photos)):
        if len(chosen) < count:
            try:
                open_rgb(path)
                chosen.append(path)
            except OSError as error:
                unreadable.append(str(error))
    if not chosen:
        first = f"; the first: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"--content: no photo below {folder} can be read; found {count_kinds(folder)}{first}")
    return sorted(chosen), unreadable


@torch.inference_mode()
def _judge_photo(one: Contender, photo: Tensor, runs: dict[str, OptimizerRun], judges: Sequence[Judge]) -> tuple[Tensor, dict[str, Any]]:
    """The model's clamped picture, and all figures of it and of the optimizer's pictures."""
    stylized = one.network(photo).clamp(0, 1)
    objective = float(one.loss(stylized, one.loss.content_targets(photo)).total)
    if not math.isfinite(objective):
        raise FloatingPointError(f"{one.file}: the objective of its picture is {objective}; is the model whole, and trained?")

    def judged(picture: Tensor, looks: dict[str, Tensor]) -> dict[str, float]:
        distances = {judge.name: judge.distances(photo, one.painting, picture) for judge in judges}
        by_kind = {f"{kind}/{name}": distances[name][kind] for kind in ("style", "content") for name in distances}
        return by_kind | _floats({"ssim": metrics.structural_similarity(photo, picture)} | looks)

    reached = {start: load_image(run.picture).to(photo.device) for start, run in runs.items()}
    return stylized, {
        "objective": objective,
        "judged": judged(stylized, metrics.judgement(one.network, photo, stylized)),
        "worth": {start: worth(objective, run.objective) for start, run in runs.items()},
        "runs": runs,
        "optimizer_judged": {start: judged(picture, metrics.looks(picture)) for start, picture in reached.items()},
    }


def _floats(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


@torch.inference_mode()
def _time_passes(one: Contender, square: Tensor, device: torch.device) -> dict[str, float]:
    """Seconds of the first pass at this size, of a warm one (median), and of its transfers to the device and back."""

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    passes: list[float] = []
    transfers: list[float] = []
    while len(passes) < 4 or (sum(passes) < 2 and len(passes) < 50):
        began = clock()
        photo = square.to(device)
        moved = clock()
        stylized = one.network(photo.float() / 255).clamp(0, 1).mul(255).round().to(torch.uint8)
        passed = clock()
        stylized.cpu()
        passes.append(passed - moved)
        transfers.append(moved - began + clock() - passed)
    return {"first_pass": passes[0], "pass": statistics.median(passes[1:]), "transfers": statistics.median(transfers[1:])}


def _gather(photos: list[dict[str, Any]], passes: dict[str, float], iterations: int, here: str) -> dict[str, Any]:
    """The figures of each photo as those of a model: plain data, where an infinite worth is none."""
    optimizer = {}
    for start in STARTS:
        worths = [photo["worth"][start] for photo in photos]
        by_iteration = list(zip(*(accumulate(photo["runs"][start].objective, min) for photo in photos)))  # the best so far
        optimizer[start] = {
            "mean": [statistics.fmean(values) for values in by_iteration],
            "quartiles": [quartiles(values) for values in by_iteration],
            "worth": [value if math.isfinite(value) else None for value in worths],
            "worth_quartiles": [value if math.isfinite(value) else None for value in quartiles(worths)],
            "judged": _columns([photo["optimizer_judged"][start] for photo in photos]),
        }
    runs = [run for photo in photos for run in photo["runs"].values()]
    runs = [run for run in runs if run.machine == here] or runs
    scaled = [run.seconds[-1] if iterations == 1 else (run.seconds[-1] - run.seconds[1]) / (iterations - 1) for run in runs]
    speed = {}
    for count in SPEED_AT:
        times = [run.seconds[count] if count <= iterations else run.seconds[-1] + (count - iterations) * each for run, each in zip(runs, scaled)]
        speed[str(count)] = statistics.median(times)
    return {
        "objective": [photo["objective"] for photo in photos],
        "judged": _columns([photo["judged"] for photo in photos]),
        "optimizer": optimizer,
        "speed": passes | {"optimizer": speed, "optimizer_first": statistics.median(run.seconds[1] for run in runs), "optimizer_machine": runs[0].machine},
    }


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _describe(one: Contender) -> dict[str, Any]:
    return {
        "file": str(one.file),
        "step": one.step,
        "parameters": sum(parameter.numel() for parameter in one.network.parameters()),
        "painting": one.recipe.style.image.name,
        "loss_network": one.recipe.loss.network,
        "raw_weights": one.loss.config.model_dump(include={"content_weight", "content_layers", "style_weight", "style_layers", "tv_weight"}),
        "weights_from": one.weights_from,
    }
