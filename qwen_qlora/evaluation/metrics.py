"""Scores of an evaluation: pure functions of gold and predicted answers."""

import math
from collections.abc import Sequence
from typing import Any

from qwen_qlora.evaluation.answers import INVALID, NEGATIVE, POSITIVE, keywords

CLASSES = (POSITIVE, NEGATIVE)
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
Confusion = dict[str, dict[str, int]]  # counts by gold class, then predicted class


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # exact at the ends, where centre and half are equal but for rounding
    return (centre - half if hits else 0.0), (centre + half if hits < total else 1.0)


def confusion_matrix(golds: Sequence[str], predictions: Sequence[str]) -> Confusion:
    """Counts over same, different and invalid on both sides."""
    matrix = {gold: dict.fromkeys((*CLASSES, INVALID), 0) for gold in (*CLASSES, INVALID)}
    for gold, predicted in zip(golds, predictions, strict=True):
        matrix[gold][predicted] += 1
    return matrix


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def precision_recall_f1(true_positive: int, predicted: int, actual: int) -> dict[str, float]:
    """The three scores; 0 where nothing was predicted or nothing was there."""
    precision, recall = _ratio(true_positive, predicted), _ratio(true_positive, actual)
    return {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}


def class_scores(matrix: Confusion) -> dict[str, dict[str, float]]:
    """precision, recall, f1 and the number of rows (support) of each class; an invalid prediction counts as a miss."""
    scores = {}
    for name in CLASSES:
        actual = sum(matrix[name].values())
        predicted = sum(row[name] for row in matrix.values())
        scores[name] = precision_recall_f1(matrix[name][name], predicted, actual) | {"support": actual}
    return scores


def share(hits: int, total: int) -> dict[str, Any]:
    """A proportion with its counts and its 95 % interval."""
    return {
        "value": _ratio(hits, total),
        "correct": hits,
        "total": total,
        "wilson_95": list(wilson_interval(hits, total)),
    }


def classification_report(golds: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """Accuracy with interval, scores by class and their mean, the confusion matrix, the number of invalid answers."""
    matrix = confusion_matrix(golds, predictions)
    by_class = class_scores(matrix)
    return {
        "accuracy": share(sum(matrix[name][name] for name in CLASSES), len(golds)),
        "by_class": by_class,
        "macro_f1": sum(scores["f1"] for scores in by_class.values()) / len(by_class),
        "confusion": matrix,
        "invalid": sum(row[INVALID] for row in matrix.values()),
    }


def keyword_report(golds: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """precision, recall and F1 over the sets of 、-separated keywords, all rows counted together (micro average)."""
    pairs = [(keywords(gold), keywords(predicted)) for gold, predicted in zip(golds, predictions, strict=True)]
    found = sum(len(gold & predicted) for gold, predicted in pairs)
    named, wanted = sum(len(predicted) for _, predicted in pairs), sum(len(gold) for gold, _ in pairs)
    counts = {"rows": len(pairs), "found": found, "predicted": named, "gold": wanted}
    return precision_recall_f1(found, named, wanted) | counts


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test, from the rows that only one of two models has right.

    Under "no difference" each such row is a fair coin: p = min(1, 2 P(X <= smaller)), X ~ Binomial(n, 1/2).
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    # whole numbers: 2.0 ** -n underflows for n > 1074
    tail = sum(math.comb(n, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Both accuracies and McNemar's exact test over the same rows in the same order."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return {
        "accuracy": share(sum(first), len(first)),
        "other_accuracy": share(sum(second), len(second)),
        "only_this_right": only_first,
        "only_other_right": only_second,
        "mcnemar_exact_p": mcnemar_exact(only_first, only_second),
    }
