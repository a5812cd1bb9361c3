"""Models in files: what it takes to open one."""

import time
from dataclasses import dataclass

import torch

from .child import PeakMemory, in_child, run_and_watch


@dataclass(frozen=True)
class Loading:
    """What it takes to open a model in a process that has imported torch, and to run one image.

    Seconds to load it: `first`, with the imports that it needs, and once more, `again`. memory: the `PeakMemory` of the first
    load and the image.
    """

    first: float
    again: float
    memory: PeakMemory


def loading(path, name=None, *, size=224):
    """Load the model in `path` in a fresh Python process, run an image of `size` × `size` pixels, and return the `Loading`.

    path, name: as for `load_model`. The file is most likely in the system's cache. Errors are those of `in_child` and
    `load_model`.
    """
    return in_child(_load_twice, path, name, size)


def load_model(path, name=None):
    """Return the model in `path`, ready to call.

    path: a file written by `backends.save`; or, with the architecture `name` given, float weights as safetensors. Errors are
    those of `backends.load`, or of safetensors and `load_state_dict`.
    """
    if name is None:
        from . import backends

        return backends.load(path)
    from safetensors.torch import load_file

    from . import models

    model = models.load(name, weights=None)
    model.load_state_dict(load_file(path))
    return model


def _load_twice(path, name, size):
    seconds = []

    def load():
        began = time.perf_counter()
        model = load_model(path, name)
        seconds.append(time.perf_counter() - began)
        return model

    def load_and_run():
        model = load()
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))

    memory = run_and_watch(load_and_run)
    load()
    return Loading(*seconds, memory)
