"""Does the test stand in the training data? Exact questions, and shared runs of 13 characters.

Texts are compared without white space, in NFKC and lower case. What an instruction template puts into every row proves
nothing: characters of a test text that stand within a run of six which more than ten training rows have are left out,
and only what is between them is compared. 13 and ten are those of the GPT-3 paper
(https://arxiv.org/abs/2005.14165, appendix C), whose units are words; six is chosen here.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from finetune.rows import Row

N = 13
TEMPLATE_N = 6
TEMPLATE_ROWS = 10


@dataclass(frozen=True)
class Overlap:
    """Numbers of test texts: all, those whose question is a training question, those that share a run; and examples."""

    total: int
    exact: tuple[int, ...]
    shared: tuple[int, ...]
    examples: tuple[tuple[int, int, str], ...]  # (test text, line of the training file, what they share)


def normal(text: str) -> str:
    """The text as it is compared."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def runs(text: str, length: int = N) -> Iterator[str]:
    """All runs of `length` characters of a normalised text."""
    return (text[i : i + length] for i in range(len(text) - length + 1))


def overlap(train: Sequence[Row], questions: Sequence[str], answers: Sequence[str]) -> Overlap:
    """Compare test questions and their gold answers with the training rows."""
    asked = [normal(question) for question in questions]
    texts = [[question, normal(answer)] for question, answer in zip(asked, answers, strict=True)]
    trained = [(row.line, [normal(message["content"]) for message in row.messages()]) for row in train]
    template = _template(trained, {run for parts in texts for part in parts for run in runs(part, TEMPLATE_N)})
    contents = [[piece for part in parts for piece in _without(part, template)] for parts in texts]
    lines = _lines(trained, {run for pieces in contents for piece in pieces for run in runs(piece)})
    shared = {}
    for i, pieces in enumerate(contents):
        run = next((run for piece in pieces for run in runs(piece) if run in lines), None)
        if run:
            shared[i] = (run, lines[run])
    places = {normal(turn.human): row.line for row in reversed(train) for turn in reversed(row.turns)}
    exact = [i for i, question in enumerate(asked) if question in places]
    examples = [(i, places[asked[i]], questions[i]) for i in exact]
    examples += [(i, line, run) for i, (run, line) in shared.items() if i not in exact]
    return Overlap(len(asked), tuple(exact), tuple(shared), tuple(examples))


def _template(trained: Iterable[tuple[int, list[str]]], wanted: set[str]) -> set[str]:
    """Those of the wanted runs that more than TEMPLATE_ROWS rows have."""
    rows: Counter[str] = Counter()
    for _, parts in trained:
        rows.update({run for part in parts for run in runs(part, TEMPLATE_N) if run in wanted})
    return {run for run, count in rows.items() if count > TEMPLATE_ROWS}


def _without(text: str, template: set[str]) -> list[str]:
    """The pieces of a text between the runs of the template."""
    kept = list(text)
    for i, run in enumerate(runs(text, TEMPLATE_N)):
        if run in template:
            kept[i : i + TEMPLATE_N] = "\0" * TEMPLATE_N
    return [piece for piece in "".join(kept).split("\0") if piece]


def _lines(trained: Iterable[tuple[int, list[str]]], wanted: set[str]) -> dict[str, int]:
    """The first line that has each of the wanted runs."""
    lines: dict[str, int] = {}
    for line, parts in trained:
        for part in parts:
            for run in runs(part):
                if run in wanted:
                    lines.setdefault(run, line)
    return lines
