"""How fast is a model applied, beside the published way of applying it: the same weights, photos and machine.

The published way is that of pytorch/examples: their network (ours of the same layers), eager, float32, the allocator as it comes.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastnst.checkpoint import load_model
from fastnst.engine import Engine, is_installed, load_engine, load_network
from fastnst.network import plainly
from fastnst.picture import open_rgb
from fastnst.runtime import WORTH_COMPILING, arithmetic_rate, cpu_threads, keep_freed_memory
from fastnst.stages import StagedNetwork

PUBLISHED = "published"
ON_DEVICE = ", on the device"  # without the way there and back
# A process says its peak itself: what the system tells its parent includes the parent's own memory at the fork.
_PEAK_SCRIPT = """
import atexit, re, sys
def peak():
    if sys.platform == "win32":
        import psutil
        kilobytes = psutil.Process().memory_info().peak_wset // 1024
    elif sys.platform == "darwin":
        import resource
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    else:
        kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    print("peak", kilobytes, file=sys.stderr)
atexit.register(peak)
"""
# One photo in a fresh process, as the published script does it: torch and torchvision, decode, one pass, encode.
_PUBLISHED_SCRIPT = """
import sys, torch
from torchvision import transforms
from PIL import Image
from fastnst.checkpoint import load_model
from fastnst.network import plainly
network = plainly(load_model(sys.argv[1])[0])
content = transforms.ToTensor()(Image.open(sys.argv[2]).convert("RGB")).unsqueeze(0)
with torch.no_grad():
    output = network(content).cpu()
Image.fromarray(output[0].clone().clamp(0, 1).mul(255).numpy().transpose(1, 2, 0).astype("uint8")).save(sys.argv[3])
"""
_OUR_SCRIPT = "import sys; from fastnst.cli import run; from fastnst.scripts.stylize import main; sys.exit(run(main, sys.argv[1:]))"


@dataclass
class Row:
    """One way of applying a model at one size."""

    way: str
    width: int
    height: int
    milliseconds: float = 0.0  # the median
    fastest: float = 0.0
    ratio: float = 1.0  # how many times as fast as the published way, on the device where this is: the median over rounds
    psnr: float | None = None  # dB to the published way's output; None: equal
    floor_share: float = 0.0  # the arithmetic, at the highest rate of this machine, over the time; 0 where not known
    times: list[float] = field(default_factory=list, repr=False)

    @property
    def megapixels_per_second(self) -> float:
        return self.width * self.height / self.milliseconds / 1000


@dataclass(frozen=True)
class FreshProcess:
    """One photo from the start of a process to its end."""

    way: str
    width: int
    height: int
    seconds: float  # the least of three
    peak_megabytes: int


@dataclass(frozen=True)
class Progress:
    """Told after every measured pass."""

    done: int
    total: int
    message: str


def ways_to_apply(model: str | Path, device: str, engines: list[str]) -> Iterator[tuple[str, Callable[[np.ndarray], Any], Engine | None]]:
    """Each way with a function of ``(1, H, W, 3)`` uint8, which gives an array or a tensor; the published one first."""
    network = plainly(load_model(model)[0])
    place = torch.device("cpu" if device == "auto" and not torch.cuda.is_available() else "cuda" if device == "auto" else device)
    network.to(place)

    def eager(pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = network(pictures.permute(0, 3, 1, 2).float().div(255).to(place))
            return output.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def published(pictures: np.ndarray, keep: bool) -> np.ndarray:
        keep_freed_memory(keep)
        return eager(torch.from_numpy(pictures)).cpu().numpy()

    yield PUBLISHED, lambda pictures: published(pictures, False), None
    if place.type == "cpu":
        yield "published, memory kept", lambda pictures: published(pictures, True), None
    else:
        yield PUBLISHED + ON_DEVICE, _Staying(eager, place), None
    staged, there = load_network(model), set()
    for name in engines:
        engine, _, precision = name.partition(":")
        made = load_engine(staged, str(place), engine, precision or "auto")
        if (made.name, made.precision) in there:  # asked for by two names
            continue
        there.add((made.name, made.precision))
        yield f"{made.name} {made.precision}", _keeping(made.run), made
        if place.type != "cpu":
            yield f"{made.name} {made.precision}{ON_DEVICE}", _Staying(lambda pictures, made=made: made.run_tensor(pictures, "uint8"), place), made


def _keeping(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def kept(pictures: np.ndarray) -> np.ndarray:
        keep_freed_memory(True)
        return run(pictures)

    return kept


class _Staying:
    """``run`` for pictures that lie on the device already, and stay there. ``seconds``: what the last took, by the clock of an NVIDIA GPU where it is one."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], place: torch.device) -> None:
        self._run, self._place, self._given, self._there = run, place, None, torch.empty(0)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if place.type == "cuda" else None
        self.seconds = 0.0

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        if self._given is not pictures:
            self._given, self._there = pictures, torch.from_numpy(pictures).to(self._place)
            torch.accelerator.synchronize(self._place)
        if self._events is None:
            began = time.perf_counter()
            output = self._run(self._there)
            torch.accelerator.synchronize(self._place)
            self.seconds = time.perf_counter() - began
            return output
        begin, end = self._events
        begin.record()
        output = self._run(self._there)
        end.record()
        torch.accelerator.synchronize(self._place)
        self.seconds = begin.elapsed_time(end) / 1000
        return output


