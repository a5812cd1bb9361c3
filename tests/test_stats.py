import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.stats import (
    Proportion,
    _half_at_least,
    bootstrap_ratio,
    mcnemar,
    mean_over_runs,
    paired_difference,
    rank_correlation,
)

quick = settings(max_examples=100)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    share = Proportion(successes, n)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)
    assert share.value == successes / n


@quick
@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_value_and_is_a_mirror_image_for_the_failures(n, drawn):
    successes = drawn.draw(st.integers(0, n))
    share, failures = Proportion(successes, n), Proportion(n - successes, n)
    assert 0 <= share.low <= share.value + 1e-12 and share.value - 1e-12 <= share.high <= 1
    assert share.low == pytest.approx(1 - failures.high, abs=1e-12)
    assert Proportion(successes, n, confidence=0.99).high >= share.high - 1e-12


def test_a_proportion_prints_with_its_interval():
    assert str(Proportion(81, 263)) == "30.80% [25.53%, 36.62%]"


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes"):
        Proportion(successes, n)


@quick
@given(fixed=st.integers(0, 40), broke=st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_test(fixed, broke):
    n = fixed + broke
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    as_extreme = sum(p for k, p in enumerate(chance) if abs(k - n / 2) >= abs(fixed - n / 2))
    assert mcnemar(fixed, broke) == pytest.approx(as_extreme) and mcnemar(fixed, broke) <= 1


def test_mcnemar_at_known_counts():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(300, 300) == 1 and mcnemar(300, 400) < 2e-4


def test_impossible_discordant_pairs_are_refused():
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)
    for counts in [(1, 2, 2), (0, 0, 0), (-1, 0, 5)]:
        with pytest.raises(ValueError, match="fixed"):
            paired_difference(*counts)


@quick
@given(fixed=st.integers(0, 50), broke=st.integers(0, 50), others=st.integers(1, 500))
def test_the_paired_interval_holds_the_difference_and_turns_with_the_sides(fixed, broke, others):
    n = fixed + broke + others
    difference, low, high = paired_difference(fixed, broke, n)
    assert difference == (fixed - broke) / n and low <= difference <= high
    assert paired_difference(broke, fixed, n) == pytest.approx((-difference, -high, -low))


def test_the_paired_interval_covers_the_truth_about_95_times_in_100():
    generator = random.Random(0)
    p_fixed, p_broke, n, runs, covered = 0.04, 0.07, 300, 600, 0
    for _ in range(runs):
        draws = [generator.random() for _ in range(n)]
        fixed = sum(d < p_fixed for d in draws)
        broke = sum(p_fixed <= d < p_fixed + p_broke for d in draws)
        _, low, high = paired_difference(fixed, broke, n)
        covered += low <= p_fixed - p_broke <= high
    assert 0.92 <= covered / runs <= 0.98


@pytest.mark.parametrize("fixed, broke, n", [(20, 5, 100), (5, 20, 100), (30, 0, 40), (1, 2, 3)])
def test_the_paired_interval_is_that_of_a_mean_of_signs(fixed, broke, n):
    # Every image is worth +1, -1 or 0, and half an image more of each of the four kinds has been seen.
    signs = {1: fixed + 0.5, -1: broke + 0.5, 0: n - fixed - broke + 1}
    seen = sum(signs.values())
    mean = sum(sign * count for sign, count in signs.items()) / seen
    deviation = math.sqrt(sum(count * (sign - mean) ** 2 for sign, count in signs.items()) / seen)
    expected = (mean - 1.959964 * deviation / math.sqrt(seen), mean + 1.959964 * deviation / math.sqrt(seen))
    assert paired_difference(fixed, broke, n) == pytest.approx(((fixed - broke) / n, *expected), abs=1e-7)


def test_a_sample_against_itself_is_exactly_one():
    times = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert bootstrap_ratio(times, times) == (1.0, 1.0, 1.0)


def test_noise_that_meets_both_samples_in_a_round_cancels():
    generator = random.Random(0)
    noise = [1 + generator.random() for _ in range(60)]
    assert bootstrap_ratio([2 * x for x in noise], noise) == pytest.approx((2, 2, 2))


def test_the_bootstrap_interval_covers_the_ratio_and_narrows_with_more_rounds():
    generator = random.Random(1)

    def interval(n):
        a = [3 * generator.lognormvariate(0, 0.2) for _ in range(n)]
        b = [generator.lognormvariate(0, 0.2) for _ in range(n)]
        ratio, low, high = bootstrap_ratio(a, b)
        assert low <= ratio <= high and low <= 3 <= high
        return high - low

    assert interval(400) < interval(25)


