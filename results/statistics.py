"""Comparisons of runs of the same seeds: interval, tests, and what several of them are worth together.

The rows of a study have the seeds in common: initial weights, order of images, augmentation. So differences are taken
seed by seed, and what a seed adds to all rows is gone from them. How far such a difference strays is estimated from all
rows together, by the model

    figure of a row and a seed = row + seed + error,    errors of one variance

since the three or five differences of two rows alone say little of it. With two rows that is the paired t test. Where
the differences of rows vary more than the others do, the model may not hold for them, and they are judged by those
differences alone. That guards a row whose figures vary more by nature, and not completely: three seeds may show little
of it. tests/test_results_statistics.py bounds how often such a row is found different from an equal one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of the largest difference: less than that is none
MOST_FLIPPED = 20  # differences of which all sign flips are looked at


def t_cdf(t: float, dof: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom, by its finite series (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(dof))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if dof % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, dof - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        inner = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, dof, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        inner = sine * total
    return 0.5 * (1 + inner)


def t_quantile(probability: float, dof: int) -> float:
    """The t below which Student's t lies with a probability from 0.5 to 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a mean so far from 0, were each difference as likely with the other sign: over all 2^n of them.

    It takes the differences to be symmetric about 0 and no more; its smallest value is 2 / 2^n. None for more than
    MOST_FLIPPED differences.
    """
    if len(differences) > MOST_FLIPPED:
        return None
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    scale = sum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9 * scale))


@dataclass(frozen=True)
class Error:
    """The standard deviation of a run that row and seed do not account for, and its degrees of freedom."""

    spread: float
    dof: int


def additive_error(rows: Sequence[Mapping[int, float]]) -> Error | None:
    """By least squares, from the figures of several rows by seed; None where they leave no degree of freedom."""
    cells = [(place, seed, value) for place, row in enumerate(rows) for seed, value in sorted(row.items())]
    if not cells:
        return None
    seeds = {seed: len(rows) + place for place, seed in enumerate(sorted({seed for _, seed, _ in cells}))}
    design, values = np.zeros((len(cells), len(rows) + len(seeds))), np.array([value for *_, value in cells])
    for line, (place, seed, _) in enumerate(cells):
        design[line, [place, seeds[seed]]] = 1.0
    solution, _, rank, _ = np.linalg.lstsq(design, values)
    dof = len(cells) - int(rank)
    if dof < 1:
        return None
    squares = float(np.sum((values - design @ solution) ** 2))
    scale = float(np.sum(values**2))
    return Error(math.sqrt(squares / dof) if squares > 1e-20 * scale else 0.0, dof)


@dataclass(frozen=True)
class Compared:
    """Differences of two sides, seed by seed: their number and mean, its standard error and degrees of freedom, and the
    two-sided p of no difference by sign flips."""

    n: int
    mean: float
    error: float
    dof: int
    p_flip: float | None
    alone: bool = False  # whether the error is estimated from these differences and no others

    @property
    def p(self) -> float:
        """Two-sided p of no difference, by Student's t."""
        return self.p_other_than(0.0)

    def p_beyond(self, margin: float) -> float:
        """Two-sided p of a difference of `margin` at most, either way, where the mean lies beyond it."""
        outside = abs(self.mean) - margin
        return min(1.0, 2 * t_cdf(-outside / self.error, self.dof))

    def p_other_than(self, expected: float) -> float:
        """Two-sided p of a difference of `expected`."""
        return min(1.0, 2 * t_cdf(-abs(self.mean - expected) / self.error, self.dof))

    def p_within(self, margin: float) -> float:
        """p of a difference of `margin` at least, by two one-sided tests."""
        outside = abs(self.mean) - margin
        return t_cdf(outside / self.error, self.dof)

    @property
    def interval(self) -> tuple[float, float]:
        """That of CONFIDENCE, by Student's t."""
        half = t_quantile((1 + CONFIDENCE) / 2, self.dof) * self.error
        return self.mean - half, self.mean + half


def compared(differences: Sequence[float], error: Error | None, weight: float = 2.0) -> Compared | None:
    """None for fewer than two differences, of which nothing can be said, and where nothing is known of the error: there
    is none of runs that are all alike but for a constant, which is what seeds without an effect leave.

    weight: the variance of a difference over that of a run, 1/k + 1/m for a mean of k rows less one of m.
    """
    n = len(differences)
    if n < 2 or error is None or not error.spread:
        return None
    mean = statistics.fmean(differences)
    return Compared(n, mean, error.spread * math.sqrt(weight / n), error.dof, sign_flip_p(differences))


def judged(
    differences: Sequence[float], error: Error | None, of_others: Error | None, weight: float = 2.0
) -> Compared | None:
    """`compared` by the error of all rows or, where these differences vary more than the others, by their own."""
    alone = paired_error(differences)
    if alone is not None and of_others is not None and 2 * alone.spread**2 > weight * of_others.spread**2:
        return replace(compared(differences, alone), alone=True)
    return compared(differences, error, weight)


def paired_error(differences: Sequence[float]) -> Error | None:
    """The same of two rows by their differences alone: `compared` is then the paired t test, for a weight of 2."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    spread = spread if spread > ROUNDING * max(map(abs, differences)) else 0.0
    return Error(spread / math.sqrt(2), len(differences) - 1)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979): below alpha, the chance of one false finding among all is too."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = largest
    return adjusted


def pooled_spread(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, over their degrees of freedom; None where no group has two values."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))
