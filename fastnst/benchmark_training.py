"""A training step as published against ours: the same network, loss, photos and machine; how fast, how near to the floor.

Guards one convention: a step that is compared runs in a process of its own, with that process's allocator and settings,
and the processes take turns, so that what disturbs the machine disturbs them alike.
"""

import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from fastnst import winograd
from fastnst.data import DataConfig, PhotoStream, keep_photos, list_photos, training_batches
from fastnst.gradient import Gradient
from fastnst.loss_network import load_loss_network
from fastnst.losses import PerceptualLoss
from fastnst.native_library import multiplies_pairs
from fastnst.network import plainly
from fastnst.objective import Objective
from fastnst.optimizer import adam
from fastnst.published import PUBLISHED, CenterCrops, PublishedStep, Task, Way
from fastnst.runtime import arithmetic_rate, keep_freed_memory, memory_format, resolve_precision
from fastnst.winograd import Conv3x3

# How far the losses of the same photos, from the same weights, may lie from the published step's, relatively. Rounding alone moves
# them: Adam's first steps are of one size however small the gradient is.
TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.02}

OURS = Way("ours", precision="auto", keep_memory=True, ours=True, fused_adam=True, kept_photos=True)
LEVERS = (
    Way("allocator keeps freed memory", keep_memory=True),
    Way("our step alone, in float32", ours=True),
    Way("bfloat16", precision="bfloat16"),
    Way("torch.compile", compile=True),
    Way("channels-last", channels_last=True),
    Way("fused Adam", fused_adam=True),
    Way("photos kept as pixels", kept_photos=True),
    replace(OURS, name="ours in float32", precision="float32"),
    replace(OURS, name="ours with torch.compile", compile=True),
)


class OurStep:
    """The step of ``train``: its objective, its optimizer."""

    def __init__(self, task: Task, way: Way) -> None:
        self.task, device = task, torch.device(task.device)
        self.precision = resolve_precision(way.precision, device)
        self.objective = our_objective(task, device, self.precision, "on" if way.compile else "off")
        self.gradient = Gradient(self.objective, task.batch, say=warnings.warn)
        self.optimizer = adam(list(self.objective.network.parameters())) if way.fused_adam else torch.optim.Adam(self.objective.network.parameters())

    def __call__(self, photos: Tensor) -> Tensor:
        """uint8 ``(N, 3, S, S)`` -> the loss before this step, still on the device."""
        names, numbers = self.gradient(photos)
        self.optimizer.step()
        return numbers[names.index("loss/total")]


def our_objective(task: Task, device: torch.device, precision: torch.dtype, compile: str = "off") -> Objective:
    layout = memory_format(device)
    loss_network = load_loss_network(task.loss, task.loss.layers).to(device, memory_format=layout)
    return Objective(task.start().to(device, memory_format=layout), PerceptualLoss(loss_network, task.loss, task.style().to(device)), precision, compile)


def draw_photos(folder: Path, count: int) -> Path:
    """``count`` JPEGs of COCO's usual size, 640x480, soft shapes under a grain, into ``folder``; returns it."""
    folder.mkdir(parents=True)
    for index in range(count):
        random = np.random.default_rng(index)
        shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (480, 640, 1))
        Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)).save(folder / f"{index:04d}.jpg", quality=90)
    return folder


@contextmanager
def batches_of(task: Task, way: Way, folder: Path) -> Iterator[Iterator[Tensor]]:
    """Batches without end, loaded in this process; ours from photos kept in ``folder``."""
    config = DataConfig(content=task.content, crop_size=task.size, crop="center", flip=False, shuffle=False, workers=0, cache=folder)
    photos = list_photos(config).train
    if not way.kept_photos:
        count = len(photos) - len(photos) % task.batch
        if not count:
            raise ValueError(f"--content: {len(photos)} photos to train on, need {task.batch} for a batch")
        loader = DataLoader(CenterCrops(photos[:count], task.size), task.batch)

        def forever() -> Iterator[Tensor]:
            while True:
                yield from loader

        yield forever()
        return
    stream = PhotoStream(photos, config, 0, keep_photos(photos, config, passes=math.inf))
    with training_batches(stream, 0, task.batch, 10**9, torch.device(task.device)) as batches:
        yield (images for images, _ in batches)


