"""Latency: callables timed against each other in interleaved rounds, and the tests that such a timing must pass first."""

import gc
import math
import statistics
import time
from dataclasses import dataclass, field

import torch

from .stats import bootstrap_ratio
from .tables import Shown, Table


@dataclass(frozen=True)
class Timing:
    """Latency of one contender over the rounds: `median`, quartiles `q1`, `q3` in milliseconds, all `times` in their order.

    speedup: how many times as fast as the baseline it is (the median over the rounds of the baseline's time in a round
    divided by its own), with its bootstrap interval. items: what one call works on, such as the images of a batch.
    """

    name: str
    median: float
    q1: float
    q3: float
    speedup: float
    speedup_low: float
    speedup_high: float
    times: tuple = field(default=(), repr=False)
    items: int = 1

    @property
    def per_second(self):
        """Items in a second, at the median: the throughput."""
        return 1000 * self.items / self.median


class Timings(Shown, dict):
    """The `Timing` of each contender by name; prints as a table. `rounds`, `threads` and `confidence` say how they were taken."""

    def __init__(self, timings, rounds, threads, confidence=0.95):
        super().__init__((timing.name, timing) for timing in timings)
        self.rounds, self.threads, self.confidence = rounds, threads, confidence

    def table(self):
        """Return the timings as a `Table`, with the items a second where a call works on several."""
        baseline = next(iter(self))
        columns = ["", "median ms", "quartiles", f"speed-up over {baseline}", f"{100 * self.confidence:g} % interval"]
        rows = [
            [
                t.name,
                f"{t.median:.2f}",
                f"{t.q1:.2f} – {t.q3:.2f}",
                f"{t.speedup:.2f}×",
                f"{t.speedup_low:.2f} – {t.speedup_high:.2f}",
            ]
            for t in self.values()
        ]
        if any(t.items > 1 for t in self.values()):
            columns.append("items a second")
            rows = [[*row, f"{t.per_second:,.0f}"] for row, t in zip(rows, self.values(), strict=True)]
        return Table(columns, rows)

    def measurements(self):
        """Return the raw times as a list of `torch.utils.benchmark.Measurement`, which its `Compare` puts into tables.

        Its `Timer` is not what takes them: it times one contender after the other.
        """
        from torch.utils.benchmark.utils.common import Measurement, TaskSpec

        return [
            Measurement(1, [ms / 1000 for ms in t.times], TaskSpec(t.name, "", num_threads=self.threads))
            for t in self.values()
        ]

    def _how(self):
        return f"{self.rounds} interleaved rounds, {self.threads} threads"


def latency(contenders, *, rounds=40, warmup=5, threads=None, mode=torch.no_grad, settle=1, items=1, confidence=0.95):
    """Time callables against each other in interleaved rounds and return their `Timings`; the first is the baseline.

    contenders: dict of name → callable without arguments. Each round calls every contender once, starting one further each
    time, and the other way round every other time through, so that drift and noise of the machine, and what the one before
    leaves behind, meet all of them alike. rounds, warmup: calls of each that count, and that
    do not. threads: torch threads during the timing (default: as they are); engines outside of torch have their own setting.
    mode: what calls run under, `torch.no_grad`, `torch.inference_mode`, or `contextlib.nullcontext` for engines that know
    neither; one for all, or a dict of name → mode (who is not in it gets `torch.no_grad`).
    settle: calls of a contender before each one that counts, as in a service that runs one model again and again. Without any, a
    contender finds the caches full of the weights of the one before, which is the same in most rounds, and its cores shared
    with the other's threads for as long as these wait actively, as those of ONNX Runtime do.
    items: what one call works on, for the throughput. confidence: of the intervals.

    The garbage collector rests meanwhile, as in Python's `timeit`: its pauses would hit whoever happens to run.
    Raises `ValueError` without contenders or with fewer than 3 rounds.
    """
    if not contenders or rounds < 3:
        raise ValueError(f"need at least one contender and 3 rounds, got {len(contenders)} and {rounds}")
    names, orders = list(contenders), _orders(list(contenders))
    modes = {name: mode.get(name, torch.no_grad) if isinstance(mode, dict) else mode for name in names}
    times = {name: [] for name in names}
    threads_before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads or threads_before)
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            for name in orders[index % len(orders)]:
                call = contenders[name]
                with modes[name]():
                    for _ in range(settle):
                        call()
                    began = time.perf_counter_ns()
                    call()
                    took = time.perf_counter_ns() - began
                if index >= 0:
                    times[name].append(took / 1e6)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
        if collecting:
            gc.enable()
    timings = [_timing(name, times[name], times[names[0]], items, confidence) for name in names]
    return Timings(timings, rounds, used, confidence)


