"""What we measure: accuracy with its interval, paired comparisons, latency, size, memory, and the machine itself."""

import importlib.metadata
import multiprocessing
import os
import pickle
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cpu
from .stats import Proportion, bootstrap_ratio, mcnemar, mean_over_runs, paired_difference
from .tables import Table

NO_IMAGES = "no images to measure on: batches was empty (a generator can be used only once)"


def accuracy(model, batches):
    """Return the share of images that `model` classifies right, as a `Proportion` with a 95 % interval.

    model: callable, float32 images `(b, 3, h, w)` → logits `(b, classes)`; a module is put into evaluation mode for the
    count and back afterwards. batches: iterable of `(images, labels)`. Raises `ValueError` when there is no image.
    """
    right = n = 0
    for (logits,), labels in _outputs([model], batches):
        right += int((logits.argmax(1) == labels).sum())
        n += len(labels)
    if n == 0:
        raise ValueError(NO_IMAGES)
    return Proportion(right, n)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same `n` images: how often they disagree, and whether one is better.

    flips: images where the predictions differ. fixed / broke: images that only the second / only the first gets right.
    difference: accuracy of the second minus the first, with its 95 % interval `low..high`. p: exact McNemar.
    """

    n: int
    first: Proportion
    second: Proportion
    flips: int
    fixed: int
    broke: int

    @property
    def agreement(self):
        """Share of images on which both predict the same class."""
        return 1 - self.flips / self.n

    @property
    def difference(self):
        return paired_difference(self.fixed, self.broke, self.n)[0]

    @property
    def low(self):
        return paired_difference(self.fixed, self.broke, self.n)[1]

    @property
    def high(self):
        return paired_difference(self.fixed, self.broke, self.n)[2]

    @property
    def p(self):
        return mcnemar(self.fixed, self.broke)

    def __str__(self):
        return (
            f"{self.first.value:.2%} → {self.second.value:.2%}: {100 * self.difference:+.2f} points "
            f"[{100 * self.low:+.2f}, {100 * self.high:+.2f}], {self.flips} of {self.n:,} predictions changed "
            f"({self.fixed} fixed, {self.broke} broke, McNemar p = {self.p:.2g})"
        )


def compare(first, second, batches):
    """Return the `Comparison` of two models on the same images; arguments and errors as in `accuracy`."""
    outputs = [(*(logits.argmax(1) for logits in both), labels) for both, labels in _outputs([first, second], batches)]
    if not outputs:
        raise ValueError(NO_IMAGES)
    return compare_predictions(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def predictions(model, batches):
    """Return `(classes, labels)`, int64 `(images,)` each: what `model` predicts and what is true; arguments as in `accuracy`.

    For a model that many others are compared with: it runs once, and `compare_predictions` does the rest.
    """
    outputs = [(logits.argmax(1), labels) for (logits,), labels in _outputs([model], batches)]
    if not outputs:
        raise ValueError(NO_IMAGES)
    classes, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return classes, labels


def compare_predictions(first, second, labels):
    """Return the `Comparison` of two lists of predicted classes with the true `labels`: int64 tensors `(images,)`.

    Raises `ValueError` when they differ in length or are empty.
    """
    if not len(first) == len(second) == len(labels) > 0:
        raise ValueError(f"need as many predictions as labels, got {len(first)}, {len(second)} and {len(labels)}")
    a_right, b_right = first == labels, second == labels
    n = len(labels)
    return Comparison(
        n,
        Proportion(int(a_right.sum()), n),
        Proportion(int(b_right.sum()), n),
        flips=int((first != second).sum()),
        fixed=int((~a_right & b_right).sum()),
        broke=int((a_right & ~b_right).sum()),
    )


@dataclass(frozen=True)
class SeedComparison:
    """Two ways to train, each with the same seeds, on the same images: mean accuracies `first` and `second`, their
    `difference` with its 95 % interval `low`..`high` over images and seeds (`stats.mean_over_runs`), and seed by seed, `each`.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    each: tuple

    def __str__(self):
        return f"{100 * self.difference:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def compare_seeds(first, second, labels):
    """Return the `SeedComparison` of two lists of predicted classes, one int64 tensor `(images,)` a seed.

    A way that has no seed is a list of the same tensor as often. Raises `ValueError` for lists of other lengths, and for
    fewer than 2 seeds.
    """
    if len(first) != len(second):
        raise ValueError(f"need as many predictions of both, got those of {len(first)} and {len(second)} seeds")
    a, b = (torch.stack([classes == labels for classes in found]).double() for found in (first, second))
    return SeedComparison(float(a.mean()), float(b.mean()), *mean_over_runs(b - a), tuple((b - a).mean(1).tolist()))


def _outputs(models, batches):
    """Yield the logits of each model, in evaluation mode and without gradients, and the labels, batch by batch."""
    training = [model for model in models if getattr(model, "training", False)]
    for model in training:
        model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                yield [model(images) for model in models], labels
    finally:
        for model in training:
            model.train()


