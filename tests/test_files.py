"""A file is written whole or not at all."""

import os
import re
import stat
import subprocess
import sys

import pytest

from fastnst.files import atomic_write, check_output, exclusive, remove_leftovers, without_leftovers, write_text


@pytest.mark.parametrize("name, overwrite", [("new/out.png", False), ("old.png", True), ("link.png", True)])
def test_what_is_new_or_may_be_replaced_may_be_written(tmp_path, name, overwrite):
    (tmp_path / "old.png").write_text("old")
    (tmp_path / "link.png").symlink_to(tmp_path / "old.png")
    check_output(tmp_path / name, [tmp_path / "in.png"], overwrite)


def test_a_hard_link_to_an_input_and_links_in_a_circle_may_be_replaced(tmp_path):
    (tmp_path / "in.png").write_text("precious")
    os.link(tmp_path / "in.png", tmp_path / "hard.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    for name in ("hard.png", "a.png"):
        check_output(tmp_path / name, [tmp_path / "in.png"], overwrite=True)
        write_text(tmp_path / name, "new")
    assert (tmp_path / "in.png").read_text() == "precious"


def test_what_is_forced_to_the_disk_is_open_for_writing(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows refuses by itself")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path / "a.txt", "a")
    assert modes == [os.O_RDWR]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["in.png", "more/../in.png", "link.png", "IN.png"])
def test_an_input_may_not_be_overwritten_even_where_others_may(tmp_path, name, overwrite):
    (tmp_path / "in.png").write_text("precious")
    (tmp_path / "link.png").symlink_to(tmp_path / "in.png")
    if not (tmp_path / "IN.png").exists():  # on macOS and Windows it does
        os.link(tmp_path / "in.png", tmp_path / "IN.png")
    with pytest.raises(ValueError, match=r"--write would overwrite the input .*in\.png; choose another --write"):
        check_output(tmp_path / name, [tmp_path / "other.png", str(tmp_path / "in.png")], overwrite, flag="--write")


def test_what_exists_needs_leave_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "old.png").write_text("old")
    with pytest.raises(FileExistsError, match=r"--output: .*old\.png exists already; use --overwrite"):
        check_output(tmp_path / "old.png")
    with pytest.raises(IsADirectoryError, match="--output: .* is a folder"):
        check_output(tmp_path, overwrite=True)


def test_result_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"  # until the end, readers see the old one
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt(), OSError("no number")])
def test_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_success_leaves_no_temporary_file(tmp_path):
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_is_hidden_beside_the_target_and_keeps_the_suffix(tmp_path):
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        temporary.write_text("x")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        assert temporary.name.startswith(".")


def test_missing_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "c.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="others' permissions are POSIX's")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_file_gets_the_users_usual_permissions(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
        assert os.umask(umask) == umask  # and the umask itself is untouched
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write .*out.png"), atomic_write(tmp_path / "file" / "out.png"):
        pass


def test_folder_in_place_of_the_file_is_named_and_kept(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OSError, match="cannot write .*out.png"), atomic_write(tmp_path / "out.png") as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["out.png"]


def test_full_disk_names_the_target_and_keeps_errno(tmp_path):
    with pytest.raises(OSError, match="cannot write .*a.txt: No space left") as raised, atomic_write(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")
    assert raised.value.errno == 28


def test_a_name_goes_where_the_locale_has_no_letters_for_it(tmp_path):
    code = "import sys\nfrom fastnst.files import write_text\nwrite_text(sys.argv[1], 'x')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "\xfc.txt"], check=True, env=environment)
    assert (tmp_path / "\xfc.txt").read_text() == "x"


@pytest.mark.parametrize("stem", ["n" * 240, "\U0001f30a" * 62, "n" + "\U0001f30a" * 62], ids=["letters", "waves", "a letter and waves"])  # a wave is 4 bytes, a name 255 at most
def test_long_names_fit(tmp_path, stem):
    path = tmp_path / f"{stem}.x"
    with atomic_write(path) as temporary:
        temporary.write_text("x")
        assert re.fullmatch(r"\.(n|\U0001f30a)+-fastnst-\w{8}\.x", temporary.name)  # no half of a wave
    assert path.read_text() == "x"
    (tmp_path / temporary.name).write_text("of a process that was killed")
    remove_leftovers(path)
    assert os.listdir(tmp_path) == [path.name]


def test_a_writer_that_writes_whole_itself_names_the_target_alone(tmp_path):
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "a.txt") as temporary:
        with atomic_write(temporary):
            raise OSError(28, "No space left on device")
    assert str(raised.value) == f"[Errno 28] cannot write {tmp_path / 'a.txt'}: No space left on device"
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")
def test_leftovers_are_removed_unless_another_may_be_writing_them(tmp_path):
    path, left = tmp_path / "new" / "v.mp4", tmp_path / "new" / ".v-fastnst-abc_1234.mp4"
    with without_leftovers(path):
        assert path.parent.is_dir()
        left.write_text("half")
        for other in (".w-fastnst-abc_1234.mp4", ".v-original.mp4"):  # of another target; a file of the user's
            (path.parent / other).write_text("whole")
        with without_leftovers(path):  # as another process: what is left may be being written
            assert left.exists()
        with atomic_write(path) as temporary, without_leftovers(path):
            temporary.write_text("whole")
    with without_leftovers(path):
        assert sorted(os.listdir(path.parent)) == [".v-original.mp4", ".w-fastnst-abc_1234.mp4", "v.mp4"]


def test_a_folder_that_somebody_else_has_locked_is_written_to(tmp_path):
    """As by `flock FOLDER fastnst stylize ...`; what is left there is left."""
    fcntl = pytest.importorskip("fcntl", reason="Windows locks no folders")
    left = tmp_path / ".v-fastnst-abc_1234.mp4"
    left.write_text("half")
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with without_leftovers(tmp_path / "v.mp4"):
        assert left.exists()
    fcntl.flock(lock, fcntl.LOCK_UN)
    with without_leftovers(tmp_path / "v.mp4"):
        assert not left.exists()
        with pytest.raises(BlockingIOError):  # until the end
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_a_folder_is_held_by_one_and_let_go_at_the_end(tmp_path):
    with exclusive(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match="run is in use by another training"):
            with exclusive(tmp_path / "run"):
                pass
    with exclusive(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in .*file"):
        with exclusive(tmp_path / "file"):
            pass


def test_text_is_written_whole_and_in_utf_8(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "\u2192\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xe2\x86\x92\n" and len(list((tmp_path / "new").iterdir())) == 1