def _orders(names):
    """Return the orders of the rounds. Turning alone would leave each behind the same one in nearly all rounds."""
    turned = [names[start:] + names[:start] for start in range(len(names))]
    return turned + [order[::-1] for order in turned]


def _timing(name, times, baseline, items, confidence):
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    ratio = bootstrap_ratio(baseline, times, confidence=confidence)
    return Timing(name, median, q1, q3, *ratio, tuple(times), items)


@dataclass(frozen=True)
class AATest:
    """The same callable timed against itself again and again: how often the interval of the ratio contained 1.

    contained: so often, out of `repeats`. ties: it was as often as `confidence` promises. chance: with which an honest
    interval contains 1 as seldom as that, or more seldom. resolution: half the width of the median interval, as a share: what
    is closer to 1 cannot be told from it today.
    """

    contained: int
    repeats: int
    confidence: float
    resolution: float
    each: tuple = field(default=(), repr=False)

    @property
    def ties(self):
        return self.contained >= math.floor(self.confidence * self.repeats)

    @property
    def chance(self):
        p, n = self.confidence, self.repeats
        return min(1.0, sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(self.contained + 1)))

    def __str__(self):
        counted = f"the {100 * self.confidence:g} % interval contains 1 in {self.contained} of {self.repeats} repeats"
        if self.ties:
            return f"{counted}: A ties with A, and a ratio is told from 1 when it is off by {self.resolution:.1%}"
        if self.chance > 0.05:
            return f"{counted}: one or two too few, as luck has it in {self.chance:.0%} of all tests; test again"
        return (
            f"{counted}: something besides the model differs between two calls (another program, heat, a battery saver), so no "
            "ratio measured now counts; end what else runs and test again"
        )


def aa_test(fn, *, repeats=20, confidence=0.99, **options):
    """Time `fn` against itself and return the `AATest`: what to do before any two different things are compared.

    repeats: how often. options: those of `latency`. confidence: of the intervals, by default more than elsewhere, because a 95 %
    interval misses 1 in one of 20 repeats by its own promise, and in two or more in a quarter of all tests on the best of
    machines; of 99 % intervals two in 20 miss in one test of 60, so that a miss means something.
    """
    each = [latency({"A": fn, "A again": fn}, confidence=confidence, **options) for _ in range(repeats)]
    again = [timings["A again"] for timings in each]
    widths = [t.speedup_high - t.speedup_low for t in again]
    contained = sum(t.speedup_low <= 1 <= t.speedup_high for t in again)
    return AATest(contained, repeats, confidence, statistics.median(widths) / 2, tuple(again))


def overhead(fn, *, calls=40, rounds=10):
    """Return `(share, low, high)`: what `latency` takes beyond each call of `fn`, as a share of it, with its interval.

    What it takes is that of timing an empty function, `calls` times and with all that comes before and after, divided by
    `calls`. (A loop over `fn` itself, with and without `latency`, differs by less than such loops differ among themselves.)
    Raises `ValueError` for fewer than 6 calls, which are two contenders by the 3 rounds that `latency` needs, or 3 rounds.
    """
    if calls < 6 or rounds < 3:
        raise ValueError(f"the overhead takes at least 6 calls and 3 rounds, got {calls} and {rounds}")

    def empty():
        return sum(range(100))  # a microsecond, for clocks that do not see less

    def timed():
        latency({"A": empty, "A again": empty}, rounds=calls // 2, warmup=0, settle=0)

    found = latency({"measure.latency": timed, "call": fn}, rounds=rounds)
    each = [ms / (2 * (calls // 2)) for ms in found["measure.latency"].times]
    return bootstrap_ratio(each, found["call"].times)
