"""The command as a user runs it: its figures are those of the loss itself, and nothing is computed twice."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import synthetic_photo

from fastnst import metrics
from fastnst.checkpoint import load_model
from fastnst.cli import run
from fastnst.config import ConfigError, validate_config
from fastnst.contender import load_contenders
from fastnst.data import DataConfig, load_validation
from fastnst.evaluate import EvaluateConfig, evaluate
from fastnst.picture import find_images
from fastnst.train import TrainConfig, train

N = 3


@pytest.fixture
def model(tmp_path, train_data):
    """A model file with its run beside it."""
    train_data["train"]["steps"] = 1
    train(validate_config(TrainConfig, train_data), tmp_path / "toy")
    return tmp_path / "toy" / "model.safetensors"


@pytest.fixture
def held_out(tmp_path):
    """Two photos of 48 and 40 px, and a file that is none."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    synthetic_photo(21, 64, 48).save(folder / "a.png")
    synthetic_photo(22, 40, 60).save(folder / "b.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def command(model, held_out, painting, tmp_path):
    """``command("--flag", ...)`` gives the exit code; the report is in ``tmp_path / "report"``."""
    main = importlib.import_module("fastnst.scripts.evaluate").main
    fixed = ["--device", "cpu", "--model", model, "--content", held_out, "--style", painting, "--output", tmp_path / "report", "--sizes", "32", "48"]
    return lambda *arguments: run(main, [str(part) for part in (*fixed, "--iterations", N, *arguments)])


def fake_optimizer(curve):
    """Its objective after k iterations is ``curve[k]``; its picture is the photo."""

    def optimize(content, style, loss_network, loss, start, iterations, report, should_stop):
        for step in range(iterations + 1):
            report(SimpleNamespace(step=step, losses={"loss/total": curve[step]}, seconds=float(step + 1)))
        return content

    return optimize


# The whole command


def test_the_report_tells_what_the_loss_itself_tells(command, model, held_out, painting, tmp_path, capsys):
    assert command("--judge", "vgg16=random") == 0
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err and printed.out.count("worth") == 4 // 2
    report = tmp_path / "report"
    assert {path.name for path in report.iterdir()} == {"report.md", "report.json", "curves.png", "sheet_32.jpg", "sheet_48.jpg", "optimizer_runs"}
    found = json.loads((report / "report.json").read_text())
    assert found["photos"] == ["a.png", "b.png"] and found["judges"] == ["vgg19_slim", "vgg16"]
    assert [found["sizes"][size]["enlarged"] for size in ("32", "48")] == [0, 1]  # b.png is 40 px wide

    network, _ = load_model(model)
    (one,) = load_contenders([model], painting, [], find_images(held_out))
    for size in (32, 48):
        photos, _ = load_validation([held_out / "a.png", held_out / "b.png"], DataConfig(content=held_out, crop="center", crop_size=size))
        of_model = found["sizes"][str(size)]["models"]["toy"]
        for index, photo in enumerate(photos[:, None].float() / 255):
            with torch.no_grad():
                targets = one.loss.content_targets(photo)
                assert of_model["objective"][index] == pytest.approx(float(one.loss(network(photo).clamp(0, 1), targets).total), rel=1e-4)
                untouched = float(one.loss(photo, targets).total)
            starts = [json.loads(path.read_text())["objective"][0] for path in report.glob(f"optimizer_runs/{size}px_content*.json")]
            assert min(abs(start / untouched - 1) for start in starts) < 1e-4
        for start in ("content", "noise"):
            best = of_model["optimizer"][start]["mean"]
            assert len(best) == N + 1 and best == sorted(best, reverse=True)
        assert of_model["optimizer"]["noise"]["mean"][-1] < of_model["optimizer"]["noise"]["mean"][0]
        assert set(of_model["judged"]) >= {"style/vgg19_slim", "content/vgg16", "ssim", "flicker", "noise_gain", "border", "grid_2", "grid_4", "clipped"}
        speed = of_model["speed"]
        assert 0 < speed["pass"] < speed["optimizer"]["100"] < speed["optimizer"]["500"]


def test_a_second_report_makes_no_run_again_and_needs_leave_to_replace_the_first(command, tmp_path, capsys):
    assert command() == 0
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "report" / "optimizer_runs").iterdir()}
    assert len(runs) == 2 * 2 * 2 * 2  # sizes, photos, starts; a JSON and a picture each
    before = json.loads((tmp_path / "report" / "report.json").read_text())
    assert command() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert command("--overwrite") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "report" / "optimizer_runs").iterdir()} == runs
    after = json.loads((tmp_path / "report" / "report.json").read_text())
    for found in (before, after):
        for at_size in found["sizes"].values():
            del at_size["models"]["toy"]["speed"]
    assert after == before


