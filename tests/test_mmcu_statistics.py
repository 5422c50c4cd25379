"""MMCU's sums and comparisons, worked out by hand."""

import pytest

from finetune.errors import UserError
from llm_code.llm_evaluation import mmcu
from llm_code.llm_evaluation.mmcu_report import verdict
from llm_code.llm_evaluation.mmcu_statistics import by_subject, compare_runs, make_record, summarise
from tests.test_mmcu_scoring import ask as make_question


def records_of(rows):
    """Records of (domain, subject, answer cell, the model's answer)."""
    return [
        make_record(make_question(domain=domain, subject=subject, number=i, answer=gold), text, text)
        for i, (domain, subject, gold, text) in enumerate(rows)
    ]


def test_scores_by_hand():
    rows = [
        ("医疗", "病理学", "A", "A"),
        ("医疗", "病理学", "AB", "BA"),
        ("医疗", "病理学", "C", "不知道"),
        ("医疗", "药理学", "B", "答案：B"),
        ("法律", "法律", "BD", "D、B"),
        ("法律", "法律", "C\n", "C"),
    ]
    records = records_of(rows)
    assert [record["official_correct"] for record in records] == [True, False, False, True, False, False]
    assert [record["correct"] for record in records] == [True, True, False, True, True, True]
    official, strict = summarise(records, "official"), summarise(records, "strict")
    assert official["domains"]["医疗"]["macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert official["overall"]["macro"] == pytest.approx(((1 / 3 + 1) / 2 + 0) / 2)
    assert official["overall"]["accuracy"]["value"] == pytest.approx(2 / 6)
    assert strict["overall"]["macro"] == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)
    assert (strict["overall"]["single"]["correct"], strict["overall"]["single"]["total"]) == (3, 4)
    assert (strict["overall"]["several"]["correct"], strict["overall"]["several"]["total"]) == (2, 2)
    assert (official["overall"]["invalid"], strict["overall"]["invalid"]) == (1, 1)
    lines = mmcu.subject_file(by_subject(records)["病理学"])
    assert lines == "A|||A|||True\nBA|||AB|||False\n未成功回答|||C|||False\nAverage accuracy 0.333 - 病理学\n"
    # a line end in the answer cell stays in the file, as the benchmark's script leaves it
    assert "C|||C\n|||False\n" in mmcu.subject_file(by_subject(records)["法律"])


def test_comparison_by_hand():
    ours = records_of([("法律", "法律", "A", "A")] * 6 + [("心理", "心理", "A", "A"), ("心理", "心理", "A", "B")])
    theirs = records_of([("法律", "法律", "A", "B")] * 6 + [("心理", "心理", "A", "B"), ("心理", "心理", "A", "A")])
    found = compare_runs(ours, theirs, "other")
    law, mind = found["strict"]["subjects"]["法律"], found["strict"]["subjects"]["心理"]
    assert law["mcnemar_exact_p"] == pytest.approx(2 / 64) and law["holm_p"] == pytest.approx(4 / 64)
    assert mind["mcnemar_exact_p"] == mind["holm_p"] == 1
    overall = found["strict"]["overall"]
    assert overall["difference"] == pytest.approx(6 / 8)
    # 7 against 1: 2 (1 + 8) / 2^8
    assert overall["mcnemar_exact_p"] == pytest.approx(18 / 256)
    assert verdict(found).startswith("No difference beyond chance")
    clear = compare_runs(ours[:6], theirs[:6], "other")
    assert verdict(clear).startswith("This run is better")
    assert verdict(compare_runs(theirs[:6], ours[:6], "other")).startswith("This run is worse")
    with pytest.raises(UserError, match="other: expected the same questions for both models, found 6 and 8"):
        compare_runs(ours[:6], theirs, "other")


def test_each_reading_is_of_the_answer_to_its_own_prompt():
    known = {"domain": "医疗", "subject": "病理学", "number": 1}
    record = make_record(make_question(**known, answer="A"), "A", "B")
    assert (record["official_predicted"], record["predicted"]) == ("A", "B")
    assert (record["official_correct"], record["correct"]) == (True, False)
    assert not make_record(make_question(**known, answer="无"), "?", "不知道")["correct"]  # no letter against none
