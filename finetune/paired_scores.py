"""The scores of one test before and after fine-tuning, paired row by row.

Records are JSON lines with row, prompt, gold, predicted, and either correct (true or false) or bleu (0 to 1); a record
may have a domain. Every evaluation here writes such a file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.answer_way import check_same_way, read_way, way_of
from finetune.errors import UserError
from finetune.statistics import SIGNIFICANT, bootstrap_interval, compare, holm, mean, paired_bootstrap
from finetune.text_files import read_json_lines

Record = dict[str, Any]
ASKED = ("row", "prompt", "gold")  # of a record, known before it is answered


@dataclass(frozen=True)
class Score:
    """One test's records before and after."""

    name: str
    before: list[Record]
    after: list[Record]


@dataclass(frozen=True)
class Difference:
    """Mean scores before and after on the same rows (0 to 1), their 95 % intervals, and the p of no difference."""

    name: str
    num_rows: int
    before: float
    after: float
    before_95: tuple[float, float]
    after_95: tuple[float, float]
    p: float
    test: str

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before


def read_records(path: Path) -> list[Record]:
    """Raises UserError when the file is missing or holds something else."""
    try:
        records = read_json_lines(path)
        if records and all({"row", "prompt", "gold", "predicted"} <= set(r) and score_key(r) for r in records):
            return records
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the records of an evaluation (.jsonl), but {error}") from None
    raise UserError(f"{path}: expected the records of an evaluation, JSON lines with row, prompt, gold, predicted.")


def score_key(record: Record) -> str | None:
    """Which of its keys is the score."""
    return next((key for key in ("correct", "bleu") if key in record), None)


def check_same_rows(first: Sequence[Record], second: Sequence[Record], name: str) -> None:
    """Raise UserError unless both are of the same questions, and of one kind of score where they have one already."""
    asked, others = ([[record.get(key) for key in ASKED] for record in records] for records in (first, second))
    kinds = {score_key(record) for record in (*first, *second)} - {None}
    if asked != others or len(kinds) > 1:
        raise UserError(
            f"{name}: expected the same questions for both models, found {len(first)} and {len(second)} that differ. "
            "Evaluate both on one set of data with one limit."
        )


def check_comparable(
    asked: Sequence[Record], config: dict[str, Any], others: Sequence[Record], path: Path, name: str
) -> None:
    """Raise UserError unless a run of these rows and this configuration can be compared with the records of a file.

    To be called before the hours of work.
    """
    check_same_rows(asked, others, name)
    check_same_way(way_of(config), read_way(path), name)


def difference(name: str, before: Sequence[Record], after: Sequence[Record]) -> Difference:
    """McNemar's exact test for right and wrong answers, the paired bootstrap for other scores."""
    key = score_key(before[0])
    first, second = [record[key] for record in before], [record[key] for record in after]
    if key == "correct":
        found = compare(second, first)
        intervals = [tuple(found[side]["wilson_95"]) for side in ("other_accuracy", "accuracy")]
        return Difference(name, len(first), mean(first), mean(second), *intervals, found["mcnemar_exact_p"], "McNemar")
    p = paired_bootstrap(second, first)["bootstrap_p"]
    intervals = [tuple(bootstrap_interval(values)) for values in (first, second)]
    return Difference(name, len(first), mean(first), mean(second), *intervals, p, "paired bootstrap")


def by_domain(name: str, before: Sequence[Record], after: Sequence[Record]) -> list[Difference]:
    """A difference for each domain, where the records have some; p adjusted by Holm's method over them."""
    domains = list(dict.fromkeys(record["domain"] for record in before if "domain" in record))
    parts = [
        difference(
            f"{name}, {domain}",
            [record for record in before if record["domain"] == domain],
            [record for record in after if record["domain"] == domain],
        )
        for domain in domains
    ]
    return adjusted(parts)


def adjusted(differences: Sequence[Difference]) -> list[Difference]:
    """The same with p adjusted for all of them (Holm)."""
    p_values = holm([entry.p for entry in differences])
    return [Difference(**(vars(entry) | {"p": p})) for entry, p in zip(differences, p_values, strict=True)]


def verdict(entry: Difference) -> str:
    """better, worse, or that chance explains it: no winner is named inside the noise."""
    if entry.p >= SIGNIFICANT or entry.change == 0:
        return "no difference beyond chance"
    return "better" if entry.change > 0 else "worse"


def samples(before: Sequence[Record], after: Sequence[Record], count: int) -> list[tuple[Record, Record]]:
    """`count` pairs chosen by a hash of the row, so neither for nor against a model."""
    pairs = list(zip(before, after, strict=True))
    by_hash = sorted(pairs, key=lambda pair: hashlib.sha256(f"sample {pair[0]['row']}".encode()).digest())
    return sorted(by_hash[:count], key=lambda pair: pairs.index(pair))
