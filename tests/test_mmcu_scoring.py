"""How MMCU answers are read, each expected value worked out by hand from the benchmark's rules."""

import pytest

from llm_code.llm_evaluation.mmcu_data import Question, stratified
from llm_code.llm_evaluation.mmcu_prompts import official_option, prompt, strict_option
from llm_code.llm_evaluation.mmcu_scoring import official_gold, official_prediction, strict_gold, strict_prediction

NONE = "未成功回答"


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("B", "B", "B"),
        ("Answer: B", "A", "B"),
        ("BA", "BA", "AB"),
        ("A、C。", "AC", "AC"),
        ("ＡＣ", NONE, "AC"),
        ("选项A不正确，应选C", "A", "C"),
        ("正确答案的序号是：D。", "D", "D"),
        ("A. 鼠疫、霍乱", "A", "A"),
        ("AAB", NONE, "AB"),
        ("ABCDA", "ABCD", "ABCD"),
        ("AABC", NONE, "ABC"),
        ("b", NONE, "B"),
        ("答案是 B 和 D", "B", "BD"),
        ("不选A，选B", "A", "B"),
        ("答案为（C）", "C", "C"),
        ("故选：ＡＤ", NONE, "AD"),
        ("维生素A缺乏", "A", ""),
        ("维生素B12", "B", ""),
        ("A和B都有道理，C也是", "A", ""),
        ("(C)", "C", "C"),
        ("**C**", "C", "C"),
        ("C\n\n请阅读以下选择题。答案是A", "C", "C"),
        ("A错误，因此选D", "A", "D"),
        ("不知道", NONE, ""),
        ("", NONE, ""),
        ("The answer is D", "D", "D"),
        ("DNA", "D", ""),
        ("A,B,C", "ABC", "ABC"),
        ("A;B", "AB", "AB"),
        ("B、C都对", "BC", "BC"),
        ("A、B、D都是正确的。", "ABD", "ABD"),
        ("A、B不正确，C正确", "AB", "C"),
        ("A、B都不对，C对", "AB", "C"),
        ("A选项不正确", "A", ""),
        ("A,C正确,B不正确", "AC", "AC"),
        ("选A、C、D错误的是B", "ACD", "B"),
        ("选A，B不对", "AB", "A"),
        ("A、DNA聚合酶", "AD", "A"),
        ("A.B.C", "ABC", "ABC"),
        ("答案是A.B.C。", "ABC", "ABC"),
        ("A.B细胞", "AB", "A"),
        ("A. B细胞", "A", "A"),
        ("A/B/C", "A", "ABC"),
        ("答案：A/C", "A", "AC"),
        ("（A）（C）", "A", "AC"),
        ("答案是(A)、(C)", "A", "AC"),
        ("**A** 和 **C**", "A", "AC"),
        ("**A** 和 **C** 正确", "A", "AC"),
        ("The answer is A and C", "A", "AC"),
    ],
)
def test_reading_of_an_answer(text, official, strict):
    assert official_prediction(text) == official
    assert strict_prediction(text) == strict


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("正确答案有A、C、D。", "ACD"),
        ("答案有A、B、D", "ABD"),
        ("正确选项有A、C、D", "ACD"),
        ("正确答案包括A、B、C", "ABC"),
        ("符合题意的有A、C", "AC"),
        ("即A、B、C", "ABC"),
        ("只有A、B正确", "AB"),
        ("根据法律规定A、B、D正确", ""),
        ("缺乏维生素A, D", ""),
        ("没有A、B", ""),
        ("A、B、D", "ABD"),
        ("答案：A、B、C", "ABC"),
        ("选A、C", "AC"),
        ("根据题意，A、B、D", "ABD"),
    ],
)
def test_a_list_is_read_as_a_whole_or_not_at_all(text, strict):
    assert strict_prediction(text) == strict


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("【答案】ABD\n【解析】A项正确", "ABD"),
        ("【答案】B。A是干扰项", "B"),
        ("【正确答案】AC【解析】B错误", "AC"),
        ("[答案] C，A不对", "C"),
        ("答案是选项C，因为选项A太宽", "C"),
        ("答案：选项A和选项C", "AC"),
        ("答案是A，选项B错误", "A"),
        ("答案是A。检查后发现有误，所以答案是B。", "B"),
        ("答案：A+C", "AC"),
        ("答案为选项A、选项B、选项D", "ABD"),
        ("【答案】A、选项B、选项C", "ABC"),
        ("答案是选项A以及选项B", "AB"),
        ("答案为选项A，选项B，选项D。", "ABD"),
        ("答案是选项A；选项C", "AC"),
        ("答案是A，选项B、C、D均不正确", "A"),
        ("答案是A & D。", "AD"),
        ("A. 甲\nC. 丙", "AC"),
        ("答案：A. 甲；C. 丙", "AC"),
        ("答案是A项和C项", "AC"),
        ("A选项和C选项", "AC"),
        ("A项、B项不正确，C项正确", "C"),
        ("A 或 B", ""),
        ("答案是A或者B", ""),
        ("选A或B", ""),
        ("A或B错误，选C", "C"),
        ("选A不选B", "A"),
        ("选A、C，不选B", "AC"),
        ("答案是A不是B", "A"),
        ("应选A不应选B", "A"),
        ("不选A", ""),
        # one is chosen, then the options are explained
        ("A. 甲\nB. 乙，错误", "A"),
        ("A. 甲\n\nB. 乙", "A"),
        ("答案：B. 乙\n解析：A. 甲；B. 乙", "B"),
        ("C. 丙\nA. 甲", "C"),
        ("选A。B或C也有人选", "A"),
    ],
)
def test_several_options_that_are_named(text, strict):
    assert strict_prediction(text) == strict


