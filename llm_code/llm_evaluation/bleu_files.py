"""Files of the BLEU evaluation: test rows, finished answers, scored rows, and their picture.

A finished file has one answer a line, as JSON with input, predict and target (other keys are left alone), or as three
columns separated by tabs. The scored file has four columns separated by tabs, line ends and tabs inside a text written
as \\n and \\t, and the average in its last line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.lines import numbered_lines
from finetune.pictures import picture

ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
KEYS = ("input", "predict", "target")


@dataclass(frozen=True)
class Question:
    """A row of the test file by its line, counted from 1."""

    row: int
    input: str
    target: str


class ScoreFiles:
    """The paths of one result, all derived from the scored file's."""

    def __init__(self, save_file: str | Path) -> None:
        """Raises UserError when the others would overwrite it."""
        self.scored = Path(save_file)
        if self.scored.suffix in (".json", ".jsonl", ".png"):
            raise UserError(f"--save_file: expected a name such as psychology_result_bleu.txt, got {save_file}")
        self.summary = self.scored.with_suffix(".json")
        self.records = self.scored.with_suffix(".jsonl")
        self.picture = self.scored.with_suffix(".png")


def read_questions(path: str | Path) -> list[Question]:
    """Rows with instruction, input and output; instruction and input together are asked. Raises UserError on others."""
    questions = []
    for number, line in numbered_lines(path, "a .jsonl file of questions"):
        try:
            row = json.loads(line)
            instruction, asked, target = (row.get(key, "") for key in ("instruction", "input", "output"))
            if not all(isinstance(value, str) for value in (instruction, asked, target)) or not target:
                raise ValueError("its output is missing")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: expected a JSON object with instruction, input and output as texts, but {error}"
            ) from None
        questions.append(Question(number, instruction + asked, target))
    if not questions:
        raise UserError(f"{path}: expected rows with instruction, input and output, found none.")
    return questions


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """input, predict and target of a finished file, and row (its line unless it says so). Raises UserError."""
    answers = []
    for number, line in numbered_lines(path, "a file of answers", json_lines=False):
        try:
            row = json.loads(line) if line.startswith("{") else dict(zip(KEYS, line.split("\t"), strict=True))
            if others := [key for key in KEYS if not isinstance(row[key], str)]:
                raise ValueError(f"{others[0]} is {row[others[0]]!r}, not a text")
            answers.append({"row": row.get("row", number)} | {key: row[key] for key in KEYS})
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: expected JSON with input, predict and target, or these three separated by tabs, "
                f"but {type(error).__name__} {error}"
            ) from None
    if not answers:
        raise UserError(f"{path}: expected finished answers, found none.")
    return answers


def answers_text(questions: Sequence[Question], predictions: Sequence[str]) -> str:
    """The content of a finished file."""
    rows = (
        {"row": question.row, "input": question.input, "predict": prediction, "target": question.target}
        for question, prediction in zip(questions, predictions, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def escaped(text: str) -> str:
    """A text that fits into a column."""
    return text.translate(str.maketrans(ESCAPES))


def scored_text(answers: Sequence[dict[str, Any]], scores: Sequence[float], average: float) -> str:
    """The content of the scored file."""
    rows = [
        "\t".join([*(escaped(answer[key]) for key in KEYS), f"{score:.6f}"])
        for answer, score in zip(answers, scores, strict=True)
    ]
    return "\n".join([*rows, f"average\t\t\t{average:.6f}"]) + "\n"


def records_text(answers: Sequence[dict[str, Any]], scores: Sequence[float]) -> str:
    """The rows once more as JSON, with the names that every evaluation's records have."""
    rows = (
        {"row": a["row"], "prompt": a["input"], "gold": a["target"], "predicted": a["predict"], "bleu": score}
        for a, score in zip(answers, scores, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def draw_scores(answers: Sequence[dict[str, Any]], scores: Sequence[float], path: Path) -> None:
    """Score against the length of the answer, with the mean length of the references."""
    with picture(path, (6, 4)) as figure:
        axes = figure.add_subplot()
        axes.plot([len(answer["predict"]) for answer in answers], scores, ".", alpha=0.5, clip_on=False)
        target = sum(len(answer["target"]) for answer in answers) / len(answers)
        axes.axvline(target, color="0.5", linestyle="--", label="mean length of the references")
        axes.set(xlabel="characters of the answer", ylabel="BLEU over characters")
        axes.set_xlim(left=0)
        axes.set_ylim(0, max(0.01, 1.05 * max(scores)))  # 1e-78 is drawn as the 0 it means
        axes.grid(alpha=0.3)
        axes.legend()
