"""The commands as a user runs them, and errors that a user can act on."""

import argparse
import gc
import importlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from fastnst.scripts import benchmark
from PIL import Image

import fastnst
from fastnst import cli, data, task
from fastnst.config import load_config
from fastnst.train import TrainConfig

INSTALLED = Path(sysconfig.get_path("scripts")) / "fastnst"
QUICK = ["--config", "smoke", "--device", "cpu", "--set", "train.steps=4", "--set", "train.log_every=2", "--set", "data.crop_size=32"]


def command(way: str, verb: str) -> list[str]:
    """One of the three ways to run a verb."""
    if way == "installed":
        return [str(INSTALLED), verb]
    if way == "module":
        return [sys.executable, "-m", "fastnst", verb]
    return [sys.executable, str(REPOSITORY / "scripts" / f"{verb}.py")]


def run(arguments: list, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(argument) for argument in arguments], cwd=cwd, capture_output=True, text=True, timeout=100)


@pytest.fixture
def train_main():
    return importlib.import_module("fastnst.scripts.train").main


# The three ways


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
@pytest.mark.parametrize("way", ["installed", "module", "script"])
def test_help_tells_flags_and_an_example(way, verb, tmp_path):
    done = run([*command(way, verb), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: fastnst {verb}" in done.stdout
    assert ("--device" in done.stdout or verb in ("export", "benchmark")) and "examples:" in done.stdout


class Parsed(Exception):
    """The command has read its flags."""


@pytest.mark.parametrize("part", [*cli.VERBS, *benchmark.PARTS.values()])
def test_an_example_is_a_command(part, monkeypatch):
    read = argparse.ArgumentParser.parse_args

    def parsed(parser, argv):
        read(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    lines = importlib.import_module(f"fastnst.scripts.{part}").EPILOG.splitlines()
    examples = [shlex.split(line, comments=True) for line in lines if line.startswith("  fastnst ") and "..." not in line]
    assert examples
    for _, verb, *flags in examples:
        with pytest.raises(Parsed):
            importlib.import_module(f"fastnst.scripts.{verb}").main(flags)


@pytest.mark.parametrize(
    "arguments, code, stream, expected",
    [
        (["--help"], 0, "out", ["usage: fastnst VERB", *cli.VERBS, "Begin with: fastnst stylize --style wave"]),
        ([], 2, "out", ["usage: fastnst VERB"]),
        (["--version"], 0, "out", [f"fastnst {fastnst.__version__}"]),
        (["trian"], 2, "err", ["no verb 'trian'", *cli.VERBS]),
    ],
)
def test_without_a_verb(arguments, code, stream, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == code
    printed = getattr(capsys.readouterr(), stream)
    assert all(text in printed for text in expected)


def test_train_resume_and_stylize_from_any_folder(photos, painting, tmp_path):
    inputs = ["--content", photos, "--style", painting]
    first = run([*command("script", "train"), *QUICK, *inputs], tmp_path)
    assert first.returncode == 0, first.stderr
    run_dir = tmp_path / "checkpoints" / "smoke"  # the default: named after the config, below the current folder
    assert {path.name for path in run_dir.iterdir()} >= {"config.yaml", "model.safetensors", "training_state.pt"}
    assert "done: 4 steps" in first.stdout
    more = run([*command("installed", "train"), *QUICK, *inputs, "--set", "train.steps=6"], tmp_path)
    assert more.returncode == 0, more.stderr
    assert "resume" in more.stderr and "at step 4 of 6" in more.stderr
    model = ["--model", run_dir / "model.safetensors"]
    applied = run([*command("module", "stylize"), *model, "--input", photos / "photo_00.jpg", "--output", "out.png"], tmp_path)
    assert applied.returncode == 0, applied.stderr
    assert Image.open(tmp_path / "out.png").size == (60, 50)


IMPORTED = """
import sys, torch
of_torch = set(sys.modules)
from fastnst.cli import run
from fastnst.scripts.train import main
code = run(main, sys.argv[1:])
print(*sorted({"sympy", "torch._dynamo", "torchvision"} & sys.modules.keys() - of_torch), sep=",")
sys.exit(code)
"""


def test_training_does_not_wait_for_libraries_that_it_does_not_need(photos, painting, tmp_path):
    """Seconds on a slow disk: algebra and compilers, which torch imports where they are asked for."""
    done = run([sys.executable, "-c", IMPORTED, *QUICK, "--content", photos, "--style", painting], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_a_mistake_shows_no_traceback(tmp_path):
    done = run([*command("module", "train"), "--config", "smoke", "--style", "nowhere.jpg", "--content", "nowhere"], tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere" in line
    assert list(tmp_path.iterdir()) == []


def test_inputs_may_have_names_that_mean_something_in_yaml(train_main, photos, painting, tmp_path, capsys):
    style, content = painting.rename(tmp_path / 'no. 1: "\U0001f30a" #2.png'), photos.rename(tmp_path / "holiday #3")
    assert cli.run(train_main, [*QUICK, "--content", str(content), "--style", str(style), "--dry-run"]) == 0
    config = yaml.safe_load(capsys.readouterr().out.split("\n\n")[0])
    assert (config["style"]["image"], config["data"]["content"]) == (str(style), str(content))


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"a\x7fb.jpg", b"a\xc2\x85b\n.jpg", b"x" * 250, b" lead", b"null", "\U0001f30a '\"\\ .jpg".encode()], ids=str)
def test_a_path_is_taken_as_it_is_in_the_file_system(name):
    """Bytes that are no UTF-8, what YAML does not print or takes for the end of a line, what it would fold."""
    overrides = [cli.path_override(key, os.fsdecode(name)) for key in ("style.image", "data.content")]
    config = load_config(TrainConfig, cli.find_config("smoke"), overrides)
    assert config.style.image == config.data.content == Path(os.fsdecode(name))


# Errors


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config", "wvae"], ["wvae", "wave", "johnson"]),
        (["--config", "nowhere/wave.yaml"], ["nowhere/wave.yaml"]),
        (["--config", "smoke", "--set", "train.step=3"], ["train.step", "train.steps"]),
        (["--config", "smoke", "--set", "train.steps=many"], ["error: --set train.steps: got 'many'"]),
        (["--config", "smoke", "--set", "train.steps"], ["key=value"]),
        (["--config", "smoke", "--set", "loss.content_layers.relu9_9=1"], ["relu9_9"]),
        (["--config", "smoke", "--device", "toaster"], ["toaster"]),
        (["--config", "gatys"], ["gatys"]),
    ],
)
def test_a_mistake_is_exit_code_2_and_names_what_to_mend(train_main, photos, painting, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(train_main, ["--content", str(photos), "--style", str(painting), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert all(text in printed.err for text in named)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind, text, expected", [(cli.whole(-5, 7), "-5", -5), (cli.whole(1, 7), "7", 7), (cli.number(0, 1), "0.25", 0.25), (cli.number(0, 1), "1", 1)])
def test_a_number_in_its_range_is_taken(kind, text, expected):
    assert kind(text) == expected


@pytest.mark.parametrize("kind", [cli.whole(1, 7), cli.number(1, 7)], ids=["whole", "number"])
@pytest.mark.parametrize("text", ["0", "8", "-1", "--5", "\u00b2", "", "many", "nan", "9" * 5000])
def test_any_other_is_told_with_its_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^got {text}, need a (whole )?number from 1 to 7$"):
        kind(text)


@pytest.mark.parametrize("missing", ["--config", "--model"])
def test_a_flag_that_is_needed_is_named(missing, capsys):
    main = importlib.import_module("fastnst.scripts.optimize" if missing == "--config" else "fastnst.scripts.stylize").main
    with pytest.raises(SystemExit) as ended:
        cli.run(main, [])
    assert ended.value.code == 2
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("bad value"), 2, "error: bad value\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (FloatingPointError("not finite"), 2, "error: not finite\n"),
        (MemoryError("use --short-side"), 2, "error: use --short-side\n"),
        (MemoryError(), 2, "error: not enough memory\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt(143), 143, "stopped\n"),
    ],
)
def test_what_a_user_can_mend_becomes_an_exit_code(error, code, text, capsys, monkeypatch):
    monkeypatch.delenv("FASTNST_DEBUG", raising=False)

    def fails(_):
        raise error

    assert cli.run(fails) == code
    assert capsys.readouterr().err == text


def test_our_own_mistakes_keep_their_traceback():
    def fails(_):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        cli.run(fails)


def test_the_debug_variable_shows_the_traceback(monkeypatch):
    def fails(_):
        raise ValueError("bad value")

    monkeypatch.setenv("FASTNST_DEBUG", "1")
    with pytest.raises(ValueError):
        cli.run(fails)


def test_a_diverging_training_ends_with_one_line_and_exit_code_1(train_main, photos, painting, tmp_path, capsys):
    arguments = [*QUICK, "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "run")]
    assert cli.run(train_main, [*arguments, "--set", "train.learning_rate.initial=1e30"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "not finite" in errors[0] and "What to change, with another --run-dir: lower train.learning_rate" in errors[0]
    assert cli.run(train_main, [*arguments[:-1], str(tmp_path / "another"), "--set", "train.learning_rate.initial=1e-3"]) == 0


@pytest.mark.parametrize("where, more", [("PerceptualLoss", []), ("load_image", []), ("load_image", ["--dry-run"])], ids=["its features", "its pixels", "a dry run"])
@pytest.mark.parametrize("key, size", [("long_side", 65535), ("short_side", 8000)])
def test_a_painting_too_large_for_the_memory_names_its_size(train_main, photos, painting, monkeypatch, capsys, where, more, key, size):
    def exhausted(*_):
        raise RuntimeError('[enforce fail at alloc_cpu.cpp:126] data. DefaultCPUAllocator: not enough memory: you tried to allocate 824633720832 bytes.')

    for module in ("fastnst.task", "fastnst.train"):
        monkeypatch.setattr(f"{module}.{where}", exhausted, raising=False)
    other = "short_side" if key == "long_side" else "long_side"
    given = [*QUICK, "--content", str(photos), "--style", str(painting), "--set", f"style.{key}={size}", "--set", f"style.{other}=null", *more]
    assert cli.run(train_main, given) == 2
    assert capsys.readouterr().err == f"error: style.{key}: got {size}, at which {painting} does not fit in the memory of cpu; set it lower, 512 is the default\n"


# How far it is


def test_a_bar_stopped_within_its_first_line_goes_in_silence(monkeypatch, capsys):
    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._PlainBar, "refresh", stopped)
    with pytest.raises(KeyboardInterrupt):
        cli.progress_bar(10, shown=True)
    gc.collect()
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_log_is_lines_and_is_closed_however_its_block_ends(capsys):
    with pytest.raises(ValueError), cli.Bar("photo") as bar:
        bar.to(3, 9, "first", first=3)
        bar.say("said")
        bar.to(4, 9)
        raise ValueError
    printed = capsys.readouterr().err
    assert "\r" not in printed and printed.endswith("\n")
    lines = printed.splitlines()
    assert "3/9" in lines[0] and lines[1] == "said" and "4/9" in lines[2] and lines[2].endswith("first]")


def test_what_is_of_unknown_length_has_a_bar_too(capsys):
    with cli.Bar("frame") as bar:
        for done in (1, 2):
            bar.to(done, None)
    assert "2frame" in capsys.readouterr().err


def test_a_bar_that_never_began_prints_nothing(capsys):
    with cli.Bar():
        pass
    assert capsys.readouterr().err == ""


# Several configs


def test_several_configs_are_trained_one_after_the_other_past_one_that_fails(train_main, photos, painting, tmp_path, capsys):
    sound = (REPOSITORY / "configs" / "smoke.yaml").read_text()
    for name, text in (("a", sound), ("b", sound.replace("style_weight: 100", "style_weight: many")), ("c", sound)):
        (tmp_path / f"{name}.yaml").write_text(text)
    configs = [str(tmp_path / f"{name}.yaml") for name in "abc"]
    arguments = ["--config", *configs, *QUICK[2:], "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "runs")]
    assert cli.run(train_main, arguments) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("a: done\nb: failed\nc: done\n")
    assert "error: b: " in printed.err and "loss.style_weight: got 'many'" in printed.err
    assert [(tmp_path / "runs" / name / "model.safetensors").exists() for name in "abc"] == [True, False, True]


def test_a_signal_ahead_of_the_first_step_ends_all_of_several(train_main, photos, painting, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text((REPOSITORY / "configs" / "smoke.yaml").read_text())
    monkeypatch.setattr("fastnst.train.survey", lambda *_: signal.raise_signal(signal.SIGTERM))
    arguments = ["--config", str(tmp_path / "a.yaml"), *QUICK[1:], "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "runs")]
    assert cli.run(train_main, arguments) == 143
    printed = capsys.readouterr()
    assert printed.out == "a: stopped\nsmoke: not begun\n" and printed.err.endswith("stopped\n")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def two_configs(photos, painting, tmp_path) -> list[str]:
    """The arguments of a training of ``a``, with decoding processes, and then ``b``, without."""
    text = (REPOSITORY / "configs" / "smoke.yaml").read_text()
    (tmp_path / "a.yaml").write_text(text.replace("workers: 0", "workers: 1"))
    (tmp_path / "b.yaml").write_text(text)
    inputs = ["--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "runs")]
    return ["--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), *QUICK[2:], *inputs]


@pytest.mark.parametrize("cache", ["off", "kept"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_decoding_process_that_is_killed_is_told_in_a_line_and_the_next_style_trained(train_main, two_configs, tmp_path, monkeypatch, capsys, cache):
    decode = data.prepare

    def run_out_of_memory(path, config):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, config)

    monkeypatch.setattr(data, "prepare", run_out_of_memory)
    assert cli.run(train_main, [*two_configs, "--set", f"data.cache={cache if cache == 'off' else tmp_path / cache}"]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("a: failed\nb: done\n")
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert errors == ["error: a: a process that decodes photos was killed, perhaps as memory ran out; the same command goes on from what was saved; lower data.workers"]
    assert "Traceback" not in printed.err


def test_our_own_mistake_in_one_of_several_is_shown_and_the_next_trained(train_main, two_configs, monkeypatch, capsys):
    prepare = task.prepare
    monkeypatch.setattr("fastnst.train.prepare", lambda config, *rest: prepare(config, *rest) if config.data.workers == 0 else [][0])
    assert cli.run(train_main, two_configs) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("a: failed\nb: done\n")
    assert "Traceback" in printed.err and "IndexError" in printed.err


def test_configs_of_one_name_are_refused(train_main, tmp_path, capsys):
    assert cli.run(train_main, ["--config", "smoke", str(tmp_path / "smoke.yaml")]) == 2
    assert "error: --config: got smoke, smoke, need different names" in capsys.readouterr().err


def test_the_end_of_a_training_is_summed_up(train_main, photos, painting, tmp_path, capsys):
    arguments = [*QUICK, "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "run")]
    assert cli.run(train_main, arguments) == 0
    printed = capsys.readouterr().out
    assert "done: 4 steps" in printed and "photos/s" in printed and "% of the time waiting for photos" in printed
    assert "loss: total" in printed and "validation: total" in printed
    assert f"model: {tmp_path / 'run' / 'model.safetensors'}, of step 4, the best on validation" in printed and "fastnst stylize --model" in printed


@pytest.mark.parametrize(
    "decay, asked, advice",
    [
        ("constant", 4, "--set train.steps=N with more of them prolongs it"),
        ("constant", 2, "--set train.steps=N with more of them prolongs it"),
        ("cosine", 4, "a longer one, as its rate is a cosine, needs another --run-dir"),
    ],
)
def test_a_finished_run_is_said_to_be(train_main, photos, painting, tmp_path, capsys, decay, asked, advice):
    arguments = [*QUICK, "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "run"), "--set", f"train.learning_rate.decay={decay}"]
    assert cli.run(train_main, arguments) == 0
    capsys.readouterr()
    assert cli.run(train_main, [*arguments, "--set", f"train.steps={asked}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"finished already, at step 4; {advice}") and "\nmodel: " in printed.out and "photos/s" not in printed.out
    assert f"run is finished already, at step 4 where {asked} are asked for, on cpu" in printed.err and "resume" not in printed.err


def test_check_data_tells_and_writes_nothing(train_main, photos, painting, tmp_path, capsys):
    arguments = [*QUICK, "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "run"), "--check-data"]
    assert cli.run(train_main, arguments) == 0
    printed = capsys.readouterr().out
    assert "photos: 12 found, every one looked at" in printed and "time: about" in printed and "disk: about" in printed
    assert not (tmp_path / "run").exists()


# A dry run


def test_own_is_the_config_by_default(train_main, photos, painting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for config in (["--config", "own"], []):
        assert cli.run(train_main, [*config, "--content", str(photos), "--style", str(painting), "--dry-run"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "vgg19_slim" in printed[0] and str(Path("checkpoints", "own")) in printed[0]


def test_a_dry_run_prints_the_complete_config_and_writes_nothing(train_main, photos, painting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", "wave", "--content", str(photos), "--style", str(painting), "--device", "cpu", "--dry-run"]
    assert cli.run(train_main, arguments) == 0
    printed = capsys.readouterr().out
    resolved, summary = printed.split("\n\n", 1)
    expected = load_config(TrainConfig, REPOSITORY / "configs" / "wave.yaml", [f"data.content={photos}", f"style.image={painting}"])
    assert TrainConfig.model_validate(yaml.safe_load(resolved)) == expected
    assert "at step 0 of 40,000" in summary and "1,679,235 parameters" in summary and str(Path("checkpoints/wave")) in summary
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_tells_where_a_run_would_resume(train_main, photos, painting, tmp_path, capsys):
    arguments = [*QUICK, "--content", str(photos), "--style", str(painting), "--run-dir", str(tmp_path / "run")]
    assert cli.run(train_main, arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert cli.run(train_main, [*arguments, "--set", "train.steps=6", "--dry-run"]) == 0
    assert "resume" in (printed := capsys.readouterr().out) and "at step 4 of 6" in printed
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_shipped_model_is_kept_and_another_folder_named(train_main, photos, painting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "checkpoints" / "smoke" / "model.safetensors"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(b"precious")
    given = [*QUICK, "--content", str(photos), "--style", str(painting)]
    assert cli.run(train_main, given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {Path('checkpoints/smoke')} holds a finished model.safetensors without") and shipped.read_bytes() == b"precious"
    assert cli.run(train_main, [*given, *error.split("such as ")[1].split()]) == 0
    assert (tmp_path / "checkpoints" / "my_smoke" / "model.safetensors").is_file()


@pytest.mark.parametrize("config", [["--config", "own"], []])
def test_what_a_recipe_still_needs_is_named_by_its_flag(train_main, capsys, config):
    assert cli.run(train_main, config) == 2
    errors = capsys.readouterr().err
    assert "style.image: not given; write it in the file or use --style PAINTING" in errors and "use --content FOLDER" in errors


def test_a_dry_run_looks_for_the_weights(train_main, photos, painting, capsys):
    given = ["--config", "smoke", "--content", str(photos), "--style", str(painting), "--set", "loss.weights=nowhere.pth", "--dry-run"]
    assert cli.run(train_main, given) == 2
    assert "loss.weights: no file at nowhere.pth" in capsys.readouterr().err


def test_a_name_that_a_pipe_cannot_show_is_written_in_escapes(tmp_path):
    code = r"import sys; from fastnst.cli import run; sys.exit(run(lambda _: print('done: \u65e5.jpg') or 0))"
    windows = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}  # as a pipe is there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=windows)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done: \\u65e5.jpg\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX makes them")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["stylize", "--list-styles"], ["export", "--help"]])
def test_a_reader_that_has_had_enough_is_left_in_silence(arguments, unbuffered):
    into, out = os.pipe()
    os.close(into)
    done = subprocess.run([sys.executable, "-m", "fastnst", *arguments], stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(out)
    silent = unbuffered and arguments[0] == "export"  # argparse then passes it over itself
    assert (done.returncode, done.stderr) == (0 if silent else 141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]], ids=" ".join)
def test_a_full_disk_under_the_output_is_told_once(arguments):
    with open("/dev/full", "w") as out:
        done = subprocess.run([sys.executable, "-m", "fastnst", *arguments], stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX closes them")
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_loses_nothing(photos, tmp_path, closed):
    photo, output = photos / "photo_00.jpg", tmp_path / "out.png"
    command = [sys.executable, "-m", "fastnst", "stylize", "--style", "wave", "--input", str(photo), "--output", str(output)]
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} {closed}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(output).size == Image.open(photo).size
    assert done.stdout == ("" if ">&- " in closed else f"1 of 1 stylized; output: {output}\n")  # no error by another way


@pytest.mark.parametrize("platform, quote", [("linux", "'"), ("win32", '"')])
def test_a_command_to_copy_is_quoted_as_the_shell_wants_it(monkeypatch, platform, quote):
    monkeypatch.setattr(sys, "platform", platform)
    assert [cli.quoted(word) for word in ("my runs/a.pt", "R&B", "a;b")] == [f"{quote}{word}{quote}" for word in ("my runs/a.pt", "R&B", "a;b")]
    assert (cli.quoted(Path("runs/a-1.pt")), cli.quoted("train.steps=4")) == ("runs/a-1.pt", "train.steps=4")


def test_a_cache_called_no_is_asked_back(train_main, photos, painting, tmp_path, capsys):
    given = ["--config", "smoke", "--content", str(photos), "--style", str(painting), "--dry-run"]
    assert cli.run(train_main, [*given, "--set", "data.cache=no"]) == 2
    assert "data.cache: got 'no', need auto, off or a folder" in capsys.readouterr().err
    assert cli.run(train_main, [*given, "--set", "data.cache=./no"]) == 2  # which config.yaml would hold as `no`
    assert cli.run(train_main, [*given, "--set", f"data.cache={tmp_path / 'no'}"]) == 0


def test_a_missing_scikit_image_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"scikit-image.*pip install 'fastnst\[evaluate\]'"):
        cli.example_photo("chelsea")


@pytest.mark.parametrize("missing", ["content", "style"])
def test_a_dry_run_looks_at_the_inputs(train_main, photos, painting, tmp_path, capsys, missing):
    given = {"content": str(photos), "style": str(painting)} | {missing: str(tmp_path / "nowhere")}
    assert cli.run(train_main, ["--config", "smoke", "--content", given["content"], "--style", given["style"], "--dry-run"]) == 2
    assert "nowhere" in capsys.readouterr().err


# Configs by name


@pytest.mark.parametrize("name", ["wave", "wave.yaml", "configs/wave.yaml"])
def test_a_shipped_config_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.find_config(name).samefile(REPOSITORY / "configs" / "wave.yaml")


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wave.yaml").write_text("train: {steps: 1}\n")
    assert cli.find_config("wave.yaml").samefile(tmp_path / "wave.yaml")
