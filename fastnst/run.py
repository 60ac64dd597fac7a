"""The folder of a training run: whether it may be gone on with, held by one process, and never left half written.

It holds ``config.yaml`` (resolved), ``model.safetensors`` (for inference), ``training_state.pt`` (for resuming) and
TensorBoard's event files.
"""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastnst.checkpoint import STATE_NAME
from fastnst.config import Config, ConfigError, flatten, load_config, to_yaml
from fastnst.files import exclusive, remove_leftovers, write_text
from fastnst.model import MODEL_NAME
from fastnst.runtime import in_words

CONFIG_NAME = "config.yaml"


def find_run(config: Config, run_dir: Path, may_change: Iterable[str]) -> bool:
    """Whether ``run_dir`` holds a run of this config, but for the keys that ``may_change``, to resume; false where it is new.

    Raises ``ValueError`` where going on would mix two runs or destroy a model.
    """
    if (run_dir / STATE_NAME).exists():
        if not (run_dir / CONFIG_NAME).exists():
            raise ValueError(f"{run_dir} holds {STATE_NAME} but no {CONFIG_NAME} to compare with; choose another --run-dir")
        try:
            old, new = flatten(load_config(type(config), run_dir / CONFIG_NAME)), flatten(config)
        except ConfigError as error:
            raise ValueError(f"{run_dir / CONFIG_NAME} is damaged or of another version, choose another --run-dir ({str(error).splitlines()[0]})") from None
        fixed = set(new) - set(may_change)
        changed = [f"{key}: {old[key]} in the run, {new[key]} asked for" for key in new if key in fixed and _resolved(old[key]) != _resolved(new[key])]
        if changed:
            raise ValueError(f"{run_dir} holds a run with another config; choose another --run-dir, or undo the change of {'; '.join(changed)}")
        return True
    if (run_dir / MODEL_NAME).exists():
        another = run_dir.parent / f"my_{run_dir.name}"
        raise ValueError(f"{run_dir} holds a finished {MODEL_NAME} without the {STATE_NAME} to resume from, and would lose it; choose another, such as --run-dir {another}")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file; choose another --run-dir")
    return False


def check_space(run_dir: Path, needed: int) -> None:
    """Raise ``OSError`` where ``run_dir`` cannot be written to, or its disk has fewer than ``needed`` bytes left."""
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"{run_dir}: the disk has {free / 1e6:.1f} MB left, model and training state need {needed / 1e6:.1f} MB; make room or choose another --run-dir")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write in {run_dir}: {error.strerror}; mend that or choose another --run-dir") from error


@contextmanager
def hold(run_dir: Path, config: Config) -> Iterator[None]:
    """Hold ``run_dir`` for this process alone, with ``config`` written into it; what a killed one left half written is removed.

    An ``OSError`` out of the block that does not say where it happened, such as a full disk under TensorBoard's events, is given the name,
    and each of those that the folder is to blame for what has become of the run.
    """
    hook = threading.excepthook
    # TensorBoard's writing thread prints a traceback for what it raises again in ours.
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else hook(args)
    try:
        with exclusive(run_dir):
            for name in (CONFIG_NAME, MODEL_NAME, STATE_NAME):
                remove_leftovers(run_dir / name)
            write_text(run_dir / CONFIG_NAME, to_yaml(config))
            yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            check_there(run_dir)
        here = str(run_dir) in str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE) and (here or error.filename is None):
            what = in_words(error) if here else f"cannot write in {run_dir}: {os.strerror(error.errno)}"
            raise type(error)(error.errno, f"{what}; what was saved before is intact: once this is mended, the same command goes on from there") from error
        raise
    finally:
        threading.excepthook = hook


def check_there(run_dir: Path) -> None:
    """Raise ``FileNotFoundError`` where the folder was deleted, moved or unmounted while in use: nothing is begun anew in its place."""
    if not (run_dir / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{run_dir / CONFIG_NAME} is gone: was the folder moved, deleted or unmounted during the training? Nothing more is saved")


def portable(config: Config) -> dict[str, Any]:
    """The config as plain data for the model file, paths cut to names: others need not know this machine's folders."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        return value.name if isinstance(value, Path) else value

    recipe = cut(config.model_dump())
    recipe["loss"]["weights"] = Path(recipe["loss"]["weights"]).name
    return recipe


def _resolved(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value
