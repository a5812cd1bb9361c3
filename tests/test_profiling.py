"""Which kernels ran and how long each layer took, on networks whose answers are known."""

import pytest
import torch
from torch import nn

from course_utils import backends, profiling, weights


@pytest.fixture(scope="module")
def int8(resnet18, calibration):
    return backends.quantize_static(resnet18, calibration)


def need_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")


def test_the_profiler_names_the_operators_with_their_calls_and_shares(resnet18, images, capfd):
    found = profiling.kernels(lambda: resnet18(images), runs=2, warmup=1)
    assert "aten::addmm" in found and "quantized::conv2d" not in found
    assert found.calls("aten::conv2d") == 20 and found.calls("aten::addmm") == 1
    assert sum(kernel.share for kernel in found) == pytest.approx(1)
    assert [k.ms for k in found] == sorted((k.ms for k in found), reverse=True)
    assert found.table(top=3).rows[0][0] == found[0].name and len(found.table(top=3).rows) == 3
    assert capfd.readouterr() == ("", "")  # the profiler's own log does not end up in a notebook


def test_the_profiler_shows_that_integer_kernels_run(int8, images):
    found = profiling.kernels(lambda: int8(images), runs=1)
    assert found.calls("quantized::conv2d") == 20 and "quantized::linear" in found
    assert found.calls("aten::conv") == 0


def test_what_is_not_torch_leaves_nothing_to_see():
    assert profiling.kernels(lambda: sum(range(10))) == []


def test_calls_are_profiled_under_the_mode_given():
    seen = []
    profiling.kernels(lambda: seen.append(torch.is_inference_mode_enabled()), runs=1, mode=torch.inference_mode)
    assert set(seen) == {True}


def test_onednn_names_its_implementations_and_keeps_the_output_clean(images, capfd):
    need_onednn()
    layer = nn.Conv2d(3, 64, 3)
    found = profiling.onednn(lambda: layer(images))
    assert [count for (operation, _), count in found.calls.items() if operation == "convolution"] == [1]
    assert len(found.implementations()) == 1 and found.implementations("no such operation") == []
    assert profiling.onednn(lambda: None).calls == {}
    print("after")
    assert capfd.readouterr() == ("after\n", "")


def test_without_onednn_there_is_nothing_to_report(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert profiling.onednn(lambda: None) == profiling.OneDNN("", {})


def test_a_float_network_its_folded_copy_and_its_integers_have_the_same_layers(resnet18, int8, images):
    before = profiling.by_layer(resnet18, images, rounds=2, warmup=1)
    assert set(before) == set(weights.layers(resnet18)) and next(iter(before)) == "conv1"
    assert set(profiling.by_layer(weights.fold_batch_norm(resnet18), images, rounds=1)) == set(before)
    after = profiling.by_layer(int8, images, rounds=2, warmup=1)
    assert set(after) - {profiling.INPUT} == set(before)
    assert all(ms > 0 for ms in [*before.values(), *after.values()])
    speedups = profiling.layer_speedups(before, after)
    assert speedups["fc"] == before["fc"] / after["fc"] and list(speedups) == list(before)
    assert before.table().rows[0][0] == max(before, key=before.get)


def test_layers_become_faster_by_their_times_and_the_longest_comes_first():
    before, after = profiling.LayerTimes(a=6, b=2, c=1), profiling.LayerTimes(b=4, a=2)
    assert profiling.layer_speedups(before, after) == {"a": 3, "b": 0.5}
    assert profiling.layer_speedups(after, before) == {"b": 2, "a": 1 / 3}
    assert after.table().rows == [["b", "4.000", "66.7%"], ["a", "2.000", "33.3%"]]
    assert before.table().rows[0] == ["a", "6.000", "66.7%"]


def test_operators_are_shown_with_calls_time_and_share():
    found = profiling.Kernels([profiling.Kernel("conv", 20, 3, 0.75), profiling.Kernel("add", 0.5, 1, 0.25)])
    assert found.table().rows == [["conv", "20", "3.000", "75.0%"], ["add", "0.5", "1.000", "25.0%"]]
    assert found.table(top=1).rows == found.table().rows[:1] and str(found.table(top=1)) in str(found)[:400]


def test_the_layers_of_an_exported_network_keep_their_names(resnet18, calibration, images):
    engine = next(engine for engine in backends.engines("pt2e") if engine.name == "pt2e")
    if not engine.runs:
        pytest.skip(f"engine pt2e does not run here: {engine.why}")
    lowered = backends.quantize_static(resnet18, calibration, engine="pt2e")
    assert set(profiling.by_layer(lowered, images, rounds=1)) - {profiling.INPUT} == set(weights.layers(resnet18))
    assert profiling.kernels(lambda: lowered(images), runs=1).calls("onednn::q") == 21


def test_the_time_of_what_follows_a_layer_is_the_layers(monkeypatch):
    clock = iter(range(0, 1_000_000_000, 1_000_000))  # every reading is a millisecond later, so each node takes one
    monkeypatch.setattr(profiling.time, "perf_counter_ns", lambda: next(clock))
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    found = profiling.by_layer(model.eval(), torch.zeros(1, 3, 1, 1), rounds=3)
    assert found == {profiling.INPUT: 1, "1": 4, "5": 1}


def test_a_network_that_cannot_be_traced_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot trace"):
        profiling.by_layer(Branches(), torch.zeros(1))
