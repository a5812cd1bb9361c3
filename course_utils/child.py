"""Measurements that need a Python process of their own: peak memory, time to load, settings read once at a start."""

import contextlib
import multiprocessing
import os
import pickle
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch


def in_child(fn, *args, env=None):
    """Run `fn(*args)` in a fresh Python process and return its result.

    fn: a function that a new process can import (defined in a module, not in the notebook). env: dict of environment variables
    that the process starts with, besides those of this one; None as a value takes one away. They are there before Python is, so
    also for what a library reads when it is loaded, such as `OMP_NUM_THREADS`, or once, such as `ONEDNN_MAX_CPU_ISA`.

    Raises `ValueError` for a function that cannot be sent there, `MemoryError` when the process is killed on the way, and
    whatever `fn` raises. The process ends with this one, however that ends.
    """
    _check(fn, args)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent) as pool:
        with _environment(env or {}):
            future = pool.submit(fn, *args)  # the process starts here, with the environment as it is now
        try:
            return future.result()
        except BrokenProcessPool:
            raise MemoryError("the process was killed while it ran, most likely for want of memory") from None


def _end_with_parent():
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _check(fn, args):
    try:
        pickle.dumps((fn, args))
    except Exception as error:
        raise ValueError(f"a fresh process cannot import this function or its arguments ({error})") from None
    if getattr(fn, "__module__", None) == "__main__":
        raise ValueError(
            f"{fn.__qualname__} is defined in this session: move it into a module, a fresh process must import it"
        )


@contextlib.contextmanager
def _environment(changes):
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables):
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = str(value)


@dataclass(frozen=True)
class PeakMemory:
    """Memory of a child process in bytes: `total` at its peak, and `added` by the function beyond what Python, torch and the
    imports already held. Only Linux lets the peak start anew at the function; elsewhere it is that of the whole process."""

    total: int
    added: int


def peak_memory(fn, *args):
    """Run `fn(*args)` in a fresh Python process and return the `PeakMemory` it took.

    fn: a function that a new process can import; its result is discarded. Errors are those of `in_child`.
    """
    _check(fn, args)
    return PeakMemory(*in_child(_run_and_watch, fn, args))


@dataclass(frozen=True)
class LoadSeconds:
    """Seconds to load a model in a process that has imported torch: `first`, with the imports it needs, and once more, `again`."""

    first: float
    again: float


def load_seconds(what, *args, repeats=3):
    """Return the `LoadSeconds` of a model, medians over so many fresh processes.

    what: a function that loads it, called with `args` (see `in_child` for which); or a path, which `load_model` opens, with
    the architecture's name as the other argument for float weights. The file is most likely still in the system's cache.
    """
    if isinstance(what, (str, os.PathLike)):
        what, args = load_model, (what, *args)
    _check(what, args)
    runs = [in_child(_load_twice, what, args) for _ in range(repeats)]
    return LoadSeconds(*(statistics.median(seconds) for seconds in zip(*runs, strict=True)))


def load_model(path, name=None):
    """Return the model in `path`, ready to call.

    path: a file written by `backends.save`; or, with the architecture `name` given, float weights as safetensors.
    """
    if name is None:
        from . import backends

        return backends.load(path)
    from safetensors.torch import load_file

    from . import models

    model = models.load(name, weights=None)
    model.load_state_dict(load_file(path))
    return model


def load_and_run(path, name=None, *, size=224):
    """Load the model in `path` and run one image of `size` × `size` pixels: what `peak_memory` is usually asked about.

    The arguments are those of `load_model`.
    """
    model = load_model(path, name)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))


def _load_twice(fn, args):
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        fn(*args)
        seconds.append(time.perf_counter() - began)
    return seconds


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
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)
