"""What a score is worth: intervals of a proportion or a mean, and tests between two models over the same rows.

Pure functions of counts and lists; nothing here knows what was asked.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
NUM_RESAMPLES = 2000
SIGNIFICANT = 0.05  # below this p a difference counts as one
SMALLEST = 1e-9  # a smaller difference is none: BLEU without a common 4-gram is 1e-78 or 1e-155 and means 0


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing to divide by."""
    return part / whole if whole else 0.0


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, 0 of nothing."""
    return ratio(math.fsum(values), len(values))


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # exact at the ends, where centre and half are equal but for rounding
    return (centre - half if hits else 0.0), (centre + half if hits < total else 1.0)


def share(hits: int, total: int) -> dict[str, Any]:
    """A proportion with its counts and its 95 % interval."""
    return {
        "value": ratio(hits, total),
        "correct": hits,
        "total": total,
        "wilson_95": list(wilson_interval(hits, total)),
    }


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


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing all of them at once (Holm's step-down method), in their order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def resampled_means(values: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> list[float]:
    """Means of samples drawn from the values with replacement, each as large as they are, in ascending order."""
    source = random.Random(seed)
    return sorted(mean(source.choices(values, k=len(values))) for _ in range(num_resamples))


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of the mean; the same for the same values and seed."""
    means = resampled_means(values, seed)
    return [means[round(0.025 * (len(means) - 1))], means[round(0.975 * (len(means) - 1))]]


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean difference first - second over the same rows, its bootstrap interval and two-sided p.

    p counts the resamples on the other side of no difference; one is added to both counts, so it is never 0.
    """
    differences = [a - b if abs(a - b) >= SMALLEST else 0.0 for a, b in zip(first, second, strict=True)]
    means = resampled_means(differences, seed)
    below, above = sum(value <= 0 for value in means), sum(value >= 0 for value in means)
    return {
        "difference": mean(differences),
        "bootstrap_95": bootstrap_interval(differences, seed),
        "bootstrap_p": min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1)),
        "resamples": len(means),
    }
