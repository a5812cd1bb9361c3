"""Measure every rung of notebook 02's ladder: `make ladder`, or `python -m course_utils.tools.ladder [model ...]`.

A rung is one network under one policy, repaired in one way. All of them are scored on validation images, the few that the
lesson ends with on the test images too, and kept in `data/ladder.json`, one line each, with the checksum of the network they
belong to. A run that was stopped goes on where it was; rungs of a network that was trained again are measured again.
"""

import functools
import itertools
import json
from dataclasses import dataclass, replace

import filelock
from tqdm import tqdm

from course_utils import data, files, measure, models, rounding, sensitivity, simulate
from course_utils.simulate import Policy
from course_utils.stats import Proportion
from course_utils.tools import names_from_command_line

FILE = "ladder.json"
MODELS = ("resnet18", "mobilenet_v2")
CALIBRATION_IMAGES = 256
VALIDATION_IMAGES = 1_000
MOST_IMAGES = 10_000  # the test images; no rung is scored on more

NEAREST = ("nearest", "bias correction")
EQUALIZED = ("equalization", "equalization, bias correction")
ADAROUND = ("AdaRound", "AdaRound, bias correction")
# Rungs that share the expensive part, the rounding, are measured together; the cheap ones come first. Equalization is for
# the fragile network: in ResNet18 only pairs inside a block can be equalized. AdaRound starts from ranges of least squared
# error, as its authors have it, and takes minutes a rung.
CLIPS, GRANULARITIES = ("minmax", "mse"), ("tensor", "channel", 32)
GRID = [
    (name, repairs, (None, 8), Policy(weights=bits, granularity=granularity, clip=clip))
    for repairs, names in ((NEAREST, MODELS), (EQUALIZED, MODELS[1:]), (ADAROUND, MODELS))
    for bits, granularity, clip, name in itertools.product(range(2, 9), GRANULARITIES, CLIPS, names)
]
FEW = {"observer": "mse", "clip": "mse"}
HEADLINES = [  # chosen on validation images, scored on the test images once
    ("resnet18", ADAROUND, Policy(weights=4, clip="mse"), None),
    ("resnet18", ADAROUND, Policy(weights=3, clip="mse"), None),
    ("resnet18", ADAROUND, Policy(weights=2, granularity=32, clip="mse"), None),
    ("resnet18", NEAREST, Policy(weights=4), 4),
    ("resnet18", NEAREST, Policy(weights=4, **FEW), 4),
    ("resnet18", NEAREST, Policy(weights=4, first_last=8, **FEW), 4),
    ("resnet18", ADAROUND, Policy(weights=4, first_last=8, **FEW), 4),
    ("mobilenet_v2", NEAREST, Policy(weights=4), None),
    ("mobilenet_v2", EQUALIZED, Policy(weights=4), None),
    ("mobilenet_v2", ADAROUND, Policy(weights=4, clip="mse"), None),
    ("mobilenet_v2", NEAREST, Policy(weights=4, granularity="tensor"), None),
    ("mobilenet_v2", EQUALIZED, Policy(weights=4, granularity="tensor"), None),
]
MIXED = ("resnet18", (2.5, 3))  # bits a weight on average, spent by sensitivity as notebook 02 does
SCAN_IMAGES = 250


@dataclass(frozen=True)
class Rung:
    """One measurement: `model` under `policy`, repaired by `repair`, on images of `split`, against the float network."""

    model: str
    policy: Policy
    repair: str
    split: str
    comparison: measure.Comparison


def read():
    """Return the stored rungs as a list of `Rung`, those of networks that have changed since left out.

    Raises `DataFileError` when there is no such file, or it is damaged.
    """
    stored = _read()
    current = {name: _checksum(name) for name in MODELS}
    return [_rung(row) for row in stored["rungs"] if stored["checkpoints"].get(row["model"]) == current[row["model"]]]


def measure_rungs(name, policy, repairs, activations, split, limit):
    """Return the `Rung`s of model `name` under `policy`, for each of `repairs` and each number of bits in `activations`.

    policy: of the weights. repairs: `NEAREST`, `EQUALIZED` or `ADAROUND`. activations: bits, or None for float32. split,
    limit: the first `limit` images of that split are scored.
    """
    model = models.load(name)
    calibration = data.batches(data.fashion_mnist("calibration"), 128, limit=CALIBRATION_IMAGES)
    judged = data.batches(data.fashion_mnist(split), 100, limit=limit)
    expected, labels = _float_predictions(name, split, limit)
    start = rounding.cross_layer_equalization(model) if repairs == EQUALIZED else model
    if repairs == ADAROUND:
        rounded, _ = rounding.adaround(start, policy, calibration)
    else:
        rounded = simulate.quantize(start, policy)
    found = []
    for repair in repairs:
        if repair.endswith("bias correction"):
            rounded = rounding.bias_correction(start, rounded, calibration)
        for bits in activations:
            full = replace(policy, activations=bits)
            scored = rounded if bits is None else simulate.quantize_activations(rounded, full, calibration)
            classes, _ = measure.predictions(scored, judged)
            found.append(Rung(name, full, repair, split, measure.compare_predictions(expected, classes, labels)))
    return found


