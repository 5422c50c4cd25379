"""BLEU from test rows to the scored file: formats by hand, the real program killed, resumed, seeded."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from finetune.errors import UserError
from llm_code.llm_evaluation import bleu
from llm_code.llm_evaluation.bleu_files import read_answers, read_questions

ROWS = 30


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """30 rows of different lengths."""
    path = tmp_path_factory.mktemp("bleu") / "test.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(ROWS):
            row = {
                "instruction": "请回答。",
                "input": f"第{i}天" + "睡不着" * (i % 6) + "怎么办",
                "output": "先起来走一走。",
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process; returns its stdout and stderr."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bleu", *map(str, options)])
        capsys.readouterr()
        bleu.main()
        return capsys.readouterr()

    return run


def files(folder):
    return ("--input_file", folder / "answers.txt", "--save_file", folder / "bleu" / "scored.txt")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"}


def test_a_finished_file_is_scored_alone_and_twice_changes_nothing(tmp_path, run):
    finished = tmp_path / "answers.txt"
    rows = [
        ("问一", "今天天气好", "今天天气很好"),
        ("问\n二", "", f"今天\u2028{chr(0x85)}"),
        ("问三", "今天\t天气很好\n", "今天\t天气很好\n"),
    ]
    keys = ("input", "predict", "target")
    finished.write_text(
        "".join(json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    )
    printed = run(*files(tmp_path)).out
    expected = [0.578930, 0, 1]  # exp(-1/5) (3/4 2/3 1/2)^(1/4)
    scored = (tmp_path / "bleu" / "scored.txt").read_text(encoding="utf-8")
    assert scored.split("\n") == [
        "问一\t今天天气好\t今天天气很好\t0.578930",
        f"问\\n二\t\t今天\u2028{chr(0x85)}\t0.000000",
        "问三\t今天\\t天气很好\\n\t今天\\t天气很好\\n\t1.000000",
        f"average\t\t\t{sum(expected) / 3:.6f}",
        "",
    ]
    assert [record["bleu"] for record in bleu.read_scores(tmp_path / "bleu" / "scored.jsonl")][1:] == [0, 1]
    summary = json.loads((tmp_path / "bleu" / "scored.json").read_text(encoding="utf-8"))
    assert summary["bleu"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert summary["bleu_with_n_plus_1"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert summary["empty"] == pytest.approx(1 / 3) and summary["generation"] is None
    assert f"{sum(expected) / 3:.4f}" in printed
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*files(tmp_path)).out == printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_that_are_something_else_are_refused(tmp_path, run):
    path = tmp_path / "answers.txt"
    path.write_text("问\t答\t参考\n\n问\t答\n", encoding="utf-8")
    with pytest.raises(UserError, match="answers.txt:3: expected JSON with input, predict and target"):
        read_answers(path)
    path.write_text('{"input": "问", "predict": null, "target": "None"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="answers.txt:1: expected JSON .* predict is None, not a text"):
        read_answers(path)
    path.write_text("\ufeff问\t答\t参考\n", encoding="utf-8")
    assert read_answers(path) == [{"row": 1, "input": "问", "predict": "答", "target": "参考"}]
    path.write_text('{"instruction": "甲", "input": "乙"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="answers.txt:1: expected a JSON object.*output is missing"):
        read_questions(path)
    with pytest.raises(UserError, match="expected a file of answers, but No such file"):
        read_answers(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="expected a name such as"):
        run("--input_file", path, "--save_file", tmp_path / "scored.json")
    with pytest.raises(UserError, match="needs --test_file"):
        run(*files(tmp_path), "--model_name_or_path", tmp_path)
    with pytest.raises(UserError, match="beside a scored file"):
        run(*files(tmp_path), "--compare_with", path)


def test_killed_and_restarted_gives_the_same_files(tiny_qwen, questions, tmp_path, run):
    """Also with one row a batch against sixteen, and against the engine."""
    options = ("--test_file", questions, "--max_new_tokens", "8")
    local = (*options, "--model_name_or_path", tiny_qwen, "--batch_size")
    whole, cut, engine = tmp_path / "whole", tmp_path / "cut", tmp_path / "engine"
    run(*files(whole), *local, "16")
    words = [sys.executable, "-m", "llm_code.llm_evaluation.bleu", *map(str, (*files(cut), *local, "1"))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    partial = cut / "answers.txt.partial.jsonl"
    while process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > 4:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the program should have been killed before its end"
    assert not (cut / "answers.txt").exists()
    done = run(*files(cut), *local, "1", "--compare_with", whole / "bleu" / "scored.jsonl")
    assert "going on behind" in done.err and "no difference beyond chance" in done.out
    assert contents(cut) == contents(whole) and not partial.exists()
    assert run(*files(cut), *local, "1").out.startswith("already answered")
    few = tmp_path / "few"
    with pytest.raises(UserError, match=f"scored.jsonl: expected the same questions .* found 2 and {ROWS}"):
        run(*files(few), *local, "1", "--limit", "2", "--compare_with", whole / "bleu" / "scored.jsonl")
    assert not few.exists()
    run(*files(engine), *local, "16", "--answer", "engine")
    assert contents(engine) == contents(whole)
    about = json.loads((whole / "bleu" / "scored.json").read_text(encoding="utf-8"))["generation"]
    assert about["timing"]["questions_computed"] == ROWS and about["model"] == str(tiny_qwen)


def test_a_seeded_run_gives_the_same_bytes(tiny_qwen, questions, tmp_path, run):
    options = ("--test_file", questions, "--model_name_or_path", tiny_qwen, "--max_new_tokens", "6", "--limit", "6")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run(*files(tmp_path / name), *options, "--temperature", "0.8", "--top_p", "0.9", "--seed", seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "again") != contents(tmp_path / "other")
    finished = tmp_path / "first" / "answers.txt"
    assert len(read_answers(finished)) == 6
    finished.write_text("问\t另一个模型的回答\t参考\n", encoding="utf-8")
    run(*files(tmp_path / "first"))
    summary = json.loads((tmp_path / "first" / "bleu" / "scored.json").read_text(encoding="utf-8"))
    assert summary["generation"] is None and summary["rows"] == 1


def test_a_run_with_other_settings_destroys_no_run_of_all_questions(tiny_qwen, questions, tmp_path, run):
    options = (*files(tmp_path), "--test_file", questions, "--model_name_or_path", tiny_qwen)
    run(*options, "--max_new_tokens", "2")
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name = "answer_generate_limit_3_max_new_tokens_2"
    for told in ("written:", "already answered:"):
        few = run(*options, "--max_new_tokens", "2", "--limit", "3")
        assert f"this one goes to {tmp_path / name / 'answers.txt'}" in few.err and told in few.out
    assert str(tmp_path / "bleu" / name / "scored.txt") in few.out
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert len(bleu.read_scores(tmp_path / "bleu" / name / "scored.jsonl")) == 3
    run(*options, "--max_new_tokens", "2")
    assert all(path.read_bytes() == content for path, content in whole.items())
