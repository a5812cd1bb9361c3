"""What we measure: accuracy with its interval, paired comparisons, size, and the machine itself.

What takes more than a page has a module of its own, and its names here too: `timing`, `child`, `loading`, `profiling`, `energy`,
`isa`.
"""

import importlib.metadata
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cpu
from .child import in_child, peak_memory
from .energy import energy
from .isa import at_level
from .loading import load_model, loading
from .profiling import by_layer, kernels, layer_speedups, onednn
from .stats import Proportion, mcnemar, mean_over_runs, paired_difference
from .timing import Timing, Timings, aa_test, latency, overhead

__all__ = ["accuracy", "compare", "compare_predictions", "compare_seeds", "predictions", "Comparison", "SeedComparison"]
__all__ += ["aa_test", "latency", "overhead", "Timing", "Timings"]
__all__ += ["in_child", "load_model", "loading", "peak_memory", "size_on_disk"]
__all__ += ["at_level", "by_layer", "energy", "kernels", "layer_speedups", "machine", "onednn"]

NO_IMAGES = "no images to measure on: batches was empty (a generator can be used only once)"


def accuracy(model, batches):
    """Return the share of images that `model` classifies right, as a `Proportion` with a 95 % interval.

    model: callable, float32 images `(b, 3, h, w)` → logits `(b, classes)`; a module is put into evaluation mode for the
    count, and each part of it back to its own mode afterwards. batches: iterable of `(images, labels)`. Raises `ValueError`
    when there is no image.
    """
    classes, labels = predictions(model, batches)
    return Proportion(int((classes == labels).sum()), len(labels))


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
    return compare_predictions(*_predictions([first, second], batches))


def predictions(model, batches):
    """Return `(classes, labels)`, int64 `(images,)` each: what `model` predicts and what is true; arguments as in `accuracy`.

    For a model that many others are compared with: it runs once, and `compare_predictions` does the rest.
    """
    return _predictions([model], batches)


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


def _predictions(models, batches):
    """Return the classes that each model predicts, in evaluation mode and without gradients, and the labels: a tuple."""
    networks = [model for model in models if isinstance(model, torch.nn.Module)]
    # Of every part: a frozen batch norm of a network in training is in evaluation mode, and the reverse happens too.
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    classes, truth = [[] for _ in models], []
    try:
        with torch.no_grad():
            for images, labels in batches:
                for model, found in zip(models, classes, strict=True):
                    # As plain integers: tensors kept from each batch would hold on to the memory around them.
                    found += model(images).argmax(1).tolist()
                truth.append(labels)
    finally:
        for network in networks:
            network.train(modes[network])  # of exported networks, the mode is more than a flag
        for module, training in modes.items():
            module.training = training
    if not truth:
        raise ValueError(NO_IMAGES)
    return *(torch.tensor(found, dtype=torch.int64) for found in classes), torch.cat(truth)


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
