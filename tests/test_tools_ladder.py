"""The ladder's file: whole, resumable, and never about another network than the one that is here."""

import json
from dataclasses import replace

import pytest

from course_utils import data, files, measure, models, rounding, sensitivity, simulate, weights
from course_utils.simulate import Policy
from course_utils.stats import Proportion
from course_utils.tools import ladder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with a manifest of two checkpoints and no ladder yet."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    manifest = {f"checkpoints/{name}.safetensors": {"bytes": 1, "sha256": f"sum of {name}"} for name in ladder.MODELS}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def rung(model="resnet18", right=90, **policy):
    counts = measure.Comparison(100, Proportion(95, 100), Proportion(right, 100), flips=7, fixed=1, broke=6)
    return ladder.Rung(model, Policy(**policy), "nearest", "validation", counts)


def test_what_was_measured_is_read_back(folder):
    rungs = [
        rung(weights=4, granularity=32, clip="mse"),
        rung("mobilenet_v2", weights=None, activations=4, observer="mse"),
    ]
    ladder._add(rungs[:1])
    ladder._add(rungs[1:])
    assert sorted(ladder.read(), key=str) == sorted(rungs, key=str)


def test_the_same_rungs_make_the_same_file_in_any_order_one_line_each(folder):
    one, two = rung(weights=4), rung(weights=3)
    ladder._add([one, two])
    text = (folder / ladder.FILE).read_text()
    (folder / ladder.FILE).unlink()
    ladder._add([two])
    ladder._add([one])
    assert (folder / ladder.FILE).read_text() == text
    assert sum('"model": "resnet18"' in line for line in text.splitlines()) == 2


