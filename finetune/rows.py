"""Training rows: what a line of a .jsonl file may look like, and how it is read.

Two spellings are read. The walkthrough's own::

    {"conversation": [{"human": "...", "assistant": "..."}, ...], "system": "..."}

and OpenAI's ``{"messages": [{"role": "user", "content": "..."}, ...]}``.
Other keys are ignored; a UTF-8 BOM is skipped.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.lines import numbered_lines

MAX_PROBLEMS_SHOWN = 10
SHAPE = (
    '{"conversation": [{"human": "...", "assistant": "..."}]} with an optional "system", '
    'or {"messages": [{"role": "user", "content": "..."}, ...]}'
)


@dataclass(frozen=True)
class Turn:
    """One exchange: what the person said and what the model should answer."""

    human: str
    assistant: str


@dataclass(frozen=True)
class Row:
    """One conversation and the 1-based line of the file it came from."""

    line: int
    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation as role/content messages, the system text first when the row has one."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        pairs = ((("user", turn.human), ("assistant", turn.assistant)) for turn in self.turns)
        return system + [{"role": role, "content": text} for pair in pairs for role, text in pair]


class RowError(ValueError):
    """A line that is not a training row; the text says what was expected."""


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where} must be a non-empty string, got {json.dumps(value, ensure_ascii=False)[:60]}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"{where} has half of a surrogate pair, as a cut emoji leaves it")
    return value


def _turns_of_conversation(conversation: Any) -> tuple[Turn, ...]:
    if not isinstance(conversation, list) or not conversation:
        raise RowError("`conversation` must be a non-empty list of {human, assistant}")
    turns = []
    for number, turn in enumerate(conversation, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} must be an object with `human` and `assistant`")
        human = _text(turn.get("human"), f"turn {number}: `human`")
        turns.append(Turn(human, _text(turn.get("assistant"), f"turn {number}: `assistant`")))
    return tuple(turns)


def _turns_of_messages(messages: Any) -> tuple[str | None, tuple[Turn, ...]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("`messages` must be a list of {role, content}")
    texts = [(m.get("role"), _text(m.get("content"), f"message {i}: `content`")) for i, m in enumerate(messages, 1)]
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowError(f"`messages` must alternate user, assistant after an optional system, got {roles[:6]}")
    return system, tuple(Turn(texts[i][1], texts[i + 1][1]) for i in range(0, len(texts), 2))


def parse_row(data: Any, line: int) -> Row:
    """Row of one decoded JSON value. Raises RowError when it is neither spelling."""
    if not isinstance(data, dict):
        raise RowError("expected a JSON object")
    if "conversation" in data:
        system = data.get("system")
        system = None if system in (None, "") else _text(system, "`system`")
        return Row(line, _turns_of_conversation(data["conversation"]), system)
    if "messages" in data:
        system, turns = _turns_of_messages(data["messages"])
        return Row(line, turns, system)
    raise RowError(
        f"expected the key `conversation` or `messages`, got {', '.join(map(repr, list(data)[:6])) or 'none'}"
    )


def _parse_line(text: str, line: int) -> Row:
    try:
        return parse_row(json.loads(text), line)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None


def iter_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every non-blank line. Raises UserError when they cannot be read."""
    return numbered_lines(path, "a .jsonl file of training rows")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a .jsonl file.

    Raises UserError with the first ten bad lines and their reasons, or when the file has no row at all.
    """
    path, rows, problems = Path(path), [], []
    for line, text in iter_lines(path):
        try:
            rows.append(_parse_line(text, line))
        except RowError as error:
            problems.append(f"{path}:{line}: {error}")
    if problems:
        more = f"\n... and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        shown = "\n".join(problems[:MAX_PROBLEMS_SHOWN])
        counted = f"{len(problems)} of {len(problems) + len(rows)} lines are not rows"
        raise UserError(f"{counted}:\n{shown}{more}\nA row is {SHAPE}.")
    if not rows:
        raise UserError(f"{path}: expected at least one row, found none.")
    return rows
