from course_utils import backends, child, kernels


def test_all_ways_are_timed_for_each_number_of_rows():
    found = kernels.latencies(256, [1, 16], 4)
    assert list(found) == [1, 16] and [timings.rounds for timings in found.values()] == [4, 3]
    for timings in found.values():
        assert list(timings) == list(backends.linear_ways()) and all(t.median > 0 for t in timings.values())
        assert timings["FP32"].speedup == 1


def test_small_weights_are_as_many_bytes_as_large_ones(monkeypatch):
    made = []

    def make(w):
        made.append(w.numel())
        return lambda x: x

    monkeypatch.setattr(kernels, "BEYOND_CACHES", 4)
    monkeypatch.setattr(kernels.backends, "linear_ways", lambda group_size: {"all": (32, make), "few": (4, make)})
    kernels.latencies(2048, [1], 3)
    assert len(made) == 2 + 2  # 16 and 2 megabytes a matrix
    made.clear()
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 20)
    kernels.latencies(2048, [1], 3)
    assert len(made) == 2 + 10


def test_it_runs_in_a_process_of_its_own():
    found = child.in_child(kernels.latencies, 256, [1], 3)
    assert found[1]["FP32"].speedup == 1
