"""Energy: measured where the processor's own counters can be read, else estimated, and never the two in one column."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .tables import Table

POWERCAP = Path("/sys/class/powercap")

# Horowitz, *Computing's Energy Problem (and What We Can Do About It)*, ISSCC 2014, figure 1.1.9: 45 nm, 0.9 V, picojoules.
# A multiplication and the addition to a wider sum: 32 bits for integers and for FP16, as kernels have them.
MAC_PJ = {"fp32": 3.7 + 0.9, "fp16": 1.1 + 0.9, "int8": 0.2 + 0.1}
WIDTH = {"fp32": 32, "fp16": 16, "int8": 8}
DRAM_PJ_PER_BYTE = (1300 / 8, 2600 / 8)  # 64 bits from DRAM: 1.3 to 2.6 nJ

LEFT_OUT = (
    "fetching and scheduling instructions (some 70 pJ each in that table), registers and caches, rounding to 8 bits, leakage, "
    "the power supply and the rest of the machine; and your chip is not made in 45 nm"
)


class _Energy:
    def times(self, other):
        """Return how many times as much energy this is as `other`. Raises `ValueError` where one is measured, one estimated."""
        if self.kind != other.kind:
            raise ValueError("a measured energy and an estimated one have no ratio: compare two of one kind")
        return self.joules / other.joules


@dataclass(frozen=True)
class MeasuredEnergy(_Energy):
    """Joules of one call, by the counters in `source`: all that the processor took meanwhile, whoever used it.

    above_idle: without the `idle_watts` that it took while nothing ran just before. calls: over so many it is the mean.
    """

    joules: float
    above_idle: float
    idle_watts: float
    calls: int
    source: str
    kind: ClassVar[str] = "measured"

    def __str__(self):
        return (
            f"{1000 * self.joules:.3g} mJ measured, {1000 * self.above_idle:.3g} of them above {self.idle_watts:.3g} W at idle "
            f"({self.source}, mean of {self.calls} calls)"
        )


@dataclass(frozen=True)
class EstimatedEnergy(_Energy):
    """Joules of one call as a table of energies per operation has it: of the `arithmetic`, and `low`..`high` with memory.

    why: what kept it from being measured, where that was tried.
    """

    arithmetic: float
    low: float
    high: float
    source: str
    why: str = ""
    kind: ClassVar[str] = "estimated"

    @property
    def joules(self):
        """The middle of `low`..`high`."""
        return (self.low + self.high) / 2

    def __str__(self):
        why = f"; not measured: {self.why}" if self.why else ""
        return f"{1000 * self.low:.3g} to {1000 * self.high:.3g} mJ estimated ({self.source}{why})"


def estimate(costs, *, arithmetic="fp32", weight_bits=None, activation_bits=None):
    """Return the `EstimatedEnergy` of one run of a network, from what `cost.cost` counted and Horowitz' table of 2014.

    arithmetic: `"fp32"`, `"fp16"` or `"int8"`, what multiplications are done in. weight_bits, activation_bits: as they lie in
    memory, by default as wide as the arithmetic; weights alone may be narrower, such as 4 bits.
    low: weights come from DRAM once, at the table's lower figure, and activations stay in caches. high: activations go to DRAM
    and back too, and all at the upper figure. What it leaves out, `LEFT_OUT`, is more than what it has: read ratios, not joules.

    Raises `ValueError` for another arithmetic.
    """
    if arithmetic not in MAC_PJ:
        raise ValueError(f"no energy is known for {arithmetic!r}: choose one of {', '.join(MAC_PJ)}")
    weight_bits, activation_bits = weight_bits or WIDTH[arithmetic], activation_bits or WIDTH[arithmetic]
    macs = sum(layer.macs for layer in costs)
    weights = sum(layer.weights for layer in costs) * weight_bits / 8
    everything = sum(layer.bytes(weight_bits, activation_bits) for layer in costs)
    low, high = (pj * size for pj, size in zip(DRAM_PJ_PER_BYTE, (weights, everything), strict=True))
    work = macs * MAC_PJ[arithmetic]
    source = (
        f"Horowitz 2014, 45 nm: {macs / 1e9:.3g} G multiply-accumulates in {arithmetic}, weights of {weight_bits} bits"
    )
    return EstimatedEnergy(work * 1e-12, (work + low) * 1e-12, (work + high) * 1e-12, source)


def energy(fn, *, estimate=None, seconds=2.0, idle=2.0, root=POWERCAP):
    """Return the energy of one call `fn()`: a `MeasuredEnergy` where this machine lets us, else the `estimate` that was given.

    Measured is with RAPL, the counters that Intel's and AMD's processors keep of the energy of each package, and some of their
    DRAM, as Linux shows them below `root` (Documentation/power/powercap). They count the whole processor, so end what else
    runs. idle: seconds of doing nothing before, for the power at rest. seconds: for so long `fn` is called, once at least; the
    counters move about every millisecond.

    estimate: an `EstimatedEnergy`, of the function `estimate`, to fall back on. Raises `RuntimeError` without one where there
    is nothing to read; the message says what is missing.
    """
    meters, why = _meters(root)
    if not meters:
        if estimate is None:
            raise RuntimeError(f"energy cannot be measured here: {why}")
        return dataclasses.replace(estimate, why=why)
    began, before = time.perf_counter(), _read(meters)
    time.sleep(idle)
    at_rest, start = _read(meters), time.perf_counter()
    idle_watts = _joules(meters, before, at_rest) / (start - began)
    calls = 0
    while calls == 0 or time.perf_counter() - start < seconds:
        fn()
        calls += 1
    took = time.perf_counter() - start
    joules = _joules(meters, at_rest, _read(meters))
    source = "RAPL: " + ", ".join(meter.name for meter in meters)
    return MeasuredEnergy(joules / calls, (joules - idle_watts * took) / calls, idle_watts, calls, source)


def table(energies):
    """Return energies, a dict of name → energy, as a `Table`: one column for the measured, others for the estimated."""
    rows = []
    for name, found in energies.items():
        row = dict.fromkeys(("measured", "above idle", "estimated"), "–")
        if found.kind == "measured":
            row |= {"measured": f"{1000 * found.joules:.3g}", "above idle": f"{1000 * found.above_idle:.3g}"}
        else:
            row["estimated"] = f"{1000 * found.low:.3g} – {1000 * found.high:.3g}"
        rows.append([name, *row.values()])
    return Table(["", "measured, mJ", "of it above idle, mJ", "estimated, mJ"], rows)


@dataclass(frozen=True)
class _Meter:
    """A RAPL counter: microjoules that start again from 0 after `wrap`."""

    name: str
    path: Path
    wrap: int


def _meters(root):
    """Return the readable counters below `root`, and, where there are none, why."""
    found, closed = [], []
    # "core" and "uncore" are parts of a package, and "psys" contains it: adding them would count twice.
    # So would intel-rapl-mmio, the same counters by another way.
    for folder in sorted(Path(root).glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            meter = _Meter(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            int(meter.path.read_text())
            found.append(meter)
        except PermissionError:
            closed.append(folder.name)
        except (OSError, ValueError):  # a counter that this kernel lists and does not have
            continue
    if found:
        return found, ""
    if closed:
        return [], (
            f"only root may read the counters of {', '.join(closed)} (Linux closed them in 2020 against eavesdropping, "
            f"CVE-2020-8694); on a machine of your own, sudo chmod a+r {os.path.join(root, 'intel-rapl:*', 'energy_uj')} opens "
            "them until it restarts"
        )
    return [], "the system shows no RAPL counter, as most virtual machines and all but x86 processors do not"


def _read(meters):
    return [int(meter.path.read_text()) for meter in meters]


def _joules(meters, before, after):
    return sum((b - a) % (meter.wrap + 1) for meter, a, b in zip(meters, before, after, strict=True)) / 1e6
