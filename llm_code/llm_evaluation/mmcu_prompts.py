"""What a model is asked: the benchmark's prompt to the letter, and the same prompt with the options kept whole.

The benchmark's script (https://github.com/Felixgithub2017/MMCU TestBloomz.py) deletes every letter A to D from the
option texts, so that DNA becomes N. The strict prompt only takes away an option's own label at its beginning.
"""

import re
from collections.abc import Sequence

from llm_code.llm_evaluation.mmcu_data import Cell, Question
from llm_code.llm_evaluation.mmcu_scoring import strict_gold

LETTERS = "ABCD"
INTRODUCTION = "请阅读以下选择题并给出正确选项，不要解释原因。请只给出答案的序号。\n"
ASKED = "\n正确答案的序号是："
MODES = ("official", "strict")
# in the order in which the script deletes them
DELETED = (" ．", *(a + "、" for a in LETTERS), *(a + "." for a in LETTERS), *LETTERS, *(a + "、" for a in "ＡＢＣＤ"))
FULL_WIDTH = dict(zip(LETTERS, "ＡＢＣＤ", strict=True))


def official_option(cell: Cell) -> str:
    """An option as the benchmark prints it; a missing one is the word nan."""
    if not isinstance(cell, str):
        return "nan" if cell is None else str(cell)
    for piece in DELETED:
        cell = cell.replace(piece, "")
    return cell.strip()


def strict_option(letter: str, cell: Cell) -> str | None:
    """An option's text without its own label; None for a missing one, which is not printed."""
    if cell is None:
        return None
    label = rf"\s*[(（]?[{letter}{FULL_WIDTH[letter]}][)）]?\s*[、.．:：]\s*"
    return re.sub(f"^{label}", "", str(cell)).strip()


def options_text(mode: str, question: Question) -> str:
    """A line for each option, with a line end before it."""
    if mode == "official":
        texts = [official_option(cell) for cell in question.options]
    else:
        texts = [strict_option(letter, cell) for letter, cell in zip(LETTERS, question.options, strict=True)]
    return "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=True) if text is not None)


def example(mode: str, question: Question, with_answer: bool) -> str:
    """One question, and its answer when it is a worked example."""
    text = question.text + options_text(mode, question) + ASKED
    answer = question.answer if mode == "official" else strict_gold(question.answer)
    return f"{text} {answer}\n\n" if with_answer else text


def opening(mode: str, shots: Sequence[Question]) -> str:
    """Everything before the question; the same for all questions of a workbook."""
    return INTRODUCTION + "".join(example(mode, shot, True) for shot in shots)


def prompt(mode: str, shots: Sequence[Question], question: Question) -> str:
    """The user message of one question."""
    return opening(mode, shots) + example(mode, question, False)
