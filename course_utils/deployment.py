"""One network in every way that this machine can run it: made, timed in interleaved rounds, and judged on the same images.

A rung of this ladder is compared with two others: with eager FP32, which is what most people run today, and with the fastest
FP32 of the same engine, so that INT8 is not credited with what another compiler did.
"""

import functools
from dataclasses import dataclass

import torch

from . import backends, cpu, measure, roofline, weights
from .backends.eager import DTYPES
from .stats import bootstrap_ratio
from .tables import Shown, Table

AS_IT_IS, DEPLOY, DYNAMIC, STATIC = "as it is", "deploy", "quantize_dynamic", "quantize_static"
LIMITS = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}  # precision of a way → of `roofline.ceilings`


@dataclass(frozen=True)
class Way:
    """One way to run a network: `name` for tables, `engine` and `precision` as in `backends`, and the function `how` that makes
    it. family: the ways whose FP32 it is fair to compare with, because compiler and runtime are the same."""

    name: str
    engine: str
    precision: str
    how: str
    family: str


WAYS = (
    Way("FP32, eager", "torch", "fp32", AS_IT_IS, "torch"),
    Way("FP32, folded, channels_last", "torch", "fp32", DEPLOY, "torch"),
    Way("BF16, folded, channels_last", "torch", "bf16", DEPLOY, "torch"),
    Way("FP16, folded, channels_last", "torch", "fp16", DEPLOY, "torch"),
    Way("INT8, dynamic", "torch", "int8", DYNAMIC, "torch"),
    Way("INT8, qnnpack", "qnnpack", "int8", STATIC, "torch"),
    Way("INT8, fbgemm", "fbgemm", "int8", STATIC, "torch"),
    Way("INT8, x86", "x86", "int8", STATIC, "torch"),
    Way("INT8, onednn", "onednn", "int8", STATIC, "torch"),
    Way("INT8, PT2E", "pt2e", "int8", STATIC, "torch"),
    Way("FP32, Inductor", "inductor", "fp32", DEPLOY, "Inductor"),
    Way("BF16, Inductor", "inductor", "bf16", DEPLOY, "Inductor"),
    Way("INT8, PT2E + Inductor", "pt2e-inductor", "int8", STATIC, "Inductor"),
    Way("FP32, ExecuTorch", "executorch", "fp32", DEPLOY, "ExecuTorch"),
    Way("INT8, ExecuTorch", "executorch", "int8", STATIC, "ExecuTorch"),
    Way("FP32, ONNX Runtime", "onnxruntime", "fp32", DEPLOY, "ONNX Runtime"),
    Way("INT8, ONNX Runtime", "onnxruntime", "int8", STATIC, "ONNX Runtime"),
    Way("FP32, OpenVINO", "openvino", "fp32", DEPLOY, "OpenVINO"),
    Way("BF16, OpenVINO", "openvino", "bf16", DEPLOY, "OpenVINO"),
    Way("INT8, OpenVINO (NNCF)", "openvino", "int8", STATIC, "OpenVINO"),
)


@dataclass(frozen=True)
class Rung:
    """What was measured of one `Way`. Each ratio is `(times as fast, low, high)`, a median over the rounds with its interval.

    timing: of one image, its speed-up over the first way. over_fp32: over the fastest FP32 of its family, which is `fp32`.
    judged: a `measure.Comparison` of the first way's network with this one, None without judges. bytes: of its file.
    """

    way: Way
    timing: measure.Timing
    fp32: str
    over_fp32: tuple
    judged: measure.Comparison | None
    bytes: int


