"""Latency on a clock of the test's own: who is called when, under what, and whether the intervals hold what they promise."""

import contextlib
import gc
import math
import sys
import time

import pytest
import torch

from course_utils import timing


class Clock:
    """A clock that calls move on: each by the next of `noise`, times the seconds that the callable takes."""

    def __init__(self, monkeypatch, noise):
        self.now, self.noise = 0, iter(noise)
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)

    def takes(self, milliseconds):
        def call():
            self.now += round(milliseconds * next(self.noise) * 1e6)

        return call


def test_contenders_take_turns_in_starting_a_round():
    calls = []
    contenders = {name: lambda name=name: calls.append((name, torch.is_grad_enabled())) for name in "abc"}
    found = timing.latency(contenders, rounds=4, warmup=2, settle=0)
    rounds = ["".join(name for name, _ in calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["acb", "bac", "abc", "bca", "cab", "cba"]
    assert not any(gradients for _, gradients in calls)
    assert list(found) == ["a", "b", "c"] and found.rounds == 4


def test_latency_is_the_median_of_the_rounds_after_the_warm_up(monkeypatch):
    clock = {"now": 0}
    spent = {"slow": iter([900] + [4, 4, 40, 4, 4]), "quick": iter([900] + [1, 1, 10, 1, 1])}

    def contender(name):
        clock["now"] += next(spent[name]) * 1_000_000

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock["now"])
    contenders = {"slow": lambda: contender("slow"), "quick": lambda: contender("quick")}
    found = timing.latency(contenders, rounds=5, warmup=1, settle=0)
    assert (found["slow"].q1, found["slow"].median, found["slow"].q3) == (4, 4, 4)
    assert found["slow"].speedup == 1
    quick = found["quick"]
    assert (quick.median, quick.speedup, quick.speedup_low, quick.speedup_high) == (1, 4, 4, 4)
    assert found.table().rows[1] == ["quick", "1.00", "1.00 – 1.00", "4.00×", "4.00 – 4.00"]
    assert "5 interleaved rounds" in str(found) and "5 interleaved rounds" in found._repr_markdown_()


def test_threads_are_set_during_the_timing_only():
    before = torch.get_num_threads()
    used = []
    found = timing.latency(
        {"a": lambda: used.append(torch.get_num_threads())}, rounds=3, warmup=0, threads=before + 1, settle=0
    )
    assert used == [before + 1] * 3 and found.threads == before + 1
    assert torch.get_num_threads() == before


def test_threads_and_gradients_are_restored_when_a_contender_fails():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        timing.latency({"a": lambda: 1 / 0}, threads=before + 1)
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


@pytest.mark.parametrize(("contenders", "rounds"), [({}, 40), ({"a": print}, 2)])
def test_too_little_to_time_is_refused(contenders, rounds):
    with pytest.raises(ValueError, match="contender"):
        timing.latency(contenders, rounds=rounds)


def test_calls_run_under_the_mode_that_they_are_given():
    seen = {}

    def note(name):
        return lambda: seen.setdefault(name, (torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    contenders = {name: note(name) for name in ("usual", "inference", "none")}
    modes = {"inference": torch.inference_mode, "none": contextlib.nullcontext}
    timing.latency(contenders, rounds=3, mode=modes)
    assert seen == {"usual": (False, False), "inference": (False, True), "none": (True, False)}
    seen.clear()
    timing.latency(contenders, rounds=3, mode=torch.inference_mode)
    assert set(seen.values()) == {(False, True)}


def test_nobody_always_follows_the_same_contender():
    orders = timing._orders(["a", "b", "c"])
    for place in range(3):
        assert [order[place] for order in orders].count("a") == 2
    pairs = [(order[i], order[i + 1]) for order in orders for i in range(2)]
    assert sorted(pairs) == sorted(2 * [(a, b) for a in "abc" for b in "abc" if a != b])


def test_a_contender_can_settle_before_each_call_that_counts(monkeypatch):
    clock = Clock(monkeypatch, [7, 1, 9, 2] + [9, 2, 7, 1] + [9, 2, 7, 1])
    found = timing.latency({"a": clock.takes(1), "b": clock.takes(1)}, rounds=3, warmup=0, settle=1)
    assert found["a"].times == (1, 1, 1) and found["b"].times == (2, 2, 2)


def test_throughput_is_items_by_time(monkeypatch):
    clock = Clock(monkeypatch, [1] * 100)
    found = timing.latency({"slow": clock.takes(20), "quick": clock.takes(4)}, rounds=3, items=32)
    assert (found["slow"].per_second, found["quick"].per_second) == (1600, 8000)
    assert found.table().columns[-1] == "items a second" and found.table().rows[1][-1] == "8,000"


def test_the_garbage_collector_rests_during_the_timing_only():
    collecting = []
    timing.latency({"a": lambda: collecting.append(gc.isenabled())}, rounds=3, warmup=1, settle=0)
    assert collecting == [False] * 4 and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.latency({"a": lambda: 1 / 0}, settle=0)
    assert gc.isenabled()
    gc.disable()
    try:
        timing.latency({"a": lambda: None}, rounds=3, settle=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_raw_times_are_kept_in_their_order_and_torchs_own_tools_take_them(monkeypatch):
    clock = Clock(monkeypatch, [9] + [3, 1, 2, 8] + [2] * 6)
    found = timing.latency({"a": clock.takes(1)}, rounds=4, warmup=1, settle=0)
    assert found["a"].times == (3, 1, 2, 8)
    (measurement,) = found.measurements()
    assert measurement.median == pytest.approx(0.0025) and measurement.num_threads == found.threads
    more = timing.latency({"a": clock.takes(1), "b": clock.takes(2)}, rounds=3, warmup=0, settle=0).measurements()
    assert [m.median for m in more] == pytest.approx([0.002, 0.004])


def noise(kind, generator):
    """Yield what a machine does to one call after another, as factors: common and rare hindrances, drift, moods that last."""
    mood, call = 0.0, 0
    slow = False
    while True:
        normal, rare, size, change = (float(torch.rand((), generator=generator)) for _ in range(4))
        factor = 1 + 0.03 * normal
        if kind != "steady" and rare < 0.1:
            factor += 0.1 * (size + 1e-3) ** -0.7  # a heavy tail: the other programs of the machine
        if kind == "drift":
            factor *= 1 + 0.3 * call / 80 + 0.1 * math.sin(call / 13)
        if kind == "moods":
            mood = 0.9 * mood + 0.1 * (normal - 0.5)
            factor *= math.exp(mood)
        if kind == "two speeds":
            slow = slow ^ (change < 0.1)
            factor *= 1.25 if slow else 1
        yield factor
        call += 1


@pytest.mark.parametrize("kind", ["steady", "heavy", "drift", "moods", "two speeds"])
@pytest.mark.parametrize(("rounds", "repeats"), [(20, 200), (40, 200)])
def test_the_interval_of_a_against_a_holds_1_as_often_as_it_says(kind, rounds, repeats, monkeypatch):
    generator = torch.Generator().manual_seed(rounds)
    held = told_apart = 0
    for _ in range(repeats):
        call = Clock(monkeypatch, noise(kind, generator)).takes(10)
        again = timing.latency({"A": call, "A again": call}, rounds=rounds, warmup=0)["A again"]
        held += again.speedup_low <= 1 <= again.speedup_high
        told_apart += not again.speedup_low <= 1.25 <= again.speedup_high
    assert held >= 0.92 * repeats
    assert told_apart >= 0.8 * repeats  # and is no wider than it must be


def test_the_interval_of_two_that_differ_holds_their_ratio(monkeypatch):
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        clock = Clock(monkeypatch, noise("drift", generator))
        b = timing.latency({"a": clock.takes(30), "b": clock.takes(10)}, rounds=30, warmup=0)["b"]
        held += b.speedup_low <= 3 <= b.speedup_high
    assert held >= 92


def test_the_a_a_test_ties_on_a_machine_of_even_noise(monkeypatch):
    clock = Clock(monkeypatch, noise("drift", torch.Generator().manual_seed(0)))
    found = timing.aa_test(clock.takes(10), repeats=20, rounds=20)
    assert found.ties and found.repeats == 20 and len(found.each) == 20 and found.confidence == 0.99
    assert "99 % interval contains 1 in 20 of 20 repeats: A ties with A" in str(found)
    widths = sorted(t.speedup_high - t.speedup_low for t in found.each)
    assert (widths[9] + widths[10]) / 4 == pytest.approx(found.resolution)


def test_the_a_a_test_fails_where_the_place_in_a_round_decides(monkeypatch):
    calls = iter(range(10_000))
    # Four rounds run BA AB AB BA from the warm-up on: the places of B in them are the slow ones.
    slow_for_again = [1.2, 1, 1, 1.2, 1, 1.2, 1.2, 1]
    clock = Clock(monkeypatch, (slow_for_again[next(calls) % 8] for _ in range(10_000)))
    found = timing.aa_test(clock.takes(10), repeats=8, rounds=20, warmup=2, confidence=0.95, settle=0)
    assert not found.ties and found.contained == 0 and found.chance < 1e-9
    assert "no ratio measured now counts" in str(found)


def test_one_too_few_is_called_bad_luck():
    found = timing.AATest(contained=18, repeats=20, confidence=0.95, resolution=0.01)
    assert not found.ties and found.chance == pytest.approx(0.264, abs=1e-3) and "test again" in str(found)
    assert timing.AATest(19, 20, 0.95, 0.01).ties


def test_timing_costs_less_than_two_percent_of_two_milliseconds():
    assert min(timing.overhead(lambda: time.sleep(0.002), rounds=5)[0] for _ in range(3)) < 0.02


def test_timing_makes_few_calls_around_each_that_it_times():
    events = []

    def count(rounds):
        events.clear()
        sys.setprofile(lambda frame, event, what: events.append(event))
        try:
            timing.latency({"A": int, "A again": int}, rounds=rounds, warmup=0, settle=0)
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    assert 2 <= (count(60) - count(10)) / 100 <= 40  # some are of the interval, which grows with the rounds


def test_the_overhead_is_what_latency_takes_around_an_empty_call(monkeypatch):
    original = timing.latency

    def dawdling(contenders, **options):
        if "measure.latency" not in contenders:
            time.sleep(0.02)  # a tenth of ten calls of 20 ms
        return original(contenders, **options)

    monkeypatch.setattr(timing, "latency", dawdling)
    share, low, high = timing.overhead(lambda: time.sleep(0.02), calls=10, rounds=3)
    assert 0.05 < share < 0.2 and low <= share <= high


@pytest.mark.parametrize("arguments", [{"calls": 5}, {"calls": 0}, {"rounds": 2}])
def test_an_overhead_of_too_few_calls_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 6 calls and 3 rounds, got"):
        timing.overhead(int, **arguments)
