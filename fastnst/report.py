"""What an evaluation found, for people: tables in Markdown, curves, a contact sheet."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastnst.files import atomic_write
from fastnst.sheet import contact_sheet

_POINTS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
# name in the findings, heading, factor, decimals
LOOKS = (
    ("ssim", "SSIM", 1, 3),
    ("flicker", "flicker", 255, 2),
    ("noise_gain", "noise gain", 1, 2),
    ("border", "border", 255, 2),
    ("frame", "frame", 1, 2),
    ("grid_2", "grid 2 px", 255, 2),
    ("grid_4", "grid 4 px", 255, 2),
    ("clipped", "clipped %", 100, 2),
)
_LEGEND = """\
Means over the photos; of L-BFGS the last picture is judged, which need not be its best. style: 0 is the painting's own statistics, 1 the photo untouched; content: 0 is the photo, 1 a like photo of other
content; both averaged over a judge's layers. A judge marked * is the network that the model was trained against, so not neutral.
SSIM: of luminance, against the photo. flicker: RMS change of the output, in levels of 255, when the photo moves by 1 px, beyond moving along.
noise gain: RMS change of the output over that of the input under noise of 2 levels; the photo itself has 1. border: RMS of what
padding does to the outer 16 px, beyond the middle. frame: share of the colour that the outer 3 px lack. grid: RMS of a regular grid of 2 or 4 px period. clipped: pixels of which a channel is 0 or 255."""


def iterations(worth: float | None, most: int) -> str:
    """A number of iterations in words; none or infinite: more than ``most``."""
    return f"> {most}" if worth is None or math.isinf(worth) else f"{worth:.{0 if worth >= 10 else 1}f}"


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile; where some are infinite, values that occur."""
    return np.quantile(values, [0.25, 0.5, 0.75], method="linear" if np.isfinite(values).all() else "nearest").tolist()


def markdown(findings: dict[str, Any]) -> str:
    """The whole report; the pictures that it shows are ``curves.png`` and ``sheet_SIZE.jpg``."""
    models, most = findings["models"], findings["iterations"]
    lines = [
        "# How good is it",
        "",
        f"{len(findings['photos'])} photos, {most} iterations of L-BFGS with the image kept in [0, 1], on {findings['machine']}, torch {findings['torch']}.",
        "The objective is that of the model's training, of its clamped picture; for L-BFGS, without line search, that of its best picture so far. "
        "Central squares of each photo.",
        "",
        *_table(
            ["model", "steps", "parameters", "painting", "loss network", "raw weights from"],
            [[label, f"{m['step']:,}", f"{m['parameters']:,}", m["painting"], m["loss_network"], m["weights_from"]] for label, m in models.items()],
        ),
    ]
    if findings["unreadable"]:
        lines += ["Photos passed over:", "", *(f"- {reason}" for reason in findings["unreadable"]), ""]
    lines += ["## Worth so many iterations", "", "Median (lower to upper quartile) over the photos; interpolated on the logarithm of the iteration.", ""]
    rows = []
    for size, found in findings["sizes"].items():
        for label, of_model in found["models"].items():
            worths = [_spread(of_model["optimizer"][start]["worth_quartiles"], most) for start in ("content", "noise")]
            rows.append([f"{size} px", label, _number(statistics.fmean(of_model["objective"])), *worths])
    lines += [*_table(["size", "model", "mean objective", "worth, from the content image", "worth, from noise"], rows), "![curves](curves.png)", ""]
    enlarged = [f"{found['enlarged']} at {size} px" for size, found in findings["sizes"].items() if found["enlarged"]]
    if enlarged:
        lines += [f"Photos smaller than the square, and so enlarged: {', '.join(enlarged)}.", ""]
    points = [point for point in _POINTS if point < most] + [most]
    for size, found in findings["sizes"].items():
        lines += [f"Mean objective at {size} px:", ""]
        rows = [
            [label, _number(statistics.fmean(of_model["objective"])), start, *(_number(of_start["mean"][point]) for point in points)]
            for label, of_model in found["models"].items()
            for start, of_start in of_model["optimizer"].items()
        ]
        lines += _table(["model", "of the model", "L-BFGS from", *map(str, points)], rows)
    lines += ["## Speed", "", *_speed(findings), "## Judges", "", _LEGEND, ""]
    for size, found in findings["sizes"].items():
        lines += [f"{size} px:", "", *_judges(findings, found), f"![pictures at {size} px](sheet_{size}.jpg)", ""]
    return "\n".join(lines)


