"""A finished evaluation is not replaced by one of other weights: its files are kept under another name (MMCU, BLEU)."""

import json
import sys

import pytest

from finetune.partial_results import config_hash
from llm_code.llm_evaluation import bleu, mmcu
from llm_code.llm_evaluation.asking import kept_tag
from tests.adapters import make_adapter
from tests.tiny.build_mmcu import build_mmcu


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program in this process; returns its stderr."""

    def run(program, *options):
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, options)])
        capsys.readouterr()
        program.main()
        return capsys.readouterr().err

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_mmcu_of_a_new_adapter_keeps_the_old_ones_result(tiny_qwen, tmp_path, run):
    build_mmcu(tmp_path / "MMCU0513")
    place = tmp_path / "results" / "adapter"
    options = ("--data_dir", tmp_path / "MMCU0513", "--save_dir", place, "--model_name_or_path", tiny_qwen)
    options += ("--limit", 6, "--max_new_tokens", 2, "--adapter_name_or_path")
    adapters = [make_adapter(tiny_qwen, tmp_path / f"adapter{seed}", 0.2, seed) for seed in (0, 1)]
    run(mmcu, *options, adapters[0])
    first = contents(place)
    said = run(mmcu, *options, adapters[1])
    tag = json.loads(first[(place / "report.json").relative_to(place)])["config_hash"][:8]
    kept = place.with_name(f"adapter-{tag}")
    assert f"kept: {kept}" in said and contents(kept) == first
    assert json.loads((place / "report.json").read_text())["model"] == str(adapters[1])
    assert "kept:" not in run(mmcu, *options, adapters[1], "--compare_with", kept)


def test_bleu_of_other_weights_keeps_answers_and_scores(tiny_qwen, tmp_path, run):
    questions = tmp_path / "test.jsonl"
    rows = [{"instruction": "请回答。", "input": f"第{i}天怎么办", "output": "先走一走。"} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "results"
    options = ("--input_file", place / "answers.txt", "--save_file", place / "scored.txt", "--test_file", questions)
    options += ("--model_name_or_path", tiny_qwen, "--max_new_tokens", 4)
    run(bleu, *options)
    first = contents(place)
    said = run(bleu, *options, "--adapter_name_or_path", make_adapter(tiny_qwen, tmp_path / "adapter", 0.2))
    kept = next(place.glob("answers-*.txt"))
    tag = kept.stem.removeprefix("answers")
    assert f"kept: {kept}" in said and len(tag) == 9
    found = {str(path).replace(tag, ""): data for path, data in contents(place).items() if tag in str(path)}
    assert found == {str(path): data for path, data in first.items()} and len(found) == 6


def test_results_of_weights_that_a_server_does_not_name_never_replace_each_other(tmp_path):
    """Three runs with the same settings: all are there at the end."""
    place, config = tmp_path / "service", {"answer": "service", "weights": None}
    for number in range(3):
        place.mkdir(exist_ok=True)
        mmcu.clear_place(place)
        report = {"config": config, "config_hash": config_hash(config), "number": number}
        (place / "report.json").write_text(json.dumps(report))
        (place / "answers.jsonl").write_text("")
    tag = config_hash(config)[:8]
    names = [f"service-{tag}", f"service-{tag}-2", "service"]
    assert [json.loads((tmp_path / name / "report.json").read_text())["number"] for name in names] == [0, 1, 2]


def test_the_same_weights_and_settings_are_kept_once(tmp_path):
    config = {"answer": "generate", "model": "abc"}
    about = {"config": config, "config_hash": config_hash(config)}
    assert kept_tag(about, lambda tag: tmp_path) == f"-{config_hash(config)[:8]}"
