"""Promises of the bundled counselling dialogues: format, counts, no repetition, answers that stay in their lane."""

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from finetune.rows import read_rows
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "llm_code" / "data"
TRAIN, TEST, BLEU = "psychology_data.jsonl", "psychology_test.jsonl", "psychology_test_bleu.jsonl"
ANSWER_CHARACTERS = range(80, 301)
GRAM = 13
# Share of the shorter text's 13-grams that another text may hold; unrelated answers share a help line's name at most.
MAX_OVERLAP = 0.12
RISK_CATEGORIES = {"轻生与自伤", "暴力与侵害"}
RISK_WORDS = re.compile("不想活|想死|自杀|遗书|割腕|活着没意思|划手臂|掐我脖子|打我妈")
HELP_LINES = {"12356", "12355", "12338", "110", "120"}
# A diagnosis, a promise, or the name of a drug.
FORBIDDEN = re.compile(
    "[你您](?:肯定|一定|就是|这是)?(?:患有|得了|有)(?:重度|轻度)?(?:抑郁症|焦虑症|强迫症|双相|惊恐障碍|精神分裂)|确诊为|我保证|一定会好|包治"
    "|舍曲林|氟西汀|帕罗西汀|西酞普兰|文拉法辛|度洛西汀|米氮平|曲唑酮|百忧解|喹硫平|奥氮平|阿立哌唑|利培酮|碳酸锂"
    "|阿普唑仑|劳拉西泮|氯硝西泮|地西泮|唑吡坦|右佐匹克隆|丁螺环酮|褪黑素"
)


def lines(name: str) -> list[dict[str, Any]]:
    """The decoded lines of a file; strict UTF-8, no byte order mark, every line an object and a final newline."""
    text = (FOLDER / name).read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\ufeff" not in text and "\ufffd" not in text
    return [json.loads(line) for line in text.splitlines()]


def dialogues() -> list[dict[str, Any]]:
    return lines(TRAIN) + lines(TEST)


def bleu_only() -> list[dict[str, str]]:
    """The rows of the BLEU file that are not the opening of a test dialogue."""
    openings = {row["conversation"][0]["human"] for row in lines(TEST)}
    return [row for row in lines(BLEU) if row["input"] not in openings]


def exchanges() -> list[tuple[str, str]]:
    """Every (question, answer) of the three files once."""
    turns = [(turn["human"], turn["assistant"]) for row in dialogues() for turn in row["conversation"]]
    return turns + [(row["input"], row["output"]) for row in bleu_only()]


def grams(text: str) -> set[str]:
    bare = re.sub(r"[\W_]", "", text)
    return {bare[start : start + GRAM] for start in range(max(1, len(bare) - GRAM + 1))}


def near_duplicates(texts: list[str]) -> list[tuple[float, str, str]]:
    """Pairs of texts of which one holds more than MAX_OVERLAP of the other's 13-grams, with that share."""
    sets, holders, found = [grams(text) for text in texts], defaultdict(list), []
    for later, own in enumerate(sets):
        for earlier, shared in Counter(index for gram in own for index in holders[gram]).items():
            share = shared / min(len(own), len(sets[earlier]))
            if share > MAX_OVERLAP:
                found.append((share, texts[earlier], texts[later]))
        for gram in own:
            holders[gram].append(later)
    return found


@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_rows_have_the_format_and_are_read_by_the_trainer(name):
    rows = lines(name)
    for row in rows:
        assert list(row) == ["conversation_id", "category", "conversation", "dataset"], row
        assert type(row["conversation_id"]) is int and row["dataset"] == "psychology_data" and row["category"]
        assert all(list(turn) == ["human", "assistant"] for turn in row["conversation"]), row
        assert 1 <= len(row["conversation"]) <= 4, row
    assert [len(row.turns) for row in read_rows(FOLDER / name)] == [len(row["conversation"]) for row in rows]


def test_bleu_rows_have_the_format_and_share_only_openings_with_the_test_dialogues():
    openings = {row["conversation"][0]["human"]: row["conversation"][0]["assistant"] for row in lines(TEST)}
    assert all(list(row) == ["instruction", "input", "output"] and row["instruction"] for row in lines(BLEU))
    shared = [row for row in lines(BLEU) if row["input"] in openings]
    assert len(shared) == len(openings) and all(row["output"] == openings[row["input"]] for row in shared)


def test_counts_and_the_readme_agree():
    counts = {name: len(lines(name)) for name in (TRAIN, TEST, BLEU)}
    assert counts[TRAIN] >= 300 and counts[TEST] == 60 and counts[BLEU] == 200
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, count in counts.items():
        assert f"| `{name}` | {count} |" in readme
    single = sum(len(row["conversation"]) == 1 for row in lines(TRAIN)) / counts[TRAIN]
    categories = {row["category"] for row in lines(TRAIN)}
    assert f"{single:.0%}".replace("%", " % have one exchange") in readme
    assert f"{len(categories)} in training" in readme
    identifiers = [row["conversation_id"] for row in dialogues()]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_two_in_five_dialogues_have_several_turns(name):
    several = sum(len(row["conversation"]) > 1 for row in lines(name)) / len(lines(name))
    assert 0.35 <= several <= 0.5


def test_topics_and_openings_are_spread():
    categories = Counter(row["category"] for row in lines(TRAIN))
    assert len(categories) >= 50 and max(categories.values()) <= 0.05 * len(lines(TRAIN))
    assert {row["category"] for row in lines(TEST)} <= set(categories)
    openings = Counter(answer[:4] for _, answer in exchanges())
    assert openings.most_common(1)[0][1] <= 0.01 * openings.total()


@pytest.mark.parametrize("side", [0, 1], ids=["questions", "answers"])
def test_nothing_is_said_twice(side):
    texts = [pair[side] for pair in exchanges()]
    assert len(set(texts)) == len(texts)
    assert near_duplicates(texts) == []


def test_a_planted_near_duplicate_is_found():
    _, answer = exchanges()[0]
    planted = "换了一个开头，" + answer[15:-10] + "，结尾也不一样。"
    assert [(first, second) for _, first, second in near_duplicates([answer, planted])] == [(answer, planted)]


def test_answers_keep_their_length_and_their_lane():
    for _, answer in exchanges():
        assert len(answer) in ANSWER_CHARACTERS, answer
        assert not FORBIDDEN.search(answer), answer
        assert set(re.findall(r"\d{3,}", answer)) <= HELP_LINES, answer


@pytest.mark.parametrize("text", ["你患有抑郁症。", "您这是得了焦虑症", "可以吃点舍曲林", "我保证你没事"])
def test_forbidden_words_are_recognised(text):
    assert FORBIDDEN.search(text)


def names_a_help_line(text: str) -> bool:
    return bool(HELP_LINES.intersection(re.findall(r"\d{3,}", text)))


def test_risk_is_answered_with_a_help_line():
    risky = 0
    for row in dialogues():
        asked = "".join(turn["human"] for turn in row["conversation"])
        if row["category"] in RISK_CATEGORIES or RISK_WORDS.search(asked):
            risky += 1
            assert names_a_help_line("".join(turn["assistant"] for turn in row["conversation"])), row
    for row in bleu_only():
        if RISK_WORDS.search(row["input"]):
            risky += 1
            assert names_a_help_line(row["output"]), row
    assert risky >= 30
