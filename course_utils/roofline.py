"""The machine's ceilings, measured, and what they allow: Williams, Waterman & Patterson, *Roofline*, CACM 2009.

A layer that makes `intensity` operations for each byte it moves can run no faster than the memory brings bytes times the
intensity, nor faster than the arithmetic's own peak: min(peak, bandwidth × intensity).
"""

import contextlib
import time
from dataclasses import dataclass

import torch

from . import cost, cpu
from .tables import Table

BITS = {"FP32": 32, "BF16": 16, "INT8": 8}
SLOW = 1  # second: what would take longer for a single run is measured on less work


@dataclass(frozen=True, repr=False)
class Ceilings:
    """What this machine reached: `peaks`, operations a second by precision (a multiplication and an addition are two), and
    `bandwidth`, bytes a second read and written. how: dict of the same names and `"bandwidth"` → what reached it."""

    peaks: dict
    bandwidth: float
    threads: int
    how: dict

    def table(self):
        """Return the ceilings as a `Table`, with the intensity from which on arithmetic limits instead of memory."""
        rows = [
            [name, f"{peak / 1e9:,.0f} G operations/s", f"{peak / self.bandwidth:.0f}", self.how[name]]
            for name, peak in self.peaks.items()
        ]
        rows.append(["memory", f"{self.bandwidth / 1e9:.1f} GB/s", "", self.how["bandwidth"]])
        return Table(["ceiling", "reached", "ridge, operations a byte", "by"], rows)

    def __str__(self):
        return f"{self.table()}\n{self.threads} threads"

    __repr__ = __str__

    def _repr_markdown_(self):
        return f"{self.table()._repr_markdown_()}\n\n{self.threads} threads"


@dataclass(frozen=True)
class Work:
    """What one layer does: `operations`, two a multiply-accumulate, and `bytes` moved if each number is moved once."""

    name: str
    operations: int
    bytes: float

    @property
    def intensity(self):
        """Operations for each byte."""
        return self.operations / self.bytes


