"""Reading of training rows: both spellings, the BOM, and what is refused with its line."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.rows import Turn, read_rows


def write(path, *lines: str, bom: bool = False):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")
    return path


def test_both_spellings_give_the_same_turns(tmp_path):
    turns = [{"human": "你好", "assistant": "您好"}, {"human": "再见", "assistant": "再会"}]
    roles = ["system", "user", "assistant", "user", "assistant"]
    texts = ["你是助手", "你好", "您好", "再见", "再会"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    lines = [
        json.dumps({"conversation": turns, "system": "你是助手", "category": "x"}),
        json.dumps({"messages": messages}),
    ]
    ours, openai = read_rows(write(tmp_path / "a.jsonl", *lines))
    assert ours.turns == openai.turns == (Turn("你好", "您好"), Turn("再见", "再会"))
    assert ours.system == openai.system == "你是助手"
    assert ours.messages() == messages


def test_bom_and_blank_lines_are_skipped_and_lines_are_numbered(tmp_path):
    row = json.dumps({"conversation": [{"human": "a", "assistant": "b"}]})
    rows = read_rows(write(tmp_path / "a.jsonl", "", row, "", row, bom=True))
    assert [row.line for row in rows] == [2, 4]
    assert rows[0].system is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"text": "x"}', "expected the key `conversation` or `messages`, got 'text'"),
        ('{"conversation": []}', "non-empty list"),
        ('{"conversation": [{"human": "x"}]}', "turn 1: `assistant` must be a non-empty string, got null"),
        ('{"conversation": [{"human": " ", "assistant": "y"}]}', "turn 1: `human` must be a non-empty string"),
        ('{"conversation": [{"human": "x", "assistant": "y"}], "system": 3}', "`system` must be"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must alternate user, assistant"),
        ('{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}', "must alternate"),
        ('{"messages": "x"}', "`messages` must be a list"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    good = json.dumps({"conversation": [{"human": "a", "assistant": "b"}]})
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path / "a.jsonl", good, line))
    assert "a.jsonl:2: " in str(error.value) and reason in str(error.value)


def test_half_of_an_emoji_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"conversation": [{"human": "a", "assistant": "\\ud83d"}]}\n')
    with pytest.raises(UserError, match=":1: .*half of a surrogate pair"):
        read_rows(path)


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path / "a.jsonl", *["{}"] * 13))
    text = str(error.value)
    assert text.endswith('or {"messages": [{"role": "user", "content": "..."}, ...]}.')
    assert "13 of 13 lines" in text and "a.jsonl:10:" in text and "a.jsonl:11:" not in text and "3 more" in text


def test_missing_empty_and_wrongly_encoded_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="found none"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "gbk.jsonl").write_bytes('{"conversation": "你好"}'.encode("gbk"))
    with pytest.raises(UserError, match="rows in UTF-8, found byte 0xc4") as refused:
        read_rows(tmp_path / "gbk.jsonl")
    assert obey(str(refused.value), "from GBK: ").read_text(encoding="utf-8") == '{"conversation": "你好"}'
    (tmp_path / "windows.jsonl").write_bytes('{"conversation": "你好"}'.encode("utf-16"))
    with pytest.raises(UserError, match="rows in UTF-8, found byte 0xff") as refused:
        read_rows(tmp_path / "windows.jsonl")
    assert obey(str(refused.value), "from UTF-16: ").read_text(encoding="utf-8") == '{"conversation": "你好"}'


def test_a_row_over_several_lines_is_told_once(tmp_path):
    row = json.dumps({"conversation": [{"human": "a", "assistant": "b"}]}, indent=2)
    with pytest.raises(UserError, match=":1: expected a JSON object a line, found the beginning of one that goes over"):
        read_rows(write(tmp_path / "a.jsonl", row))


def obey(text: str, marker: str) -> Path:
    """Run the command that an error advises; returns the file it writes."""
    command = text.partition(marker)[2]
    subprocess.run(["bash", "-c", command], check=True)
    return Path(shlex.split(command)[-1])


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_can_be_written_as_rows(tmp_path, indent, bom):
    array = [{"conversation": [{"human": human, "assistant": "好"}]} for human in ("一", "二")]
    path = write(tmp_path / "an array.json", json.dumps(array, ensure_ascii=False, indent=indent), bom=bom)
    with pytest.raises(UserError, match="found an array") as refused:
        read_rows(path)
    rows = read_rows(obey(str(refused.value), "a line each: "))
    assert [row.turns[0].human for row in rows] == ["一", "二"]
