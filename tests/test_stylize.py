"""Applying a model: which files are read and written, and what comes out of the network."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import synthetic_photo
from PIL import Image

import fastnst
from fastnst.checkpoint import save_model
from fastnst.cli import run
from fastnst.image import to_tensor
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.picture import ImageSize
from fastnst.stylize import Job, Stylizer, plan_jobs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model file with random weights."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    save_model(path, TransformNetwork(NetworkConfig(width=4, residual_blocks=1)), 7, {})
    return path


@pytest.fixture(scope="module")
def stylizer(model) -> Stylizer:
    return Stylizer.from_file(model, "cpu")


def names(jobs: list[Job], output: Path) -> dict[str, str]:
    """Source name -> target below the output folder."""
    return {job.source.name: job.target.relative_to(output).as_posix() for job in jobs}


@pytest.fixture
def stylize_command(model):
    """The command in this process: ``stylize_command("--input", ...)`` gives its exit code."""
    main = importlib.import_module("fastnst.scripts.stylize").main
    return lambda *arguments: run(main, ["--model", str(model), "--device", "cpu", *map(str, arguments)])


# Which file goes where


def test_one_file_to_one_file(photos, tmp_path):
    source, target = photos / "photo_00.jpg", tmp_path / "out.png"
    assert plan_jobs([str(source)], str(target)) == [Job(source, target)]


@pytest.mark.parametrize("output", ["out", "out/", "out.d/"])
def test_one_file_to_a_folder_keeps_its_name(photos, tmp_path, output):
    (job,) = plan_jobs([str(photos / "photo_00.jpg")], f"{tmp_path}/{output}")
    assert job.target == tmp_path / output / "photo_00.jpg"


def test_one_file_to_an_existing_folder_with_a_dot(photos, tmp_path):
    (tmp_path / "v1.0").mkdir()
    (job,) = plan_jobs([str(photos / "photo_00.jpg")], str(tmp_path / "v1.0"))
    assert job.target == tmp_path / "v1.0" / "photo_00.jpg"


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


@pytest.mark.parametrize("output", ["out.jpg", "out.PNG"])
def test_several_pictures_need_a_folder(photos, tmp_path, output):
    with pytest.raises(ValueError, match="need a folder for 12 pictures"):
        plan_jobs([str(photos)], str(tmp_path / output))


def test_a_suffix_that_cannot_be_written_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write \.gif"):
        plan_jobs([str(photos / "photo_00.jpg")], str(tmp_path / "out.gif"))


@pytest.mark.parametrize("missing", ["nothing.jpg", "nothing/*.jpg"])
def test_an_input_that_names_nothing_is_reported(tmp_path, missing):
    with pytest.raises(FileNotFoundError, match="--input"):
        plan_jobs([str(tmp_path / missing)], str(tmp_path / "out"))


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"found 1 \.txt"):
        plan_jobs([str(tmp_path / "texts")], str(tmp_path / "out"))


# What comes out


@pytest.mark.parametrize("height, width", [(48, 64), (37, 53), (1, 1), (2, 301), (17, 16)])
def test_any_size_comes_out_as_it_went_in(stylizer, height, width):
    images = torch.rand(1, 3, height, width)
    stylized = stylizer(images)
    assert stylized.shape == images.shape
    assert stylized.isfinite().all() and stylized.min() >= 0 and stylized.max() <= 1


def test_the_picture_given_is_left_alone(stylizer):
    images = torch.rand(1, 3, 20, 20)
    before = images.clone()
    stylizer(images)
    assert torch.equal(images, before)


def test_a_batch_is_stylized_as_its_pictures_one_by_one(stylizer):
    images = torch.rand(3, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    singly = torch.cat([stylizer(image[None]) for image in images])
    torch.testing.assert_close(stylizer(images), singly, atol=1e-5, rtol=0)


def test_the_package_offers_the_stylizer(model):
    stylizer = fastnst.Stylizer.from_file(model, "cpu")
    assert stylizer.info.step == 7
    with pytest.raises(AttributeError, match="Trainer"):
        fastnst.Trainer


def test_a_file_holds_what_the_network_gave(stylizer, tmp_path):
    synthetic_photo(0).save(tmp_path / "in.png")
    stylizer.stylize_file(tmp_path / "in.png", tmp_path / "out.png")
    expected = stylizer(to_tensor(synthetic_photo(0))).mul(255).round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected.astype(np.uint8))


def test_transparency_is_kept(stylizer, tmp_path):
    picture = synthetic_photo(0)
    alpha = Image.linear_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    picture.save(tmp_path / "in.png")
    stylizer.stylize_file(tmp_path / "in.png", tmp_path / "out.png")
    out = Image.open(tmp_path / "out.png")
    assert out.mode == "RGBA"
    assert np.array_equal(np.asarray(out.getchannel("A")), np.asarray(alpha))


def test_transparency_is_scaled_with_the_picture(stylizer, tmp_path):
    picture = synthetic_photo(0, 64, 48)
    picture.putalpha(Image.new("L", picture.size, 100))
    picture.save(tmp_path / "in.png")
    stylizer.stylize_file(tmp_path / "in.png", tmp_path / "out.png", ImageSize(short_side=24))
    out = Image.open(tmp_path / "out.png")
    assert out.size == (32, 24)
    assert out.getchannel("A").getextrema() == (100, 100)


def test_too_little_memory_names_file_size_and_way_out(stylizer, tmp_path, monkeypatch):
    synthetic_photo(0, 64, 48).save(tmp_path / "in.png")

    def exhausted(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(stylizer.network, "forward", exhausted)
    with pytest.raises(OSError, match=r"in\.png: 64x48 .*--short-side"):
        stylizer.stylize_file(tmp_path / "in.png", tmp_path / "out.png")


# The command


def test_a_folder_is_stylized_size_for_size(stylize_command, photos, tmp_path, capsys):
    assert stylize_command("--input", photos, "--output", tmp_path / "out") == 0
    for source in photos.rglob("*.*"):
        assert Image.open(tmp_path / "out" / source.relative_to(photos)).size == Image.open(source).size
    assert "12 of 12 stylized" in capsys.readouterr().out


def test_short_side_scales(stylize_command, photos, tmp_path):
    assert stylize_command("--input", photos / "photo_00.jpg", "--output", tmp_path / "out.png", "--short-side", 25) == 0
    assert Image.open(tmp_path / "out.png").size == (30, 25)  # from 60 x 50


def test_an_unreadable_file_is_reported_and_the_others_are_done(stylize_command, photos, tmp_path, capsys):
    (photos / "photo_03.jpg").write_bytes((photos / "photo_03.jpg").read_bytes()[:300])
    (photos / "empty.png").write_bytes(b"")
    assert stylize_command("--input", photos, "--output", tmp_path / "out") == 1
    assert len(list((tmp_path / "out").rglob("*.*"))) == 11
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "empty.png" in errors[0] and "photo_03.jpg" in errors[1]
    assert "11 of 13 stylized, 2 failed" in printed.out


def test_an_output_that_exists_is_kept_without_the_flag(stylize_command, photos, tmp_path, capsys):
    target = tmp_path / "out.png"
    target.write_bytes(b"precious")
    arguments = ("--input", photos / "photo_00.jpg", "--output", target)
    assert stylize_command(*arguments) == 1
    assert target.read_bytes() == b"precious"
    assert "--overwrite" in capsys.readouterr().err
    assert stylize_command(*arguments, "--overwrite") == 0
    assert Image.open(target).size == (60, 50)


def test_quality_changes_the_size_of_a_jpeg(stylize_command, photos, tmp_path):
    for quality in (10, 95):
        assert stylize_command("--input", photos / "photo_00.jpg", "--output", tmp_path / f"{quality}.jpg", "--quality", quality) == 0
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nothing.jpg", "--output", "out"], "nothing.jpg"),
        (["--input", "in.png", "--output", "in.png"], "overwrite the input"),
        (["--input", "in.png", "--output", "out.gif"], ".gif"),
        (["--input", "in.png", "--output", "out.png", "--model", "nothing.safetensors"], "nothing.safetensors"),
        (["--input", "in.png", "--output", "out.png", "--model", "in.png"], "in.png"),
        (["--input", "in.png", "--output", "out.png", "--device", "toaster"], "toaster"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stylize_command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    synthetic_photo(0).save("in.png")
    assert stylize_command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
