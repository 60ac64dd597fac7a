"""Training: resuming is exact, nothing is overwritten or saved broken, and what happened can be read afterwards."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import synthetic_photo
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastnst.run
import fastnst.train
import fastnst.training
from fastnst.adam import Adam
from fastnst.checkpoint import load_model, load_training_state
from fastnst.config import validate_config
from fastnst.gradient import Gradient
from fastnst.network import TransformNetwork
from fastnst.run import hold
from fastnst.task import _cut
from fastnst.train import TrainConfig, TrainingDiverged, train
from fastnst.watchdog import Trouble


def changed(data: dict, **values) -> dict:
    """A copy of ``data`` with dotted keys set, ``__`` standing for the dot."""
    data = deepcopy(data)
    for key, value in values.items():
        section, name = key.split("__")
        data[section][name] = value
    return data


def fit(data: dict, run_dir: Path, stop_at: int | None = None, report=lambda progress: None, **values):
    """Train, stopping after ``stop_at`` steps as a signal would make it."""
    reached = [0]

    def watch(progress):
        reached[0] = progress.step
        report(progress)

    def should_stop():
        return stop_at is not None and reached[0] >= stop_at

    return train(validate_config(TrainConfig, changed(data, **values)), run_dir, report=watch, should_stop=should_stop)


def assert_same_run(a: Path, b: Path) -> None:
    """Both folders hold the same weights, Adam moments and step, bit for bit."""
    weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [load_training_state(folder / "training_state.pt") for folder in (a, b)]
    assert states[0]["step"] == states[1]["step"]
    assert all(torch.equal(states[0]["network"][name], states[1]["network"][name]) for name in states[0]["network"])
    of_optimizers = [state["optimizer"] if "muon" in state["optimizer"] else {"adam": state["optimizer"]} for state in states]
    for optimizer, keys in (("adam", ("step", "exp_avg", "exp_avg_sq")), ("muon", ("momentum_buffer",))):
        moments = [of_run.get(optimizer, {"state": {}})["state"] for of_run in of_optimizers]
        assert moments[0].keys() == moments[1].keys() and (moments[0] or optimizer not in of_optimizers[0])
        for index in moments[0]:
            assert all(torch.equal(moments[0][index][key], moments[1][index][key]) for key in keys)


def saved() -> None:
    """Wait until what is being saved is."""
    for thread in threading.enumerate():
        if thread.name == "saving":
            thread.join(10)


def events_of(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


# Resuming


@pytest.mark.parametrize(
    "stop_at, settings, settings_later",
    [
        (1, {}, {}),
        (3, {}, {"data__workers": 2}),
        (5, {"data__workers": 1}, {"data__workers": 0}),
        (3, {"network__norm": "batch", "train__learning_rate": {"decay": "cosine", "warmup_steps": 2}, "train__clip_gradient": 1.0}, {}),
        (2, {"train__keep": "last"}, {"train__log_every": 1, "train__validate_every": 1, "train__save_every": 1}),
        (3, {"train__optimizer": "muon", "loss__grid_weight": 100.0, "loss__spectrum_weight": 0.1, "loss__stability_weight": 100.0}, {}),
    ],
    ids=["first-step", "more-workers", "fewer-workers", "batch-norm-cosine-clip", "watched-closer", "muon-grid-stability"],
)
def test_interrupted_and_resumed_ends_where_uninterrupted_does(train_data, tmp_path, stop_at, settings, settings_later):
    fit(train_data, tmp_path / "whole", **settings)
    first = fit(train_data, tmp_path / "parts", stop_at, **settings)
    assert (first.step, first.finished) == (stop_at, False)
    second = fit(train_data, tmp_path / "parts", **settings | settings_later)
    assert (second.step, second.finished) == (6, True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_cache_changes_nothing_and_may_go_between_two_parts_of_a_run(train_data, tmp_path):
    fit(train_data, tmp_path / "whole", data__cache="off")
    messages = []
    fit(train_data, tmp_path / "parts", 3, report=lambda progress: messages.append(progress.message), data__cache=str(tmp_path / "kept"))
    assert any("11 of 11 photos" in message and str(tmp_path / "kept") in message for message in messages)
    fit(train_data, tmp_path / "parts", data__cache="off")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("change, told", [("none", None), ("added", "12 photos now, 11 before"), ("renamed", "11 photos as before, but others")])
def test_photos_that_changed_between_two_parts_of_a_run_are_told(train_data, tmp_path, photos, change, told):
    fit(train_data, tmp_path / "run", 3)
    first = min(path for path in photos.iterdir() if path.is_file())
    if change == "added":
        shutil.copy(first, photos / f"zz{first.suffix}")
    elif change == "renamed":
        first.rename(photos / f"zz{first.suffix}")
    messages = []
    assert fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message)).finished
    found = [message for message in messages if "data.content has changed" in message]
    assert len(found) == (told is not None) and all(told in message for message in found)


def test_a_validation_without_memory_takes_that_of_the_recordings(train_data, tmp_path, monkeypatch):
    forgotten, validate = [], fastnst.training.validate
    monkeypatch.setattr(Gradient, "forget", lambda self: forgotten.append(self))

    def exhausted(*given):
        if len(forgotten) < 1:
            raise RuntimeError("CUDA out of memory")
        return validate(*given)

    monkeypatch.setattr(fastnst.training, "validate", exhausted)
    assert fit(train_data, tmp_path / "run").finished and len(forgotten) == 1


def test_a_crash_loses_only_the_steps_since_the_last_save(train_data, tmp_path):
    def crash(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(train_data, tmp_path / "crashed", report=crash)
    assert load_training_state(tmp_path / "crashed" / "training_state.pt")["step"] == 4
    fit(train_data, tmp_path / "crashed")
    fit(train_data, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_a_crash_between_the_last_state_and_the_model_is_mended_by_the_same_command(train_data, tmp_path, monkeypatch):
    save_model = fastnst.training.save_model

    def disk_full(path, network, step, *rest, **more):
        if step == 6:
            raise OSError("No space left on device")
        save_model(path, network, step, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(fastnst.training, "save_model", disk_full)
        fit(train_data, tmp_path / "run")
    fit(train_data, tmp_path / "run")
    assert load_model(tmp_path / "run" / "model.safetensors")[1].step == 6


def test_a_crash_during_a_save_beside_the_training_leaves_it_whole(train_data, tmp_path, monkeypatch):
    save, under_way, crashed = fastnst.training.save_training_state, [], threading.Event()

    def save_slowly(path, learned, *rest):
        if learned["step"] == 4:
            under_way.append(crashed.wait(10))  # the run goes on by a step meanwhile, which changes nothing of what is saved
            time.sleep(0.1)
        save(path, learned, *rest)

    def crash(progress):
        if progress.step == 5:
            crashed.set()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fastnst.training, "save_training_state", save_slowly)
        fit(train_data, tmp_path / "crashed", report=crash)
    assert under_way == [True]
    assert load_training_state(tmp_path / "crashed" / "training_state.pt")["step"] == 4
    fit(train_data, tmp_path / "crashed")
    fit(train_data, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_a_save_that_fails_beside_the_training_ends_it_and_the_one_before_is_intact(train_data, tmp_path, monkeypatch):
    save, steps, run_dir = fastnst.training.save_training_state, [], tmp_path / "run"

    def disk_full(path, learned, *rest):
        if learned["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, learned, *rest)

    def watch(progress):
        steps.append(progress.step)
        if progress.step == 5:
            saved()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write in .*run: No space left on device; what was saved before is intact: .*the same command goes on"):
        patch.setattr(fastnst.training, "save_training_state", disk_full)
        fit(train_data, run_dir, report=watch, train__keep="last")
    assert max(steps) in (4, 5)  # at 6 the next would be saved
    assert load_training_state(run_dir / "training_state.pt")["step"] == load_model(run_dir / "model.safetensors")[1].step == 3
    fit(train_data, run_dir, train__keep="last")
    fit(train_data, tmp_path / "whole", train__keep="last")
    assert_same_run(tmp_path / "whole", run_dir)


def test_more_steps_may_be_asked_of_a_finished_run(train_data, tmp_path):
    fit(train_data, tmp_path / "grown", train__steps=4)
    fit(train_data, tmp_path / "grown")
    fit(train_data, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "grown")


def test_the_same_command_on_a_finished_run_changes_nothing(train_data, tmp_path):
    run_dir = tmp_path / "run"
    fit(train_data, run_dir)
    before = {name: (run_dir / name).read_bytes() for name in ("training_state.pt", "config.yaml")}
    weights = load_file(run_dir / "model.safetensors")
    again = fit(train_data, run_dir)
    assert again.finished and again.step == 6
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert all(torch.equal(value, weights[name]) for name, value in load_file(run_dir / "model.safetensors").items())


@pytest.mark.parametrize(
    "key, old, new",
    [
        ("train.batch_size", 2, 3),
        ("train.seed", 0, 7),
        ("loss.style_weight", 100.0, 50.0),
        ("data.crop_size", 32, 48),
        ("network.width", 4, 5),
        ("style.long_side", 64, 48),
    ],
)
def test_any_other_change_of_a_run_is_refused(train_data, tmp_path, key, old, new):
    run_dir = tmp_path / "run"
    fit(train_data, run_dir, stop_at=2)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError) as refusal:
        fit(train_data, run_dir, **{key.replace(".", "__"): new})
    assert f"{key}: {old} in the run, {new} asked for" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("look", ["train", "dry run"])
def test_another_painting_of_the_same_name_is_refused(train_data, tmp_path, painting, look):
    run_dir = tmp_path / "run"
    fit(train_data, run_dir, stop_at=2)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    config, first = validate_config(TrainConfig, train_data), painting.read_bytes()
    synthetic_photo(3, 128, 96).save(painting)
    with pytest.raises(ValueError, match=r"style\.image: .*painting\.png is another picture than when the run began; choose another --run-dir"):
        train(config, run_dir) if look == "train" else fastnst.train.plan(config, run_dir, torch.device("cpu"))
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    painting.write_bytes(first)
    assert fit(train_data, run_dir).finished


def test_a_painting_that_was_moved_is_the_same(train_data, tmp_path, painting):
    fit(train_data, tmp_path / "run", stop_at=2)
    painting = painting.rename(tmp_path / "moved.png")
    assert fit(train_data, tmp_path / "run", style__image=str(painting)).finished


def test_a_state_of_an_older_version_that_does_not_tell_the_painting_resumes(train_data, tmp_path):
    fit(train_data, tmp_path / "run", stop_at=2)
    state = torch.load(tmp_path / "run" / "training_state.pt", weights_only=True)
    del state["style"]
    torch.save(state, tmp_path / "run" / "training_state.pt")
    synthetic_photo(3, 128, 96).save(tmp_path / "another.png")
    with pytest.raises(ValueError, match="undo the change of style.image"):
        fit(train_data, tmp_path / "run", style__image=str(tmp_path / "another.png"))
    assert fit(train_data, tmp_path / "run").finished


def test_a_model_without_training_state_is_never_overwritten(train_data, tmp_path):
    fit(train_data, tmp_path / "run", train__steps=2)
    (tmp_path / "run" / "training_state.pt").unlink()
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="run-dir"):
        fit(train_data, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model


def test_a_damaged_training_state_is_named(train_data, tmp_path):
    fit(train_data, tmp_path / "run", train__steps=2)
    state = tmp_path / "run" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ValueError, match="training_state.pt"):
        fit(train_data, tmp_path / "run")


def test_stopped_before_the_first_step_the_folder_is_still_usable(train_data, tmp_path):
    result = fit(train_data, tmp_path / "run", stop_at=0)
    assert (result.step, result.finished) == (0, False)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert fit(train_data, tmp_path / "run").finished


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has other signals")
@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (9, -9)], ids=["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_to_the_process_group_costs_nothing_but_time(train_data, tmp_path, number, exit_code):
    # Endless for this test; the signal reaches the decoding worker too, as Ctrl-C in a terminal does.
    data = changed(train_data, train__steps=100_000, train__validate_every=100_000, data__workers=1)
    run_dir, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "fastnst", "train", "--config", str(config), "--run-dir", str(run_dir), "--device", "cpu"]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (run_dir / "model.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        code = process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "output.txt").read_text()
    assert code == exit_code, text
    assert "Traceback" not in text
    saved = load_training_state(run_dir / "training_state.pt")["step"]
    if number != 9:
        assert f"stopped at step {saved:,} of 100,000" in text
        assert load_model(run_dir / "model.safetensors")[1].step == saved

    fit(data, run_dir, train__steps=saved + 3)
    fit(data, tmp_path / "whole", train__steps=saved + 3)
    assert_same_run(tmp_path / "whole", run_dir)


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_look_at_the_data(painting, tmp_path, number, exit_code):
    (tmp_path / "many").mkdir()
    synthetic_photo(1, 800, 600).save(tmp_path / "photo.jpg")
    for index in range(6000):  # half a minute of decoding
        (tmp_path / "many" / f"{index}.jpg").symlink_to(tmp_path / "photo.jpg")
    command = [sys.executable, "-m", "fastnst", "train", "--config", "smoke", "--content", tmp_path / "many", "--style", painting, "--check-data", "--device", "cpu"]
    with open(tmp_path / "output.txt", "w") as output, subprocess.Popen(list(map(str, command)), stdout=output, stderr=output) as process:
        deadline = time.monotonic() + 60
        while "photo" not in (tmp_path / "output.txt").read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(60)
    text = (tmp_path / "output.txt").read_text()
    assert code == exit_code and text.endswith("stopped\n") and "Traceback" not in text, text


def test_the_same_seed_gives_the_same_network_and_another_seed_another(train_data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(train_data, tmp_path / name, train__steps=2, train__seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert not torch.equal(a["layers.0.weight"], c["layers.0.weight"])


# Going wrong


def sabotaged(monkeypatch, spoil, at: set[int]) -> None:
    """Let ``spoil(network)`` happen once at each of the updates ``at``, counted from 1 over everything that is learned."""
    step_of_adam, calls = Adam.step, []

    def step(self, *args, **kwargs):
        calls.append(None)
        result = step_of_adam(self, *args, **kwargs)
        if len(calls) in at:
            with torch.no_grad():
                spoil(self.param_groups[0]["params"])
        return result

    monkeypatch.setattr(Adam, "step", step)


def with_nan(parameters) -> None:
    parameters[0].view(-1)[0] = float("nan")


def test_a_loss_that_is_not_finite_stops_naming_step_and_terms(train_data, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    fit(train_data, run_dir, train__steps=4, train__rollbacks=0)
    before = {name: (run_dir / name).read_bytes() for name in ("training_state.pt", "model.safetensors")}
    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged) as stopped:
        patch.setattr(fastnst.training, "learning_rate_at", lambda *_: 1e30)  # update 5 ruins the weights, the loss of step 6 shows it
        fit(train_data, run_dir, train__rollbacks=0)
    assert "step 6" in str(stopped.value) and "at step 4, is intact" in str(stopped.value) and "train.rollbacks=0" in str(stopped.value)
    assert all(term in str(stopped.value) for term in ("loss/total nan", "loss/content", "loss/style"))
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert fit(train_data, run_dir).finished


def test_after_the_last_rollback_the_good_model_is_intact(train_data, tmp_path, monkeypatch):
    run_dir, messages = tmp_path / "run", []
    fit(train_data, run_dir, train__steps=4)
    weights = load_file(run_dir / "model.safetensors")
    sabotaged(monkeypatch, with_nan, set(range(1, 100)))
    with pytest.raises(TrainingDiverged, match="2 rollbacks with lower rates, the last 0.09 of the schedule's"):
        fit(train_data, run_dir, report=lambda progress: messages.append(progress.message), train__rollbacks=2)
    assert [message[:9] for message in messages if "Back to step 4" in message] == ["watchdog:"] * 2
    assert all(torch.equal(value, weights[name]) for name, value in load_file(run_dir / "model.safetensors").items())
    assert load_training_state(run_dir / "training_state.pt")["step"] == 4


@pytest.mark.parametrize("spoiled_update, back_to", [(1, 0), (4, 3), (5, 4), (6, 4)])  # saved at 2, 3, 4 and 6; 4 and 6 show at the saving itself
def test_one_nan_costs_a_rollback_and_no_more(train_data, tmp_path, monkeypatch, spoiled_update, back_to):
    sabotaged(monkeypatch, with_nan, {spoiled_update})
    result = fit(train_data, tmp_path / "run")
    assert (result.finished, result.rollbacks) == (True, 1)
    state = load_training_state(tmp_path / "run" / "training_state.pt")
    assert all(bool(value.isfinite().all()) for value in state["network"].values())
    assert state["watchdog"]["rate"] == pytest.approx(0.3)
    (text,) = events_of(tmp_path / "run").Tensors("watchdog/text_summary")
    assert b"not finite" in text.tensor_proto.string_val[0] and f"Back to step {back_to},".encode() in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_a_run_with_a_rollback_resumes_exactly(train_data, tmp_path, monkeypatch, stop_at):
    with monkeypatch.context() as patch:
        sabotaged(patch, with_nan, {3})
        fit(train_data, tmp_path / "whole", train__log_every=1)
    reached = []

    def rolled_back_and_at(step):
        return lambda progress: reached.append(progress.step) if reached or "Back to" in progress.message else None

    with monkeypatch.context() as patch:
        sabotaged(patch, with_nan, {3})
        config = validate_config(TrainConfig, changed(train_data, train__log_every=1))
        first = train(config, tmp_path / "parts", report=rolled_back_and_at(stop_at), should_stop=lambda: bool(reached) and reached[-1] >= stop_at)
    assert (first.step, first.finished) == (stop_at, False)
    second = fit(train_data, tmp_path / "parts", train__log_every=1)
    assert second.finished and second.rollbacks == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_output_gone_flat_is_taken_back(train_data, tmp_path, monkeypatch):
    def paint_it_black(parameters):
        for parameter in parameters[-2:]:
            parameter.zero_()
        parameters[-1].fill_(-100.0)

    data = changed(train_data, train__steps=70, train__log_every=5, train__save_every=10, train__validate_every=20)
    data["train"]["learning_rate"] = {"initial": 0.01}
    sabotaged(monkeypatch, paint_it_black, {42})
    messages = []
    result = fit(data, tmp_path / "run", report=lambda progress: messages.append(progress.message))
    assert (result.finished, result.rollbacks) == (True, 1)
    (message,) = [message for message in messages if "Back to" in message]
    assert "gone black" in message or "exploded" in message
    assert "Back to step 40" in message  # what was due at 50 was not saved, as it looked bad already


def test_a_good_state_that_is_none_is_gone_back_behind(train_data, tmp_path, monkeypatch):
    seen, messages = [], []

    def watch(self, step, rows, *rest):
        seen.append(step)
        return Trouble("made up", "nothing") if seen.count(5) in (1, 2) and step == 5 else None  # twice from the state of step 4

    monkeypatch.setattr(fastnst.training.Watchdog, "watch", watch)
    result = fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message), train__log_every=1)
    assert result.finished
    assert [message.split(", the learning rate")[0] for message in messages if "Back to" in message] == [
        "watchdog: made up. Back to step 4",
        "watchdog: made up. Back to step 3",
    ]


def test_the_model_is_the_best_on_validation_and_says_its_step(train_data, tmp_path, monkeypatch):
    totals = iter([9.0, 5.0, 4.0, 7.0])  # at steps 0, 2, 4, 6

    def scored(*args):
        _, pairs = validate(*args)
        return {"validation/total": next(totals)}, pairs

    validate = fastnst.training.validate
    monkeypatch.setattr(fastnst.training, "validate", scored)
    result = fit(train_data, tmp_path / "run", train__validate_every=2)
    assert (result.best_step, load_model(result.model)[1].step) == (4, 4)
    assert load_training_state(tmp_path / "run" / "training_state.pt")["step"] == 6


def test_a_validation_that_is_not_finite_is_taken_back(train_data, tmp_path, monkeypatch):
    totals, messages = iter([9.0, 5.0, float("nan"), 7.0, 6.0]), []  # at steps 0, 2, 4, and 4 and 6 after going back
    monkeypatch.setattr(fastnst.training, "validate", lambda *_: ({"validation/total": next(totals)}, torch.zeros(3, 8, 8)))
    result = fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message), train__validate_every=2, train__keep="last")
    assert [message.partition(". If")[0] for message in messages if "watchdog" in message] == [
        "watchdog: the loss on validation is not finite at step 4. Back to step 2, the learning rate now 0.3 of the schedule's (rollback 1 of 3)"
    ]
    assert (result.rollbacks, load_model(result.model)[1].step) == (1, 6)


def test_the_best_that_is_still_being_written_is_not_replaced_by_a_worse_one(train_data, tmp_path, monkeypatch):
    save = fastnst.training.save_model

    def save_slowly(*args, **more):
        time.sleep(0.3)  # the next one is due before
        save(*args, **more)

    totals = iter([9.0, 4.0, 5.0])  # at steps 0, 1, 2
    monkeypatch.setattr(fastnst.training, "validate", lambda *_: ({"validation/total": next(totals)}, torch.zeros(3, 8, 8)))
    monkeypatch.setattr(fastnst.training, "save_model", save_slowly)
    result = fit(train_data, tmp_path / "run", train__validate_every=1, train__steps=2)
    assert (result.best_step, load_model(result.model)[1].step) == (1, 1)


def test_a_best_that_is_gone_is_forgotten(train_data, tmp_path, monkeypatch):
    totals = iter([9.0, 4.0, 5.0, 6.0])  # at steps 0, 2, 4, and 6 after the resumption
    monkeypatch.setattr(fastnst.training, "validate", lambda *_: ({"validation/total": next(totals)}, torch.zeros(3, 8, 8)))
    fit(train_data, tmp_path / "run", train__validate_every=2, train__steps=4, train__keep="last")
    result = fit(train_data, tmp_path / "run", train__validate_every=2, train__steps=6, train__keep="best")
    assert (result.best_step, load_model(result.model)[1].step) == (6, 6)  # not 2, which nobody kept


def test_a_rollback_to_the_start_leaves_nothing_of_the_run_to_go_back_to(train_data, tmp_path, monkeypatch):
    watch, seen = fastnst.training.Watchdog.watch, []

    def stuck_then_exploded(self, step, rows, *more):
        seen.append(step)
        if len(seen) in (3, 4):  # two saves are behind; the second trouble comes before the next one
            return Trouble("it is stuck", "advice", from_start=len(seen) == 3)
        return watch(self, step, rows, *more)

    monkeypatch.setattr(fastnst.training.Watchdog, "watch", stuck_then_exploded)
    messages = []
    fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message), train__log_every=1, train__save_every=1)
    assert ["Back to step 0" in message for message in messages if "Back to" in message] == [True, True]


@pytest.mark.parametrize("settings", [{"train__learning_rate": {"initial": 1e-12}}, {"loss__content_weight": 0.0, "loss__style_weight": 0.0}], ids=["a rate of nearly 0", "no weights"])
def test_a_run_that_learns_nothing_is_stuck(train_data, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(fastnst.watchdog, "PATIENCE", 6)
    messages = []
    with pytest.raises(TrainingDiverged, match="the loss is stuck: by step 6 its best on validation is .*, and was .* untrained. 1 rollbacks"):
        fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message), train__steps=8, train__validate_every=3, train__rollbacks=1, **settings)
    assert ["Back to step 0, the learning rate now 0.3 of" in message for message in messages if "Back to" in message] == [True]


def test_the_model_may_be_the_last(train_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fastnst.training, "validate", lambda *_: ({"validation/total": next(totals)}, torch.zeros(3, 8, 8)))
    totals = iter([9.0, 5.0, 4.0, 7.0])
    assert load_model(fit(train_data, tmp_path / "run", train__validate_every=2, train__keep="last").model)[1].step == 6


@pytest.mark.parametrize("key, parts", [("train__accumulate", 2), ("train__accumulate", 3), ("train__accumulate", 64)])
def test_accumulated_gradients_are_those_of_the_whole_batch(train_data, tmp_path, key, parts):
    data = changed(train_data, train__steps=1, train__batch_size=5, loss__stability_weight=1000.0)  # all photos of a step are cut at the same place
    fit(data, tmp_path / "whole")
    fit(data, tmp_path / "parts", **{key: parts})
    assert gradient_difference(tmp_path / "whole", tmp_path / "parts") < 1e-3  # float32: a few activations fall on the other side of a ReLU


def gradient_difference(a: Path, b: Path) -> float:
    """Of the first gradient, relative to its size: after one step Adam's first moment is a tenth of it."""
    moments = [torch.cat([entry["exp_avg"].flatten() for entry in load_training_state(run / "training_state.pt")["optimizer"]["state"].values()]) for run in (a, b)]
    return float((moments[0] - moments[1]).norm() / moments[0].norm())


