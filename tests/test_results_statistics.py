"""Intervals and tests of paired differences, against scipy and by their error rates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from results.statistics import (
    Compared,
    Error,
    additive_error,
    compared,
    holm,
    judged,
    paired_error,
    pooled_spread,
    sign_flip_p,
    t_cdf,
    t_quantile,
)

SIGNS = [*itertools.product((1, -1), repeat=3)]


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 6, 9, 10, 29, 30, 101])
def test_students_t_is_scipys(dof: int) -> None:
    for t in (-40.0, -3.0, -0.5, 0.0, 1e-3, 0.7, 2.0, 12.0, 300.0):
        assert t_cdf(t, dof) == pytest.approx(stats.t.cdf(t, dof), rel=1e-9, abs=1e-14)
    for probability in (0.5, 0.6, 0.9, 0.95, 0.975, 0.9995):
        assert t_quantile(probability, dof) == pytest.approx(stats.t.ppf(probability, dof), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_two_rows_are_compared_by_the_paired_t_test(n: int) -> None:
    random = np.random.default_rng(n)
    one, other = random.normal(1, 1, n), random.normal(0, 1, n)
    differences, test = [*(one - other)], stats.ttest_rel(one, other)
    by_rows = compared(differences, additive_error([dict(enumerate(one)), dict(enumerate(other))]))
    alone = compared(differences, paired_error(differences))
    for ours in (by_rows, alone):
        assert (ours.n, ours.mean, ours.dof) == (n, pytest.approx(np.mean(one - other)), n - 1)
        assert ours.p == pytest.approx(test.pvalue, rel=1e-9)
        assert ours.interval == pytest.approx([*test.confidence_interval(0.95)], rel=1e-9)
    flipped = stats.permutation_test(
        (one - other,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert by_rows.p_flip == pytest.approx(flipped.pvalue, abs=1e-12)


def test_an_equality_is_two_one_sided_tests() -> None:
    differences = [0.1, -0.2, 0.3, 0.0, 0.05]
    ours = compared(differences, paired_error(differences))
    below = stats.ttest_1samp(differences, 0.5, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    assert ours.p_within(0.5) == pytest.approx(max(below, above), rel=1e-9)
    far = compared([d + 2 for d in differences], paired_error(differences))
    assert far.p_beyond(0.5) == pytest.approx(stats.ttest_1samp([d + 2 for d in differences], 0.5).pvalue, rel=1e-9)
    assert far.p_within(0.5) > 0.99


def test_the_error_is_what_rows_and_seeds_leave() -> None:
    """In a table without gaps it is the residual of the two-way analysis of variance."""
    random = np.random.default_rng(3)
    table = random.normal(size=(4, 5)) + 10 * random.normal(size=(4, 1)) + 10 * random.normal(size=(1, 5))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    error = additive_error([dict(enumerate(row)) for row in table])
    assert error.dof == 3 * 4 and error.spread == pytest.approx(math.sqrt((rest**2).sum() / 12))
    exact = additive_error([{0: 1.0, 1: 4.0}, {0: 2.0, 1: 5.0}, {1: 9.0}])  # with a gap, and no chance at all
    assert (exact.spread, exact.dof) == (0.0, 1)
    assert additive_error([]) is None and additive_error([{0: 1.0}, {0: 2.0}]) is None


def test_what_can_be_said_of_few_and_of_equal_differences() -> None:
    some, none = Error(1.0, 4), Error(0.0, 4)
    assert compared([], some) is None and compared([1.0], some) is None and compared([1.0, 2.0], None) is None
    assert compared([0.5, 0.5], some) == Compared(2, 0.5, 1.0, 4, 0.5)
    # Runs that differ by a constant alone say nothing of chance; t would be infinite. Figures are rounded binary.
    equal = [70.3 - 70.1, 60.3 - 60.1, 50.3 - 50.1]
    assert compared(equal, none) is None and compared(equal, paired_error(equal)) is None
    assert len({*equal}) > 1 and compared([0.0, 0.0], paired_error([0.0, 0.0])) is None
    assert compared([*equal, 0.2001], paired_error([*equal, 0.2001])) is not None  # the control
    assert sign_flip_p([1.0] * 5) == 2 / 2**5
    assert sign_flip_p([0.1, 0.2, 0.3, -0.6]) == 1.0
    assert sign_flip_p([1.0] * 21) is None
    by_hand = [sum(s * d for s, d in zip(signs, (3.0, 1.0, -0.5), strict=True)) for signs in SIGNS]
    assert sign_flip_p([3.0, 1.0, -0.5]) == np.mean(np.abs(by_hand) >= 3.5)


def test_intervals_hold_what_they_promise() -> None:
    """Of rows with gaps and of means of several rows; seeds add much to all rows."""
    random = np.random.default_rng(0)
    effects, held, narrow = np.array([1.0, 0.5, 0.0, -0.5]), 0, 0
    for _ in range(1000):
        table = effects[:, None] + 5 * random.normal(size=(1, 4)) + random.normal(size=(4, 4))
        rows = [dict(enumerate(row)) for row in table]
        del rows[3][3]
        differences = [*((table[0] + table[1]) / 2 - table[3])[:3]]
        ours = compared(differences, additive_error(rows), weight=1.5)
        held += ours.interval[0] <= 1.25 <= ours.interval[1]
        wrong = compared(differences, additive_error(rows), weight=0.75)
        narrow += wrong.interval[0] <= 1.25 <= wrong.interval[1]
    deviation = math.sqrt(1000 * 0.95 * 0.05)
    assert abs(held - 950) < 4 * deviation
    assert abs(narrow - 950) > 4 * deviation  # the control: another weight


def test_rows_that_vary_more_are_judged_by_themselves() -> None:
    wild, calm = [4.0, 2.5, -1.0, 2.5, 2.0], [2.1, 1.9, 2.0, 2.05, 1.95]
    error, others = Error(0.3, 12), Error(0.1, 6)
    assert judged(calm, error, others) == compared(calm, error)
    alone = judged(wild, error, others)
    assert alone.alone and alone.p == pytest.approx(stats.ttest_1samp(wild, 0).pvalue, rel=1e-9)
    assert judged(wild, error, None) == compared(wild, error) and judged([1.0], error, others) is None
    # At the border, and with the weight of a mean of several rows.
    spread = paired_error(wild).spread
    assert not judged(wild, error, Error(spread * 1.001, 6)).alone
    assert judged(wild, error, Error(spread * 0.999, 6)).alone
    assert judged(wild, error, Error(spread * 1.001, 6), weight=1.0).alone


def test_rows_that_vary_more_by_nature_are_seldom_taken_for_different() -> None:
    """Equal rows of which one varies thrice as much as 18 others, three seeds: the interval misses 0 in 5 to 9 %."""
    random = np.random.default_rng(4)
    found = pooled = 0
    for _ in range(1000):
        table = random.normal(size=(20, 3)) + 5 * random.normal(size=(1, 3))
        table[1] = 3 * random.normal(size=3) + table[0] - random.normal(size=3)
        error, others = (additive_error([dict(enumerate(row)) for row in rows]) for rows in (table, table[2:]))
        differences = [*(table[1] - table[0])]
        found += judged(differences, error, others).p < 0.05
        pooled += compared(differences, error).p < 0.05
    assert found < 90 and pooled > 200  # the control: the error of all rows


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
