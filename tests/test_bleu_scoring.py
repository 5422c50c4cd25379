"""Scores of Chinese texts; expected values computed by hand or by another program."""

import math
import random

import pytest
from rouge_chinese import Rouge
from sacrebleu.metrics import BLEU

from llm_code.llm_evaluation.bleu_scoring import (
    distinct,
    longest_common_subsequence,
    repetition,
    rouge,
    rouge_l,
    rouge_n,
    sacre_bleu,
    score_pairs,
    sentence_bleu,
    words,
)

SHORT, LONG = "今天天气好", "今天天气很好"


def test_sentence_bleu_by_hand():
    # 1- to 4-grams of 今天天气好 found in 今天天气很好: 5/5, 3/4, 2/3, 1/2; brevity penalty exp(1 - 6/5)
    assert sentence_bleu(SHORT, LONG) == pytest.approx(math.exp(-1 / 5) * (3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert sentence_bleu(SHORT, LONG, (0.5, 0.5)) == pytest.approx(math.exp(-1 / 5) * (3 / 4) ** 0.5)
    # the other way round nothing is too short: 5/6, 3/5, 2/4, 1/3
    assert sentence_bleu(LONG, SHORT) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert sentence_bleu(LONG, LONG) == 1


def test_sentence_bleu_of_short_and_empty_texts():
    assert sentence_bleu("", LONG) == 0
    assert 0 < sentence_bleu("天气", LONG) < 1e-70  # no 3-gram at all
    # Chen & Cherry's first method puts 0.1 where nothing matches: 2/2, 1/1, 0.1/1, 0.1/1 and exp(1 - 6/2)
    assert sentence_bleu("天气", LONG, smoothing="method1") == pytest.approx(math.exp(-2) * 0.01**0.25)


def test_sacrebleu_needs_its_chinese_tokenizer():
    pairs = [(LONG, LONG), (SHORT, LONG)]
    found = sacre_bleu(pairs, "zh")
    # n-grams of both rows together: 11/11, 8/9, 6/7, 4/5; lengths 11 and 12
    expected = math.exp(1 - 12 / 11) * (8 / 9 * 6 / 7 * 4 / 5) ** 0.25
    assert found["score"] == pytest.approx(expected)
    assert "tok:zh" in found["signature"]
    # a default tokenizer takes each sentence for one word
    assert BLEU().corpus_score([SHORT], [[LONG]]).score == 0


def test_rouge_by_hand():
    assert rouge_n(list(SHORT), list(LONG), 1) == pytest.approx(2 * 5 / 11)
    assert rouge_n(list(SHORT), list(LONG), 2) == pytest.approx(2 * 3 / (4 + 5))
    assert rouge_l(list(SHORT), list(LONG)) == pytest.approx(2 * 5 / 11)
    assert rouge_n(list("天天"), list("天"), 1) == pytest.approx(2 / 3)
    assert rouge([("", LONG), ("", "")], list) == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}
    assert words("我 喜欢 天安门") == ["我", "喜欢", "天安门"]


@pytest.mark.parametrize("seed", range(5))
def test_rouge_agrees_with_rouge_chinese(seed):
    source = random.Random(seed)
    first, second = ("".join(source.choices("天地人和春", k=source.randint(2, 30))) for _ in range(2))
    theirs = Rouge(exclusive=False).get_scores(" ".join(first), " ".join(second))[0]
    assert rouge_n(first, second, 1) == pytest.approx(theirs["rouge-1"]["f"], abs=1e-6)
    assert rouge_n(first, second, 2) == pytest.approx(theirs["rouge-2"]["f"], abs=1e-6)


def table_lcs(first, second):
    row = [0] * (len(second) + 1)
    for a in first:
        last = row
        row = [0]
        for j, b in enumerate(second):
            row.append(last[j] + 1 if a == b else max(last[j + 1], row[j]))
    return row[-1]


def test_longest_common_subsequence_against_the_table():
    source = random.Random(0)
    for _ in range(200):
        first, second = ("".join(source.choices("甲乙丙丁", k=source.randint(0, 20))) for _ in range(2))
        assert longest_common_subsequence(first, second) == table_lcs(first, second)
    # where a recursive reconstruction, as in rouge-chinese, leaves Python's stack
    assert longest_common_subsequence("好" * 1500, "好的" * 700) == 700


def test_distinct_and_repetition_by_hand():
    assert distinct(["天天", "天气"], 1) == 2 / 4
    assert distinct(["天天", "天气"], 2) == 1
    assert repetition("一二三四五六") == 0
    assert repetition("好好好好好好") == 2 / 3  # three times the same 4-gram
    assert repetition("好") == 0


def test_summary_by_hand():
    scores, summary = score_pairs([(SHORT, LONG), ("", LONG), (LONG, LONG)])
    assert scores[1:] == [0, 1]
    assert summary["bleu"] == pytest.approx(sum(scores) / 3)
    assert summary["bleu_with_n_plus_1"] == pytest.approx(sum(scores) / 4)
    assert summary["empty"] == pytest.approx(1 / 3)
    assert summary["length_ratio"] == pytest.approx(11 / 18)
    assert summary["rouge_characters"]["rouge_1"] == pytest.approx((10 / 11 + 0 + 1) / 3)
    assert summary["bleu_by_order"]["1"] == pytest.approx((math.exp(-1 / 5) + 0 + 1) / 3)
    assert summary["bleu_by_order"]["4"] == summary["bleu"]
    # all rows together: 11/11, 8/9, 6/7, 4/5 and 11 of 18 characters
    assert summary["corpus_bleu"]["score"] == pytest.approx(math.exp(1 - 18 / 11) * (8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    assert summary["bleu_bootstrap_95"][0] <= summary["bleu"] <= summary["bleu_bootstrap_95"][1]


def test_scores_of_all_answers_by_hand():
    by_order = score_pairs([("一二三四", "一二三五")])[1]["bleu_by_order"]
    assert by_order["1"] == pytest.approx(3 / 4) and by_order["2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    lengths = score_pairs([("一一", "一"), (" \n", "一二三")])[1]
    assert (
        lengths["length_ratio"] == pytest.approx((2 + 2) / (1 + 3)) and lengths["empty"] == 0.5
    )  # not (2/1 + 2/3) / 2
    assert score_pairs([("一二三四五", "一二三六七")])[1]["corpus_bleu"]["score"] == 0  # no four in a row, unsmoothed
