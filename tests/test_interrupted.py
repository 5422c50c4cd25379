"""The benchmark that stops a training of two ranks and goes on on one; what it measures is in test_llm_train.py."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks import interrupted
from benchmarks.train_runs import execute
from finetune.errors import UserError

# Counts updates until SIGTERM comes, which ends it as a training that has saved.
PROGRAM = """
import itertools, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
for update in itertools.count(1):
    print(f"{update}/99  loss 1.0", flush=True)
    time.sleep(0.2)
"""


def test_a_training_is_stopped_once_the_update_is_done(tmp_path: Path) -> None:
    stopper = interrupted.Stopper(3)
    ended = execute([sys.executable, "-c", PROGRAM], tmp_path / "log", 60, watch=stopper)
    assert ended.status == interrupted.STOPPED and stopper.sent <= time.monotonic()
    assert "3/99  loss 1.0" in ended.lines


def test_losses_until_the_stop_and_afterwards_are_told_apart() -> None:
    found = {"run": "zero-3-x2", "model": "tiny", "device": "cpu", "saved_at_update": 2, "ranks_of_states": 2}
    found |= {"checkpoint_gb": 9.72, "seconds_from_sigterm_to_end": 21.4, "seconds_of_the_rest": 58.0}
    found |= {"undisturbed": [3.0, 2.5, 2.25, 2.0], "stopped": [3.0, 2.5005, 2.25, 2.002]}
    lines = interrupted.page(found).splitlines()
    assert "SIGTERM saved the states of 2 ranks (9.7 GB) after update 2, 21 s from the signal" in lines[0]
    assert lines[0].endswith("Losses differ by at most 5.0e-04 until then, 2.0e-03 afterwards.")
    assert lines[-1] == "| 4 | 2.0000 | 2.0020 |"


@pytest.mark.parametrize("stop_after", ["0", "11", "12"])
def test_a_stop_that_leaves_nothing_to_do_is_refused(tmp_path: Path, stop_after: str) -> None:
    with pytest.raises(UserError, match=f"must leave updates to do, got {stop_after} of 12"):
        interrupted.main([str(tmp_path), "--stop_after", stop_after])


def test_a_training_that_ends_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the wrong status, with the log to look into."""
    monkeypatch.setattr(interrupted, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit(7)"])
    run = interrupted.all_runs(is_tiny=True)["zero-3-x2"]
    with pytest.raises(UserError, match=r"expected to end with 143, ended with 7. Look in .*stopped-2.log"):
        interrupted.train(run, tmp_path, "stopped", interrupted.Stopper(1))
