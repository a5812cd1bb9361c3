"""The ladder of engines: every way is made, timed and judged, and compared with the right FP32."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from course_utils import backends, data, deployment, measure, roofline
from course_utils.deployment import Way

EAGER, FOLDED, BF16 = deployment.WAYS[:3]
DYNAMIC = next(way for way in deployment.WAYS if way.how == deployment.DYNAMIC)


@pytest.fixture(scope="module")
def static():
    engine = backends.default_engine()
    return next(way for way in deployment.WAYS if way.engine == engine)


@pytest.fixture(scope="module")
def judges():
    return data.batches(data.fashion_mnist("validation"), 20, limit=40)


@pytest.fixture(scope="module")
def ladder(trained, static, judges):
    absent = Way("INT8, absent", "tensorrt", "int8", deployment.STATIC, "TensorRT")
    ways = (EAGER, FOLDED, DYNAMIC, static, absent)
    return deployment.climb(trained, judges, calibration=judges, judges=judges, ways=ways, rounds=5)


@pytest.fixture(scope="module")
def trained():
    from course_utils import models

    return models.load("resnet18")


def test_each_way_that_runs_is_timed_and_judged_and_the_others_say_why_not(ladder, static, trained):
    assert list(ladder) == [EAGER.name, FOLDED.name, DYNAMIC.name, static.name]
    assert list(ladder.missing) == ["INT8, absent"] and "tensorrt" in ladder.missing["INT8, absent"]
    eager, int8 = ladder[EAGER.name], ladder[static.name]
    assert eager.timing.speedup == 1 and eager.judged.agreement == 1
    assert 3.8 < eager.bytes / int8.bytes < 4.1 and 43e6 < ladder[FOLDED.name].bytes < eager.bytes
    assert int8.judged.n == 40 and int8.judged.second.value > 0.5


def test_the_float_network_that_counts_is_the_fastest_of_its_own_family(ladder, static):
    fastest = min((ladder[EAGER.name], ladder[FOLDED.name]), key=lambda rung: rung.timing.median)
    for rung in ladder.values():
        assert rung.fp32 == fastest.way.name
    ratios = [a / b for a, b in zip(fastest.timing.times, ladder[static.name].timing.times, strict=True)]
    assert ladder[static.name].over_fp32[0] == pytest.approx(sorted(ratios)[len(ratios) // 2])


def test_the_best_rung_of_a_precision_and_none_where_there_is_none(ladder, static):
    int8 = [ladder[DYNAMIC.name], ladder[static.name]]
    assert ladder.best() is max(int8, key=lambda rung: rung.timing.speedup)
    assert ladder.best("bf16") is None and ladder.best("int8", families=("OpenVINO",)) is None


def test_the_speed_up_decides_where_the_milliseconds_of_two_processes_do_not(ladder, static):
    quick, rung = ladder[DYNAMIC.name], ladder[static.name]
    # Another process had a slower minute: more milliseconds, for the first way too, and the larger speed-up.
    timing = replace(rung.timing, median=2 * quick.timing.median, speedup=2 * quick.timing.speedup)
    odd = deployment.Ladder([ladder[EAGER.name], replace(rung, timing=timing), quick], {}, 64, 5, 1)
    assert odd.best().way is static
    assert [row[0] for row in odd.table().rows if row[0] != EAGER.name] == [DYNAMIC.name, static.name]


def test_the_table_has_the_slowest_first_and_says_how_it_was_taken(ladder):
    rows = ladder.table().rows
    assert [row[0] for row in rows] == sorted(ladder, key=lambda name: ladder[name].timing.speedup)
    own = next(row for row in rows if row[0] == next(iter(ladder.values())).fp32)
    assert own[4] == "–", "the fastest FP32 is not compared with itself"
    assert "64 × 64, 5 interleaved rounds an engine" in str(ladder) and "40 images" in str(ladder)


def test_without_judges_there_is_no_accuracy_to_show(trained, judges):
    found = deployment.climb(trained, judges, ways=(EAGER, FOLDED), rounds=3)
    assert all(rung.judged is None for rung in found.values())
    assert "accuracy" not in found.table().columns and "images" not in str(found).partition("rounds")[2]


def test_without_the_first_way_there_is_nothing_to_compare_with(trained, judges):
    absent = Way("FP32, absent", "tensorrt", "fp32", deployment.DEPLOY, "TensorRT")
    with pytest.raises(ValueError, match="nothing to compare with: FP32, absent does not run here: .*tensorrt"):
        deployment.climb(trained, judges, ways=(absent, EAGER), rounds=3)


def test_who_judges_must_calibrate(trained, judges):
    with pytest.raises(ValueError, match="pass calibration="):
        deployment.climb(trained, judges, judges=judges)


@pytest.fixture
def grey():
    """A small network for images of one channel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)).eval()


@pytest.fixture
def killed(monkeypatch):
    """Measure families in this process; those whose names are put into this set end as they do where memory is short."""
    names = set()

    def in_child(climb, model, own, *arguments):
        if own[-1].family in names:
            raise MemoryError("the process was killed")
        return climb(model, own, *arguments)

    monkeypatch.setattr(deployment.measure, "in_child", in_child)
    return names