def curves(findings: dict[str, Any], path: Path) -> None:
    """Write the curves: a panel for each model and size, median and quartiles over the photos."""
    from matplotlib.figure import Figure

    sizes, labels = list(findings["sizes"]), list(findings["models"])
    figure = Figure(figsize=(4.6 * len(sizes), 3.6 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(sizes), squeeze=False)
    for row, label in zip(panels, labels):
        for panel, size in zip(row, sizes):
            of_model = findings["sizes"][size]["models"][label]
            for (start, of_start), color in zip(of_model["optimizer"].items(), ("tab:blue", "tab:orange")):
                low, middle, high = zip(*of_start["quartiles"][1:])
                steps = range(1, len(middle) + 1)
                panel.plot(steps, middle, color=color, label=f"L-BFGS from {start}", marker="." if len(middle) == 1 else None)
                panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
                if of_start["worth_quartiles"][1] is not None:
                    panel.axvline(max(1, of_start["worth_quartiles"][1]), color=color, linestyle=":")
            low, middle, high = quartiles(of_model["objective"])
            panel.axhline(middle, color="black", label="the model")
            panel.axhspan(low, high, color="black", alpha=0.12, linewidth=0)
            panel.set(xscale="log", yscale="log", title=f"{label}, {size} px", xlabel="iterations", ylabel="objective")
            panel.set_xticks([point for point in _POINTS if 0 < point <= len(of_start["mean"])], minor=False)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
            panel.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], height: int) -> Image.Image:
    """Pictures with a line under each, laid out in rows."""
    return contact_sheet([[_captioned(picture, text, height) for picture, text in row] for row in rows], height=height + _line(height) * 2)


def _line(height: int) -> int:
    return max(12, height // 18)


def _captioned(picture: Image.Image, text: str, height: int) -> Image.Image:
    font = ImageFont.load_default(size=_line(height))
    picture = picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (max(picture.width, math.ceil(font.getlength(text))), height + _line(height) * 2), (250, 250, 248))
    cell.paste(picture, ((cell.width - picture.width) // 2, 0))
    ImageDraw.Draw(cell).text((cell.width / 2, height + _line(height)), text, (40, 40, 40), font, anchor="mm")
    return cell


def _speed(findings: dict[str, Any]) -> list[str]:
    most, rows, counts = findings["iterations"], [], []
    for size, found in findings["sizes"].items():
        for label, of_model in found["models"].items():
            speed = of_model["speed"]
            counts = list(speed["optimizer"])
            same = speed["optimizer_machine"] == findings["machine"]
            optimizer = [f"{seconds:.3g}" + ("" if int(count) <= most else " *") for count, seconds in speed["optimizer"].items()]
            gains = [f"{seconds / speed['pass']:,.0f}" if same else "-" for seconds in speed["optimizer"].values()]
            times = [f"{speed[name] * 1000:.4g}" for name in ("pass", "first_pass", "transfers")]
            rows.append([f"{size} px", label, f"{speed['optimizer_first']:.3g}", *optimizer, *times, *gains])
    heads = ["size", "model", "optimizer: set-up and first iteration, s", *(f"{count}, s" for count in counts), "one pass, ms", "first pass, ms", "transfers, ms"]
    machines = {of_model["speed"]["optimizer_machine"] for found in findings["sizes"].values() for of_model in found["models"].values()} - {findings["machine"]}
    notes = [
        f"Medians, one picture at a time, in float32. Seconds are those of the runs above, set-up in them; * scaled from {most} iterations. "
        "A pass is warm, its transfers to the device and back not in it; the first pass at a size is told apart.",
        *([f"The optimizer was timed on {', '.join(sorted(machines))}: no speed-up is told where that is another machine."] if machines else []),
    ]
    return [*notes, "", *_table([*heads, *(f"speed-up at {count}" for count in counts)], rows)]


def _judges(findings: dict[str, Any], found: dict[str, Any]) -> list[str]:
    columns = [f"{kind}/{judge}" for judge in findings["judges"] for kind in ("style", "content")]
    untouched = {name: [1.0 if name.startswith("style") else 0.0] for name in columns}
    untouched |= {"ssim": [1.0], "flicker": [0.0], "noise_gain": [1.0], "border": [0.0]}
    rows = [_judged("the photo", untouched | found["photo"], columns)]
    most = findings["iterations"]
    for label, of_model in found["models"].items():
        partial = findings["models"][label]["loss_network"]
        rows.append(_judged(label, of_model["judged"], columns, partial))
        rows += [_judged(f"its L-BFGS, {most} from {start}", of_start["judged"], columns, partial) for start, of_start in of_model["optimizer"].items()]
    return _table(["", *(" ".join(name.split("/")) for name in columns), *(heading for _, heading, _, _ in LOOKS)], rows)


def _judged(name: str, judged: dict[str, Sequence[float]], columns: Sequence[str], partial: str = "") -> list[str]:
    distances = [f"{statistics.fmean(judged[column]):.3f}" + (" *" if column.endswith(f"/{partial}") else "") for column in columns]
    looks = [f"{statistics.fmean(judged[key]) * factor:.{decimals}f}" if key in judged else "-" for key, _, factor, decimals in LOOKS]
    return [name, *distances, *looks]


def _spread(worths: Sequence[float | None], most: int) -> str:
    low, middle, high = (iterations(worth, most) for worth in worths)
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)] + [""]
