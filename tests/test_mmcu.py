"""MMCU from the workbooks to the report: reading against pandas, the real program killed, resumed, over a service."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas
import pytest
from openpyxl import Workbook

from finetune.errors import UserError
from finetune.models import load_for_inference
from llm_code.llm_evaluation import mmcu
from llm_code.llm_evaluation.mmcu_data import find_data_dir, read_questions, read_shots, stem_of
from llm_code.llm_evaluation.mmcu_prompts import prompt
from tests.chat_server import ChatServer, ScriptedServer
from tests.service_process import ServiceProcess
from tests.test_mmcu_statistics import records_of
from tests.tiny.build_mmcu import OTHERS, SUBJECTS, build_mmcu

FILES = ("answers.jsonl", *SUBJECTS, *OTHERS)
REPORTS = {"answers.jsonl", "report.json", "report.md", "report.png", "report.txt"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The small set, and how many questions it has."""
    folder = tmp_path_factory.mktemp("mmcu") / "MMCU0513"
    return folder, build_mmcu(folder)


def pandas_prompt(test, dev, i, ntrain):
    """The benchmark's prompt from pandas' tables."""

    def shown(table, i):
        question, *options = table.iloc[i, :5]
        lines = [question]
        for letter, option in zip("ABCD", options, strict=True):
            if isinstance(option, str):
                for removed in " ．|A、|B、|C、|D、|A.|B.|C.|D.|A|B|C|D|Ａ、|Ｂ、|Ｃ、|Ｄ、".split("|"):
                    option = option.replace(removed, "")
                option = option.strip()
            lines.append(f"{letter}. {option}")
        return "\n".join([*lines, "正确答案的序号是："])

    start = "请阅读以下选择题并给出正确选项，不要解释原因。请只给出答案的序号。\n"
    return start + "".join(f"{shown(dev, k)} {dev.iloc[k, 5]}\n\n" for k in range(ntrain)) + shown(test, i)


@pytest.mark.parametrize("ntrain", [0, 5])
def test_official_prompts_are_those_that_pandas_gives(data, ntrain):
    folder, total = data
    questions, remarks = read_questions(folder)
    shots = read_shots(folder, ntrain)
    assert len(questions) == total
    assert remarks == ["心理.xlsx, Sheet1: question 5 has no answer and is left out"]
    assert [q.subject for q in questions if q.number == 1] == [*SUBJECTS, "心理", "教育_数学", "教育_语文", "法律"]
    assert {q.domain for q in questions} == {"医疗", "法律", "心理", "教育"}
    for question in questions:
        book, sheet = stem_of(question), question.subject if question.domain == "医疗" else 0
        test = pandas.read_excel(folder / "test" / f"{book}.xlsx", sheet_name=sheet).dropna(how="all")
        dev = pandas.read_excel(folder / "dev" / f"{book}.xlsx")
        found = prompt("official", shots[book], question)
        assert found == pandas_prompt(test, dev, question.number - 1, ntrain)
        assert question.answer == test.iloc[question.number - 1, 5]