def default_engines(device: str) -> list[str]:
    """``ENGINE:PRECISION`` of all that are installed, what ``auto`` chooses first."""
    if device != "cpu" and torch.cuda.is_available():
        return ["torch:float16", "torch:bfloat16", "torch:float32"]
    if device == "mps":
        return ["torch:float32"]
    found = ["auto:auto"]
    found += ["native:float32"] if is_installed("native") else []
    found += ["openvino:auto", "openvino:float32"] if is_installed("openvino") else []
    found += ["onnxruntime:float32"] if is_installed("onnxruntime") else []
    return [*found, "torch:auto", "torch:float32"]


def measure(
    model: str | Path, photo: str | Path, sizes: list[tuple[int, int]], engines: list[str], device: str = "auto", rounds: int = 5, report: Callable[[Progress], None] = lambda progress: None
) -> list[Row]:
    """Each way at each ``(width, height)``, alternating, ``rounds`` times after passes that do not count: one, of ours as many as it takes to compile for a size."""
    ways = list(ways_to_apply(model, device, engines))
    picture, _ = open_rgb(photo)
    rows: list[Row] = []
    done, total = 0, len(sizes) * len(ways) * (rounds + 1)
    shares = [engine for _, _, engine in ways if engine is not None and engine.precision != "int8"]  # whose arithmetic torch can measure, too
    rates = {key: arithmetic_rate(key[0], getattr(torch, key[1])) for key in {(engine.device, engine.precision) for engine in shares}}
    for width, height in sizes:
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))[None]
        here = [Row(way, width, height) for way, _, _ in ways]
        outputs = []
        for turn in range(rounds + 1):
            for row, (way, run, engine) in zip(here, ways):
                for _ in range(WORTH_COMPILING if turn == 0 and engine is not None else 0):  # what a folder or a video of one size gets
                    run(pixels)
                began = time.perf_counter()
                output = run(pixels)
                seconds = run.seconds if isinstance(run, _Staying) else time.perf_counter() - began
                if turn == 0:
                    outputs.append(output if isinstance(output, np.ndarray) else output.cpu().numpy())
                else:
                    row.times.append(seconds * 1000)
                done += 1
                report(Progress(done, total, f"{width}x{height} {way}"))
        for row, output, (_, _, engine) in zip(here, outputs, ways):
            row.milliseconds, row.fastest = float(np.median(row.times)), min(row.times)
            base = next(one for one in here if one.way == PUBLISHED + (ON_DEVICE if row.way.endswith(ON_DEVICE) else ""))
            row.ratio = float(np.median([theirs / ours for theirs, ours in zip(base.times, row.times)]))
            row.psnr = psnr(output, outputs[0])
            if engine in shares:
                count = engine.operations if engine.name == "native" else partial(operations, engine.network)
                row.floor_share = count(height, width) / rates[engine.device, engine.precision] / (row.milliseconds / 1000)
        rows += here
    return rows


