"""The benchmark of what short trainings are worth after merging, with a tiny model."""

import json

import pytest

from benchmarks import small_steps


def test_what_is_merged_or_beside_falls_as_far_as_float32(tiny_qwen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_steps, "STEPS", (1e-4, 5e-4))
    small_steps.main([str(tmp_path), "--model_name_or_path", str(tiny_qwen), "--rows", "4"])
    found = json.loads((tmp_path / "small_steps.json").read_text())
    exact, rounded = found["before"]["float32"], found["before"]["bfloat16"]
    falls = [
        [start - loss for start, loss in zip([exact, exact, exact, rounded, rounded], losses, strict=True)]
        for losses in found["after"].values()
    ]
    assert falls[1][0] > falls[0][0] > 0.005
    for whole, merged, _, beside, _ in falls:
        assert merged == pytest.approx(whole, rel=0.1) and beside == pytest.approx(whole, rel=0.1)
    assert falls[0][2] < 0.7 * falls[0][0]  # to the nearest
    printed = capsys.readouterr().out
    assert "| B moved by | exact | merged |" in printed and f"| 0.0001 | {-falls[0][0]:+.4f} |" in printed
