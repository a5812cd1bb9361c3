"""The range of an affine map, dragged over the histogram of a tensor."""

import math

import ipywidgets
import torch

from .. import affine, observers
from ..plots import BLUE, GREY, ORANGE
from .base import Explorer, paragraph, table

MOST_VALUES = 2**15  # for more torch takes several threads, which wait for one another where other programs run
BINS = 161
FLOOR = -70  # dB: where the bars of the errors begin


class ClipRange(Explorer):
    """Drag the range that a few bits cover, or scale and zero point themselves: what is clipped, what is only rounded?

    The map is the asymmetric one of `affine`: integers 0..2^bits−1, one scale for the whole tensor. Values beyond its ends make
    the clipping error, all others the rounding error. Both are given in dB against the power of the signal.

    x: float tensor of any shape; of more than 32,768 values so many are drawn by chance, always the same. title: what it is.
    Raises `ValueError` for integers, an empty tensor, NaN or infinite values, and nothing but zeros.
    """

    size = (5.2, 3.5)

    def __init__(self, x, *, title="the tensor"):
        x = x.detach()
        low, high = affine.extremes(x)
        if low == high == 0:
            raise ValueError("the tensor holds nothing but zeros: there is no range to choose")
        self.title = title
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
        self.values = x.flatten().float()[order[:MOST_VALUES]]
        observer = observers.MSE().observe(self.values)
        best = {bits: observer.qparams(bits=bits) for bits in range(2, 9)}
        self._best = {bits: affine.sqnr(self.values, affine.fake_quantize(self.values, q)) for bits, q in best.items()}

        self._limit = limit = 1.1 * float(torch.maximum(-low, high))
        minmax = {bits: affine.qparams_from_range(low, high, bits=bits) for bits in (8, 4)}
        start = choice(minmax[4])
        log_scales = {"base": 2, "min": math.log2(limit / 4096), "max": math.log2(limit), "step": 0.05}
        controls = {
            "bits": ipywidgets.IntSlider(start["bits"], min=2, max=8),
            "clip": ipywidgets.FloatRangeSlider(
                value=(float(low), float(high)),
                description="clip range",
                min=-limit,
                max=limit,
                step=limit / 200,
                # Three digits of the largest; significant ones would show a zero that is 1e-15 off as that.
                readout_format=f".{max(0, 2 - math.floor(math.log10(limit)))}f",
            ),
            "scale": ipywidgets.FloatLogSlider(start["scale"], readout_format=".3g", **log_scales),
            "zero_point": ipywidgets.IntSlider(start["zero_point"], min=0, max=15),
        }
        self._following = False
        super().__init__(controls, [choice(q) for q in (minmax[8], minmax[4], best[4], best[2])])

    def moved(self, change):
        """Let scale and zero point follow the range, or the range them."""
        if self._following:
            return
        self._following = True  # so that setting the others does not come back here
        bits, ends, scale, zero_point = (control.value for control in self.controls.values())
        if change.owner in (self.controls["scale"], self.controls["zero_point"]):
            self.controls["clip"].value = choice(qparams(bits, scale, zero_point))["clip"]
        else:
            found = choice(affine.qparams_from_range(*ends, bits=bits))
            self.controls["zero_point"].max = 2**bits - 1
            self.controls["scale"].value, self.controls["zero_point"].value = found["scale"], found["zero_point"]
        self._following = False
        self.update()

    def build(self, figure):
        limit, edges = self._limit, torch.linspace(-self._limit, self._limit, BINS + 1)
        heights = torch.histc(self.values, BINS, -limit, limit).log1p()
        top = float(heights.max())
        axis = figure.add_axes([0.04, 0.47, 0.92, 0.44])
        axis.stairs(heights, edges, fill=True, color=BLUE, alpha=0.6)
        ticks = axis.vlines([], -0.16 * top, -0.04 * top, color="black", lw=0.6)
        cut = {"facecolor": ORANGE, "alpha": 0.25, "hatch": "//", "edgecolor": ORANGE, "lw": 0}
        below, above = axis.axvspan(-limit, 0, **cut), axis.axvspan(0, limit, **cut)
        axis.set(xlim=(-limit, limit), ylim=(-0.18 * top, 1.05 * top), yticks=[], ylabel="count (log)")
        axis.set_xlabel("value | black: what the bits can represent | hatched: clipped", labelpad=1)
        set_bars = _bars(figure.add_axes([0.16, 0.12, 0.8, 0.21]))
        power = self.values.double().square().sum()

        def show(bits, clip, scale, zero_point):
            q = qparams(bits, scale, zero_point)  # `clip` follows from the others
            low, high = choice(q)["clip"]
            rounded = affine.fake_quantize(self.values, q)
            squared = (self.values - rounded).double().square()
            outside = (self.values < low) | (self.values > high)
            errors = {"rounding": squared[~outside], "clipping": squared[outside], "both": squared}
            decibels = {name: float(10 * (part.sum() / power).log10()) for name, part in errors.items()}
            sqnr = affine.sqnr(self.values, rounded)

            grid = affine.dequantize(torch.arange(q.qmin, q.qmax + 1), q).tolist()
            ticks.set_segments([[(value, -0.16 * top), (value, -0.04 * top)] for value in grid])
            below.set_width(low + limit)
            above.set_bounds(high, 0, limit - high, 1)
            set_bars(decibels)
            axis.set_title(f"{self.title}, {bits} bits, {low:.3g} to {high:.3g}: SQNR {sqnr:.1f} dB")
            share = float(outside.double().mean())
            return paragraph(
                f"{bits} bits cover {low:.3g} to {high:.3g} in steps of {scale:.3g} (scale), and 0 is the integer {zero_point} "
                f"(zero point). {share:.2%} of {len(self.values):,} values lie outside and are clipped. "
                f"SQNR {sqnr:.1f} dB; the range of least squared error (observer MSE) has {self._best[bits]:.1f} dB."
            ) + table(
                ["error against the signal", *decibels], [["", *(_decibels(value) for value in decibels.values())]]
            )

        return show


def choice(q):
    """Return what the controls say of the `QParams` q: dict of name → value."""
    ends = affine.dequantize(torch.tensor([q.qmin, q.qmax]), q).tolist()
    return {
        "bits": q.qmax.bit_length(),
        "clip": tuple(ends),
        "scale": float(q.scale),
        "zero_point": int(q.zero_point),
    }


def qparams(bits, scale, zero_point):
    """Return the `QParams` that the controls say."""
    return affine.QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), 0, 2**bits - 1)


def _bars(axis):
    """Draw the bars of the three errors and return a function that sets their decibels."""
    styles = {"rounding": {"color": BLUE}, "clipping": {"color": ORANGE, "hatch": "//"}, "both": {"color": GREY}}
    bars, labels = {}, {}
    for y, (name, style) in enumerate(reversed(styles.items())):
        (bars[name],) = axis.barh(y, 0, left=FLOOR, height=0.7, **style | {"edgecolor": "black"})
        labels[name] = axis.text(0, y, "", va="center")
    axis.set(xlim=(FLOOR, 8), yticks=range(len(styles)), yticklabels=reversed(styles))
    axis.set_xlabel("error against the signal, dB", labelpad=1)

    def set_bars(decibels):
        for name, value in decibels.items():
            bars[name].set_width(max(value - FLOOR, 0))
            labels[name].set(x=max(value, FLOOR) + 0.5, text=_decibels(value))

    return set_bars


def _decibels(value):
    return "none" if value == -math.inf else f"{value:.1f} dB"