def operations(network: StagedNetwork, height: int, width: int) -> int:
    """Floating-point operations of the convolutions of one picture: two for each multiplication with its sum."""
    total, size = 0, (height, width)
    for stage in network.stages:
        size_in, size = size, tuple(stage.size(side) for side in size)
        positions = size_in[0] * size_in[1] if stage.transposed else size[0] * size[1] // stage.shuffle**2
        total += 2 * stage.weight.size * positions
    return total


def psnr(output: np.ndarray, reference: np.ndarray) -> float | None:
    """dB between pictures of 0..255; None where they are equal."""
    error = float(np.mean((output.astype(np.float64) - reference) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else None


def measure_fresh_processes(model: str | Path, photo: str | Path, sizes: list[tuple[int, int]], repeats: int = 3) -> list[FreshProcess]:
    """One photo from command to file, decode and encode included, with the peak of resident memory."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        picture, _ = open_rgb(photo)
        source, target = Path(folder) / "in.jpg", Path(folder) / "out.jpg"
        for width, height in sizes:
            picture.resize((width, height), Image.Resampling.BICUBIC).save(source, quality=95)
            ours = [sys.executable, "-c", _PEAK_SCRIPT + _OUR_SCRIPT, "--model", str(model), "--device", "cpu", "--input", str(source), "--output", str(target), "--overwrite"]
            theirs = [sys.executable, "-c", _PEAK_SCRIPT + _PUBLISHED_SCRIPT, str(model), str(source), str(target)]
            for way, command in ((PUBLISHED, theirs), ("stylize.py", ours)):
                runs = [_run(command) for _ in range(repeats)]
                found.append(FreshProcess(way, width, height, min(seconds for seconds, _ in runs), max(peak for _, peak in runs)))
    return found


def _run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in MB, of a process of its own."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"a process of its own failed: {done.stderr[-500:]}")
    return seconds, int(done.stderr.rsplit("peak", 1)[1]) // 1024


def machine() -> str:
    """What was measured on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    try:
        name = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {cpu_threads()} threads, torch {torch.__version__}"


def to_markdown(rows: list[Row], fresh: list[FreshProcess]) -> str:
    """Both tables."""
    lines = [f"On {machine()}.", "", "| size | way | ms (fastest) | megapixels/s | times as fast | PSNR, dB | of the floor |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        same = "" if row.way in (PUBLISHED, PUBLISHED + ON_DEVICE) else "equal" if row.psnr is None else f"{row.psnr:.1f}"
        share = f"{row.floor_share:.0%}" if row.floor_share else ""
        lines.append(f"| {row.width}x{row.height} | {row.way} | {_short(row.milliseconds)} ({_short(row.fastest)}) | {row.megapixels_per_second:.2f} | {row.ratio:.2f} | {same} | {share} |")
    if fresh:
        lines += ["", "| one photo in a fresh process | way | s | peak MB |", "|---|---|---|---|"]
        lines += [f"| {one.width}x{one.height} | {one.way} | {one.seconds:.2f} | {one.peak_megabytes:,} |" for one in fresh]
    return "\n".join(lines) + "\n"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def to_json(rows: list[Row], fresh: list[FreshProcess]) -> str:
    """Everything measured."""
    return json.dumps({"machine": machine(), "passes": [asdict(row) for row in rows], "fresh_processes": [asdict(one) for one in fresh]}, indent=1) + "\n"