def mixed(name, averages):
    """Return the policies with so many bits a weight on average, spent where a layer at 4 bits hurts most."""
    if not averages:
        return []
    images = data.batches(data.fashion_mnist("validation"), 100, limit=SCAN_IMAGES)
    scanned = sensitivity.scan(models.load(name), Policy(weights=4), images)
    return [Policy(weights=4, layers=sensitivity.spend(scanned, average)) for average in averages]


@functools.cache
def _float_predictions(name, split, limit):
    return measure.predictions(models.load(name), data.batches(data.fashion_mnist(split), 100, limit=limit))


def main():
    names = names_from_command_line(__doc__, MODELS, "networks to measure")
    jobs = [(name, policy, repairs, (bits,), "test", None) for name, repairs, policy, bits in HEADLINES]
    jobs += [
        (name, policy, repairs, activations, "validation", VALIDATION_IMAGES)
        for name, repairs, activations, policy in GRID
    ]
    jobs += [(MIXED[0], policy, NEAREST, (None,), "test", None) for policy in mixed(*MIXED)]
    done = {(r.model, str(r.policy), r.repair, r.split) for r in (read() if (files.data_dir() / FILE).exists() else ())}
    todo = [job for job in jobs if job[0] in names and not _wanted(*job) <= done]
    for job in (bar := tqdm(todo, unit="job")):
        found = measure_rungs(*job)
        _add(found)
        for rung in found:
            bar.write(f"{rung.model}, {rung.policy}, {rung.repair}, {rung.split}: {rung.comparison}")


def _wanted(name, policy, repairs, activations, split, limit):
    return {
        (name, str(replace(policy, activations=bits)), repair, split)
        for repair, bits in itertools.product(repairs, activations)
    }


def _add(rungs):
    path = files.data_dir() / FILE
    with filelock.FileLock(path.with_name(f".{FILE}.lock")):  # two networks may be measured side by side
        _add_alone(path, rungs)


def _add_alone(path, rungs):
    stored = _read() if path.exists() else {"version": 1, "checkpoints": {}, "rungs": []}
    for name in {rung.model for rung in rungs}:
        if stored["checkpoints"].get(name) != _checksum(name):
            stored["checkpoints"][name] = _checksum(name)
            stored["rungs"] = [row for row in stored["rungs"] if row["model"] != name]
    stored["machine"] = measure.machine()
    newest = {_measured(row): row for row in [*stored.pop("rungs"), *map(_row, rungs)]}
    rows = sorted(json.dumps(row, sort_keys=True) for row in newest.values())
    head = json.dumps(stored, indent=1, sort_keys=True)
    files.write_text(path, head.removesuffix("\n}") + ',\n "rungs": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")


def _row(rung):
    policy = {key: value for key, value in vars(rung.policy).items() if value != getattr(Policy(), key)}
    counts = rung.comparison
    return {
        "model": rung.model,
        "policy": policy,
        "repair": rung.repair,
        "split": rung.split,
        "images": counts.n,
        "right": [counts.first.successes, counts.second.successes],
        "flips": [counts.flips, counts.fixed, counts.broke],
    }


def _measured(row):
    """Return what was measured, whatever came out."""
    return json.dumps([row["model"], row["policy"], row["repair"], row["split"]], sort_keys=True)


def _rung(row):
    """Return the `Rung` of one line of the file; a damaged one ends in errors of several types."""
    n, (first, second), (flips, fixed, broke) = row["images"], row["right"], row["flips"]
    whole = all(type(count) is int for count in (n, first, second, flips, fixed, broke))
    if not whole or n > MOST_IMAGES or not 0 <= fixed + broke <= flips <= n or fixed - broke != second - first:
        raise ValueError(f"these counts cannot be: {n} images, {first} and {second} right, {row['flips']} flips")
    known = row["model"] in MODELS and row["split"] in data.SPLITS and row["repair"] in NEAREST + EQUALIZED + ADAROUND
    if not known:
        raise ValueError(f"nothing is known of {row['model']}, {row['repair']}, {row['split']}")
    counts = measure.Comparison(n, Proportion(first, n), Proportion(second, n), flips, fixed, broke)
    return Rung(row["model"], Policy(**row["policy"]), row["repair"], row["split"], counts)


def _read():
    path = files.data_dir() / FILE
    if not path.exists():
        raise files.DataFileError(f"{path} is missing: restore it with git, or measure it with `make ladder`")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for row in stored["rungs"]:
            _rung(row)
        return stored | {"checkpoints": dict(stored["checkpoints"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise files.DataFileError(
            f"{path} is damaged ({error}): restore it with git, or delete it and run `make ladder`"
        ) from None


def _checksum(name):
    return files.read_manifest()[models.checkpoint(name)]["sha256"]


if __name__ == "__main__":
    main()
