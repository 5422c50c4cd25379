"""Scores of an evaluation: pure functions of gold and predicted answers."""

from collections.abc import Sequence
from typing import Any

from finetune.statistics import ratio, share
from qwen_qlora.evaluation.answers import INVALID, NEGATIVE, POSITIVE, keywords

CLASSES = (POSITIVE, NEGATIVE)
Confusion = dict[str, dict[str, int]]  # counts by gold class, then predicted class


def confusion_matrix(golds: Sequence[str], predictions: Sequence[str]) -> Confusion:
    """Counts over same, different and invalid on both sides."""
    matrix = {gold: dict.fromkeys((*CLASSES, INVALID), 0) for gold in (*CLASSES, INVALID)}
    for gold, predicted in zip(golds, predictions, strict=True):
        matrix[gold][predicted] += 1
    return matrix


def precision_recall_f1(true_positive: int, predicted: int, actual: int) -> dict[str, float]:
    """The three scores; 0 where nothing was predicted or nothing was there."""
    precision, recall = ratio(true_positive, predicted), ratio(true_positive, actual)
    return {"precision": precision, "recall": recall, "f1": ratio(2 * precision * recall, precision + recall)}


def class_scores(matrix: Confusion) -> dict[str, dict[str, float]]:
    """precision, recall, f1 and the number of rows (support) of each class; an invalid prediction counts as a miss."""
    scores = {}
    for name in CLASSES:
        actual = sum(matrix[name].values())
        predicted = sum(row[name] for row in matrix.values())
        scores[name] = precision_recall_f1(matrix[name][name], predicted, actual) | {"support": actual}
    return scores


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
