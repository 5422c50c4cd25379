"""Does the test stand in the training data? Exact questions, and shared runs of 13 characters.

Texts are compared without white space, in NFKC and lower case. A run of 13 characters that stands in more than ten
training rows is a template and proves nothing; 13 and ten are those of the GPT-3 paper (https://arxiv.org/abs/2005.14165,
appendix C), whose units are words.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from finetune.rows import Row

N = 13
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


def runs(text: str) -> Iterator[str]:
    """All runs of N characters of a normalised text."""
    return (text[i : i + N] for i in range(len(text) - N + 1))


def overlap(train: Iterable[Row], questions: Sequence[str], answers: Sequence[str]) -> Overlap:
    """Compare test questions and their gold answers with the training rows, which are read once."""
    asked = [normal(question) for question in questions]
    texts = [[question, normal(answer)] for question, answer in zip(asked, answers, strict=True)]
    lines: dict[str, list[int]] = {run: [] for parts in texts for part in parts for run in runs(part)}
    places: dict[str, int] = {}
    for row in train:
        parts = [normal(message["content"]) for message in row.messages()]
        for turn in row.turns:
            places.setdefault(normal(turn.human), row.line)
        for run in {run for part in parts for run in runs(part) if run in lines}:
            lines[run].append(row.line)
    shared = {i: first for i, parts in enumerate(texts) if (first := _first_shared(parts, lines))}
    exact = [i for i, question in enumerate(asked) if question in places]
    examples = [(i, places[asked[i]], questions[i]) for i in exact]
    examples += [(i, line, run) for i, (run, line) in shared.items() if i not in exact]
    return Overlap(len(asked), tuple(exact), tuple(shared), tuple(examples))


def _first_shared(parts: Sequence[str], lines: dict[str, list[int]]) -> tuple[str, int] | None:
    """The first run that stands in training rows and is no template, and the first of these rows."""
    found = (run for part in parts for run in runs(part) if 0 < len(lines[run]) <= TEMPLATE_ROWS)
    run = next(found, None)
    return (run, lines[run][0]) if run else None
