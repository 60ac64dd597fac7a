"""Writing files whole or not at all, never over what is read, and one writer at a time: a reader, or a crash, never sees half a file."""

import glob
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where files can be locked, not folders
    fcntl = None
    import msvcrt


def check_output(path: str | Path, inputs: Iterable[str | Path] = (), overwrite: bool = False, flag: str = "--output") -> None:
    """Whether ``path``, which ``flag`` asks for, may be written; to be asked before slow work begins.

    Raises ``ValueError`` where it is one of ``inputs``, which nothing overwrites, ``IsADirectoryError`` where it is a folder,
    and ``FileExistsError`` where it exists, unless ``overwrite``.
    """
    path = Path(path)
    for source in inputs:
        if _is_same(os.path.realpath(path), os.path.realpath(source)):
            raise ValueError(f"{flag} would overwrite the input {source}; choose another {flag}")
    if path.is_dir():
        raise IsADirectoryError(f"{flag}: {path} is a folder, need the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{flag}: {path} exists already; use --overwrite to replace it")


def in_any_letters(name: str) -> str:
    """One for all names that a disk which minds neither large letters nor how an accent is written takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_same(path: str, other: str) -> bool:
    """Whether both name one file, perhaps in other letters, which macOS, Windows and some disks do not mind. A hard link is another, which stays when one is replaced."""
    return path == other or (in_any_letters(path) == in_any_letters(other) and os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on failure it is removed.

    The temporary name keeps the suffix, for writers that choose the format by it. The folder of ``path`` is made
    when missing. Raises ``OSError`` naming ``path`` when the folder cannot be written or the disk is full; whatever
    ``path`` held before is then still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp, and some writers, make files private; results are the user's to share
        with open(temporary, "rb+") as written:  # Windows writes out only what is open for writing
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            reason = str(error.strerror).removeprefix(f"cannot write {temporary}: ")  # of a writer that writes atomically itself
            raise type(error)(error.errno, f"cannot write {path}: {reason}") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """The whole text, in UTF-8, or nothing. Raises as ``atomic_write``."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def remove_leftovers(path: str | Path) -> None:
    """Remove what ``atomic_write`` to ``path`` left beside it when its process was killed; only for who holds the folder alone."""
    path = Path(path)
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}{'[a-z0-9_]' * 8}{path.suffix}"):  # as mkstemp names them
        leftover.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    """What temporary names for ``path`` begin with: as much of its own as fits, as a name has 255 bytes at most, not characters, and whose they are."""
    return f".{os.fsencode(path.stem)[:60].decode(sys.getfilesystemencoding(), 'ignore')}-fastnst-"


@contextmanager
def without_leftovers(path: str | Path) -> Iterator[None]:
    """Around ``atomic_write`` to ``path``: first remove what killed processes left of it, unless another is within such a block for the same folder, or holds a lock on it for purposes of its own.

    The folder, made when missing, is the lock, so no file stays behind. Where it cannot be locked (Windows, some network file
    systems), nothing is removed. Whoever got no lock within a tenth of a second goes on without, and might lose its file to a later run of the same target.
    """
    folder = Path(path).parent
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):  # atomic_write tells what is wrong with the folder
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_leftovers(path)
                finally:
                    _share(lock)  # until the end none is alone here
        yield


def _share(lock: int) -> None:
    """Take a lock beside others, for which it waits no longer than removing takes: it may be held by who knows nothing of us."""
    for _ in range(20):
        try:
            return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold ``folder``, made when missing, for this process alone; the system lets go of it however the process ends.

    Raises ``BlockingIOError`` naming the folder when another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise type(error)(error.errno, f"cannot write in {folder}: {error.strerror}") from error
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if fcntl is not None and not isinstance(error, BlockingIOError):
                raise
            raise BlockingIOError(f"{folder} is in use by another training; wait for it or choose another --run-dir") from None
        yield