class Ladder(Shown, dict):
    """Name of a way → `Rung`, in the order of `WAYS`. missing: name → why it is not here. size: of the images, in pixels."""

    def __init__(self, rungs, missing, size, rounds, threads):
        super().__init__((rung.way.name, rung) for rung in rungs)
        self.missing, self.size, self.rounds, self.threads = missing, size, rounds, threads

    def best(self, precision="int8", families=None):
        """Return the fastest rung of a precision, of these families if any are named, or None where there is none.

        It is the one of the largest speed-up: the first way was timed beside each rung, while the milliseconds of two families
        come from two processes, one after the other.
        """
        found = [
            r for r in self.values() if r.way.precision == precision and (not families or r.way.family in families)
        ]
        return max(found, key=lambda rung: rung.timing.speedup, default=None)

    def table(self):
        """Return the ladder as a `Table`, the slowest rung, of the smallest speed-up, first."""
        first, judged = next(iter(self)), any(rung.judged for rung in self.values())
        columns = ["", "median ms", "quartiles", f"over {first}", "over its own FP32"]
        columns += ["accuracy", "same prediction", "file"] if judged else ["file"]
        rows = []
        for rung in sorted(self.values(), key=lambda rung: rung.timing.speedup):
            t = rung.timing
            row = [rung.way.name, f"{t.median:.2f}", f"{t.q1:.2f} – {t.q3:.2f}"]
            row.append(f"{t.speedup:.2f}× [{t.speedup_low:.2f}, {t.speedup_high:.2f}]")
            row.append("–" if rung.way.name == rung.fp32 else "{:.2f}× [{:.2f}, {:.2f}]".format(*rung.over_fp32))
            if judged:
                row += [f"{rung.judged.second.value:.2%}", f"{rung.judged.agreement:.2%}"]
            rows.append([*row, f"{rung.bytes / 1e6:.1f} MB"])
        return Table(columns, rows)

    def _how(self):
        judged = next((rung.judged for rung in self.values() if rung.judged is not None), None)
        images = "" if judged is None else f"; accuracy on {judged.n:,} images"
        return (
            f"one image of {self.size} × {self.size}, {self.rounds} interleaved rounds an engine, {self.threads} threads"
            f"{images}"
        )


def make(way, model, calibration, image_shape):
    """Return `model` made in one `Way`, ready to call with images `(n, *image_shape)`.

    calibration: batches of such images, with labels or without. Raises `RuntimeError` when the engine does not run here.
    """
    if way.how == AS_IT_IS:
        return model.eval()
    if way.how == DYNAMIC:
        return backends.quantize_dynamic(model)
    if way.how == STATIC:
        return backends.quantize_static(model, calibration, engine=way.engine)
    return backends.deploy(model, engine=way.engine, precision=way.precision, image_shape=image_shape)


def climb(model, timed, *, calibration=None, judges=None, ways=WAYS, rounds=30, settle=1, on_family=lambda name: None):
    """Measure `model` in each way that runs here and return the `Ladder`.

    Each family has a fresh process of its own, as it would have in service, so that engines neither share threads nor add up
    in memory; in each of them the ways are timed in interleaved rounds, with the first way, to which all ratios refer.

    model: float32 module in evaluation mode that can be pickled. timed: batches of calibration images of the size to be timed,
    with labels or without; the first image is what is timed. judges: batches of `(images, labels)` that accuracy is measured
    on, none by default; calibration: batches of the same size, for the networks that are judged. All three can be iterated
    more than once. rounds, settle: as in `measure.latency`; with one call before each that counts, a model finds its own
    weights in the caches, as it does in a service that runs one model again and again. on_family: called with each name
    before its turn.

    A way that fails, however it does, is `missing`, and so are those of a family whose process is killed: the others go on.
    Raises `ValueError` for judges without calibration, without an image, and when the first way does not run here.
    """
    if judges is not None and calibration is None:
        raise ValueError("to judge INT8 networks takes calibration images of the judges' size: pass calibration=")
    size = _first(timed).shape[-1]
    settings = {"rounds": rounds, "settle": settle}
    found, missing = {}, {}
    for family in dict.fromkeys(way.family for way in ways):
        on_family(family)
        own = [ways[0], *(way for way in ways[1:] if way.family == family)]
        new = {
            way.name for way in own
        } - found.keys()  # the first way too, when the process of its own family was killed
        try:
            # On its first call in a fresh process a family finds out what runs, so errors of one do not reach the others.
            timings, outcomes, reasons = measure.in_child(_climb, model, own, new, timed, calibration, judges, settings)
        except MemoryError as error:
            timings, outcomes, reasons = {}, {}, {way.name: str(error) for way in own}
        missing |= reasons
        found |= {name: (timings, *outcomes[name]) for name in timings if name not in found}
    if ways[0].name not in found:
        raise ValueError(f"nothing to compare with: {ways[0].name} does not run here: {missing.get(ways[0].name)}")
    missing = {name: why for name, why in missing.items() if name not in found}
    return Ladder(list(_rungs(ways, found, judges)), missing, size, rounds, torch.get_num_threads())


