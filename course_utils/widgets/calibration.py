"""The calibration set you choose, and the accuracy it gives."""

import itertools

import ipywidgets

from ..plots import BLUE, GREY
from ..stats import Proportion, paired_difference
from .base import Explorer, paragraph, table


class CalibrationSet(Explorer):
    """Choose what a network is calibrated on and on how much of it: the accuracy that was measured for this choice.

    results: dict of `(kind, images)` → list of `measure.Comparison` of the float network with the quantized one, one each time
    it was repeated with other images; they are pooled as if their images were one sample. Raises `ValueError` when it is empty,
    and when not every kind was measured with every number of images.
    """

    def __init__(self, results):
        self.kinds = list(dict.fromkeys(kind for kind, _ in results))
        self.counts = sorted({images for _, images in results})
        missing = [(kind, n) for kind in self.kinds for n in self.counts if not results.get((kind, n))]
        if missing or not results:
            raise ValueError(
                f"need results of each kind with each number of images, missing: {missing or 'all of them'}"
            )
        self._found = {choice: _pooled(comparisons) for choice, comparisons in results.items()}
        self._floor = min(found[1].low for found in self._found.values())
        controls = {
            "kind": ipywidgets.Dropdown(options=self.kinds, description="images"),
            "images": ipywidgets.SelectionSlider(options=self.counts, description="how many"),
        }
        middle = self.counts[len(self.counts) // 2]
        super().__init__(controls, [{"kind": kind, "images": middle} for kind in self.kinds[:4]])

    def build(self, figure):
        axis = figure.add_axes([0.1, 0.25, 0.88, 0.65])
        x = range(len(self.counts))
        lines = {}
        for kind, marker in zip(self.kinds, itertools.cycle("sD^vP"), strict=False):
            y = [100 * self._found[kind, n][1].value for n in self.counts]
            (lines[kind],) = axis.plot(x, y, marker=marker, color=GREY, ms=4, lw=1, label=kind)
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.47, -0.2), ncols=5, fontsize=7, frameon=False, columnspacing=1
        )
        float_line = axis.axhline(0, color="black", ls="--", lw=1)
        name = axis.annotate("FP32", (0, 0), (0, 3), textcoords="offset points")
        (interval,) = axis.plot([0, 0], [0, 0], color=BLUE, lw=5, alpha=0.4)
        (dot,) = axis.plot(0, 0, "o", color=BLUE, ms=9)
        axis.set(xticks=x, xticklabels=self.counts, xlim=(-0.2, len(x) - 0.8), ylim=(100 * self._floor - 5, 104))
        axis.set_xlabel("calibration images", labelpad=1)
        axis.set_ylabel("accuracy, %", labelpad=1)

        def show(kind, images):
            before, after, (change, low, high) = self._found[kind, images]
            for other, line in lines.items():
                line.set(color=BLUE if other == kind else GREY, lw=2.2 if other == kind else 1)
            at = self.counts.index(images)
            dot.set_data([at], [100 * after.value])
            interval.set_data([at, at], [100 * after.low, 100 * after.high])
            float_line.set_ydata([100 * before.value] * 2)
            name.xy = (0, 100 * before.value)
            axis.set_title(f"{kind}, {images} {'image' if images == 1 else 'images'}: {after.value:.1%}")
            rows = [[k, *(f"{self._found[k, n][1].value:.1%}" for n in self.counts)] for k in self.kinds]
            return paragraph(
                f"Calibrated on “{kind}”, {images} of them: accuracy {after} on {after.n:,} images, FP32 {before.value:.2%}. "
                f"Paired difference {100 * change:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]. All that was measured:"
            ) + table(["calibration images", *self.counts], rows)

        return show


def _pooled(comparisons):
    """Return (float accuracy, quantized accuracy, paired difference) over several comparisons on different images."""
    fixed, broke, n = (sum(getattr(each, part) for each in comparisons) for part in ("fixed", "broke", "n"))
    before, after = (
        Proportion(sum(getattr(each, m).successes for each in comparisons), n) for m in ("first", "second")
    )
    return before, after, paired_difference(fixed, broke, n)