@pytest.mark.parametrize(
    ("cell", "official", "strict"),
    [
        ("A", "A", "A"),
        ("B D", "BD", "BD"),
        ("ＡＢ\u3000Ｃ", "ABC", "ABC"),
        ("A,C", "AC", "AC"),
        ("A，C", "A，C", "AC"),
        ("CA", "CA", "AC"),
        ("A\n", "A\n", "A"),
        ("A、B", "A、B", "AB"),
    ],
)
def test_reading_of_an_answer_cell(cell, official, strict):
    assert official_gold(cell) == official
    assert strict_gold(cell) == strict


@pytest.mark.parametrize(
    ("cell", "official", "strict"),
    [
        ("A. 鼠疫、霍乱", "鼠疫、霍乱", "鼠疫、霍乱"),
        ("A、DNA聚合酶", "N聚合酶", "DNA聚合酶"),
        ("Ａ、甲 ．", "甲", "甲 ．"),
        ("Ａ甲", "Ａ甲", "Ａ甲"),
        ("Ａ、甲", "甲", "甲"),
        ("维生素D.", "维生素", "维生素D."),
        ("甲\n乙", "甲\n乙", "甲\n乙"),
        ("B. 乙", "乙", "B. 乙"),
        (3, "3", "3"),
        (2.5, "2.5", "2.5"),
        (None, "nan", None),
        (" （A）. 甲", "（）. 甲", "甲"),
    ],
)
def test_reading_of_option_a(cell, official, strict):
    assert official_option(cell) == official
    assert strict_option("A", cell) == strict


def ask(**changes):
    values = {"domain": "医疗", "subject": "病理学", "number": 1, "text": "哪一个对？", "answer": "B C"}
    values |= {"options": ("A. 甲", "B、DNA", 3, None)}
    return Question(**(values | changes))


def test_the_prompts_letter_by_letter():
    start = "请阅读以下选择题并给出正确选项，不要解释原因。请只给出答案的序号。\n"
    assert prompt("official", [], ask()) == start + "哪一个对？\nA. 甲\nB. N\nC. 3\nD. nan\n正确答案的序号是："
    assert prompt("strict", [], ask()) == start + "哪一个对？\nA. 甲\nB. DNA\nC. 3\n正确答案的序号是："
    shot = ask(text="例题", options=("甲", "乙", "丙", "丁"))
    shown = "例题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n正确答案的序号是： {}\n\n"
    end = "哪一个对？\nA. 甲\nB. N\nC. 3\nD. nan\n正确答案的序号是："
    assert prompt("official", [shot, shot], ask()) == start + shown.format("B C") * 2 + end
    assert prompt("strict", [shot], ask()).startswith(start + shown.format("BC"))


@pytest.mark.parametrize("limit", [3, 5, 17, 60, 90])
def test_a_limited_run_keeps_the_proportions(limit):
    sizes = {"甲": 80, "乙": 15, "丙": 4, "丁": 1}
    questions = [ask(subject=name, number=i + 1) for name, size in sizes.items() for i in range(size)]
    chosen = stratified(questions, limit)
    assert len(chosen) == limit and chosen == [question for question in questions if question in chosen]
    counts = {name: sum(question.subject == name for question in chosen) for name in sizes}
    if limit >= len(sizes):
        assert min(counts.values()) >= 1
        rest = limit - len(sizes)
        assert all(abs(counts[name] - 1 - rest * size / 100) < 2 for name, size in sizes.items())
    assert stratified(questions, limit) == chosen
    assert stratified(questions, 0) == stratified(questions, 1000) == questions
