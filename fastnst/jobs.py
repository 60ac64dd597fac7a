"""Which pictures a command reads, and where each result goes."""

import glob
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fastnst.files import in_any_letters
from fastnst.picture import READABLE, WRITABLE, check_writable, count_kinds, find_images


@dataclass(frozen=True)
class Job:
    """One picture to read and where its stylized version goes."""

    source: Path
    target: Path


def plan_jobs(inputs: list[str], output: str, mask: str | None = None) -> list[Job]:
    """What ``--input`` and ``--output`` mean: a list of files to read and write.

    Each input is a file, a folder (searched recursively, names below it kept) or a glob pattern. ``output`` is a file for a
    single file, else a folder; ``mask`` is read, too. In a folder a picture keeps its format where it can be written, else it becomes a PNG.
    Raises ``ValueError`` or ``FileNotFoundError`` where an input names nothing, two pictures would share an output, or a
    picture would overwrite one that is read.
    """
    folder = Path(output)
    found: list[tuple[Path, Path]] = []  # (source, name below the output folder)
    for text in inputs:
        if not text:
            raise ValueError("--input: got an empty name; need a file, a folder or a pattern ('.' is this folder)")
        path = Path(text)
        if path.is_dir():
            below = [image for image in find_images(path) if not _lies_in(image, folder) or _lies_in(path, folder)]
            if not below:
                raise FileNotFoundError(f"--input {text}: no pictures in this folder; looked for {', '.join(READABLE)}, found {count_kinds(path)}")
            found += [(image, image.relative_to(path)) for image in below]
        elif path.is_file():
            found.append((path, Path(path.name)))
        elif path.exists():
            raise ValueError(f"--input {text} is a pipe or a device, need a file, a folder or a pattern")
        else:
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True) if Path(match).is_file())
            if not matches:
                raise FileNotFoundError(f"--input {text}: no such file or folder, and no file matches it as a pattern")
            found += [(match, Path(match.name)) for match in matches]

    single = len(found) == 1 and not Path(inputs[0]).is_dir()
    if single and folder.suffix and not folder.is_dir() and not output.endswith("/"):
        check_writable(folder)
        jobs = [Job(found[0][0], folder)]
    else:
        if folder.is_file() or (folder.suffix.lower() in WRITABLE and not folder.is_dir()):
            raise ValueError(f"--output {output} is a file name, need a folder, as --input names {'a folder' if len(found) == 1 else f'{len(found)} pictures'}")
        jobs = [Job(source, folder / (name if name.suffix.lower() in WRITABLE else name.with_suffix(".png"))) for source, name in found]

    taken: dict[Path, Path] = {}
    sources = {_alike(_real(source)) for source in [*(job.source for job in jobs), *([mask] if mask else [])]}
    for job in jobs:
        if _alike(_real(job.target)) in sources:
            raise ValueError(f"--output would overwrite the input {job.target}; choose another --output")
        other = taken.setdefault(_alike(job.target), job.source)
        if _alike(_real(other)) != _alike(_real(job.source)):
            raise ValueError(f"{other} and {job.source} would both be written to {job.target}; stylize them into separate folders")
    return list({_alike(job.target): job for job in jobs}.values())


def _real(path: str | Path) -> Path:
    """Without symlinks; ``Path.resolve`` fails where they run in a circle, in some versions of Python."""
    return Path(os.path.realpath(path))


def _alike(path: Path) -> Path:
    """One for all names of a file, where the system takes them for one: on macOS; paths of Windows compare so by themselves."""
    return Path(in_any_letters(str(path))) if sys.platform == "darwin" else path


def _lies_in(path: Path, folder: Path) -> bool:
    return _real(path).is_relative_to(_real(folder))