def test_a_nested_folder_is_found_and_other_data_is_refused(data, tmp_path):
    folder, _ = data
    assert find_data_dir(folder.parent) == folder
    with pytest.raises(UserError, match="make mmcu-download"):
        find_data_dir(tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "法律.xlsx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"法律.xlsx: expected an Excel workbook, .*Move {tmp_path} away and run"):
        read_questions(tmp_path)
    book = Workbook()
    book.active.append(["题目", "A", "B", "答案"])
    book.active.append(["甲", "乙", "丙", "A"])
    book.save(tmp_path / "test" / "法律.xlsx")
    with pytest.raises(UserError, match=r"sheet Sheet: expected 6 columns .* found 4"):
        read_questions(tmp_path)
    with pytest.raises(UserError, match=r"expected 99 worked examples \(--ntrain, MMCU_NTRAIN\), found \d"):
        read_shots(data[0], 99)
    with pytest.raises(UserError, match="expected worked examples for --ntrain 5"):
        read_shots(tmp_path, 5)


def arguments(data, save_dir, *options):
    return [str(word) for word in ("--data_dir", data[0], "--save_dir", save_dir, *options)]


@pytest.fixture
def run(monkeypatch, capsys, data):
    """Run the program in this process; returns its stdout and stderr."""

    def run(save_dir, *options):
        monkeypatch.setattr(sys, "argv", ["mmcu", *arguments(data, save_dir, *options)])
        capsys.readouterr()
        mmcu.main()
        return capsys.readouterr()

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_killed_and_restarted_gives_the_same_files(tiny_qwen, data, tmp_path, run):
    """Also with one row a batch against sixteen."""
    options = ("--model_name_or_path", tiny_qwen, "--limit", "30", "--max_new_tokens", "3", "--batch_size")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, *options, "16")
    program = [sys.executable, "-m", "llm_code.llm_evaluation.mmcu", *arguments(data, cut, *options, "1")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    partial = cut / "partial.jsonl"
    while process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > 4:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the program should have been killed before its end"
    assert not (cut / "answers.jsonl").exists() and not (cut / "report.json").exists()
    done = run(cut, *options, "1", "--compare_with", whole)
    assert "going on behind" in done.err and "No difference beyond chance" in done.out
    assert contents(cut) == contents(whole) and not partial.exists()
    report = report_of(cut)
    assert 0 < report["timing"]["questions_computed"] < report_of(whole)["timing"]["questions_computed"]
    part, all_prompts = (report["timing"][key] for key in ("questions_computed", "questions"))
    assert f"{part} of {all_prompts} prompts in" in (cut / "report.txt").read_text(encoding="utf-8")
    assert len(report["samples"]) == 20 and report["config"]["data"] == report_of(whole)["config"]["data"]
    for name in ("report.txt", "report.md"):
        assert "心理.xlsx, Sheet1: question 5 has no answer" in (cut / name).read_text(encoding="utf-8")
    assert (cut / "report.png").read_bytes().startswith(b"\x89PNG")

    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert run(whole, *options, "16").out.startswith("already done")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_likelihood_with_worked_examples_and_a_limit(tiny_baichuan, tmp_path, run):
    folder = tmp_path / "result"
    options = ("--model_name_or_path", tiny_baichuan, "--answer", "likelihood", "--ntrain", "5", "--limit", "14")
    run(folder, *options)
    records = mmcu.read_answers(folder)
    assert len(records) == 14 and {record["subject"] for record in records} == {*SUBJECTS, *OTHERS}
    assert all(record["answer"] in mmcu.SUBSETS and record["predicted"] == record["answer"] for record in records)
    assert report_of(folder)["strict"]["overall"]["invalid"] == 0
    again = tmp_path / "again"
    run(again, *options, "--batch_size", "1")
    assert contents(again) == contents(folder)


def test_engine_and_service_give_what_the_model_gives(tiny_qwen, tmp_path, run, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-key,other-key")
    limits = ("--limit", "16", "--max_new_tokens", "6")
    run(tmp_path / "direct", "--model_name_or_path", tiny_qwen, *limits)
    run(tmp_path / "engine", "--model_name_or_path", tiny_qwen, "--answer", "engine", *limits)
    assert contents(tmp_path / "engine") == contents(tmp_path / "direct")
    serve = [sys.executable, "-m", "llm_code.service.server", "--model_name_or_path", str(tiny_qwen), "--port", "0"]
    service = ServiceProcess(tmp_path / "service.log", {"api_keys": ["secret-key"]}, command=serve)
    try:
        card = service.http.get("/v1/models").json()["data"][0]
        assert len(card["weights_fingerprint"]) == 64
        url = f"http://127.0.0.1:{service.port}/v1/"
        run(tmp_path / "service", "--answer", "service", "--service_url", url, *limits)
    finally:
        assert service.stop() == 0
    assert contents(tmp_path / "service") == contents(tmp_path / "direct")
    config = report_of(tmp_path / "service")["config"]
    assert config["model"] == tiny_qwen.name and config["weights"] == card["weights_fingerprint"]
    assert f"({config['weights']})" in (tmp_path / "service" / "report.txt").read_text(encoding="utf-8")


def test_a_busy_service_is_asked_again_and_a_refusal_is_told(tiny_qwen, tmp_path, run, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-key")
    limits = ("--limit", "5", "--max_new_tokens", "2")
    with ChatServer(*load_for_inference(tiny_qwen)) as server:
        server.busy = 2
        run(tmp_path / "busy", "--answer", "service", "--service_url", server.url, *limits)
        assert server.keys == {"Bearer secret-key"} and server.requests[0]["temperature"] == 0
        server.status = 401
        with pytest.raises(UserError, match="HTTP 401.*turned off.*API_KEY"):
            run(tmp_path / "refused", "--answer", "service", "--service_url", server.url, *limits)
    assert len(mmcu.read_answers(tmp_path / "busy")) == 5


def test_records_are_read_line_feed_by_line_feed(tmp_path):
    records = records_of([("法律", "法律", "A", f"选\u2028B\u2029或{chr(0x85)}C")])
    (tmp_path / "answers.jsonl").write_text("".join(map(mmcu.canonical_line, records)), encoding="utf-8")
    assert mmcu.read_answers(tmp_path) == records


def test_another_runs_questions_are_compared_before_any_is_answered(data, tmp_path, run, monkeypatch):
    with ScriptedServer(lambda body: (200, "A")) as server:
        options = ("--answer", "service", "--service_url", server.url)
        run(tmp_path / "few", *options, "--limit", "4")
        asked = len(server.requests)
        with pytest.raises(UserError, match="few: expected the same questions for both models, found 9 and 4"):
            run(tmp_path / "more", *options, "--limit", "9", "--compare_with", tmp_path / "few")
        assert len(server.requests) == asked and not (tmp_path / "more").exists()

        def break_off(*args):
            raise OSError("disk full")

        with monkeypatch.context() as broken:
            broken.setattr(mmcu, "summarise", break_off)
            with pytest.raises(OSError, match="disk full"):
                run(tmp_path / "more", *options, "--limit", "9")
        asked = len(server.requests)
        assert "going on behind" in run(tmp_path / "more", *options, "--limit", "9").err
        assert len(server.requests) == asked and not (tmp_path / "more" / "partial.jsonl").exists()


def test_a_run_of_fewer_subjects_leaves_no_file_of_the_others(data, tmp_path, run):
    folder, fewer = tmp_path / "result", tmp_path / "fewer"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(data[0], fewer)
    (fewer / "test" / "法律.xlsx").unlink()
    with ScriptedServer(lambda body: (200, "A")) as server:
        for source in (data[0], fewer):
            run(folder, "--answer", "service", "--service_url", server.url, "--data_dir", source)
    subjects = {record["subject"] for record in mmcu.read_answers(folder)}
    assert "法律" not in subjects
    assert {path.name for path in folder.iterdir()} == REPORTS | {"notes.txt"} | subjects


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_with_other_settings_destroys_no_run_of_all_questions(tmp_path, run, monkeypatch):
    folder, ways = tmp_path / "result", (["--limit", "3"], ["--max_new_tokens", "5"])
    beside = [folder / f"answer_service_{end}" for end in ("limit_3_max_new_tokens_16", "max_new_tokens_5")]
    with ScriptedServer(lambda body: (200, "A")) as server:
        whole = (folder, "--answer", "service", "--service_url", server.url)

        def break_off(*args):
            raise OSError("disk full")

        with monkeypatch.context() as broken:
            broken.setattr(mmcu, "summarise", break_off)
            with pytest.raises(OSError, match="disk full"):
                run(*whole)
        half = files_in(folder)
        assert "partial.jsonl" in half
        assert f"this one goes to {beside[0]}" in run(*whole, *ways[0]).err
        assert files_in(folder) == half
        assert "going on behind" in run(*whole).err
        finished = files_in(folder)
        for place, options in zip(beside, ways, strict=True):
            assert f"written: {place}/report.txt" in run(*whole, *options).out
            assert REPORTS <= files_in(place).keys()
        assert files_in(folder) == finished and len(mmcu.read_answers(beside[0])) == 3
        few = (tmp_path / "few", *whole[1:])
        run(*few, "--limit", "3")
        run(*few)
    assert len(mmcu.read_answers(tmp_path / "few")) == len(mmcu.read_answers(folder)) > 3
    assert not any(path.is_dir() for path in (tmp_path / "few").iterdir())
    assert "of at most 16 tokens (max_new_tokens)" in (folder / "report.txt").read_text(encoding="utf-8")


def test_the_same_address_and_name_with_other_weights_is_another_model(tmp_path, run):
    with ScriptedServer(lambda body: (200, "A")) as server:
        options = (tmp_path, "--answer", "service", "--service_url", server.url, "--limit", "3")
        server.card = {"weights_fingerprint": "one"}
        run(*options)
        asked = len(server.requests)
        again = run(*options)
        assert again.out.startswith("already done") and len(server.requests) == asked and not again.err
        server.card = {"weights_fingerprint": "two"}
        assert "already done" not in run(*options).out and len(server.requests) == 2 * asked
        server.card = {}
        for times in (3, 4):
            told = run(*options)
            assert "does not say which weights it serves" in told.err and "already done" not in told.out
            assert len(server.requests) == times * asked


def test_what_is_missing_is_named(tmp_path, run):
    with pytest.raises(UserError, match="--model_name_or_path"):
        run(tmp_path)
    with pytest.raises(UserError, match="--service_url"):
        run(tmp_path, "--answer", "service")
    with pytest.raises(UserError, match="answers of an MMCU run"):
        mmcu.read_answers(tmp_path)
    assert len(mmcu.SUBSETS) == 15 and mmcu.SUBSETS[0] == "A" and mmcu.SUBSETS[-1] == "ABCD"
