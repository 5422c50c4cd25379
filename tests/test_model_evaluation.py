"""`make qwen-eval`'s program: records and files alone, then the real program, killed and started again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from finetune.errors import UserError
from finetune.partial_results import PartialResults
from finetune.pictures import find_cjk_font
from finetune.rows import Row, Turn
from qwen_qlora.evaluation import model_evaluation
from qwen_qlora.evaluation.cases import cases_of, require_labels
from qwen_qlora.evaluation.confusion_plot import plot_confusion
from qwen_qlora.evaluation.metrics import confusion_matrix
from qwen_qlora.evaluation.results import (
    ResultFiles,
    compare_records,
    make_record,
    read_records,
    report_lines,
    summarise,
    write_records,
)
from tests.adapters import make_adapter

SAME, DIFFERENT = "答案：相同", "答案：不相同"


def case(line, gold, prompt="两句话相同吗"):
    return cases_of([Row(line, (Turn(prompt, gold),))])[0]


def test_a_case_asks_everything_before_the_last_answer():
    row = Row(3, (Turn("一", "甲"), Turn("二", "不相似")), system="系统")
    [built] = cases_of([row])
    assert [message["content"] for message in built.messages] == ["系统", "一", "甲", "二"]
    assert (built.line, built.gold, built.answers.texts()) == (3, "不相似", ["相似", "不相似"])
    assert built.prompt == "system: 系统\nuser: 一\nassistant: 甲\nuser: 二"
    assert case(1, SAME).prompt == "两句话相同吗"


@pytest.mark.parametrize(
    "prompt",
    [
        "判断下面两句话的意思是否相同，只回答是或不是。\n句子一：甲",
        "是否相同？只答“不是”或“是”。若是则答是，否则答不是。",
        "两句话相同吗",
    ],
)
@pytest.mark.parametrize(("negative", "likelihoods"), [("不是", (-2.0, -0.1)), ("否", (-2.0, -9.0))])
def test_a_model_that_always_says_the_same_is_right_for_half_the_rows(prompt, negative, likelihoods):
    golds = ["是", negative] * 5
    cases = cases_of([Row(i, (Turn(prompt, gold),)) for i, gold in enumerate(golds)])
    assert {tuple(asked.answers.texts()) for asked in cases} == {("是", negative)}
    assert summarise([make_record(asked, likelihoods) for asked in cases])["accuracy"]["value"] == 0.5


def test_a_gold_answer_against_its_prompt_has_no_pair():
    golds = ["是", "否", "不是"]
    cases = cases_of([Row(i, (Turn("只回答是或否", gold),)) for i, gold in enumerate(golds)])
    assert [asked.answers and asked.answers.texts() for asked in cases] == [["是", "否"], ["是", "否"], None]


def test_records_of_generated_text():
    record = make_record(case(7, SAME), "相同。")
    assert record["correct"] and not record["exact_match"]
    assert (record["row"], record["gold_class"], record["predicted_class"]) == (7, "same", "same")
    assert make_record(case(7, SAME), "说不好")["predicted_class"] == "invalid"
    keywords = make_record(case(8, "医保、报销"), "医保、报销 ")
    assert keywords["correct"] and keywords["exact_match"] and keywords["gold_class"] is None


@pytest.mark.parametrize(("scores", "text"), [((-1.0, -2.0), SAME), ((-2.0, -1.0), DIFFERENT), ((-1.0, -1.0), SAME)])
def test_records_of_likelihoods_choose_the_likelier(scores, text):
    record = make_record(case(1, DIFFERENT), scores)
    assert record["predicted"] == text
    assert (record["log_likelihood_same"], record["log_likelihood_different"]) == scores


def test_rows_without_a_pair_are_refused_for_likelihoods():
    require_labels([case(1, SAME)], "test.jsonl")
    with pytest.raises(UserError, match="1 of 2 rows.*line 9.*医保"):
        require_labels([case(1, SAME), case(9, "医保、报销")], "test.jsonl")


@pytest.fixture
def records():
    """Labels: same as same, same as different, different as different, different as nonsense; one row of keywords."""
    cases = [case(1, SAME), case(2, SAME), case(3, DIFFERENT), case(4, DIFFERENT), case(5, "医保、报销")]
    texts = (SAME, DIFFERENT, "不相同", f"呃，\n“不”\u2028\u2029{chr(0x85)}", "报销")
    return [make_record(asked, text) for asked, text in zip(cases, texts, strict=True)]


def test_summary_of_mixed_rows(records):
    metrics = summarise(records)
    assert metrics["accuracy"]["value"] == 2 / 5
    assert metrics["exact_match"]["value"] == 1 / 5
    assert metrics["labels"]["accuracy"]["value"] == 2 / 4
    assert metrics["labels"]["invalid"] == 1
    assert (metrics["keywords"]["precision"], metrics["keywords"]["recall"]) == (1, 0.5)
    text = "\n".join(report_lines(metrics))
    assert "40.0 %" in text and "invalid answers: 1" in text and "recall 0.5" in text


def test_records_are_read_back_as_they_were_written(records, tmp_path):
    files = ResultFiles(tmp_path / "result.csv")
    write_records(files, records)
    assert files.csv.read_bytes().startswith(b"\xef\xbb\xbfrow,prompt,gold,predicted,correct,exact_match")
    with open(files.csv, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["predicted"] for row in rows] == [record["predicted"] for record in records]
    assert [row["correct"] for row in rows] == ["True", "False", "True", "False", "False"]
    assert read_records(files.jsonl) == records
    with pytest.raises(UserError, match="ends in .csv"):
        ResultFiles(tmp_path / "result.txt")


def test_comparison_of_two_results(records, tmp_path):
    files = ResultFiles(tmp_path / "other.csv")
    others = [make_record(case(r["row"], r["gold"]), r["gold"]) for r in records]
    write_records(files, others)
    result = compare_records(records, files.jsonl)
    assert (result["only_this_right"], result["only_other_right"]) == (0, 3)
    assert result["mcnemar_exact_p"] == pytest.approx(2 / 8)
    with pytest.raises(UserError, match="same questions for both models, found 4 and 5"):
        compare_records(records[:4], files.jsonl)
    with pytest.raises(UserError, match="of an evaluation"):
        read_records(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("font", [True, False])
def test_confusion_picture(tmp_path, font, monkeypatch, recwarn):
    if not font:
        monkeypatch.setattr("finetune.pictures.CJK_FONTS", ())
        assert find_cjk_font() is None
    matrix = confusion_matrix(["same", "different", "different"], ["same", "invalid", "different"])
    plot_confusion(matrix, "model", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn if "Glyph" in str(w.message)], "a label has no glyph in the font"


def test_partial_results_survive_a_torn_line(tmp_path, capsys):
    path, config = tmp_path / "part.jsonl", {"model": "a", "limit": 5}
    partial = PartialResults(path, config)
    partial.append(0, [[1, "甲"]])
    partial.append(1, [[0, "乙"]])
    with pytest.raises(UserError, match="another run is writing"):
        PartialResults(path, config)
    partial.close()
    path.write_bytes(path.read_bytes()[:-3])
    again = PartialResults(path, config)
    assert again.batches == {0: [[1, "甲"]]}
    again.append(1, [[0, "丙"]])
    again.close()
    assert PartialResults(path, config).batches == {0: [[1, "甲"]], 1: [[0, "丙"]]}
    assert PartialResults(path, config | {"limit": 6}).batches == {}
    assert "set aside, it is of a run with other limit" in capsys.readouterr().err


ROWS = 120


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """120 rows of different lengths."""
    path = tmp_path_factory.mktemp("evaluation") / "test.jsonl"
    answers = ["相同", "不相同", SAME, DIFFERENT, "相似", "不相似"]
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(ROWS):
            turn = {"human": f"第{i}句" + "怎么办理" * (i % 7) + "意思相同吗", "assistant": answers[i % 6]}
            stream.write(json.dumps({"conversation": [turn]}, ensure_ascii=False) + "\n")
    return path


def arguments(model, questions, result, *options):
    required = {"--model_name_or_path": model, "--test_file": questions, "--result_file": result}
    return [str(word) for pair in required.items() for word in pair] + list(options)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process; returns its stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["model_evaluation", *arguments(*args)])
        capsys.readouterr()
        model_evaluation.main()
        return capsys.readouterr()

    return run


def kill_in_the_middle(args, partial):
    """Start the program and kill -9 it when it has written some batches."""
    program = [sys.executable, "-m", "qwen_qlora.evaluation.model_evaluation", *arguments(*args)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > 4:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the program should have been killed before its end"


def test_killed_and_restarted_gives_the_same_files(tiny_qwen, questions, tmp_path, run):
    # batches of a row or two, so that there are many to be killed between
    options = ("--token_budget", "100")
    whole, cut = ResultFiles(tmp_path / "whole.csv"), ResultFiles(tmp_path / "cut.csv")
    run(tiny_qwen, questions, whole.csv, *options)
    kill_in_the_middle((tiny_qwen, questions, cut.csv, *options), cut.partial)
    assert not cut.csv.exists() and not cut.metrics.exists()
    saved = cut.partial.read_bytes().count(b"\n") - 1
    assert saved >= 4
    done = run(tiny_qwen, questions, cut.csv, *options, "--compare_with", str(whole.jsonl))
    assert "going on behind" in done.err
    for one, other in ((whole.csv, cut.csv), (whole.jsonl, cut.jsonl), (whole.confusion, cut.confusion)):
        assert one.read_bytes() == other.read_bytes()
    metrics, expected = (json.loads(files.metrics.read_text(encoding="utf-8")) for files in (cut, whole))
    assert 0 < metrics["timing"]["rows_computed"] < ROWS == expected["timing"]["rows_computed"]
    assert metrics["comparison"]["mcnemar_exact_p"] == 1
    for key in ("comparison", "timing"):
        del metrics[key], expected[key]
    assert metrics == expected
    assert not cut.partial.exists()
    assert len(read_records(cut.jsonl)) == ROWS

    expected["config"]["mode"] = "likelihood"
    whole.metrics.write_text(json.dumps(expected), encoding="utf-8")
    with pytest.raises(UserError, match="expected both models asked in one way"):
        run(tiny_qwen, questions, cut.csv, *options, "--compare_with", str(whole.jsonl))

    other = ResultFiles(tmp_path / "other.csv")
    with pytest.raises(UserError, match=f"whole.jsonl: expected the same questions .* found 3 and {ROWS}"):
        run(tiny_qwen, questions, other.csv, "--limit", "3", "--compare_with", str(whole.jsonl))
    assert not other.partial.exists() and not other.jsonl.exists()

    before = cut.csv.stat().st_mtime_ns
    again = run(tiny_qwen, questions, cut.csv, *options)
    assert again.out.startswith("already done") and "accuracy" in again.out
    assert cut.csv.stat().st_mtime_ns == before


def test_answers_are_kept_until_the_metrics_are_written(tiny_qwen, questions, tmp_path, run, monkeypatch):
    files, options = ResultFiles(tmp_path / "result.csv"), ("--limit", "6", "--mode", "likelihood")

    def break_off(*args):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(model_evaluation, "write_metrics", break_off)
        with pytest.raises(OSError, match="disk full"):
            run(tiny_qwen, questions, files.csv, *options)
    assert "going on behind 6 of 6 rows" in run(tiny_qwen, questions, files.csv, *options).err
    assert not files.partial.exists()


def test_a_finished_result_with_other_settings_is_kept(tiny_qwen, questions, tmp_path, run):
    files, options = ResultFiles(tmp_path / "result.csv"), ("--mode", "likelihood")
    run(tiny_qwen, questions, files.csv, *options)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("result*")}
    said = run(tiny_qwen, questions, files.csv, *options, "--limit", "4").err
    assert len(read_records(files.jsonl)) == 4
    kept = ResultFiles(next(tmp_path.glob("result-*.csv")))
    assert f"kept: {kept.csv}" in said
    found = {path.name.replace(kept.csv.stem, "result"): path.read_bytes() for path in tmp_path.glob("result-*")}
    assert found == whole and len(whole) == 4
    few = files.csv.read_bytes()
    again = run(tiny_qwen, questions, files.csv, *options)  # taken back, the other kept in its place
    assert again.out.startswith("already done") and files.csv.read_bytes() == whole["result.csv"]
    assert [path.read_bytes() for path in tmp_path.glob("result-*.csv")] == [few]
    with pytest.raises(UserError, match="is what this run writes"):
        run(tiny_qwen, questions, files.csv, *options, "--compare_with", str(files.jsonl))


def test_likelihood_of_an_adapter_and_the_limit(tiny_qwen, questions, tmp_path, run):
    adapter = make_adapter(tiny_qwen, tmp_path / "adapter")
    files = ResultFiles(tmp_path / "result.csv")
    done = run(
        tiny_qwen,
        questions,
        files.csv,
        *("--adapter_name_or_path", str(adapter), "--mode", "likelihood", "--limit", "30"),
    )
    records = read_records(files.jsonl)
    assert [record["row"] for record in records] == list(range(1, 31))
    assert all(record["predicted_class"] in ("same", "different") for record in records)
    assert all(record["predicted"].removeprefix("答案：").removeprefix("不") in ("相同", "相似") for record in records)
    metrics = json.loads(files.metrics.read_text(encoding="utf-8"))
    hits = sum(record["gold"] == record["predicted"] for record in records)
    assert metrics["accuracy"]["correct"] == metrics["exact_match"]["correct"] == hits
    assert metrics["adapter_name_or_path"] == str(adapter) and metrics["config"]["adapter"]
    assert f"({hits}/30," in done.out
