"""Intervals and tests for small samples, so that no accuracy or ratio is a bare number."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, correlation, median


@dataclass(frozen=True)
class Proportion:
    """`successes` out of `n` with its Wilson interval: `.value`, `.low`, `.high` between 0 and 1.

    Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 1927.
    """

    successes: int
    n: int
    confidence: float = 0.95

    def __post_init__(self):
        if self.n < 1 or not 0 <= self.successes <= self.n:
            raise ValueError(f"need 0 <= successes <= n and n >= 1, got {self.successes} of {self.n}")

    @property
    def value(self):
        return self.successes / self.n

    @property
    def low(self):
        return self._wilson(-1)

    @property
    def high(self):
        return self._wilson(+1)

    def _wilson(self, sign):
        z = NormalDist().inv_cdf((1 + self.confidence) / 2)
        p, n = self.value, self.n
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(1.0, max(0.0, (centre + sign * half) / (1 + z * z / n)))

    def __str__(self):
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]"


def mcnemar(fixed, broke):
    """Return the two-sided exact p-value that two models err equally often, given their discordant pairs.

    fixed, broke: images that only the second / only the first model gets right. With no such image the p-value is 1.
    McNemar, *Note on the sampling error of the difference between correlated proportions or percentages*, 1947.
    """
    if fixed < 0 or broke < 0:
        raise ValueError(f"counts cannot be negative, got {fixed} and {broke}")
    n, k = fixed + broke, min(fixed, broke)
    term = tail = 1  # binomial coefficients of n, one from the last: exact integers
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def paired_difference(fixed, broke, n, confidence=0.95):
    """Return `(difference, low, high)` of two accuracies on the same `n` images, from their discordant pairs.

    Agresti & Min, *Simple improved confidence intervals for comparing matched proportions*, Statistics in Medicine 2005
    (Wald interval after adding half an observation to each of the four cells).
    """
    if n < 1 or fixed < 0 or broke < 0 or fixed + broke > n:
        raise ValueError(f"need fixed + broke <= n, got {fixed} + {broke} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    f, b, m = fixed + 0.5, broke + 0.5, n + 2
    centre = (f - b) / m
    half = z * math.sqrt((f + b) - (f - b) ** 2 / m) / m
    return (fixed - broke) / n, centre - half, centre + half


def mean_over_runs(differences, confidence=0.95):
    """Return `(mean, low, high)` of `differences` `(runs, items)`: one number for each item, such as an image, in each run.

    Both count: other items could have been drawn, and other runs, such as seeds, be made. The variance of the mean is that of
    the items' means over the runs, divided by the items, plus that of the runs' means, divided by the runs; the interval is
    the normal one. With few runs their variance is a rough guess. Raises `ValueError` for fewer than 2 runs or 2 items.
    """
    import torch

    table = torch.as_tensor(differences, dtype=torch.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"need a table of at least 2 runs and 2 items, got shape {tuple(table.shape)}")
    runs, items = table.shape
    variance = table.mean(0).var() / items + table.mean(1).var() / runs
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(float(variance))
    mean = float(table.mean())
    return mean, mean - half, mean + half


def bootstrap_ratio(numerator, denominator, *, confidence=0.95):
    """Return `(ratio, low, high)`: the median ratio of two paired samples (the same rounds), with its bootstrap interval.

    numerator, denominator: sequences of positive numbers of equal length. Each round gives one ratio, so that noise which met
    both in it, and drift over the rounds, cancel before anything is averaged. What resampled rounds would have as their median
    need not be simulated: it is at most the k-th smallest of the n ratios with the chance that at least half of n draws are,
    each with probability k/n (Efron, *Bootstrap Methods: Another Look at the Jackknife*, 1979, section 3). The ends are ratios
    that were seen, the outer ones where two would do, so that the interval holds at least as often as it says.

    Raises `ValueError` for samples of other lengths, empty ones, or numbers that are not positive.
    """
    if len(numerator) != len(denominator) or len(numerator) == 0:
        raise ValueError(f"need two samples of equal length, got {len(numerator)} and {len(denominator)}")
    if min(*numerator, *denominator) <= 0:
        raise ValueError("need positive numbers to take ratios of")
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    n = len(ratios)
    outside = bisect_right(range(1, (n + 1) // 2), (1 - confidence) / 2, key=lambda k: _half_at_least(n, k / n))
    return median(ratios), ratios[outside], ratios[n - 1 - outside]


def _half_at_least(n, p):
    # The chance that at least half of n draws succeed; by logarithms, for factorials of hundreds fit into no float.
    def chance(k):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))

    return sum(chance(k) for k in range((n + 1) // 2, n + 1))


def rank_correlation(first, second):
    """Return Spearman's rank correlation of two samples of equal length: 1 for the same order, −1 for the reverse.

    Equal values share the mean of their ranks. Raises `ValueError` for fewer than two values, unequal lengths, or a sample
    that is constant and so has no order. Spearman, *The Proof and Measurement of Association between Two Things*, 1904.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"need two samples of equal length, at least 2, got {len(first)} and {len(second)}")
    if len(set(first)) == 1 or len(set(second)) == 1:
        raise ValueError("a constant sample has no order to compare")
    return correlation(_ranks(first), _ranks(second))


def _ranks(values):
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
