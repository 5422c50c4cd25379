"""Answers and scores of the evaluation; expected values computed by hand or from the definitions."""

import pytest

from qwen_qlora.evaluation.answers import answers_for, bare_word, keywords, normalise
from qwen_qlora.evaluation.metrics import (
    classification_report,
    confusion_matrix,
    keyword_report,
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
        ("不是", "请回答“是”或“不是”", ["是", "不是"]),
        ("是", "判断是否相同，只回答是或不是。", ["是", "不是"]),
        ("不是", "判断是否相同，只回答是或不是。", ["是", "不是"]),
        ("对", "对得上吗？回答对或不对。句子一：我错了", ["对", "不对"]),
        ("不对", "对得上吗？回答对或不对。句子一：我错了", ["对", "不对"]),
        ("错", "说得对不对？只答：错/对。", ["对", "错"]),
        ("对", "说得对不对？只答：错/对。", ["对", "错"]),
        ("相同", "输出相同或不同", ["相同", "不同"]),
        ("相同", "输出相同或不相同", ["相同", "不相同"]),
        ("不同", "一样就输出相同，否则输出不同", ["相同", "不同"]),
    ],
)
def test_answers_valid_for_a_row(gold, prompt, texts):
    assert answers_for(gold, prompt).texts() == texts


@pytest.mark.parametrize("gold", ["北京、天气", "相同的句子", "两句话", "关键词：医保、报销", ""])
def test_other_answers_have_no_pair(gold):
    assert answers_for(gold) is None


@pytest.mark.parametrize("word", ["是", "不是", "否"])
def test_the_words_a_file_uses_come_before_the_prompt(word):
    answers = answers_for(word, "请回答“是”或“否”", {"是", "不是"})
    assert answers is None if word == "否" else answers.texts() == ["是", "不是"]


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
