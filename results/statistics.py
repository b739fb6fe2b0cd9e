"""Paired comparisons of runs of the same seeds: interval, test, and what several of them are worth together.

Two rows of a study have the seeds in common: initial weights, order of images, augmentation. So their difference is
taken seed by seed, and what is the same in both is gone from it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
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
class Paired:
    """Differences seed by seed: their mean, standard deviation, interval of CONFIDENCE, and two-sided p of no
    difference by the paired t test and by sign flips."""

    n: int
    mean: float
    spread: float
    low: float
    high: float
    p: float
    p_flip: float | None

    def interval(self, confidence: float) -> tuple[float, float]:
        """Of the mean, by Student's t; for another confidence than CONFIDENCE."""
        half = t_quantile((1 + confidence) / 2, self.n - 1) * self.spread / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def paired(differences: Sequence[float]) -> Paired | None:
    """None for fewer than two differences, of which nothing can be said."""
    n = len(differences)
    if n < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    error = spread / math.sqrt(n)
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    p = 2 * t_cdf(-abs(mean) / error, n - 1) if error else float(not mean)
    return Paired(n, mean, spread, mean - half, mean + half, p, sign_flip_p(differences))


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
