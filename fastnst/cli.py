"""What the commands share: finding a config, flags that mean the same everywhere, errors turned into exit codes."""

import argparse
import contextlib
import difflib
import importlib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

VERBS = {
    "stylize": "apply a trained model to photos, videos or a camera",
    "preview": "see how a painting will come out, before training",
    "train": "fit a network to one painting, on a folder of photos",
    "export": "write a model as ONNX, for other programs and machines without torch",
    "evaluate": "judge models: worth how many iterations of the reference, how fast, how clean",
    "publish": "turn a training run into a style to ship",
    "optimize": "the reference: optimize a single picture, slowly (Gatys et al.)",
    "benchmark": "measure fastnst against pytorch/examples' fast_neural_style on this machine",
    "distill": "make the loss network inside the package anew from VGG-19",
}
_USAGE = """\
usage: fastnst VERB ...

{verbs}

Begin with: fastnst stylize --style wave --input photo.jpg --output out.jpg
Flags of a verb: fastnst VERB --help"""


def example_photo(name: str) -> Path:
    """A photo that scikit-image carries: ``astronaut``, ``chelsea`` or ``coffee``. Raises ``ValueError`` where that is not installed."""
    try:
        import skimage
    except ImportError as error:
        raise ValueError(f"the photos to show a style with are scikit-image's ({error}): pip install 'fastnst[evaluate]', or give photos of your own") from None
    return Path(skimage.__file__).parent / "data" / f"{name}.png"


def main(argv: Sequence[str] | None = None) -> None:
    """``fastnst VERB ...``: the same as ``python scripts/VERB.py ...``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in VERBS:
        verb = importlib.import_module(f"fastnst.scripts.{argv[0]}")
        sys.exit(run(verb.main, argv[1:]))
    sys.exit(run(_without_verb, argv))


def _without_verb(argv: Sequence[str]) -> int:
    if argv and argv[0] == "--version":
        from fastnst import __version__

        print(f"fastnst {__version__}")
        return 0
    verbs = "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())
    print(_USAGE.format(verbs=verbs), file=sys.stdout if argv in ([], ["--help"], ["-h"]) else sys.stderr)
    if argv and argv[0] not in ("--help", "-h"):
        print(f"fastnst: error: no verb {argv[0]!r}", file=sys.stderr)
    return 0 if argv and argv[0] in ("--help", "-h") else 2


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a script's ``main``; what a user can mend is one line on stderr and exit code 2, without a traceback.

    ``FASTNST_DEBUG=1`` shows the traceback.
    """
    from fastnst.picture import take_large_pictures

    take_large_pictures()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name of a file that the terminal, or on Windows a pipe, cannot show
    try:
        try:
            return command(argv)
        finally:  # also behind --help, which argparse ends by SystemExit
            _flush()
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        return 141
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        complain("", error)
        return 2


def _flush() -> None:
    """Here a reader that has gone, or a full disk, is an error; Python would tell it at its end with a traceback, as what is left unsaid is tried again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _open_closed_streams() -> None:
    """Where a shell closed one (``2>&-``), or a program without a window has none: what is said there goes nowhere, and no file gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def complain(what: str, error: Exception) -> None:
    """One line on stderr; ``FASTNST_DEBUG=1`` raises instead."""
    if os.environ.get("FASTNST_DEBUG"):
        raise error
    from fastnst.runtime import in_words

    print(f"error: {what}{in_words(error)}", file=sys.stderr, flush=True)


def quoted(word: str | Path) -> str:
    """As this system's shell takes it for one word."""
    if sys.platform != "win32":
        return shlex.quote(str(word))
    return str(word) if re.fullmatch(r"[\w.:/\\=-]+", str(word)) else f'"{word}"'