def test_a_family_that_is_killed_takes_no_other_along(grey, killed):
    elsewhere = Way("FP32, elsewhere", "torch", "fp32", deployment.DEPLOY, "elsewhere")
    images = [(torch.randn(20, 1, 8, 8), torch.arange(20) % 10)]
    settings = {"calibration": images, "judges": images, "ways": (EAGER, FOLDED, elsewhere), "rounds": 3}
    killed.add("torch")
    ladder = deployment.climb(grey, images, **settings)
    assert list(ladder) == [EAGER.name, elsewhere.name] and ladder.missing == {FOLDED.name: "the process was killed"}
    assert [rung.judged.agreement for rung in ladder.values()] == [1, 1]
    killed.add("elsewhere")
    with pytest.raises(
        ValueError, match="nothing to compare with: FP32, eager does not run here: the process was killed"
    ):
        deployment.climb(grey, images, **settings)


def test_a_family_of_which_nothing_runs_is_not_timed(grey, killed, monkeypatch):
    absent = Way("FP32, absent", "tensorrt", "fp32", deployment.DEPLOY, "TensorRT")
    timed, latency = [], measure.latency
    monkeypatch.setattr(
        measure, "latency", lambda contenders, **how: timed.append(list(contenders)) or latency(contenders, **how)
    )
    ladder = deployment.climb(grey, [torch.randn(1, 1, 8, 8)], ways=(EAGER, FOLDED, absent), rounds=3)
    assert timed == [[EAGER.name, FOLDED.name]] and list(ladder.missing) == [absent.name]


def test_a_way_that_fails_with_any_error_is_missing(grey, killed, monkeypatch):
    make, misspelt = deployment.make, replace(DYNAMIC, name="INT8, misspelt", engine="x87", how=deployment.STATIC)

    def make_or_break(way, *arguments):
        return torch.det if way is DYNAMIC else make(way, *arguments)  # which is made, and then takes no images

    def size(way, *arguments):
        if way is FOLDED:
            raise TypeError("no file")
        return 1

    monkeypatch.setattr(deployment, "make", make_or_break)
    monkeypatch.setattr(deployment, "_bytes", size)
    images = [(torch.randn(2, 1, 8, 7), torch.zeros(2))]
    model = nn.Sequential(grey[0], nn.ReLU(), nn.Flatten())
    ladder = deployment.climb(model, images, ways=(EAGER, FOLDED, DYNAMIC, misspelt), rounds=3)
    assert list(ladder) == [EAGER.name]
    assert ladder.missing[misspelt.name].startswith("ValueError: unknown engine 'x87'")
    assert ladder.missing[FOLDED.name] == "TypeError: no file"
    assert "square" in ladder.missing[DYNAMIC.name], "the sentence of a RuntimeError needs no type"


@pytest.mark.parametrize("labels", [True, False])
def test_the_first_image_is_timed_of_batches_with_labels_or_without(grey, killed, labels):
    images, seen = torch.randn(5, 1, 8, 8), set()
    grey.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
    timed = [(images, torch.zeros(5)) if labels else images]
    ladder = deployment.climb(grey, timed, ways=(EAGER,), rounds=3)
    assert seen == {(1, 1, 8, 8)} and ladder.size == 8 and ladder.missing == {}


def test_without_an_image_there_is_nothing_to_time(grey):
    with pytest.raises(ValueError, match="no images to time"):
        deployment.climb(grey, [], ways=(EAGER,), rounds=3)


def test_the_share_of_the_limit_is_the_least_time_over_the_measured_one(ladder, static, trained):
    ceilings = roofline.Ceilings({"FP32": 1e11, "INT8": 4e11}, 1e20, 1, {})
    macs = sum(work.operations for work in roofline.layers(trained, (3, 64, 64)))
    for name, peak in ((EAGER.name, 1e11), (static.name, 4e11)):
        share = deployment.of_ceiling(ladder[name], ceilings, trained, 64)
        assert share == pytest.approx(macs / peak / (ladder[name].timing.median / 1000))
    assert deployment.of_ceiling(ladder[DYNAMIC.name], ceilings, trained, 64) is None
    for peaks in ({"FP32": 1e11}, {"FP32": 1e11, "INT8": 1e9}):  # not measured, and emulated only
        without = roofline.Ceilings(peaks, 1e20, 1, {})
        assert deployment.of_ceiling(ladder[static.name], without, trained, 64) is None


def test_the_limit_is_that_of_images_of_any_shape(ladder, grey):
    ceilings = roofline.Ceilings({"FP32": 1e11}, 1e20, 1, {})
    rung = ladder[EAGER.name]
    operations = sum(work.operations for work in roofline.layers(grey, (1, 8, 8)))
    share = deployment.of_ceiling(rung, ceilings, grey, (1, 8, 8))
    assert share == pytest.approx(operations / 1e11 / (rung.timing.median / 1000))


def test_every_way_is_one_that_the_engines_have():
    names = [way.name for way in deployment.WAYS]
    assert len(set(names)) == len(names) and deployment.WAYS[0].how == deployment.AS_IT_IS
    for way in deployment.WAYS:
        if way.how == deployment.DEPLOY:
            assert way.precision in backends.PRECISIONS[way.engine] and way.precision != "int8"
        if way.how == deployment.STATIC:
            assert way.precision == "int8" and way.engine in sum(backends.FAMILIES.values(), ())
    for family in {way.family for way in deployment.WAYS}:
        assert any(way.precision == "fp32" for way in deployment.WAYS if way.family == family), f"{family} has no FP32"
    engines = {way.engine for way in deployment.WAYS} | {"tensorrt"}
    assert engines == set(sum(backends.FAMILIES.values(), ())), (
        "every engine but TensorRT, which has no CPU, is on the ladder"
    )