def test_every_fourth_step_has_the_stability_term(train_data, tmp_path):
    fit(train_data, tmp_path / "run", loss__stability_weight=20.0, train__steps=6, train__log_every=1, train__validate_every=6)
    logged = {event.step: event.value for event in events_of(tmp_path / "run").Scalars("loss/stability")}
    assert {step for step, value in logged.items() if value > 0} == {1, 5}  # after the updates number 0 and 4


@pytest.mark.parametrize("side", [16, 17, 33, 256])
def test_a_cut_lies_within_the_photo_and_elsewhere_each_time(train_data, side):
    config = validate_config(TrainConfig, changed(train_data, loss__stability_weight=1.0))
    cuts = [_cut(config, side, step) for step in range(0, 400, 4)]
    assert all(cut.side == side - side // 8 and cut.share == 4 for cut in cuts)
    places = {int(cut.top) for cut in cuts} | {int(cut.left) for cut in cuts}
    assert min(places) == 0 and max(places) + side - side // 8 == side  # it reaches all borders
    assert _cut(config, side, 4) == cuts[1] and all(_cut(config, side, step) is None for step in (1, 2, 3, 5))


def test_batch_norm_in_parts_is_refused(train_data, tmp_path):
    with pytest.raises(ValueError, match="network.norm: batch norm needs the whole batch at once: set train.accumulate=1"):
        fit(train_data, tmp_path / "run", network__norm="batch", train__accumulate=2)


def test_out_of_memory_names_the_sizes_that_fit(train_data, tmp_path, monkeypatch):
    forward = TransformNetwork.forward

    def small_memory(self, images):
        if self.training and images.shape[0] * images.shape[2] * images.shape[3] > 3 * 32 * 32:  # three photos of 32 px
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, images)

    monkeypatch.setattr(TransformNetwork, "forward", small_memory)
    with pytest.raises(ValueError) as error:
        fit(train_data, tmp_path / "run", train__batch_size=12)
    assert "12 photos of 32 px" in str(error.value)
    # 12 photos in 4 parts of 3; and sqrt(3 / 12) * 32 = 16 px
    assert "train.accumulate=4 (slower, the same result) or train.batch_size=3, or data.crop_size=16" in str(error.value)
    assert fit(train_data, tmp_path / "run", train__accumulate=4, train__batch_size=12).finished


