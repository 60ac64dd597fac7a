"""A cache is whole or not there, is built once, knows when it is stale, and stays within its limit."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnst.files import exclusive
from fastnst.photo_cache import CACHE_NAME, build_cache, cache_path, read_cache


def prepare(path: Path) -> torch.Tensor:
    """The file's first byte, as 2 x 3 pixels: 18 bytes."""
    content = path.read_bytes()
    if not content:
        raise OSError(f"{path}: the file is empty")
    return torch.full((2, 3, 3), content[0], dtype=torch.uint8)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Five files that hold one byte each: 0 to 4."""
    paths = [tmp_path / "photos" / f"{index}.jpg" for index in range(5)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]))
    return paths


@pytest.fixture
def place(tmp_path, files) -> Path:
    return cache_path(tmp_path / "caches", files, files[0].parent, "as they are")


def values(cache) -> list[int | None]:
    photos = [cache.photo(index) for index in range(len(cache.sizes))]
    assert all(photo is None or tuple(photo.shape) == (2, 3, 3) for photo in photos)
    return [None if photo is None else int(photo.unique()) for photo in photos]


def test_what_was_built_is_read_back(files, place):
    assert read_cache(place, 5) is None
    built = build_cache(place, files, prepare, None, 0)
    assert values(built) == values(read_cache(place, 5)) == [0, 1, 2, 3, 4]
    assert (built.kept, built.gigabytes) == (5, 90e-9)


def test_a_finished_cache_is_not_built_again(files, place):
    build_cache(place, files, prepare, None, 0)
    assert values(build_cache(place, files, lambda path: 1 / 0, None, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_that_prepare_keep_the_order(files, place):
    assert values(build_cache(place, files, prepare, None, 3)) == [0, 1, 2, 3, 4]


def test_the_place_changes_with_names_sizes_times_and_recipe(tmp_path, files):
    def now(recipe="a", photos=files):
        return cache_path(tmp_path, photos, files[0].parent, recipe)

    seen = [now(), now("b"), now(photos=files[1:])]
    files[1].write_bytes(b"longer")
    seen.append(now())
    os.utime(files[2], (1, 1))
    seen.append(now())
    files[3] = files[3].rename(files[3].with_name("other.jpg"))
    seen.append(now())
    files[4].unlink()
    seen.append(now())
    assert len(set(seen)) == 7
    assert now() == seen[-1]


def test_a_moved_folder_keeps_its_cache(tmp_path, files):
    before = cache_path(tmp_path, files, files[0].parent, "a")
    moved = files[0].parent.rename(tmp_path / "moved")
    assert cache_path(tmp_path, [moved / path.name for path in files], moved, "a") == before


@pytest.mark.parametrize("damage", ["cut", "cut to nothing", "another file", "bytes lost inside", "other count"])
def test_a_damaged_cache_is_built_again(files, place, damage):
    build_cache(place, files, prepare, None, 0)
    whole = place.read_bytes()
    texts = {"cut": whole[:-3], "cut to nothing": b"", "another file": b"x" * 200, "bytes lost inside": whole[5:], "other count": whole}
    place.write_bytes(texts[damage])
    count = 4 if damage == "other count" else 5
    assert read_cache(place, count) is None
    assert values(build_cache(place, files[:count], prepare, None, 0)) == [0, 1, 2, 3, 4][:count]


def test_no_bit_of_the_index_can_end_a_training(files, place):
    files[2].write_bytes(b"")
    build_cache(place, files, prepare, None, 0)
    whole = place.read_bytes()
    for at in range(4 * 18, len(whole)):  # behind the pixels
        for bit in range(8):
            place.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            found = read_cache(place, 5)
            assert found is None or (values(found) == [0, 1, None, 3, 4] and len(found.unreadable) == 1)


def test_unreadable_files_are_recorded_and_not_kept(files, place):
    files[2].write_bytes(b"")
    cache = build_cache(place, files, prepare, None, 0)
    assert values(cache) == [0, 1, None, 3, 4]
    assert cache.unreadable == {str(files[2]): f"{files[2]}: the file is empty"}


def test_unreadable_files_of_one_name_in_two_folders_are_two(tmp_path):
    files = [tmp_path / folder / "x.jpg" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"")
    cache = build_cache(cache_path(tmp_path / "caches", files, tmp_path, "as they are"), files, prepare, None, 0)
    assert list(cache.unreadable) == [str(file) for file in files]


def test_what_does_not_fit_the_limit_is_not_kept(files, place):
    prepared = []
    cache = build_cache(place, files, lambda path: prepared.append(path) or prepare(path), 50e-9, 0)  # 50 bytes: 2 of 18
    assert values(cache) == [0, 1, None, None, None]
    assert len(prepared) == 3


def test_the_least_recently_used_cache_gives_way(tmp_path, files):
    root = tmp_path / "caches"
    places = [cache_path(root, files, tmp_path, recipe) for recipe in "abc"]
    for index, place in enumerate(places[:2]):
        build_cache(place, files, prepare, None, 0)
        os.utime(place, (1000 + index, 1000 + index))
    read_cache(places[0], 5)  # used again
    size = places[0].stat().st_size
    build_cache(places[2], files, prepare, (size + 100) * 1e-9, 0)
    assert [place.exists() for place in places] == [True, False, True]


def test_a_cache_that_cannot_be_removed_stays_and_counts(tmp_path, files, monkeypatch):
    first, second, third = (cache_path(tmp_path / "caches", files, tmp_path, recipe) for recipe in "abc")
    for index, place in enumerate((first, second)):
        build_cache(place, files, prepare, None, 0)
        os.utime(place, (1000 + index, 1000 + index))
    unlink = type(first).unlink

    def as_windows_does(path, missing_ok=False):
        if path == first:  # another training reads it
            raise PermissionError(13, "in use")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(type(first), "unlink", as_windows_does)
    cache = build_cache(third, files, prepare, 2 * first.stat().st_size * 1e-9, 0)  # room for it and the first
    assert cache.kept == 5 and [place.exists() for place in (first, second, third)] == [True, False, True]


def test_a_stop_while_building_leaves_nothing(files, place):
    asked = []
    assert build_cache(place, files, prepare, None, 0, should_stop=lambda: asked.append(None) or len(asked) > 3) is None
    assert [path.name for path in place.parent.iterdir()] == [".lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_an_open_cache_survives_its_deletion(files, place):
    cache = build_cache(place, files, prepare, None, 0)
    first = cache.photo(0)
    place.unlink()
    assert values(cache) == [0, 1, 2, 3, 4] and int(first[0, 0, 0]) == 0
    assert values(type(cache)(cache.path, cache.offsets, cache.sizes, {})) == [None] * 5  # not open when it went


def test_waits_for_the_process_that_builds_it(files, place):
    said = []
    with exclusive(place.parent):
        assert build_cache(place, files, prepare, None, 0, said.append, should_stop=lambda: len(said) > 0) is None
    assert "another process is building" in said[0]


def build_slowly(files, place, log, pause) -> None:
    def slowly(path):
        time.sleep(pause)
        with open(log, "a") as file:
            file.write(f"{path.name}\n")
        return prepare(path)

    build_cache(place, files, slowly, None, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_two_processes_build_it_once_and_a_killed_one_leaves_it_to_the_next(files, place, tmp_path):
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=build_slowly, args=(files, place, tmp_path / "killed", 60))
    killed.start()
    for _ in range(600):
        if list(place.parent.glob(".photos-*")):
            break
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert not place.exists() and list(place.parent.glob(".photos-*"))  # half a build
    both = [fork.Process(target=build_slowly, args=(files, place, tmp_path / "log", 0.1)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [path.name for path in files]  # each prepared once
    assert values(read_cache(place, 5)) == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in place.parent.iterdir()) == [".lock", CACHE_NAME]


def test_kept_pixels_are_exact(tmp_path, files, place):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 7, 3), dtype=np.uint8)
    cache = build_cache(place, files, lambda path: torch.from_numpy(pictures[int(path.stem)]), None, 0)
    assert all(np.array_equal(cache.photo(index).numpy(), pictures[index]) for index in range(5))
