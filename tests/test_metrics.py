"""Answers and scores of the evaluation; expected values computed by hand or from the definitions."""

import itertools
import math

import pytest

from qwen_qlora.evaluation.answers import answers_for, bare_word, keywords, normalise
from qwen_qlora.evaluation.metrics import (
    classification_report,
    compare,
    confusion_matrix,
    keyword_report,
    mcnemar_exact,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("gold", "prompt", "texts"),
    [
        ("相同", "", ["相同", "不相同"]),
        ("不相同", "", ["相同", "不相同"]),
        ("答案：不相似", "", ["答案：相似", "答案：不相似"]),
        ("答案: 一致。", "", ["答案: 一致。", "答案: 不一致。"]),
        ("是", "请回答是或否", ["是", "否"]),
        ("是", "请回答“是”或“不是”", ["是", "不是"]),
        ("是", "", ["是", "否"]),
        ("不是", "", ["是", "不是"]),
        ("相同", "输出相同或不同", ["相同", "不同"]),
        ("相同", "输出相同或不相同", ["相同", "不相同"]),
        ("不同", "", ["相同", "不同"]),
    ],
)
def test_answers_valid_for_a_row(gold, prompt, texts):
    assert answers_for(gold, prompt).texts() == texts


@pytest.mark.parametrize("gold", ["北京、天气", "相同的句子", "两句话", "关键词：医保、报销", ""])
def test_other_answers_have_no_pair(gold):
    assert answers_for(gold) is None


def test_a_word_inside_its_own_negation_is_not_named():
    # 不是 contains 是: a prompt that only names 是否 must not choose 是/不是
    assert answers_for("是", "判断是否同义").texts() == ["是", "否"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("相似", "same"),
        (" 相似。\n", "same"),
        ("答案：相似", "same"),
        ("答案：不相似！", "different"),
        ("不相似", "different"),
        ("相同", "invalid"),
        ("相似的", "invalid"),
        ("", "invalid"),
        ("。", "invalid"),
    ],
)
def test_class_of_a_prediction(text, kind):
    assert answers_for("答案：相似").class_of(text) == kind


def test_normalise_and_keywords():
    assert normalise("\u3000答案：相同。. \n") == "答案：相同"
    assert bare_word("答案：相同。") == "相同"
    assert keywords(" 医保、报销 、、报销。") == {"医保", "报销"}


def test_wilson_interval_of_the_published_result():
    # 454 of 500 right is the walkthrough's own result
    low, high = wilson_interval(454, 500)
    assert (round(low, 3), round(high, 3)) == (0.879, 0.930)
    # the bounds are the roots of (p - 0.908)^2 = z^2 p (1 - p) / 500
    for bound in (low, high):
        assert (bound - 0.908) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 500, rel=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (0, 0)])
def test_wilson_interval_at_the_ends(hits, total):
    low, high = wilson_interval(hits, total)
    assert 0 <= low < high <= 1
    assert (low == 0) == (hits == 0)
    assert (high == pytest.approx(1)) == (hits == total)


def published_result():
    """TP 200, FP 19, FN 27, TN 254 as gold and predicted classes."""
    cells = [
        ("same", "same", 200),
        ("different", "same", 19),
        ("same", "different", 27),
        ("different", "different", 254),
    ]
    rows = [(gold, predicted) for gold, predicted, n in cells for _ in range(n)]
    return [gold for gold, _ in rows], [predicted for _, predicted in rows]


def test_classification_report_of_the_published_result():
    report = classification_report(*published_result())
    assert report["accuracy"]["value"] == 454 / 500
    assert report["accuracy"]["correct"] == 454
    same, different = report["by_class"]["same"], report["by_class"]["different"]
    assert same["precision"] == pytest.approx(200 / 219)
    assert same["recall"] == pytest.approx(200 / 227)
    assert same["f1"] == pytest.approx(400 / (219 + 227))  # 2 TP / (2 TP + FP + FN)
    assert different["precision"] == pytest.approx(254 / 281)
    assert different["recall"] == pytest.approx(254 / 273)
    assert (same["support"], different["support"]) == (227, 273)
    assert report["macro_f1"] == pytest.approx((400 / 446 + 508 / (281 + 273)) / 2)
    assert report["invalid"] == 0


def test_an_invalid_prediction_is_wrong_and_counted():
    golds, predictions = ["same", "same", "different"], ["same", "invalid", "invalid"]
    report = classification_report(golds, predictions)
    assert report["confusion"]["same"] == {"same": 1, "different": 0, "invalid": 1}
    assert report["confusion"]["different"] == {"same": 0, "different": 0, "invalid": 1}
    assert report["accuracy"]["value"] == pytest.approx(1 / 3)
    assert report["by_class"]["same"]["recall"] == 0.5
    assert report["by_class"]["different"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert report["invalid"] == 2


def test_confusion_matrix_wants_as_many_predictions_as_golds():
    with pytest.raises(ValueError):
        confusion_matrix(["same"], [])


def test_keyword_report_counts_sets():
    report = keyword_report(["医保、报销、流程", "天气"], ["报销、医保、医院", ""])
    assert report["precision"] == pytest.approx(2 / 3)
    assert report["recall"] == pytest.approx(2 / 4)
    assert report["f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert (report["found"], report["predicted"], report["gold"], report["rows"]) == (2, 3, 4, 2)


def brute_force_mcnemar(b, c):
    """Share of all 2^(b+c) ways to deal the discordant rows that are at least as uneven as the one seen."""
    deals = itertools.product((0, 1), repeat=b + c)
    return sum(min(sum(d), b + c - sum(d)) <= min(b, c) for d in deals) / 2 ** (b + c)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 1), (0, 6), (1, 8), (3, 9), (5, 5), (4, 7)])
def test_mcnemar_equals_counting_every_deal(b, c):
    assert mcnemar_exact(b, c) == pytest.approx(brute_force_mcnemar(b, c))
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_mcnemar_of_many_rows_does_not_underflow():
    # 1000 against 1100: normal approximation of the same tail with continuity correction
    expected = math.erfc((100 - 1) / math.sqrt(2100) / math.sqrt(2))
    assert mcnemar_exact(1000, 1100) == pytest.approx(expected, rel=0.01)


def test_compare_counts_the_discordant_rows():
    first, second = [True] * 8 + [False] * 2, [True] * 3 + [False] * 5 + [True, False]
    result = compare(first, second)
    assert result["accuracy"]["value"] == 0.8
    assert result["other_accuracy"]["value"] == 0.4
    assert (result["only_this_right"], result["only_other_right"]) == (5, 1)
    assert result["mcnemar_exact_p"] == pytest.approx(2 * (1 + 6) / 64)