def ceilings(*, size=2048, repeats=7, threads=None, megabytes=None):
    """Measure this machine's `Ceilings`; takes some seconds.

    The peak of a precision is the best of `repeats` runs of the better of two ways to its kernels: a product of two square
    matrices of `size` rows, and, for floats, a 3 × 3 convolution in channels_last, because torch hands matrices to MKL, which
    is slow on processors of other makers, and convolutions to oneDNN. What a machine has no way to is not in `peaks`.
    Bandwidth is the better of STREAM's copy and triad (McCalpin 1995), bytes read and bytes written, on arrays of `megabytes`
    each: by default four times the last-level cache as STREAM asks, but no more than 128, so that three of them leave room in
    2 GB. threads: torch threads (default: as they are).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        peaks, how = {}, {}
        with torch.no_grad():
            for precision, ways in WAYS.items():
                for name, make in ways.items():
                    # Those are what a way raises that this build of torch does not have.
                    with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
                        rate = _rate(make, size, repeats)
                        if rate > peaks.get(precision, 0):
                            peaks[precision], how[precision] = rate, name
            bandwidth, how["bandwidth"] = _bandwidth(megabytes, repeats)
        return Ceilings(peaks, bandwidth, torch.get_num_threads(), how)
    finally:
        torch.set_num_threads(before)


def layers(model, image_shape, bits=32, *, batch=1):
    """Return a list of `Work`, one a convolution or linear layer of the float `model`, with all numbers `bits` wide.

    Arguments as in `cost.cost`. Each number counts as moved once: what caches keep from one layer, or call, to the next makes
    a real network move less, what they cannot hold more.
    """
    return [Work(c.name, 2 * c.macs, c.bytes(bits)) for c in cost.cost(model, image_shape, batch=batch)]


def attainable(ceilings, intensity, precision="FP32"):
    """Return the operations a second that the roofline allows at `intensity` operations a byte."""
    return min(ceilings.peaks[precision], ceilings.bandwidth * intensity)


def least_seconds(ceilings, layers, precision="FP32", *, memory=True):
    """Return the seconds that a network takes at the least, each of its `layers` at what the roofline allows.

    memory=False leaves the bandwidth out: a cache that holds all weights from one call to the next may beat that part, not the
    arithmetic's. Divided by what was measured it is the fraction of the ceiling that a kernel reaches.
    """
    peak = ceilings.peaks[precision]
    return sum(w.operations / (attainable(ceilings, w.intensity, precision) if memory else peak) for w in layers)


def achieved(layers, milliseconds):
    """Return `(intensity, operations a second, name)` of each of `layers` that has a time in the dict `milliseconds`."""
    return [
        (w.intensity, 1000 * w.operations / milliseconds[w.name], w.name) for w in layers if milliseconds.get(w.name)
    ]


def _rate(make, size, repeats):
    """Return the operations a second of one way to a precision.

    What is emulated, such as BF16 on an older processor, would take many seconds: it shows on a sixty-fourth of the work.
    """
    run, operations = make(size // 4)
    seconds = _best(run, repeats)
    if 64 * seconds < SLOW:
        run, operations = make(size)
        seconds = _best(run, repeats)
    return operations / seconds


def _matrices(size, dtype):
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    return lambda: torch.mm(a, b), 2 * size**3


def _convolution(size, dtype, channels=256):
    side = max(7, round((size**3 / 9) ** 0.5 / channels))  # about as many operations as the matrices
    generator = torch.Generator().manual_seed(0)
    image, weight = (
        torch.randn(shape, generator=generator) for shape in ((1, channels, side, side), (channels, channels, 3, 3))
    )
    image, weight = (t.to(dtype).to(memory_format=torch.channels_last) for t in (image, weight))
    return lambda: torch.nn.functional.conv2d(image, weight, padding=1), 2 * 9 * channels**2 * side**2


def _integers(size, dtype):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return torch.randint(low, high, (size, size), dtype=dtype, generator=torch.Generator().manual_seed(0))


def _int8_matrices(size):
    a, b = _integers(size, torch.int8), _integers(size, torch.int8)
    return lambda: torch._int_mm(a, b), 2 * size**3


def _int8_linear(size):
    x, weight = (
        _integers(size, torch.uint8),
        torch.ops.onednn.qlinear_prepack(_integers(size, torch.int8), [size, size]),
    )
    scales, zero_points = torch.ones(size), torch.zeros(size, dtype=torch.int64)

    def run():
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, weight, scales, zero_points, None, 1e4, 128, torch.uint8, "none", [], ""
        )

    return run, 2 * size**3


WAYS = {  # precision → name of a way to its kernels → function that makes it: size → (function to time, operations)
    "FP32": {
        "matrix product": lambda size: _matrices(size, torch.float32),
        "convolution": lambda size: _convolution(size, torch.float32),
    },
    "BF16": {
        "matrix product": lambda size: _matrices(size, torch.bfloat16),
        "convolution": lambda size: _convolution(size, torch.bfloat16),
    },
    "INT8": {
        "int8 × int8 matrix product": _int8_matrices,
        "uint8 × int8 linear layer of oneDNN": _int8_linear,
    },
}


def _bandwidth(megabytes, repeats):
    cache = cpu.last_level_cache()
    if megabytes is None:
        megabytes = min(128, max(64, 4 * (cache or 0) / 2**20))
    a, b, c = (torch.ones(int(megabytes * 2**20) // 4) for _ in range(3))
    size = a.numel() * a.element_size()
    rates = {
        "copy": 2 * size / _best(lambda: a.copy_(b), repeats),
        "triad": 3 * size / _best(lambda: torch.add(b, c, alpha=3.0, out=a), repeats),
    }
    best = max(rates, key=rates.get)
    known = "of unknown size" if cache is None else f"{cache / 2**20:.0f} MiB"
    return rates[best], f"{best} of arrays of {size / 2**20:.0f} MiB, last-level cache {known}"


def _best(run, repeats):
    """Return the seconds of the fastest of so many runs, after one that does not count: a ceiling is what can be reached."""
    run()
    seconds = []
    while len(seconds) < repeats and sum(seconds) < 1:
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
