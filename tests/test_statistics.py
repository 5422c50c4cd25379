"""Intervals and tests; expected values computed by hand, from the definitions, or by counting every case."""

import itertools
import math

import pytest

from finetune.statistics import (
    bootstrap_interval,
    compare,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    wilson_interval,
)


def test_wilson_interval_of_the_published_result():
    # 454 of 500 right is the walkthrough's own result
    low, high = wilson_interval(454, 500)
    assert (round(low, 3), round(high, 3)) == (0.879, 0.930)
    # the bounds are the roots of (p - 0.908)^2 = z^2 p (1 - p) / 500
    for bound in (low, high):
        assert (bound - 0.908) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 500, rel=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (0, 0)])
def test_wilson_interval_at_the_ends(hits, total):
    low, high = wilson_interval(hits, total)
    assert 0 <= low < high <= 1
    assert (low == 0) == (hits == 0)
    assert (high == pytest.approx(1)) == (hits == total)


def brute_force_mcnemar(b, c):
    """Share of all 2^(b+c) ways to deal the discordant rows that are at least as uneven as the one seen."""
    deals = itertools.product((0, 1), repeat=b + c)
    return sum(min(sum(d), b + c - sum(d)) <= min(b, c) for d in deals) / 2 ** (b + c)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 1), (0, 6), (1, 8), (3, 9), (5, 5), (4, 7)])
def test_mcnemar_equals_counting_every_deal(b, c):
    assert mcnemar_exact(b, c) == pytest.approx(brute_force_mcnemar(b, c))
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_mcnemar_of_many_rows_does_not_underflow():
    # 1000 against 1100: normal approximation of the same tail with continuity correction
    expected = math.erfc((100 - 1) / math.sqrt(2100) / math.sqrt(2))
    assert mcnemar_exact(1000, 1100) == pytest.approx(expected, rel=0.01)


def test_compare_counts_the_discordant_rows():
    first, second = [True] * 8 + [False] * 2, [True] * 3 + [False] * 5 + [True, False]
    result = compare(first, second)
    assert result["accuracy"]["value"] == 0.8
    assert result["other_accuracy"]["value"] == 0.4
    assert (result["only_this_right"], result["only_other_right"]) == (5, 1)
    assert result["mcnemar_exact_p"] == pytest.approx(2 * (1 + 6) / 64)


def test_holm_by_hand():
    # 4 x 0.01, 3 x 0.02, 2 x 0.03 (kept at the 0.06 before it), 1 x 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_interval_of_a_known_mean():
    # the mean of 400 coins has a standard deviation of 0.5 / 20
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    assert bootstrap_interval(values) == [low, high] != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.25] * 7) == [0.25, 0.25]


def test_paired_bootstrap_sees_a_constant_gain_and_no_other():
    noisy = [float(i % 7) for i in range(70)]
    better = paired_bootstrap([value + 0.1 for value in noisy], noisy)
    assert better["difference"] == pytest.approx(0.1)
    assert better["bootstrap_95"] == pytest.approx([0.1, 0.1])
    assert better["bootstrap_p"] == pytest.approx(2 / 2001)
    same = paired_bootstrap(noisy, noisy)
    assert same["bootstrap_p"] == 1 and same["difference"] == 0
    nothing = paired_bootstrap([0.0] * 50, [1e-78, 1e-155] * 25)  # BLEU of rows that share no 4-gram
    assert nothing["bootstrap_p"] == 1 and nothing["difference"] == 0 and nothing["bootstrap_95"] == [0, 0]
    turned = paired_bootstrap(noisy, noisy[1:] + noisy[:1])
    assert turned["difference"] == pytest.approx(0) and turned["bootstrap_p"] > 0.5