@dataclass(frozen=True)
class Timing:
    """Latency of one contender over the rounds: `median`, quartiles `q1`, `q3` in milliseconds.

    speedup: the baseline's median divided by this one's (above 1 is faster), with its 95 % bootstrap interval.
    """

    name: str
    median: float
    q1: float
    q3: float
    speedup: float
    speedup_low: float
    speedup_high: float


class Timings(dict):
    """The `Timing` of each contender by name; prints as a table. `rounds` and `threads` say how they were taken."""

    def __init__(self, timings, rounds, threads):
        super().__init__((timing.name, timing) for timing in timings)
        self.rounds, self.threads = rounds, threads

    def table(self):
        """Return the timings as a `Table`."""
        baseline = next(iter(self))
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
        return Table(["", "median ms", "quartiles", f"speed-up over {baseline}", "95 % interval"], rows)

    def __str__(self):
        return f"{self.table()}\n{self.rounds} interleaved rounds, {self.threads} threads"

    __repr__ = __str__

    def _repr_markdown_(self):
        return f"{self.table()._repr_markdown_()}\n\n{self.rounds} interleaved rounds, {self.threads} threads"


def latency(contenders, *, rounds=40, warmup=5, threads=None):
    """Time callables against each other in interleaved rounds and return their `Timings`; the first is the baseline.

    contenders: dict of name → callable without arguments. Each round calls every contender once, starting one further each
    time, so that drift and noise of the machine meet all of them alike. rounds, warmup: calls of each that count, and that
    do not. threads: torch threads during the timing (default: as they are). Calls run under `torch.no_grad()`.

    Raises `ValueError` without contenders or with fewer than 3 rounds.
    """
    if not contenders or rounds < 3:
        raise ValueError(f"need at least one contender and 3 rounds, got {len(contenders)} and {rounds}")
    names = list(contenders)
    seconds = {name: [] for name in names}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with torch.no_grad():
            for index in range(-warmup, rounds):
                start = index % len(names)
                for name in names[start:] + names[:start]:
                    began = time.perf_counter_ns()
                    contenders[name]()
                    took = time.perf_counter_ns() - began
                    if index >= 0:
                        seconds[name].append(took / 1e6)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    return Timings([_timing(name, seconds[name], seconds[names[0]]) for name in names], rounds, used)


def _timing(name, times, baseline):
    quartiles = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    speedup, low, high = bootstrap_ratio(baseline, times)
    return Timing(name, quartiles[1], quartiles[0], quartiles[2], speedup, low, high)


def size_on_disk(model):
    """Return the bytes of `model` as a file: a path's own size, or what saving the model as safetensors takes.

    model: a path, a module (its state dict is saved), or a model that `backends` quantized (saved by `backends.save`).
    """
    if isinstance(model, (str, os.PathLike)):
        return Path(model).stat().st_size
    from safetensors.torch import save_file

    from . import backends

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if "course_recipe" in getattr(model, "meta", {}):
            return backends.save(model, path)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        return path.stat().st_size


@dataclass(frozen=True)
class PeakMemory:
    """Memory of a child process in bytes: `total` at its peak, and `added` by the function beyond what Python, torch and the
    imports already held."""

    total: int
    added: int


def peak_memory(fn, *args):
    """Run `fn(*args)` in a fresh Python process and return the `PeakMemory` it took.

    fn: a function that a new process can import (defined in a module, not in the notebook); its result is discarded.
    Raises `ValueError` for a function that cannot be sent there, `MemoryError` when the process is killed on the way, and
    whatever `fn` raises.
    """
    try:
        pickle.dumps((fn, args))
    except Exception as error:
        raise ValueError(f"a fresh process cannot import this function or its arguments ({error})") from None
    if getattr(fn, "__module__", None) == "__main__":
        raise ValueError(
            f"{fn.__qualname__} is defined in this session: move it into a module, a fresh process must import it"
        )
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return PeakMemory(*pool.submit(_run_and_watch, fn, args).result())
        except BrokenProcessPool:
            raise MemoryError("the process was killed while it ran, most likely for want of memory") from None


def load_and_run(path, name=None, *, size=224):
    """Load the model in `path` and run one image of `size` × `size` pixels: what `peak_memory` is usually asked about.

    path: a file written by `backends.save`; or, with the architecture `name` given, float weights as safetensors.
    """
    if name is None:
        from . import backends

        model = backends.load(path)
    else:
        from safetensors.torch import load_file

        from . import models

        model = models.load(name, weights=None)
        model.load_state_dict(load_file(path))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))


def _run_and_watch(fn, args):
    import psutil

    before = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew here
    except OSError:
        pass
    fn(*args)
    peak = _peak_rss()
    return peak, max(0, peak - before)


def _peak_rss():
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)


def machine():
    """Return what decides the numbers on this machine, as a dict of text and numbers ready for a report or a ledger.

    Keys: cpu, isa (the instruction sets in `cpu.ISA_FLAGS` that it has), cores, threads (torch's), memory_gib, system, python,
    torch, torchvision, int8_engine (torch's current one).
    """
    return {
        "cpu": cpu.name(),
        "isa": [flag for flag in cpu.ISA_FLAGS if flag in cpu.flags()],
        "cores": cpu.cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": cpu.memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "int8_engine": torch.backends.quantized.engine,
    }