@pytest.mark.parametrize("name", ["curves.png", "sheet_32.jpg"])
def test_a_painting_is_never_replaced_by_a_page_of_the_report(command, painting, tmp_path, capsys, name):
    (tmp_path / "report").mkdir()
    precious = painting.rename(tmp_path / "report" / name)
    assert command("--style", str(precious)) == 2
    assert f"--output would overwrite the input {precious}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--content", "nowhere"], ["--content", "nowhere"]),
        (["--model", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--style", "nowhere.jpg"], ["nowhere.jpg", "--style"]),
        (["--judge", "vgg17"], ["--judge", "vgg17"]),
        (["--judge", "vgg16=nowhere.pth"], ["nowhere.pth"]),
        (["--judge", "vgg19_slim"], ["vgg19_slim", "once"]),
        (["--sizes", "16"], ["sizes", "got 16"]),
        (["--photos", "0"], ["photos"]),
        (["--set", "loss.style_wait=1"], ["loss.style_wait", "loss.style_weight"]),
    ],
)
def test_a_mistake_is_named_before_anything_slow_begins(command, tmp_path, capsys, arguments, named):
    assert command(*arguments) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in named) and len(errors.splitlines()) == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("flag", ["--output", "--cache"])
def test_pictures_of_the_report_are_kept_apart_from_the_photos(command, held_out, capsys, flag):
    assert command(flag, held_out / "report") == 2
    assert "outside of --content" in capsys.readouterr().err and not (held_out / "report").exists()


def test_a_missing_library_is_named_with_its_extra(command, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command() == 2
    assert "fastnst[evaluate]" in capsys.readouterr().err


def test_a_folder_without_a_readable_photo_is_refused(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "broken.png").write_bytes(b"")
    assert command("--content", tmp_path / "empty") == 2
    assert "1 .png" in (errors := capsys.readouterr().err) and "the file is empty" in errors


# The verb


def judge(model, held_out, painting, cache, optimize, **more):
    config = EvaluateConfig(sizes=(32,), photos=2, iterations=N)
    return evaluate([model], held_out, config, optimize, cache, painting, **more)


@pytest.mark.parametrize("curve, worth", [([1e9, 1e9, 1e9, 0], [2, 3]), ([1e9] * 4, [None, None]), ([0] * 4, [0, 0])])
def test_a_model_is_worth_the_iterations_that_reach_its_objective(model, held_out, painting, tmp_path, curve, worth):
    found = judge(model, held_out, painting, tmp_path / "cache", fake_optimizer(curve)).findings["sizes"]["32"]["models"]["toy"]
    for start in ("content", "noise"):
        for each in found["optimizer"][start]["worth"]:
            assert each == worth[0] if worth[0] in (None, 0) else worth[0] < each <= worth[1]
    # A second an iteration, told after the one that follows: 3 s + 1 for the last image, then (4 - 1) / 2 s each.
    assert found["speed"]["optimizer"]["100"] == pytest.approx(4 + 97 * 1.5)
    # An optimizer that gives the photo back: nothing of style gained, nothing of content lost.
    judged = found["optimizer"]["noise"]["judged"]
    assert judged["style/vgg19_slim"] == pytest.approx([1, 1], abs=1e-5) and judged["ssim"] == pytest.approx([1, 1])


def test_no_figure_of_a_picture_is_found_twice(model, held_out, painting, tmp_path, monkeypatch):
    seen, clipped = [], metrics.clipped
    monkeypatch.setattr(metrics, "clipped", lambda images: seen.append(images) or clipped(images))
    judge(model, held_out, painting, tmp_path / "cache", fake_optimizer([1] * 4))
    assert len(seen) == 2 * (1 + 1 + 2)  # photos; each itself, as stylized, and as reached from either start


def test_a_stopped_evaluation_goes_on_where_it_stopped(model, held_out, painting, tmp_path):
    made = []

    def optimize(*arguments):
        made.append(arguments[4])
        return fake_optimizer([4, 3, 2, 1])(*arguments)

    assert judge(model, held_out, painting, tmp_path / "cache", optimize, should_stop=lambda: len(made) >= 3) is None
    assert len(made) == 3 and len(list((tmp_path / "cache").glob("*.json"))) == 3
    seen = []
    assert judge(model, held_out, painting, tmp_path / "cache", optimize, report=seen.append) is not None
    assert sorted(made) == ["content"] * 2 + ["noise"] * 2
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen) and seen[-1].done == seen[-1].total == N + 2 * 20
    assert {progress.total for progress in seen} == {N + 2 * 20}  # one run and two judgings left, of 1 thousand pixels


def test_a_model_that_makes_no_numbers_is_named(model, held_out, painting, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(model, framework="pt") as file:
        weights, metadata = {key: file.get_tensor(key) * torch.nan for key in file.keys()}, file.metadata()
    save_file(weights, tmp_path / "nan.safetensors", metadata)
    with pytest.raises(FloatingPointError, match="nan.safetensors"):
        judge(tmp_path / "nan.safetensors", held_out, painting, tmp_path / "cache", fake_optimizer([1] * 4))


def test_more_photos_take_in_those_of_fewer(model, tmp_path, painting):
    folder = tmp_path / "six"
    folder.mkdir()
    for index in range(6):
        synthetic_photo(index, 40, 40).save(folder / f"photo_{index}.png")
    chosen = []
    for count in (2, 4, 9):
        config = EvaluateConfig(sizes=(32,), photos=count, iterations=1)
        chosen.append(set(evaluate([model], folder, config, fake_optimizer([1, 1]), tmp_path / "cache", painting).findings["photos"]))
    assert chosen[0] < chosen[1] < chosen[2] and [len(names) for names in chosen] == [2, 4, 6]


def test_a_size_is_judged_once():
    with pytest.raises(ConfigError, match="sizes.*once"):
        validate_config(EvaluateConfig, {"sizes": [32, 32]})
