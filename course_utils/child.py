"""A Python process of its own, for what needs one: peak memory, libraries, and settings that are read once at a start."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path


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
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin) as pool:
        with _environment(env or {}):
            future = pool.submit(_run, fn, args)  # the process starts here, with the environment as it is now
        try:
            return future.result()
        except BrokenProcessPool:
            raise MemoryError("the process was killed while it ran, most likely for want of memory") from None


def _begin():
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    gc.disable()  # until the function is there, with torch and all: it would take a fifth of the time of the imports


def _run(fn, args):
    gc.freeze()  # what is imported stays, so nobody needs to look through it
    gc.enable()
    return fn(*args)


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
    """Memory of a child process in bytes: `total` at its peak, and `added` by the function beyond what Python and its
    imports already held. Only Linux lets the peak start anew at the function; elsewhere it is that of the whole process."""

    total: int
    added: int


def peak_memory(fn, *args):
    """Run `fn(*args)` in a fresh Python process and return the `PeakMemory` it took.

    fn: a function that a new process can import; its result is discarded. Errors are those of `in_child`.
    """
    _check(fn, args)
    return in_child(run_and_watch, fn, args)


def run_and_watch(fn, args=()):
    """Return the `PeakMemory` of `fn(*args)`, run in this process."""
    import psutil

    before = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew here
    except OSError:
        pass
    fn(*args)
    peak = _peak_rss()
    return PeakMemory(peak, max(0, peak - before))


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
