"""What we measure: accuracy with its interval, paired comparisons, latency, size, memory, and the machine itself."""

import importlib.metadata
import platform

import torch

from . import cpu
from .stats import Proportion


def accuracy(model, batches):
    """Return the share of images that `model` classifies right, as a `Proportion` with a 95 % interval.

    model: callable, float32 images `(b, 3, h, w)` → logits `(b, classes)`; a module is put into evaluation mode for the
    count and back afterwards. batches: iterable of `(images, labels)`. Raises `ValueError` when there is no image.
    """
    right = n = 0
    for logits, labels in _outputs(model, batches):
        right += int((logits.argmax(1) == labels).sum())
        n += len(labels)
    if n == 0:
        raise ValueError("no images to measure accuracy on: batches was empty (a generator can be used only once)")
    return Proportion(right, n)


def _outputs(model, batches):
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                yield model(images), labels
    finally:
        if training:
            model.train()


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
