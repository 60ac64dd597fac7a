"""Several processes train as one does; what happens to one happens to the run. On the CPU, with gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from safetensors.torch import load_file
from test_train import changed, events_of, fit, gradient_difference

from fastnst.checkpoint import load_training_state
from fastnst.data import DataConfig, PhotoStream, list_photos, training_batches
from fastnst.ranks import Ranks


def start(ranks: int, code: list[str], folder: Path) -> list[subprocess.Popen]:
    """So many processes with the environment that torchrun gives them; their output goes to ``folder``/0.txt and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "OMP_NUM_THREADS": 1}
    started = []
    for rank in range(ranks):
        environment = os.environ | {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with open(folder / f"{rank}.txt", "w") as output:
            started.append(subprocess.Popen([sys.executable, *code], env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True))
    return started


def wait(started: list[subprocess.Popen], seconds: float = 100) -> list[int]:
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def train_on(ranks: int, data: dict, run_dir: Path, *flags: str) -> list[subprocess.Popen]:
    folder = run_dir.parent
    (folder / f"{run_dir.name}.yaml").write_text(yaml.safe_dump(data))
    script = str(REPOSITORY / "scripts" / "train.py")
    return start(ranks, [script, "--config", str(folder / f"{run_dir.name}.yaml"), "--run-dir", str(run_dir), "--device", "cpu", *flags], folder)


def until(reached, started: list[subprocess.Popen], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline and all(process.poll() is None for process in started):
        time.sleep(0.05)


def test_the_ranks_parts_are_the_batch(photos):
    config = DataConfig(content=photos, crop_size=16, workers=0)
    stream = PhotoStream(list_photos(config).train, config, 0)

    def batches(**part) -> list[torch.Tensor]:
        with training_batches(stream, 10, 5, 3, **part) as found:
            return [images for images, _ in found]

    parts = [batches(rank=rank, ranks=3) for rank in range(3)]
    assert [len(part[0]) for part in parts] == [1, 2, 2]
    assert all(torch.equal(torch.cat(together), whole) for whole, *together in zip(batches(), *parts))


def test_alone_every_question_is_answered_by_oneself():
    ranks = Ranks()
    assert ranks.main and ranks.any(True, False) == [True, False] and ranks.gather("a") == ["a"] and ranks.from_main(3) == 3
    module = torch.nn.Linear(1, 1)
    assert ranks.average_gradients(module) is module and torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
    with pytest.raises(KeyError), ranks.apart(agreed=ValueError), ranks.together():
        raise KeyError


def test_three_ranks_do_as_one_and_another_number_of_ranks_goes_on(train_data, tmp_path):
    # A batch of 5 over 3 and over 2 ranks, whose parts are unequal, and these in 2 parts again.
    data = changed(train_data, train__steps=1, train__batch_size=5, train__log_every=1, train__keep="last", data__validation_photos=1)
    data["train"]["learning_rate"] = {"initial": 1e-4}
    data["loss"] |= {"grid_weight": 100.0, "spectrum_weight": 0.1, "stability_weight": 100.0}
    fit(data, tmp_path / "whole")
    assert wait(train_on(3, data, tmp_path / "run")) == [0, 0, 0], (tmp_path / "0.txt").read_text()
    assert gradient_difference(tmp_path / "whole", tmp_path / "run") < 1e-3
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert "done: 1 steps" in printed[0] and "done" not in printed[1] + printed[2] and "step 1" not in printed[1] + printed[2]

    more = changed(data, train__steps=4)
    fit(more, tmp_path / "whole")
    assert wait(train_on(2, more, tmp_path / "run", "--set", "train.accumulate=2")) == [0, 0], (tmp_path / "0.txt").read_text()
    losses = [[event.value for event in events_of(tmp_path / name).Scalars("loss/total")] for name in ("whole", "run")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    # Adam moves a bias ahead of an instance norm, whose gradient is rounding alone, by up to the rate a step: 4 x 1e-4 either way.
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-3 for name in weights[0])


def test_a_signal_to_one_rank_stops_all_at_the_same_step(train_data, tmp_path):
    data = changed(train_data, train__steps=100_000, train__validate_every=100_000)
    started = train_on(2, data, tmp_path / "run")
    until((tmp_path / "run" / "model.safetensors").exists, started)
    started[1].send_signal(signal.SIGTERM)
    assert wait(started) == [143, 143], (tmp_path / "0.txt").read_text()
    step = load_training_state(tmp_path / "run" / "training_state.pt")["step"]
    assert f"stopped at step {step:,} of 100,000" in (tmp_path / "0.txt").read_text()


def test_a_rank_that_dies_ends_the_run_and_the_state_resumes(train_data, tmp_path):
    data = changed(train_data, train__steps=100_000, train__validate_every=100_000)
    started = train_on(2, data, tmp_path / "run")
    until((tmp_path / "run" / "model.safetensors").exists, started)
    started[1].kill()
    assert wait(started) == [1, -9]
    text = (tmp_path / "0.txt").read_text()
    assert "error: rank 0 has lost another rank" in text and "Traceback" not in text
    saved = load_training_state(tmp_path / "run" / "training_state.pt")["step"]
    assert saved >= 2 and fit(data, tmp_path / "run", train__steps=saved + 1).finished


TOGETHER = """
import torch
from fastnst.ranks import RankFailed, RankLost, join_ranks

try:
    with join_ranks(torch.device("cpu")) as (ranks, device):
        assert ranks.any(ranks.rank == 1, False) == [True, False]
        assert ranks.gather(ranks.rank) == [0, 1] and ranks.from_main(f"of {ranks.rank}") == "of 0"
        assert ranks.sum(torch.tensor([1.0 + ranks.rank])).item() == 3.0
        for culprit in (0, 1):
            try:
                with ranks.together():
                    if ranks.rank == culprit:
                        raise OSError(f"no folder on {culprit}")
            except (OSError, RankFailed) as error:
                print(type(error).__name__, error)
        with ranks.together():
            print("on")
        with ranks.apart(agreed=KeyError):
            if ranks.rank == 1:
                raise OSError("disk full")
            ranks.any(False)
except RankLost as error:
    print(error.here, error, flush=True)
"""


def test_an_error_of_one_rank_is_known_to_all(tmp_path):
    assert wait(start(2, ["-c", TOGETHER], tmp_path)) == [0, 0], (tmp_path / "0.txt").read_text()
    lines = [[line for line in (tmp_path / f"{rank}.txt").read_text().splitlines() if not line.startswith("[")] for rank in (0, 1)]
    assert lines[0][0] == "OSError no folder on 0" and lines[1][0] == "RankFailed no folder on 0"
    assert all(line[1].startswith("RankFailed rank 1 on ") and line[1].endswith("no folder on 1") for line in lines)
    assert lines[0][2] == lines[1][2] == "on"
    assert lines[0][3].startswith("False rank 0 has lost another rank")
    assert lines[1][3].startswith("True rank 1 on ") and lines[1][3].endswith("disk full")


def test_more_ranks_than_photos_of_a_step_are_refused(train_data, tmp_path):
    data = changed(train_data, train__batch_size=1)
    assert wait(train_on(2, data, tmp_path / "run")) == [2, 2]
    assert "error: train.batch_size: got 1, need a photo for each of the 2 ranks" in (tmp_path / "0.txt").read_text()
    assert "error" not in (tmp_path / "1.txt").read_text()
    assert not (tmp_path / "run").exists()
