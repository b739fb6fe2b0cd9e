"""Intervals and tests of paired differences, against scipy and by their error rates."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from results.statistics import Paired, holm, paired, pooled_spread, sign_flip_p, t_cdf, t_quantile


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 6, 9, 10, 29, 30, 101])
def test_students_t_is_scipys(dof: int) -> None:
    for t in (-40.0, -3.0, -0.5, 0.0, 1e-3, 0.7, 2.0, 12.0, 300.0):
        assert t_cdf(t, dof) == pytest.approx(stats.t.cdf(t, dof), rel=1e-9, abs=1e-14)
    for probability in (0.5, 0.6, 0.9, 0.95, 0.975, 0.9995):
        assert t_quantile(probability, dof) == pytest.approx(stats.t.ppf(probability, dof), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_a_paired_comparison_is_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    one, other = random.normal(1, 1, n), random.normal(0, 1, n)
    ours, test = paired([*(one - other)]), stats.ttest_rel(one, other)
    interval = test.confidence_interval(0.95)
    assert ours.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert ours.interval(0.95) == pytest.approx((ours.low, ours.high), rel=1e-12)
    assert ours.interval(0.9) == pytest.approx([*test.confidence_interval(0.9)], rel=1e-9)
    assert (ours.n, ours.mean, ours.spread) == (n, statistics.fmean(one - other), statistics.stdev(one - other))
    flipped = stats.permutation_test(
        (one - other,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    by_hand = [
        sum(s * d for s, d in zip(signs, one - other, strict=True)) for signs in itertools.product((1, -1), repeat=n)
    ]
    share = np.mean([abs(total) >= abs(sum(one - other)) - 1e-9 for total in by_hand])
    assert ours.p_flip == share
    assert flipped.pvalue == pytest.approx(share, abs=1e-12)


def test_what_can_be_said_of_few_and_of_equal_differences() -> None:
    assert paired([]) is None and paired([1.0]) is None
    assert paired([0.5, 0.5]) == Paired(2, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5)
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert sign_flip_p([1.0] * 5) == 2 / 2**5
    assert sign_flip_p([0.1, 0.2, 0.3, -0.6]) == 1.0
    assert sign_flip_p([1.0] * 21) is None


def test_intervals_hold_what_they_promise() -> None:
    random = np.random.default_rng(0)
    found = [paired([*random.normal(0.3, 1, 5)]) for _ in range(2000)]
    held = sum(one.low <= 0.3 <= one.high for one in found)
    expected, deviation = 0.95 * 2000, math.sqrt(2000 * 0.95 * 0.05)
    assert abs(held - expected) < 4 * deviation
    assert abs(sum(one.low <= 0.6 <= one.high for one in found) - expected) > 4 * deviation  # the control


def test_holm_is_stepwise() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.04]) == [0.04]
    random = np.random.default_rng(1)
    any_found = np.mean([min(holm([*random.uniform(size=15)])) < 0.05 for _ in range(2000)])
    assert any_found < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean([min(random.uniform(size=15)) < 0.05 for _ in range(2000)]) > 0.4  # the control: unadjusted


def test_spread_is_pooled_over_groups() -> None:
    assert pooled_spread([[1.0, 3.0], [10.0, 10.0, 10.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert pooled_spread([[1.0], [2.0]]) is None
    assert pooled_spread([[1.0, 2.0], [5.0]]) == pytest.approx(math.sqrt(0.5))
