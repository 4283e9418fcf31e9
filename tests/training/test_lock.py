"""Two processes never train in one folder."""

import os
import re
import signal

import pytest
import torch

from sparsifiner.training import loop
from tests.processes import clean_processes
from tests.training.runs import assert_equal_runs, train_tiny


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Drawing the report takes longer than these runs."""
    monkeypatch.setattr(loop, "write_training_report", lambda file, records: None)


def train_until_killed(folder, reached):
    """Trains with a worker, says when the first epoch ends, and goes no further."""
    torch.set_num_threads(1)

    def wait(trainer, where):
        reached.set()
        signal.pause()

    loop._Trainer._validate = wait
    train_tiny(folder, workers=1)


def test_a_second_process_stops_and_a_dead_one_is_succeeded(tmp_path):
    train_tiny(tmp_path / "alone")
    context = clean_processes(__name__)
    reached = context.Event()
    first = context.Process(target=train_until_killed, args=(tmp_path / "run", reached))
    first.start()
    reached.wait()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    try:
        for resume in (True, False):
            with pytest.raises(
                BlockingIOError,
                match=rf"output='.*run' is in use by process {first.pid} on .+; wait until it ends, or give",
            ):
                train_tiny(tmp_path / "run", resume=resume)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    finally:
        # its worker lives a little longer, and must not hold the folder
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert re.fullmatch(rf"process {first.pid} on .+", (tmp_path / "run" / ".owner").read_text())
    train_tiny(tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", tmp_path / "alone")
    assert not (tmp_path / "run" / ".owner").exists()


def test_a_name_that_was_left_does_not_lock(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".owner").write_text(f"process {os.getppid()} on this machine")  # which lives
    train_tiny(tmp_path)
    assert not (tmp_path / ".owner").exists()


def test_a_run_that_fails_lets_the_next_one_in(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Validation", None)  # before the first step
        with pytest.raises(TypeError):
            train_tiny(tmp_path)
    train_tiny(tmp_path)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train_tiny(tmp_path)
    train_tiny(tmp_path, resume=True)