def _rungs(ways, found, judges):
    labels = None if judges is None else torch.cat([labels for _, labels in judges])
    expected = found[ways[0].name][1]
    for way in ways:
        if way.name in found:
            timings, classes, size = found[way.name]
            floats = [w.name for w in ways if w.family == way.family and w.precision == "fp32" and w.name in timings]
            fastest = min(floats or [ways[0].name], key=lambda name: timings[name].median)
            ratio = bootstrap_ratio(timings[fastest].times, timings[way.name].times)
            judged = None if labels is None else measure.compare_predictions(expected, classes, labels)
            yield Rung(way, timings[way.name], fastest, ratio, judged, size)


def _climb(model, ways, new, timed, calibration, judges, settings):
    """Return `(name → Timing, name → (classes, bytes), name → why it does not run)` of the ways of a family.

    With them comes the first of all ways, to be timed beside them. Judged are those whose names are in `new`.
    """
    image = _first(timed)[:1].contiguous()
    made, outcomes, missing = {}, {}, {}
    for way in ways:
        try:
            candidate, classes = None, None
            if judges is not None and way.name in new:
                candidate = make(way, model, calibration, _first(judges).shape[1:])
                classes, _ = measure.predictions(candidate, judges)
            if candidate is None or calibration is not timed:
                candidate = make(way, model, timed, image.shape[1:])
            with torch.no_grad():
                candidate(image)  # who cannot run it fails here, alone
            outcomes[way.name] = classes, _bytes(way, model, candidate)
            made[way.name] = candidate
        except Exception as error:  # engines raise what they like, and none may take the others along
            missing[way.name] = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        cpu.trim_memory()
    contenders = {name: functools.partial(candidate, image) for name, candidate in made.items()}
    timings = (
        measure.latency(contenders, warmup=2, **settings) if new & made.keys() else {}
    )  # or there is nothing to learn
    return dict(timings), outcomes, missing


def _first(batches):
    """Return the images of the first batch, be it `(images, labels)` or images alone. Raises `ValueError` without one."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("no images to time or to judge with: pass batches with at least one image")
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _bytes(way, model, made):
    """Return the bytes of a file that holds `made`; of torch's own float ones, which have no format, of the folded weights."""
    if way.how == AS_IT_IS:
        return measure.size_on_disk(model)
    if way.engine in backends.FLOAT_ONLY and way.how == DEPLOY:
        return measure.size_on_disk(weights.fold_batch_norm(model).to(DTYPES[way.precision]))
    return measure.size_on_disk(made)


def of_ceiling(rung, ceilings, model, image_shape):
    """Return which share of the machine's limit a rung reaches, or None where its precision has none.

    It has none where it was not measured, or where it is lower than that of FP32, because the processor only emulates it.

    The limit is the least time that `ceilings` allow the convolutions and linear layers of `model`, each the slower of its
    arithmetic and its bytes, in one image (`roofline.least_seconds`). image_shape: its shape, such as `(1, 28, 28)`; a number
    n stands for `(3, n, n)`.
    """
    name = LIMITS.get(rung.way.precision)
    if ceilings.peaks.get(name, 0) < ceilings.peaks["FP32"] or rung.way.how == DYNAMIC:  # which computes mostly in FP32
        return None
    shape = (3, image_shape, image_shape) if isinstance(image_shape, int) else image_shape
    works = roofline.layers(model, shape, roofline.BITS[name])
    return 1000 * roofline.least_seconds(ceilings, works, name) / rung.timing.median