def serve(connection: Any, task: Task, way: Way, folder: Path) -> None:
    """The process of one way: answers ``("steps", n)``, ``("losses", batches)`` and ``("profile", n)`` until ``None`` comes."""
    if way.keep_memory:
        keep_freed_memory()
    make = OurStep if way.ours else PublishedStep
    step = make(task, way)
    try:
        with batches_of(task, way, folder) as batches:
            while (asked := connection.recv()) is not None:
                kind, argument = asked
                if kind == "losses":  # from the first weights on, whatever was done before
                    fresh = make(task, way)
                    connection.send([float(fresh(batch)) for batch in argument])
                elif kind == "profile":
                    connection.send(_profile(step, batches, argument))
                else:
                    connection.send(_time(step, batches, argument))
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        connection.send(error)


def _time(step: Callable[[Tensor], Any], batches: Iterator[Tensor], steps: int) -> tuple[float, float]:
    """Seconds of ``steps`` steps, and of these in waiting for photos."""
    began, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        before = time.perf_counter()
        photos = next(batches)
        waited += time.perf_counter() - before
        loss = step(photos)
    float(loss)  # sync point
    return time.perf_counter() - began, waited


def _profile(step: Callable[[Tensor], Any], batches: Iterator[Tensor], rows: int) -> list[tuple[str, float]]:
    """The operations that took longest in one step, and their share of it."""
    photos = next(batches)
    step(photos)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as profile:
        float(step(photos))
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in profile.key_averages()}
    whole = sum(times.values())
    return [(name, spent / whole) for name, spent in sorted(times.items(), key=lambda item: -item[1])[:rows]]


class Runner:
    """A way in its own process."""

    def __init__(self, task: Task, way: Way, folder: Path) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own log, read when torch is loaded
        context = multiprocessing.get_context("spawn")
        self.way = way
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task, way, folder), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, kind: str, argument: Any) -> Any:
        self._connection.send((kind, argument))
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise OSError(f"the process of {self.way.name!r} ended with code {self._process.exitcode}; is the memory full?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # the process ends when it next listens, or here
        self._process.terminate()
        self._process.join()


def count_flops(task: Task, ours: bool = True, natively: bool = False, precision: str = "float32") -> int:
    """Floating-point operations of one photo's step, by the formula of each operation's shapes: 2 x kernel^2 x channels in x channels
    out x pixels out for a convolution, once more for each gradient that is needed; norms, ReLUs and poolings are left out. ``natively``: a fifth or a quarter of them
    for what ``Conv3x3`` does in another way than torch in this precision."""
    one = replace(task, batch=1, device="cpu", loss=task.loss.model_copy(update={"weights": "random"}))
    step = (OurStep if ours else PublishedStep)(one, replace(OURS if ours else PUBLISHED, precision=precision))
    if ours:
        plainly(step.objective.network)  # as we make its last layer, it has more of them
        for module in [*step.objective.network.modules(), *step.objective.loss.loss_network.modules()]:
            if isinstance(module, Conv3x3):
                module.natively = natively
    before = winograd.operations
    with FlopCounterMode(display=False) as counter:
        step(torch.zeros(1, 3, task.size, task.size, dtype=torch.uint8))
    return counter.get_total_flops() + winograd.operations - before


@dataclass(frozen=True)
class Row:
    """One way: seconds of a step in each turn, the published step's beside them, and the losses' largest distance (None: of another network or loss)."""

    name: str
    seconds: list[float]
    published_seconds: list[float]
    waiting: float
    distance: float | None
    tolerance: float

    def photos_per_second(self, batch: int) -> float:
        return batch / statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the published step, turn by turn."""
        return [published / own for own, published in zip(self.seconds, self.published_seconds)]


@dataclass(frozen=True)
class Report:
    """What was measured, and on what."""

    task: dict[str, Any]
    threads: int
    precision: str
    rows: list[Row]
    flops: int
    published_flops: int
    rate: float
    profile: list[tuple[str, float]]

    @property
    def floor_seconds(self) -> float:
        """Of a step: its operations at the machine's rate."""
        return self.flops * self.task["batch"] / self.rate

    @property
    def disagreements(self) -> list[str]:
        apart = [row for row in self.rows if row.distance is not None and not row.distance <= row.tolerance]
        return [f"{row.name}: losses {row.distance:.2%} from the published ones, {row.tolerance:.1%} allowed" for row in apart]

    def as_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"photos_per_second": row.photos_per_second(self.task["batch"]), "ratio": statistics.median(row.ratios)} for row in self.rows]
        return asdict(self) | {"rows": rows, "floor_seconds": self.floor_seconds, "share_of_floor": self.floor_seconds / statistics.median(self.rows[-1].seconds)}

    def as_markdown(self) -> str:
        batch = self.task["batch"]
        lines = [
            f"{self.task['size']} px, batch {batch}, {self.task['device']}, {self.threads} threads, torch {torch.__version__}; ours in {self.precision}",
            "",
            "| step | s | photos/s | times the published (least to most) | waiting for photos | losses differ by |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            ratios = row.ratios
            lines.append(
                f"| {row.name} | {statistics.median(row.seconds):.3g} | {row.photos_per_second(batch):.3g} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | {row.waiting:.1%} | {'not the same' if row.distance is None else f'{row.distance:.2%}'} |"
            )
        ours = statistics.median(self.rows[-1].seconds)
        lines += [
            "",
            f"floor: {self.flops / 1e9:.0f} GFLOP a photo ({self.published_flops / 1e9:.0f} as published) at {self.rate / 1e9:.0f} GFLOP/s is "
            f"{self.floor_seconds:.3g} s a step; ours reaches {self.floor_seconds / ours:.0%} of it",
        ]
        if self.profile:
            lines += ["", "where ours spends it: " + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in self.profile)]
        return "\n".join(lines)