def test_a_run_folder_that_is_gone_is_named_and_not_begun_anew(train_data, tmp_path):
    run_dir = tmp_path / "run"

    def move_away(progress):
        if progress.step == 3 and run_dir.exists():
            saved()
            run_dir.rename(tmp_path / "elsewhere")

    with pytest.raises(FileNotFoundError, match=r"run/config\.yaml is gone"):
        fit(train_data, run_dir, report=move_away)
    assert not (run_dir / "training_state.pt").exists()
    assert load_training_state(tmp_path / "elsewhere" / "training_state.pt")["step"] == 2


def test_what_a_killed_writer_left_is_removed(train_data, tmp_path):
    fit(train_data, tmp_path / "run", stop_at=2)
    for name in (".training_state-fastnst-abc_1234.pt", ".model-fastnst-abc_1234.safetensors", ".config-fastnst-abc_1234.yaml"):
        (tmp_path / "run" / name).write_bytes(b"half")
    fit(train_data, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*-*"))


def test_no_room_on_the_disk_is_said_before_the_first_step(train_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fastnst.run.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"run: the disk has 0\.0 MB left, model and training state need .* MB"):
        fit(train_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_without_room_says_so_before_its_first_step_and_a_finished_one_needs_none(train_data, tmp_path, monkeypatch):
    fit(train_data, tmp_path / "run", stop_at=3)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="run: the disk has"):
        patch.setattr(fastnst.run.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        fit(train_data, tmp_path / "run")
    fit(train_data, tmp_path / "run")
    monkeypatch.setattr(fastnst.run.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert fit(train_data, tmp_path / "run", data__cache="off").finished


def test_a_folder_that_may_not_be_written_is_said_before_photos_are_kept(train_data, tmp_path, monkeypatch):
    def forbidden(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fastnst.run.tempfile, "TemporaryFile", forbidden)
    with pytest.raises(PermissionError, match="cannot write in .*run: Permission denied; mend that or choose another --run-dir"):
        fit(train_data, tmp_path / "run", data__cache=str(tmp_path / "kept"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "kept").exists()


def test_a_full_disk_whose_error_names_the_file_says_what_is_left_of_the_run_too(train_data, tmp_path):
    with pytest.raises(OSError) as full, hold(tmp_path / "run", validate_config(TrainConfig, train_data)):
        raise OSError(errno.ENOSPC, f"cannot write {tmp_path / 'run' / 'a'}: No space left on device")
    assert full.value.strerror.startswith(f"cannot write {tmp_path / 'run' / 'a'}: No space left on device; what was saved before is intact: ")


def test_another_folder_s_error_is_not_laid_to_the_run(train_data, tmp_path):
    with pytest.raises(PermissionError) as forbidden, hold(tmp_path / "run", validate_config(TrainConfig, train_data)):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/triton")
    assert str(forbidden.value) == "[Errno 13] Permission denied: '/elsewhere/triton'"


def test_the_result_tells_speed_waiting_and_last_terms(train_data, tmp_path):
    result = fit(train_data, tmp_path / "run")
    assert result.photos_per_second > 0 and 0 < result.waiting < 1
    assert result.losses["loss/total"] == pytest.approx(result.losses["loss/content"] + result.losses["loss/style"], rel=1e-4)


@pytest.mark.parametrize("busy", [False, True])
def test_a_wait_counts_only_where_the_device_has_nothing_left_to_do(train_data, tmp_path, monkeypatch, busy):
    class Device:
        """As a GPU's, that is still at work when the photos have come."""

        def __init__(self, _device):
            self.given = 0

        def set(self):
            self.given += 1

        def passed(self):
            return not (busy and self.given)

    def slow(*args):
        time.sleep(0.02)
        return one(*args)

    one = fastnst.data.crop
    monkeypatch.setattr(fastnst.data, "crop", slow)
    monkeypatch.setattr(fastnst.training, "Mark", Device)
    fit(train_data, tmp_path / "run", train__log_every=1)
    waits = [event.value for event in events_of(tmp_path / "run").Scalars("train/waiting_for_photos")]
    assert waits[0] > 0 and [wait > 0 for wait in waits[1:]] == [not busy] * 5  # ahead of the first step there is nothing to do


def test_check_data_decodes_everything_and_estimates(train_data, tmp_path, photos):
    (photos / "truncated.jpg").write_bytes((photos / "photo_00.jpg").read_bytes()[:400])
    done = []
    text = fastnst.train.check_data(
        validate_config(TrainConfig, train_data), tmp_path / "run", torch.device("cpu"), lambda count, total: done.append((count, total))
    )
    assert done == [(count, 13) for count in range(1, 14)]
    assert "13 found, every one looked at" in text and "1 cannot be read" in text and "truncated.jpg" in text
    assert "time: about" in text and "for 6 steps" in text and "disk: about" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_a_photo_whose_name_is_no_text_is_one_as_others(train_data, tmp_path, photos):
    shutil.copy(photos / "photo_00.jpg", os.fsencode(photos) + b"/M\xfcnchen.jpg")  # Latin-1, as old archives have it
    (photos / os.fsdecode(b"K\xf6ln.jpg")).write_text("no picture")
    result = fit(train_data, tmp_path / "run", train__steps=14)
    assert result.finished and any("K\udcf6ln.jpg" in message for message in result.unreadable)
    assert fit(train_data, tmp_path / "run", train__steps=15).finished


@pytest.mark.parametrize("place", ["photos", "held_out"])
def test_a_corrupt_photo_is_skipped_and_named_once(train_data, tmp_path, photos, place):
    (tmp_path / "held_out").mkdir()
    synthetic_photo(77).save(tmp_path / "held_out" / "a.png")
    whole = (photos / "photo_00.jpg").read_bytes()
    (tmp_path / place / "corrupt.jpg").write_bytes(whole[: len(whole) // 3])
    settings = {"train__steps": 14, "data__validation": str(tmp_path / "held_out")}  # two epochs and more
    messages = []
    result = fit(train_data, tmp_path / "run", report=lambda progress: messages.append(progress.message), **settings)
    assert result.finished
    assert ["corrupt.jpg" in message for message in result.unreadable] == [True]
    assert sum(message.startswith("skipped") and "corrupt.jpg" in message for message in messages) == (1 if place == "photos" else 0)
    again = fit(train_data, tmp_path / "run", **settings)
    assert list(again.unreadable) == list(result.unreadable)


@pytest.mark.parametrize("key, value", [("data__content", "nowhere"), ("style__image", "nowhere.png"), ("loss__weights", "nowhere.pth")])
def test_what_is_missing_is_named_before_anything_is_written(train_data, tmp_path, key, value):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(train_data, tmp_path / "run", **{key: str(tmp_path / value)})
    assert not (tmp_path / "run").exists()


# What a run leaves


@pytest.fixture
def finished(train_data, tmp_path) -> Path:
    fit(train_data, tmp_path / "run", loss__tv_weight=0.1)
    return tmp_path / "run"


def test_tensorboard_shows_losses_rates_images_and_config(finished):
    events = events_of(finished)
    terms = {"/total", "/content", "/style", "/tv", "_content/relu2_2", "_style/relu1_2", "_style/relu2_2"}
    watched = {"train/photos_per_second", "train/learning_rate", "train/gradient_norm", "train/waiting_for_photos", "output/contrast", "output/brightness"}
    expected = {f"{kind}{term}" for kind in ("loss", "validation") for term in terms} | watched
    expected |= {f"validation_look/{figure}" for figure in ("flicker", "noise_gain", "border", "frame", "grid_2", "grid_4", "clipped")}
    assert set(events.Tags()["scalars"]) == expected
    assert [event.step for event in events.Scalars("validation/total")] == [0, 3, 6]
    assert {2, 4, 6} <= {event.step for event in events.Scalars("loss/total")}
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([1e-3] * 4)
    assert all(event.value > 0 for event in events.Scalars("train/photos_per_second"))
    assert set(events.Tags()["images"]) == {"style", "validation/content_and_stylized"}
    pairs = events.Images("validation/content_and_stylized")
    assert [pair.step for pair in pairs] == [0, 3, 6]
    assert pairs[0].width == 2 * 32  # the photo and beside it the stylized one
    assert Image.open(io.BytesIO(pairs[0].encoded_image_string)).size == (2 * 32, 32)
    (text,) = events.Tensors("config/text_summary")
    assert b"batch_size: 2" in text.tensor_proto.string_val[0]


def test_the_terms_add_up_to_the_total(train_data, tmp_path):
    fit(train_data, tmp_path / "run", loss__tv_weight=0.1, loss__grid_weight=100.0, loss__spectrum_weight=0.1, loss__stability_weight=20.0)
    events = events_of(tmp_path / "run")
    for kind in ("loss", "validation"):
        value = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith(kind)}
        parts = {"content", "style", "tv", "grid", "spectrum"} | ({"stability"} if kind == "loss" else set())
        assert {f"{kind}/{part}" for part in parts | {"total"}} == {tag for tag in value if tag.startswith(f"{kind}/")}
        assert value[f"{kind}/total"] == pytest.approx(sum(value[f"{kind}/{part}"] for part in parts), rel=1e-4)
        assert value[f"{kind}/style"] == pytest.approx(value[f"{kind}_style/relu1_2"] + value[f"{kind}_style/relu2_2"], rel=1e-4)


def test_after_a_crash_and_a_resume_every_step_is_logged_once(train_data, tmp_path):
    def crash(progress):
        if progress.step == 5 and progress.losses:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(train_data, tmp_path / "run", report=crash, train__log_every=1)
    fit(train_data, tmp_path / "run", train__log_every=1)
    assert [event.step for event in events_of(tmp_path / "run").Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]


def test_the_resolved_config_in_the_run_folder_is_complete(finished, train_data):
    written = validate_config(TrainConfig, yaml.safe_load((finished / "config.yaml").read_text()))
    assert written == validate_config(TrainConfig, changed(train_data, loss__tv_weight=0.1))


def test_the_model_file_tells_recipe_and_style_but_no_folder(finished, tmp_path):
    network, info = load_model(finished / "model.safetensors")
    assert (network.config.width, info.step) == (4, 6)
    assert info.recipe["style"]["image"] == "painting.png"
    assert info.recipe["data"]["content"] == "photos"
    assert max(info.thumbnail.size) == 128
    assert str(tmp_path).encode() not in (finished / "model.safetensors").read_bytes()


def test_every_step_is_reported_in_order_and_told_of_once_the_next_is_launched(train_data, tmp_path, monkeypatch):
    told, step_of_adam, add_scalar = [], Adam.step, fastnst.train.SummaryWriter.add_scalar

    def step(self):
        told.append("launched")
        return step_of_adam(self)

    def draw(self, name, value, at):
        told.append((f"{name} drawn", at))
        add_scalar(self, name, value, at)

    def report(progress):
        what = "losses" if progress.losses else "validation" if progress.validation else "message" if progress.message else "step"
        told.append((what, progress.step))

    monkeypatch.setattr(Adam, "step", step)
    monkeypatch.setattr(fastnst.train.SummaryWriter, "add_scalar", draw)
    fit(train_data, tmp_path / "run", report=report, train__log_every=1, train__save_every=4)
    begun = told.index(("validation", 0)) + 1
    assert {what for what, _ in (each for each in told[:begun] if "drawn" not in each[0])} == {"message", "validation"}
    shown = [each for each in told[begun:] if "drawn" not in each[0] or each[0] in ("loss/total drawn", "validation/total drawn")]
    logged = [[("loss/total drawn", at), ("losses", at)] for at in range(7)]
    validated = [[("validation/total drawn", at), ("validation", at)] for at in range(7)]
    at_once = [*logged[3], *validated[3], "launched", ("step", 4), *logged[4], "launched", ("step", 5)]  # ahead of what is validated, and saved
    first = ["launched", ("step", 1), "launched", *logged[1], ("step", 2), "launched", *logged[2], ("step", 3)]
    assert shown == [*first, *at_once, "launched", *logged[5], ("step", 6), *logged[6], *validated[6]]


def test_what_was_logged_is_told_though_the_next_step_fails(train_data, tmp_path, monkeypatch):
    learn, losses = fastnst.training.learn, []

    def fail(task, content, step):
        if step == 5:
            raise OSError("no photo")
        return learn(task, content, step)

    monkeypatch.setattr(fastnst.training, "learn", fail)
    with pytest.raises(OSError, match="no photo"):
        fit(train_data, tmp_path / "run", report=lambda progress: losses.append(progress.step) if progress.losses else None, train__log_every=1)
    assert losses == [1, 2, 3, 4, 5]
    assert [event.step for event in events_of(tmp_path / "run").Scalars("loss/total")] == [1, 2, 3, 4, 5]


# Learning


def validation_curve(run_dir: Path) -> list[float]:
    return [event.value for event in events_of(run_dir).Scalars("validation/total")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_validation_loss_falls_in_a_toy_training(train_data, tmp_path, precision):
    data = deepcopy(train_data)
    data["network"] = {"width": 8, "residual_blocks": 0}
    data["loss"] |= {"content_layers": {"relu1_1": 1}}
    data["train"] |= {"steps": 60, "batch_size": 4, "validate_every": 60, "save_every": 60, "precision": precision}
    data["train"]["learning_rate"] = {"initial": 3e-3}
    fit(data, tmp_path / "run")
    first, last = validation_curve(tmp_path / "run")
    assert last < 0.65 * first


def test_validation_loss_falls_well_with_a_real_loss_network(shared, tmp_path):
    data = {
        "style": {"image": str(shared / "styles" / "wave.jpg"), "long_side": 128},
        "data": {
            "content": str(shared / "content" / "train"),
            "validation": str(shared / "content" / "val"),
            "validation_photos": 8,
            "crop_size": 64,
            "workers": 0,
        },
        "network": {"width": 16},
        "loss": {
            "network": "vgg19",
            "weights": str(shared / "weights" / "vgg19_to_relu3_4.safetensors"),
            "content_layers": {"relu3_3": 1},
            "style_layers": {"relu1_2": 1, "relu2_2": 1, "relu3_3": 1},
            "style_weight": 5,
        },
        "train": {"steps": 80, "validate_every": 80, "save_every": 80, "precision": "float32", "learning_rate": {"initial": 3e-3}},
    }
    fit(data, tmp_path / "run")
    first, last = validation_curve(tmp_path / "run")
    assert last < 0.5 * first


# Beside the way


@pytest.mark.parametrize("sabotage", ["diverges", "no photo can be read"])
def test_an_error_ends_the_process_with_its_workers(photos, painting, tmp_path, sabotage):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    synthetic_photo(50).save(held_out / "a.png")
    settings = ["data.workers=1", f"data.validation={held_out}"]
    if sabotage == "diverges":
        settings.append("train.learning_rate.initial=1e30")
    else:
        for photo in photos.rglob("*.*"):
            photo.write_bytes(b"")
    command = [sys.executable, "-m", "fastnst", "train", "--config", "smoke", "--content", photos, "--style", painting, "--run-dir", tmp_path / "run"]
    done = subprocess.run([*map(str, command), *(f"--set={setting}" for setting in settings)], capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if sabotage == "diverges" else 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert ("not finite" if sabotage == "diverges" else "can be read") in errors[0]


def test_a_second_training_in_the_same_folder_is_refused(train_data, tmp_path):
    refused = []

    def start_another(progress):
        if progress.step == 3 and not refused:
            with pytest.raises(BlockingIOError, match="run is in use by another training"):
                fit(train_data, tmp_path / "run")
            refused.append(True)

    assert fit(train_data, tmp_path / "run", report=start_another).finished
    assert refused


def test_a_painting_too_flat_for_the_loss_network_is_named(train_data, tmp_path, painting):
    Image.new("RGB", (200, 1), "red").save(painting)
    with pytest.raises(ValueError, match="64x1 pixels is too small for relu2_2 of vgg16"):
        fit(train_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strength_is_calibrated_once_and_kept(train_data, tmp_path):
    data = changed(train_data, loss__strength=5, loss__style_weight=1)
    fit(data, tmp_path / "run", stop_at=3)
    first = load_training_state(tmp_path / "run" / "training_state.pt")["loss"]
    assert first["strength"] is None and first["style_weight"] == 10
    fit(data, tmp_path / "run")
    assert load_training_state(tmp_path / "run" / "training_state.pt")["loss"] == first
