"""Rows of a test file as questions with a known answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.errors import UserError
from finetune.rows import Row
from qwen_qlora.evaluation.answers import Answers, answers_for, bare_word


@dataclass(frozen=True)
class EvaluationCase:
    """Everything up to the last assistant turn is asked, that turn is the gold answer."""

    line: int
    messages: tuple[dict[str, str], ...]
    gold: str
    answers: Answers | None  # the two answers valid here; None for rows of another kind, such as keywords

    @property
    def prompt(self) -> str:
        """The question as text: the user's words alone, or one `role: text` line a message when there are more."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def cases_of(rows: Sequence[Row]) -> list[EvaluationCase]:
    """The cases of a whole file: rows that are left out later may tell which words its answers use."""
    turns = [row.messages() for row in rows]
    used = {bare_word(last["content"]) for *_, last in turns}
    return [
        EvaluationCase(
            row.line, tuple(asked), last["content"], answers_for(last["content"], asked[-1]["content"], used)
        )
        for row, (*asked, last) in zip(rows, turns, strict=True)
    ]


def require_labels(cases: Sequence[EvaluationCase], path: str) -> None:
    """Raise UserError when a row has no pair of answers to compare the likelihoods of."""
    others = [case for case in cases if case.answers is None]
    if others:
        raise UserError(
            f"{path}: likelihood mode compares the two answers of a pair such as 相同/不相同, but {len(others)} of "
            f"{len(cases)} rows have another kind of answer, first line {others[0].line}: {others[0].gold[:40]!r}. "
            "Use --mode generate for them."
        )
