import pytest

from course_utils import backends, child, kernels


def test_all_ways_are_timed_for_each_number_of_rows():
    found = kernels.latencies(256, [1, 16], 4)
    assert list(found) == [1, 16] and [timings.rounds for timings in found.values()] == [4, 3]
    for timings in found.values():
        assert list(timings) == list(backends.linear_ways()) and all(t.median > 0 for t in timings.values())
        assert timings["FP32"].speedup == 1


@pytest.fixture
def made(monkeypatch):
    """Pretend a machine with a way of 16 and one of 2 megabytes a matrix; return the matrices made, each its list of calls."""
    made = []

    def make(w):
        made.append([])
        return made[-1].append

    monkeypatch.setattr(kernels.backends, "linear_ways", lambda group_size: {"all": (32, make), "few": (4, make)})
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 4)
    monkeypatch.setattr(kernels.cpu, "last_level_cache", lambda: None)
    monkeypatch.setattr(kernels.cpu, "memory_gib", lambda: 16)
    return made


def test_small_weights_are_as_many_bytes_as_large_ones(made, monkeypatch):
    kernels.latencies(2048, [1], 3)
    assert len(made) == 2 + 2
    made.clear()
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 20)
    kernels.latencies(2048, [1], 3)
    assert len(made) == 2 + 10


def test_every_matrix_is_read_as_often_as_the_others(made, monkeypatch):
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 40)
    kernels.latencies(2048, [1], 5)  # with a warm-up, and a call before each that counts: 12 of 8 multiplications
    few, every = made[:20], made[20:]
    assert {len(calls) for calls in few} == {4, 5} and [len(calls) for calls in every] == [32, 32, 32]


def test_what_caches_hold_twice_is_read_but_never_more_than_memory_bears(made, monkeypatch):
    def megabytes(cache, memory):
        monkeypatch.setattr(kernels.cpu, "last_level_cache", lambda: cache)
        monkeypatch.setattr(kernels.cpu, "memory_gib", lambda: memory)
        return kernels._megabytes()

    assert megabytes(None, 16) == megabytes(10**6, 16) == megabytes(10**9, None) == 4
    assert megabytes(10**8, 16) == 200 and megabytes(10**9, 64) == kernels.MOST
    assert megabytes(10**8, 2) == pytest.approx(67.1, abs=0.1)


def test_it_runs_in_a_process_of_its_own():
    found = child.in_child(kernels.latencies, 256, [1], 3)
    assert found[1]["FP32"].speedup == 1