@pytest.mark.parametrize("n", [5, 15, 41])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_ends_are_those_that_resampling_comes_to(n, confidence):
    generator = random.Random(n)
    ratios = sorted(generator.lognormvariate(0, 0.3) for _ in range(n))
    ratio, low, high = bootstrap_ratio(ratios, [1.0] * n, confidence=confidence)
    drawn = torch.tensor(ratios)[torch.randint(n, (40_000, n), generator=torch.Generator().manual_seed(0))]
    medians, tail = drawn.median(1).values.double(), (1 - confidence) / 2

    def below(value):
        return float((medians < value - 1e-6).double().mean())

    inside = ratios[ratios.index(low) + 1]
    # It is the last ratio that leaves no more outside than the tail.
    assert below(low) < tail + 0.003 and below(inside) > tail - 0.003
    assert ratio == ratios[n // 2] and ratios.index(low) == n - 1 - ratios.index(high)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_the_chance_of_at_least_half_is_binomial(n, p):
    expected = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if 2 * k >= n)
    assert _half_at_least(n, p) == pytest.approx(expected, rel=1e-12)


def test_drift_over_the_rounds_does_not_widen_the_interval():
    generator = random.Random(0)
    a, b = ([1 + 0.02 * generator.random() for _ in range(40)] for _ in range(2))
    drift = [1 + i / 20 for i in range(40)]  # three times as slow in the end
    still, moving = (
        bootstrap_ratio(a, b),
        bootstrap_ratio(*([x * d for x, d in zip(s, drift, strict=True)] for s in (a, b))),
    )
    assert moving == pytest.approx(still) and still[1] < still[0] < still[2]


def test_a_wider_confidence_and_fewer_rounds_give_wider_intervals():
    generator = random.Random(2)
    a, b = ([generator.lognormvariate(0, 0.2) for _ in range(40)] for _ in range(2))
    intervals = [bootstrap_ratio(a, b, confidence=c)[1:] for c in (0.8, 0.95, 0.99)]
    assert all(
        outer[0] < inner[0] and inner[1] < outer[1] for inner, outer in zip(intervals, intervals[1:], strict=False)
    )
    assert bootstrap_ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]) == (2, 1, 4)  # all that three rounds can say
    many = [float(i % 7 + 1) for i in range(3000)]
    assert bootstrap_ratio(many, [1.0] * 3000) == (4, 4, 4)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_samples_that_are_no_pairs_are_refused(a, b):
    with pytest.raises(ValueError, match="equal length"):
        bootstrap_ratio(a, b)


def test_a_clock_that_stood_still_is_refused():
    with pytest.raises(ValueError, match="positive"):
        bootstrap_ratio([1.0, 2.0], [0.0, 1.0])


def test_rank_correlation_sees_the_order_alone():
    assert rank_correlation([1, 2, 3, 4], [0.1, 10, 1000, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, -1]) == pytest.approx(-1)
    # Equal values share a rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4, worked out by hand.
    assert rank_correlation([5, 6, 6, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    # Two values are an order, too: ranks 1.5, 1.5, 3.5, 3.5 and 2, 2, 2, 4 against the same.
    assert rank_correlation([0, 0, 1, 1], [1, 2, 3, 4]) == pytest.approx(4 / (4 * 5) ** 0.5)
    assert rank_correlation([1, 2, 3, 4], [7, 7, 7, 8]) == pytest.approx(3 / (5 * 3) ** 0.5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1], [2], "at least 2"),
        ([1, 2], [1, 2, 3], "equal length"),
        ([1, 1], [1, 2], "^a constant sample has no order to compare$"),
        ([1, 2], [1, 1], "^a constant sample has no order to compare$"),
    ],
)
def test_samples_without_an_order_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(a, b)


def test_the_interval_over_runs_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    runs, items, trials, hits = 10, 200, 400, 0
    for _ in range(trials):
        seed_effect = 0.1 * torch.randn(runs, 1, generator=generator)
        item_effect = torch.randn(1, items, generator=generator)
        table = 0.3 + seed_effect + item_effect + torch.randn(runs, items, generator=generator)
        mean, low, high = mean_over_runs(table)
        assert low < mean < high
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / trials <= 0.99


def test_runs_that_agree_leave_the_interval_of_the_items():
    items = torch.tensor([0.0, 1.0, 0.0, 0.0])
    mean, low, high = mean_over_runs(items.repeat(3, 1))
    half = 1.959964 * (items.double().var() / 4).sqrt().item()
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), rel=1e-6)


def test_two_runs_of_two_items_are_enough_and_may_be_whole_numbers():
    # Means of the items 0.5 and 1, of the runs 0.5 and 1: each has the variance 1/8.
    mean, low, high = mean_over_runs([[0, 1], [1, 1]])
    half = 1.959964 * (1 / 16 + 1 / 16) ** 0.5
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half), rel=1e-6)


@pytest.mark.parametrize("table", [[[1.0, 2.0]], [[1.0], [2.0]], [1.0, 2.0]])
def test_too_few_runs_or_items_are_refused(table):
    with pytest.raises(ValueError, match="at least 2 runs and 2 items"):
        mean_over_runs(table)