def test_rungs_of_a_network_trained_again_are_left_out_and_replaced(folder):
    ladder._add([rung(weights=4), rung("mobilenet_v2", weights=4)])
    manifest = files.read_manifest()
    manifest["checkpoints/resnet18.safetensors"]["sha256"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert [r.model for r in ladder.read()] == ["mobilenet_v2"]
    ladder._add([rung(weights=3)])
    assert sorted(r.policy.weights for r in ladder.read() if r.model == "resnet18") == [3]


@pytest.mark.parametrize("text", ["", "{", '{"rungs": []}', '{"checkpoints": {}, "rungs": [{"model": "resnet18"}]}'])
def test_a_damaged_file_is_named_with_the_way_out(folder, text):
    (folder / ladder.FILE).write_text(text)
    with pytest.raises(files.DataFileError, match=r"ladder\.json is damaged .*make ladder"):
        ladder.read()


def test_a_missing_file_is_named_with_the_way_out(folder):
    with pytest.raises(files.DataFileError, match=r"ladder\.json is missing.*make ladder"):
        ladder.read()


def test_an_unknown_network_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ladder", "vgg"])
    with pytest.raises(SystemExit):
        ladder.main()
    assert "choose from resnet18, mobilenet_v2" in capsys.readouterr().err


def test_a_stopped_run_goes_on_where_it_was(folder, monkeypatch):
    jobs = []

    def measured(name, policy, repairs, activations, split, limit):
        jobs.append((name, str(policy), repairs, split))
        if len(jobs) == 6:
            raise KeyboardInterrupt
        counts = rung().comparison
        return [
            ladder.Rung(name, ladder.replace(policy, activations=bits), repair, split, counts)
            for repair in repairs
            for bits in activations
        ]

    monkeypatch.setattr("sys.argv", ["ladder"])
    monkeypatch.setattr(ladder, "measure_rungs", measured)
    monkeypatch.setattr(ladder, "GRID", ladder.GRID[:3])
    monkeypatch.setattr(ladder, "MIXED", ("resnet18", ()))
    with pytest.raises(KeyboardInterrupt):
        ladder.main()
    ladder.main()
    assert len(jobs) == len(ladder.HEADLINES) + 3 + 1  # only the one that was interrupted came twice
    assert jobs.count(jobs[5]) == 2
    before, grid = list(jobs), ladder.GRID
    ladder.main()
    assert jobs == before
    more = [(name, ladder.NEAREST, bits, replace(policy, weights=7)) for name, _, bits, policy in grid]
    monkeypatch.setattr(ladder, "GRID", [*grid, *more])
    ladder.main()
    assert jobs == [*before, *((name, str(policy), repairs, "validation") for name, repairs, _, policy in more)]


@pytest.fixture
def little(monkeypatch):
    """Few images for all that is measured; returns a function that gives those of a split in batches."""
    few = 24
    for name in ("CALIBRATION_IMAGES", "SCAN_IMAGES"):
        monkeypatch.setattr(ladder, name, few)
    return lambda split: data.batches(data.fashion_mnist(split), few, limit=few)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_rungs_are_what_quantizing_step_by_step_gives(little, split):
    policy, model, calibration = Policy(weights=3, clip="mse"), models.load("mobilenet_v2"), little("calibration")
    for repairs in (ladder.NEAREST, ladder.EQUALIZED):
        start = rounding.cross_layer_equalization(model) if repairs == ladder.EQUALIZED else model
        plain = simulate.quantize(start, policy)
        networks = [plain, rounding.bias_correction(start, plain, calibration)]
        expected = [
            ladder.Rung(
                "mobilenet_v2",
                replace(policy, activations=bits),
                repair,
                split,
                measure.compare(model, n, little(split)),
            )
            for repair, network in zip(repairs, networks, strict=True)
            for bits, n in (
                (None, network),
                (8, simulate.quantize_activations(network, replace(policy, activations=8), calibration)),
            )
        ]
        assert ladder.measure_rungs("mobilenet_v2", policy, repairs, (None, 8), split, 24) == expected
    assert len({rung.comparison for rung in expected}) > 1


def test_adaround_is_measured_where_it_is_asked_for(little, monkeypatch):
    """It takes minutes, and here gives the float network, of which no prediction flips."""
    monkeypatch.setattr(ladder.rounding, "adaround", lambda model, policy, images: (model, {}))
    found = ladder.measure_rungs("resnet18", Policy(weights=2), ladder.ADAROUND, (None,), "test", 24)
    assert [(rung.repair, rung.comparison.flips) for rung in found] == [(repair, 0) for repair in ladder.ADAROUND]
    found = ladder.measure_rungs("resnet18", Policy(weights=2), ladder.NEAREST, (None,), "test", 24)
    assert all(rung.comparison.flips > 0 for rung in found)


def test_mixed_bits_are_spent_where_a_scan_says(little):
    model = models.load("resnet18")
    scanned = sensitivity.scan(model, Policy(weights=4), little("validation"))
    found = ladder.mixed("resnet18", (2.5, 6))
    assert found == [Policy(weights=4, layers=sensitivity.spend(scanned, average)) for average in (2.5, 6)]
    assert found[0] != found[1] and ladder.mixed("resnet18", ()) == []


def test_the_stored_ladder_is_that_of_the_networks_that_are_here():
    found = ladder.read()
    assert {r.model for r in found} == set(ladder.MODELS)
    asked = {
        (name, repair, str(ladder.replace(policy, activations=bits)))
        for name, repairs, activations, policy in ladder.GRID
        for repair in repairs
        for bits in activations
    }
    stored = {(r.model, r.repair, str(r.policy)) for r in found if r.split == "validation"}
    assert asked <= stored, "rungs are missing: run `make ladder`"
    assert all(r.comparison.n == 10_000 for r in found if r.split == "test")


def test_the_stored_ladder_has_networks_of_mixed_bits_that_keep_their_budget():
    name, averages = ladder.MIXED
    sizes = {layer: module.weight.numel() for layer, module in weights.layers(models.load(name)).items()}
    spent = [
        sum(r.policy.layers[layer] * n for layer, n in sizes.items()) / sum(sizes.values())
        for r in ladder.read()
        if r.policy.layers and r.repair == "nearest"
    ]
    assert len(spent) == len(averages), "run `make ladder`"
    for found, average in zip(sorted(spent), averages, strict=True):
        assert average - 0.1 < found <= average