def measure(
    task: Task,
    folder: Path,
    repeats: int = 5,
    steps: int = 1,
    levers: bool = False,
    profile: int = 8,
    others: Sequence[tuple[str, Task]] = (),
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Time the published step and each way in turns of ``steps`` steps, ``repeats`` times, photos kept in ``folder``.

    The last row is ours; ``others`` are tasks, with names, that ours is measured on, too. First each goes over the same three batches
    from the same weights: ``disagreements`` tells whose losses do not come out as published.
    """
    with batches_of(task, PUBLISHED, folder) as batches:
        trial = [next(batches) for _ in range(3)]
    rows: list[Row] = []
    top: list[tuple[str, float]] = []
    precision = resolve_precision(OURS.precision, torch.device(task.device))
    rate = arithmetic_rate(task.device, precision)
    with Runner(task, PUBLISHED, folder) as published:
        wanted = published.ask("losses", trial)
        published.ask("steps", 1)
        compared = [(way, task) for way in (LEVERS if levers else ())]
        for way, its_task in [*compared, *((replace(OURS, name=name), other) for name, other in others), (OURS, task)]:
            with Runner(its_task, way, folder) as own:
                say(f"{way.name}: the losses of {len(trial)} steps")
                losses = own.ask("losses", trial)
                distance = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted)) if its_task is task else None
                own.ask("steps", 1)  # warm
                turns = []
                for turn in range(repeats):
                    turns.append((own.ask("steps", steps), published.ask("steps", steps)))
                    say(f"{way.name}: {turns[-1][1][0] / turns[-1][0][0]:.2f} times as fast in turn {turn + 1} of {repeats}")
                seconds = [one[0] / steps for one, _ in turns]
                theirs = [(other[0] / steps, other[1] / other[0]) for _, other in turns]
                tolerance = TOLERANCE[resolve_precision(way.precision, torch.device(task.device))]
                waiting = statistics.median(one[1] / one[0] for one, _ in turns)
                rows.append(Row(way.name, seconds, [second for second, _ in theirs], waiting, distance, tolerance))
                if way is OURS:
                    top = own.ask("profile", profile) if profile else []
                    rows.insert(0, Row("published", [s for s, _ in theirs], [s for s, _ in theirs], statistics.median(w for _, w in theirs), 0.0, 0.0))
    plain = {"size": task.size, "batch": task.batch, "device": task.device, "network": task.network.model_dump(), "loss": task.loss.model_dump()}
    name = str(precision).removeprefix("torch.")
    natively = task.device == "cpu" and (precision == torch.float32 or multiplies_pairs())
    flops, published_flops = count_flops(task, natively=natively, precision=name if natively else "float32"), count_flops(task, ours=False)
    return Report(plain, torch.get_num_threads(), name, rows, flops, published_flops, rate, top)
