"""Lines, clocks and money of a run, its report and picture, without a model."""

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.checkpointing import Progress
from finetune.conversation import Sample
from finetune.pictures import find_cjk_font
from finetune.progress import Meter, ProgressCallback, clock, decoded_sample, progress_line, size_text
from finetune.report import draw_losses, git_commit, run_numbers, versions, write_json


def test_the_meter_counts_a_window() -> None:
    meter = Meter(flops_per_token=50e9, peak_flops=1000e12, price_per_hour=3.6)
    assert meter.read() == {}
    meter.add(6000, 1.5)
    meter.add(2000, 0.5)
    assert meter.read() == {"tokens_per_second": 4000.0, "peak_share": 0.2}
    assert meter.read() == {}
    assert meter.cost(1000) == 1.0
    on_cpu = Meter(flops_per_token=50e9)
    on_cpu.add(10, 1)
    assert on_cpu.read() == {"tokens_per_second": 10.0}


def test_a_line_of_the_log() -> None:
    logs = {
        "loss": 1.23456,
        "learning_rate": 5e-5,
        "grad_norm": 0.3123,
        "tokens_per_second": 7646.2,
        "peak_share": 0.424,
        "memory_gib": 35.42,
        "cost": 0.314,
    }
    expected = "10/1547  loss 1.2346  lr 5.00e-05  grad 0.312  7,646 tokens/s  42.4 % of peak  35.4 GiB"
    expected += "  eta 2:10:11  cost 0.31"
    assert progress_line(logs, 10, 1547, 7811.4) == expected
    assert progress_line({"eval_loss": 2.0}, 3, 9, 0.0) == "3/9  evaluation loss 2.0000  eta 0:00:00"
    assert clock(59.6) == "0:01:00"
    assert (size_text(1.5 * 2**30), size_text(12 * 2**20)) == ("1.5 GiB", "12 MiB")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_lines_in_a_log() -> None:
    for stream in (_Terminal(), io.StringIO()):
        trainer = SimpleNamespace(progress=Progress())
        callback = ProgressCallback(trainer, Meter(1.0), stream)
        state = SimpleNamespace(global_step=4, max_steps=6, is_world_process_zero=True)
        callback.on_train_begin(None, state, None)
        for _ in range(2):
            callback.on_step_begin(None, state, None)
            trainer.progress.tokens += 50
            state.global_step += 1
            callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, {"loss": 1.5})
        callback.on_log(None, state, None, {"train_runtime": 1.5})
        callback.on_train_end(None, state, None)
        assert callback.meter.tokens == 100 and callback.meter.seconds > 0
        assert "6/6  loss 1.5000  eta 0:00:00\n" in stream.getvalue()
        assert ("\r" in stream.getvalue() and "6/6 [" in stream.getvalue()) == stream.isatty()


class _Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_the_supervised_parts_of_a_row_are_marked() -> None:
    text = "ask:yes;end"
    supervised = "    yes;   "
    labels = [ord(mark) if mark != " " else -100 for mark in supervised]
    sample = Sample([ord(letter) for letter in text], labels, 1)
    assert decoded_sample(_Letters(), sample) == "ask:[[yes;]]end"
    everything = Sample([97, 98], [97, 98], 1)
    assert decoded_sample(_Letters(), everything) == "[[ab]]"


def test_the_report_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(seconds=1800, tokens=900_000, supervised_tokens=100, starts=2, peak_memory_bytes=3 * 2**30)
    numbers = run_numbers(progress, Meter(1.0, price_per_hour=4.0), 50, 100)
    assert (numbers["tokens_per_second"], numbers["cost"], numbers["peak_memory_gib"]) == (500.0, 2.0, 3.0)
    write_json(tmp_path / "train_report.json", {"numbers": numbers, "path": tmp_path, "word": "相同"})
    text = (tmp_path / "train_report.json").read_text(encoding="utf-8")
    assert json.loads(text)["path"] == str(tmp_path) and "相同" in text
    history = [{"step": step, "loss": 3 / step, "learning_rate": 1e-4} for step in range(1, 9)]
    draw_losses([*history, {"step": 8, "eval_loss": 1.0}], tmp_path / "loss.png", "a run")
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    draw_losses(history, tmp_path / "loss.png", "a ru?")
    without_font = (tmp_path / "loss.png").read_bytes()
    with warnings.catch_warnings(action="error"):  # matplotlib's, of a glyph that is missing
        draw_losses(history, tmp_path / "loss.png", "a ru匹")
        assert (tmp_path / "loss.png").read_bytes() != without_font or not find_cjk_font()
        monkeypatch.setattr("finetune.report.find_cjk_font", lambda: None)
        draw_losses(history, tmp_path / "loss.png", "a ru匹")
    assert (tmp_path / "loss.png").read_bytes() == without_font
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "train_report.json"]
    assert {"python", "torch", "transformers"} <= set(versions())
    assert git_commit(tmp_path) is None
