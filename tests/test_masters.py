"""The comparison of full fine-tuning with and without wide weights, on a tiny model, its runs inside this process."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import masters, masters_table, train_nearest
from benchmarks.random_model import build
from benchmarks.train_runs import Ended
from finetune.arguments import parse_arguments
from finetune.errors import UserError
from finetune.full import full_method
from finetune.training import run_training

UPDATES = 8


def run_here(command: Sequence[str], log: Path, limit_s: float) -> Ended:
    """In place of a process of its own, which takes seconds to start."""
    module, flags = command[2], command[3:]
    if module == "benchmarks.train_exact":  # everything is in float32 here anyway
        flags = flags[1:]
    if module == "benchmarks.train_nearest":
        return Ended(train_nearest.main(flags), [], {})
    arguments = parse_arguments(flags)
    return Ended(run_training(arguments, full_method(arguments)), [], {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison with a run in 32 bits."""
    target = tmp_path_factory.mktemp("masters")
    model = build(target / "model", "tiny-qwen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masters, "execute", run_here)
        flags = f"{target / 'work'} --model {model} --only float32,stochastic,nearest --updates {UPDATES} --tokens 64"
        masters.main(flags.split())
    return target / "work"


def test_stochastic_rounding_goes_the_way_of_wide_weights_and_rounding_to_nearest_does_not(folder: Path) -> None:
    found = json.loads((folder / "masters.json").read_text())
    losses = {name: run["losses"] for name, run in found["runs"].items()}
    for name in ("float32", "stochastic", "nearest"):
        assert len(losses[name]) == UPDATES and losses[name][0] == pytest.approx(losses["float32"][0], rel=0.01)
    along = {name: weights["along"]["float32"] for name, weights in found["weights"].items()}
    changed = {name: weights["changed"] for name, weights in found["weights"].items()}
    assert along["float32"] == pytest.approx(1) and along["stochastic"] == pytest.approx(1, abs=0.15)
    assert along["nearest"] < 0.7
    assert changed["nearest"] < changed["stochastic"] < changed["float32"]


def test_page_and_picture_are_written(folder: Path) -> None:
    text = (folder / "masters.md").read_text()
    assert "less fp32 throughout" in text and "learning rate 1e-05" in text
    assert text.count("| bf16, stochastic rounding (ours) |") == text.count("| bf16, rounding to nearest |") == 2
    assert (folder / "masters.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "execute", lambda *_: pytest.fail("a run was begun again"))
    masters.train("nearest", masters.parse([str(folder)]))


def test_the_masters_run_is_deepspeeds_with_the_shipped_stage_1(tmp_path: Path) -> None:
    command = " ".join(masters.command_of("masters", masters.parse([str(tmp_path)])))
    assert "deepspeed.launcher.runner --quiet --num_gpus 1" in command
    assert f"--deepspeed {masters.STAGE_1} --save_steps 200" in command and "--bf16 true" in command


def test_unknown_runs_and_a_missing_reference_are_refused(tmp_path: Path) -> None:
    for names in ("fp16,masters", "nearest,stochastic"):
        with pytest.raises(UserError, match="masters or float32 among them"):
            masters.parse([str(tmp_path), "--only", names])


def test_an_interval_is_of_the_mean() -> None:
    assert masters_table.interval([0.1, 0.3] * 50) == "+0.2000 ± 0.0197"
