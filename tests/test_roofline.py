"""The roofline's arithmetic by hand, and ceilings that are measured, small and quick, for their logic alone."""

import pytest
import torch
from torch import nn

from course_utils import roofline
from course_utils.roofline import Ceilings, Work

CEILINGS = Ceilings({"FP32": 100e9, "INT8": 400e9}, 20e9, 2, {"FP32": "a", "INT8": "b", "bandwidth": "copy"})


@pytest.mark.parametrize(
    ("intensity", "precision", "rate"),
    [(1, "FP32", 20e9), (5, "FP32", 100e9), (50, "FP32", 100e9), (10, "INT8", 200e9)],
)
def test_the_lower_roof_counts(intensity, precision, rate):
    assert roofline.attainable(CEILINGS, intensity, precision) == rate


def test_layers_are_operations_and_bytes():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    (fp32,), (int8,) = (roofline.layers(model, (2, 8, 8), bits) for bits in (32, 8))
    macs, numbers = 4 * 64 * 2 * 9, 4 * 2 * 9 + 2 * 64 + 4 * 64
    assert fp32 == Work("0", 2 * macs, 4 * numbers) and int8 == Work("0", 2 * macs, numbers)
    assert int8.intensity == 4 * fp32.intensity == 2 * macs / numbers


def test_a_batch_shares_the_weights():
    model = nn.Linear(1000, 1000)
    one, many = (roofline.layers(model, (1000,), batch=batch)[0] for batch in (1, 64))
    assert many.operations == 64 * one.operations and many.intensity > 30 * one.intensity


def test_the_least_time_adds_what_each_layer_is_bound_by():
    layers = [Work("bound by memory", 10**9, 1e9), Work("bound by arithmetic", 10**10, 1e8)]
    assert roofline.least_seconds(CEILINGS, layers) == pytest.approx(1 / 20 + 1 / 10)
    assert roofline.least_seconds(CEILINGS, layers, memory=False) == pytest.approx(11 / 100)
    assert roofline.least_seconds(CEILINGS, layers, "INT8") == pytest.approx(1 / 20 + 1 / 40)


def test_achieved_rates_take_the_layers_that_have_a_time():
    layers = [Work("a", 2 * 10**9, 1e9), Work("b", 1, 1)]
    assert roofline.achieved(layers, {"a": 100, "c": 5}) == [(2, 2e10, "a")]
    assert roofline.achieved(layers, {"a": 200, "b": 1}) == [(2, 1e10, "a"), (1, 1000, "b")]


def test_the_table_of_ceilings_has_their_ridges():
    assert CEILINGS.table().rows == [
        ["FP32", "100 G operations/s", "5", "a"],
        ["INT8", "400 G operations/s", "20", "b"],
        ["memory", "20.0 GB/s", "", "copy"],
    ]
    assert Ceilings({}, 5e9, 1, {"bandwidth": "triad"}).table().rows == [["memory", "5.0 GB/s", "", "triad"]]


def test_ceilings_of_this_machine_are_found_with_what_reached_them():
    before = torch.get_num_threads()
    found = roofline.ceilings(size=256, repeats=3, megabytes=8, threads=before + 1)
    assert found.threads == before + 1 and torch.get_num_threads() == before
    assert {"FP32", "BF16"} <= set(found.peaks) <= set(roofline.BITS)
    assert set(found.how) == {*found.peaks, "bandwidth"} and found.how["FP32"] in ("matrix product", "convolution")
    assert all(rate > 1e6 for rate in [*found.peaks.values(), found.bandwidth])
    assert "arrays of 8 MiB" in found.how["bandwidth"] and "threads" in str(found)
    assert [row[0] for row in found.table().rows] == [*found.peaks, "memory"]


def test_the_best_way_counts_and_one_that_this_torch_lacks_is_passed_over(monkeypatch):
    def missing(size):
        raise NotImplementedError

    ways = {
        "FP32": {"slow": lambda size: (0.002, size), "quick": lambda size: (0.001, size), "missing": missing},
        "INT8": {"missing": missing},
    }
    monkeypatch.setattr(roofline, "WAYS", ways)
    monkeypatch.setattr(roofline, "_best", lambda run, repeats: run if isinstance(run, float) else 1)
    found = roofline.ceilings(size=100, megabytes=1)
    assert found.peaks == {"FP32": 100 / 0.001} and found.how["FP32"] == "quick"


@pytest.mark.parametrize(("seconds", "sizes"), [(0.001, [64, 256]), (0.02, [64])])
def test_what_is_emulated_is_measured_on_less_work(seconds, sizes, monkeypatch):
    asked = []
    monkeypatch.setattr(roofline, "_best", lambda run, repeats: seconds)
    rate = roofline._rate(lambda size: (None, asked.append(size) or size**3), 256, 3)
    assert asked == sizes and rate == sizes[-1] ** 3 / seconds


def test_every_way_counts_the_operations_that_it_makes():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    for ways in roofline.WAYS.values():
        for make in ways.values():
            run, operations = make(64)
            out = run()
            per_output = 64 if out.ndim == 2 else 9 * out.shape[1]
            assert operations == 2 * out.numel() * per_output


@pytest.mark.parametrize(("cache", "expected"), [(None, 64), (2**20, 64), (25 * 2**20, 100), (2**30, 128)])
def test_arrays_outgrow_the_cache_within_reason(cache, expected, monkeypatch):
    monkeypatch.setattr(roofline.cpu, "last_level_cache", lambda: cache)
    monkeypatch.setattr(roofline.torch, "ones", lambda n: torch.empty(n, device="meta"))
    monkeypatch.setattr(roofline, "_best", lambda run, repeats: 0.5)
    rate, how = roofline._bandwidth(None, 1)
    assert rate == 3 * expected * 2**20 / 0.5 and how.startswith(f"triad of arrays of {expected} MiB")
    assert ("unknown" in how) == (cache is None)


def test_the_fastest_run_counts_and_slow_ones_are_not_repeated_for_long(monkeypatch):
    clock, took = {"now": 0.0}, iter([9, 0.3, 0.1, 0.2] + [9, 0.8, 0.7, 0.6])

    def run():
        clock["now"] += next(took)

    monkeypatch.setattr(roofline.time, "perf_counter", lambda: clock["now"])
    assert roofline._best(run, 3) == pytest.approx(0.1)
    assert roofline._best(run, 3) == pytest.approx(0.7) and next(took) == 0.6
