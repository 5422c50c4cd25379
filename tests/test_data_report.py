"""The data report: numbers counted by hand, problems with their lines, exit 2."""

import json
import subprocess
import sys

import pytest

from finetune.data_report import contradictions, histogram, label_balance, leaks, percentile
from finetune.rows import Row, Turn


def row(line: int, human: str, assistant: str) -> Row:
    return Row(line, (Turn(human, assistant),))


def test_percentiles_are_values_of_the_list():
    values = [30, 10, 20, 40, 50, 60, 70, 80, 90, 100]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 100, 100]
    assert percentile([7], 0.5) == 7


def test_histogram_covers_every_value_once():
    lines = histogram([5, 5, 5, 24])  # 20 integers from 5 to 24 in ten buckets of 2
    assert lines[0].split() == ["5..6", "3", "#" * 40]
    assert lines[-1].split() == ["23..24", "1", "#" * 14]
    assert sum(int(line.split()[1]) for line in lines) == 4


def test_repeated_and_contradicting_rows_are_told_apart():
    rows = [row(1, "q", "a"), row(2, "q", "a"), row(3, "q", "b"), row(4, "r", "a")]
    assert contradictions(rows) == (1, ["line 3: same prompt as line 1, another answer"])


def test_a_test_prompt_in_training_is_a_leak_whatever_its_answer():
    assert leaks([row(1, "q", "a"), row(2, "r", "a")], [row(5, "r", "b"), row(6, "s", "a")]) == [
        "line 5: its prompt is line 2 of the training file"
    ]


def test_labels_are_counted_only_when_they_are_few():
    assert label_balance([row(1, "p", "是"), row(2, "q", "否"), row(3, "r", "是")]) == "是 2 (66.7 %), 否 1 (33.3 %)"
    assert label_balance([row(i, "p", str(i)) for i in range(13)]) == "13 distinct last answers"


def write_rows(path, pairs):
    lines = (json.dumps({"conversation": [{"human": human, "assistant": answer}]}) for human, answer in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tiny_qwen):
    def run(train, test=None, limit=64, experiment=None):
        command = [sys.executable, "-m", "finetune.data_report", "--model_dir", tiny_qwen, "--train_file", train]
        command += ["--max_seq_length", limit] if limit else []
        command += ["--train_args_file", experiment] if experiment else []
        command += ["--test_file", test] if test else []
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    return run


def test_a_sound_file_is_described_and_its_tokens_counted(report, tmp_path, tiny_qwen):
    done = report(write_rows(tmp_path / "train.jsonl", [("你好", "是"), ("再见", "否")]))
    assert done.returncode == 0, done.stderr
    assert "rows                 2" in done.stdout and "是 1 (50.0 %), 否 1 (50.0 %)" in done.stdout

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    chats = (
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (("你好", "是"), ("再见", "否"))
    )
    lengths = [len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats]
    assert f"tokens               {sum(lengths)}," in done.stdout


def test_problems_end_with_status_2_and_their_lines(report, tmp_path):
    # The template alone fills a limit of 24 tokens but for a few: the long question leaves no room for the answer.
    train = write_rows(tmp_path / "train.jsonl", [("你好", "是"), ("你好", "否"), ("再见", "是")])
    test = write_rows(tmp_path / "test.jsonl", [("再见", "是")])
    done = report(train, test)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{train}: line 2: same prompt as line 1, another answer" in done.stderr
    assert f"{test}: line 1: its prompt is line 3 of the training file" in done.stderr
    too_short = report(train, limit=8)
    assert too_short.returncode == 2 and "line 3: no supervised token within 8" in too_short.stderr


@pytest.mark.parametrize(
    ("written", "limit", "told"), [({"max_seq_length": 48}, None, 48), ({}, None, 1024), ({}, 32, 32)]
)
def test_the_length_is_the_flags_or_the_experiments_or_its_default(report, tmp_path, written, limit, told):
    experiment = tmp_path / "experiment.json"
    experiment.write_text(json.dumps(written))
    rows = write_rows(tmp_path / "train.jsonl", [("你好", "是"), ("再见", "否")])
    done = report(rows, limit=limit, experiment=experiment)
    assert done.returncode == 0, done.stderr
    assert f"over {told:,} tokens" in done.stdout