def parser(verb: str, description: str, epilog: str = "", device: bool = True) -> argparse.ArgumentParser:
    """A parser with the flag that nearly every command has."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=f"fastnst {verb}", description=description, epilog=epilog, formatter_class=kind, allow_abbrev=False)  # a new flag breaks no old command
    if device:
        p.add_argument("--device", default="auto", metavar="auto|cpu|cuda|mps", help="where to compute (auto: a GPU where there is one)")
    return p


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"got {text}, need a whole number from {least} to {most}")

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of a flag that takes a number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"got {text}, need a number from {least:g} to {most:g}")

    return parse


def add_config_flags(p: argparse.ArgumentParser, shipped: str, default: list[str] | None = None) -> None:
    """--config, with words on the ``shipped`` ones, of several where the command takes them, which then has a ``default``, and --set."""
    several, more = ("+", f"; several: one after the other (default: {' '.join(default)})") if default else (None, "")
    p.add_argument("--config", required=not default, default=default, nargs=several, metavar="CONFIG", help=f"a shipped config by name ({shipped}) or a YAML file{more}")
    add_set_flag(p, "override any key of the config")


def add_set_flag(p: argparse.ArgumentParser, what: str) -> None:
    """--set; ``what`` it overrides."""
    p.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help=f"{what}; may be repeated")


def add_model_flags(p: argparse.ArgumentParser, or_else: str = "") -> argparse._MutuallyExclusiveGroup:
    """--model, which may be something ``or_else``, or --style; returns the group of which one is needed."""
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="FILE", help=f"a model.safetensors that `fastnst train` wrote{or_else}")
    which.add_argument("--style", metavar="NAME", help=f"a style that comes with the project: {', '.join(shipped_styles())}")
    return which


def judges(given: Iterable[str]) -> list[Any]:
    """The configs of loss networks that --judge NETWORK[=WEIGHTS] names. Raises ``ConfigError`` naming the flag."""
    from fastnst.config import validate_config
    from fastnst.loss_network import LossNetworkConfig

    named = [judge.partition("=") for judge in given]
    return [validate_config(LossNetworkConfig, {"network": network, "weights": weights or "auto"}, source="--judge") for network, _, weights in named]


def path_override(key: str, path: str | Path) -> str:
    """``KEY=PATH`` as --set takes it, quoted, as a name may hold what means something in YAML: ``no. 1: #2.jpg``, or bytes that are no text."""
    import yaml

    return f"{key}={yaml.safe_dump(str(path), default_style=chr(34), width=math.inf).strip()}"


def shipped_folder(name: str) -> Path:
    """``configs`` or ``checkpoints``: they lie beside the scripts, in the repository as in an installed package."""
    return Path(importlib.import_module("fastnst.scripts").__file__).parents[1] / name


def shipped_styles() -> dict[str, Path]:
    """The models that come with the project: ``{name: model file}``."""
    return {path.parent.name: path for path in sorted(shipped_folder("checkpoints").glob("*/model.safetensors"))}


def find_style(name: str) -> Path:
    """The model file of a shipped style. Raises ``ValueError`` naming the nearest one."""
    styles = shipped_styles()
    if name not in styles:
        near = difflib.get_close_matches(name, styles, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(styles) or 'none'}"
        raise ValueError(f"--style: no shipped style {name!r}; {hint} Another model: --model FILE")
    return styles[name]


def find_config(name: str) -> Path:
    """The path itself where it exists, else the shipped config of that name. Raises ``FileNotFoundError`` listing them."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_folder("configs")
    candidate = shipped / f"{Path(name).stem}.yaml"
    if Path(name).parent in (Path("."), Path("configs")) and candidate.is_file():
        return candidate
    raise FileNotFoundError(f"--config: no file at {name}; shipped: {', '.join(sorted(path.stem for path in shipped.glob('*.yaml')))}")


class _PlainBar(tqdm):
    """A progress bar for logs: a line of its own each time, no carriage returns."""

    @staticmethod
    def status_printer(file):
        def write_line(status: str) -> None:
            if status.strip():
                file.write(status.strip() + "\n")
                file.flush()

        return write_line

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # of a bar that was stopped within its first line
            super().__del__()


def progress_bar(total: int | None, initial: int = 0, unit: str = "step", shown: bool = True) -> tqdm:
    """A bar on stderr with rate and time left; where stderr is a file, a line every half minute."""
    if not shown or sys.stderr.isatty():
        return tqdm(disable=not shown, total=total, initial=initial, unit=unit, dynamic_ncols=True, mininterval=0.2, smoothing=0.1)
    return _PlainBar(total=total, initial=initial, unit=unit, mininterval=30, smoothing=0.1, ascii=True)


class Bar:
    """``progress_bar`` within a block, which begins when its length is first told."""

    def __init__(self, unit: str = "step") -> None:
        self._unit, self._bar = unit, None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_error) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, done: int, total: int | None, text: str | None = None, first: int = 0) -> None:
        """``done`` of ``total``, of which ``first`` were done before; ``text`` stands beside until there is another."""
        if self._bar is None:
            self._bar = progress_bar(total, first, self._unit)
        if text is not None:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, message: str) -> None:
        say(self._bar, message)


def say(bar: tqdm | None, message: str) -> None:
    """A line on stderr, above the progress bar where there is a live one."""
    if bar is None or isinstance(bar, _PlainBar):
        print(message, file=sys.stderr, flush=True)
    else:
        bar.write(message, file=sys.stderr)
