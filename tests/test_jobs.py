"""Which files a command reads and writes: nothing twice, nothing lost."""

import os
import sys
from pathlib import Path

import pytest
from conftest import synthetic_photo

from fastnst.jobs import Job, plan_jobs


def names(jobs: list[Job], output: Path) -> dict[str, str]:
    """Source name -> target below the output folder."""
    return {job.source.name: job.target.relative_to(output).as_posix() for job in jobs}


def test_one_file_to_one_file(photos, tmp_path):
    source, target = photos / "photo_00.jpg", tmp_path / "out.png"
    assert plan_jobs([str(source)], str(target)) == [Job(source, target)]


@pytest.mark.parametrize("output", ["out", "out/", "out.d/"])
def test_one_file_to_a_folder_keeps_its_name(photos, tmp_path, output):
    (job,) = plan_jobs([str(photos / "photo_00.jpg")], f"{tmp_path}/{output}")
    assert job.target == tmp_path / output / "photo_00.jpg"


@pytest.mark.parametrize("folder", ["v1.0", "stylized.png"])
def test_an_existing_folder_with_a_dot_takes_one_file_or_several(photos, tmp_path, folder):
    (tmp_path / folder).mkdir()
    (job,) = plan_jobs([str(photos / "photo_00.jpg")], str(tmp_path / folder))
    assert job.target == tmp_path / folder / "photo_00.jpg"
    assert len(plan_jobs([str(photos)], str(tmp_path / folder))) == 12


def test_a_folder_is_searched_recursively_and_keeps_its_tree(photos, tmp_path):
    (photos / "notes.txt").write_text("not a picture")
    (photos / ".hidden.jpg").write_bytes(b"")
    found = names(plan_jobs([str(photos)], str(tmp_path / "out")), tmp_path / "out")
    assert len(found) == 12
    assert found["photo_11.bmp"] == "more/photo_11.bmp"
    assert found["photo_02.webp"] == "photo_02.webp"


@pytest.mark.parametrize("pattern, count", [("*.png", 4), ("photo_0[0-2].*", 3), ("**/*.bmp", 1)])
def test_a_pattern_names_the_files_that_match(photos, tmp_path, pattern, count):
    assert len(plan_jobs([str(photos / pattern)], str(tmp_path / "out"))) == count


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    source = tmp_path / "photo[1].png"
    synthetic_photo(0).save(source)
    assert plan_jobs([str(source)], str(tmp_path / "out.png")) == [Job(source, tmp_path / "out.png")]


def test_an_output_whose_links_run_in_a_circle_is_planned(photos, tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert [job.target for job in plan_jobs([str(photos / "photo_00.jpg")], str(tmp_path / "a.png"))] == [tmp_path / "a.png"]


def test_a_kind_that_cannot_be_written_becomes_png(tmp_path):
    synthetic_photo(0).save(tmp_path / "animation.gif")
    (job,) = plan_jobs([str(tmp_path / "animation.gif")], str(tmp_path / "out"))
    assert job.target == tmp_path / "out" / "animation.png"


def test_the_same_picture_named_twice_is_stylized_once(photos, tmp_path):
    inputs = [str(photos / "photo_00.jpg"), str(photos / "more" / ".." / "photo_00.jpg"), str(photos)]
    jobs = plan_jobs(inputs, str(tmp_path / "out"))
    assert len(jobs) == 12


def test_results_inside_the_input_folder_are_not_stylized_again(photos):
    output = photos / "stylized"
    output.mkdir()
    synthetic_photo(5).save(output / "photo_00.jpg")
    jobs = plan_jobs([str(photos)], str(output))
    assert len(jobs) == 12
    assert all(output not in job.source.parents for job in jobs)


def test_two_pictures_for_one_name_are_refused_naming_both(photos, tmp_path):
    synthetic_photo(50).save(photos / "more" / "photo_00.jpg")
    with pytest.raises(ValueError, match="(?s)photo_00.jpg and .*more.photo_00.jpg"):
        plan_jobs([str(photos / "photo_00.jpg"), str(photos / "more" / "photo_00.jpg")], str(tmp_path / "out"))


def test_gif_and_png_of_one_name_are_refused(tmp_path):
    for suffix in ("gif", "png"):
        synthetic_photo(0).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match="a.gif and .*a.png"):
        plan_jobs([str(tmp_path / "a.gif"), str(tmp_path / "a.png")], str(tmp_path / "out"))


@pytest.mark.parametrize("inputs, output", [(["photo_00.jpg"], "photo_00.jpg"), (["photo_00.jpg"], "more/../photo_00.jpg"), ([""], "")])
def test_an_input_is_never_overwritten(photos, inputs, output):
    with pytest.raises(ValueError, match="overwrite the input"):
        plan_jobs([str(photos / text) for text in inputs], str(photos / output))


@pytest.mark.parametrize("name, alike", [("Photo.png", "photo.PNG"), ("caf\u00e9.png", "cafe\u0301.png")])
def test_names_that_macos_takes_for_one_are_refused_there(tmp_path, monkeypatch, name, alike):
    for folder, file in (("one", name), ("two", alike)):
        (tmp_path / folder).mkdir()
        synthetic_photo(0).save(tmp_path / folder / file, "PNG")
    inputs = [str(tmp_path / "one"), str(tmp_path / "two")]
    if sys.platform == "linux":
        assert len(plan_jobs(inputs, str(tmp_path / "out"))) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="would both be written to"):
        plan_jobs(inputs, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="would overwrite the input"):
        plan_jobs(inputs[:1], str(tmp_path / "One"))


@pytest.mark.parametrize("output", ["out.jpg", "out.PNG"])
def test_several_pictures_need_a_folder(photos, tmp_path, output):
    with pytest.raises(ValueError, match="is a file name, need a folder, as --input names 12 pictures"):
        plan_jobs([str(photos)], str(tmp_path / output))


def test_a_suffix_that_cannot_be_written_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write \.gif"):
        plan_jobs([str(photos / "photo_00.jpg")], str(tmp_path / "out.gif"))


@pytest.mark.parametrize("missing", ["nothing.jpg", "nothing/*.jpg"])
def test_an_input_that_names_nothing_is_reported(tmp_path, missing):
    with pytest.raises(FileNotFoundError, match="--input"):
        plan_jobs([str(tmp_path / missing)], str(tmp_path / "out"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_called_one(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="photo.jpg is a pipe or a device, need a file"):
        plan_jobs([str(tmp_path / "photo.jpg")], "out.jpg")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"found 1 \.txt"):
        plan_jobs([str(tmp_path / "texts")], str(tmp_path / "out"))
