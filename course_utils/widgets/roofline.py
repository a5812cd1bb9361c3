"""A layer under the machine's roofline."""

import ipywidgets

from .. import roofline
from ..plots import COLOURS
from .base import Explorer, paragraph

LOOKS = {"FP32": ("-", "o"), "BF16": ("--", "s"), "INT8": ("-.", "D")}  # line and dots


class Roofline(Explorer):
    """Go through a network's layers: where each lies under the roofline, what limits it, and how much of the roof it reaches.

    ceilings: `roofline.Ceilings`. work: dict of precision → list of `roofline.Work`, the same layers for each
    (`roofline.layers`); precisions that `ceilings` has no peak of are left out. milliseconds: dict of precision → dict of
    layer → measured time (`measure.by_layer`); for what it does not hold only the limit is shown. Raises `ValueError` when
    nothing is left to show, and for precisions with different layers.
    """

    size = (5.2, 3.4)

    def __init__(self, ceilings, work, milliseconds=None):
        self.ceilings = ceilings
        self._work = {name: {w.name: w for w in found} for name, found in work.items() if name in ceilings.peaks}
        layers = [list(found) for found in self._work.values()]
        if not layers or not layers[0]:
            raise ValueError(f"there is no layer in a precision that has a ceiling: {', '.join(ceilings.peaks)}")
        if any(names != layers[0] for names in layers):
            raise ValueError("each precision needs the same layers in the same order")
        self._reached = {
            name: {layer: rate for _, rate, layer in roofline.achieved(work[name], (milliseconds or {}).get(name, {}))}
            for name in self._work
        }
        precisions = list(self._work)
        controls = {
            "layer": ipywidgets.SelectionSlider(options=layers[0]),
            "precision": ipywidgets.ToggleButtons(options=precisions, description="precision"),
        }
        ends = [(layer, name) for layer in (layers[0][0], layers[0][-1]) for name in (precisions[0], precisions[-1])]
        super().__init__(controls, [{"layer": layer, "precision": name} for layer, name in dict.fromkeys(ends)])

    def build(self, figure):
        axis = figure.add_axes([0.11, 0.13, 0.86, 0.77])
        roofs = self._roofs(axis)
        (gap,) = axis.plot([1, 1], [1, 1], color="black", ls=":", lw=1)
        (allowed,) = axis.plot(1, 1, "v", color="black", mfc="white", ms=8, mew=1.5, zorder=4)
        (star,) = axis.plot(1, 1, "*", color="black", ms=12, zorder=4)

        def show(layer, precision):
            for name, (line, dots) in roofs.items():
                line.set_linewidth(3 if name == precision else 1)
                dots.set_visible(name == precision)
            work = self._work[precision][layer]
            limit = roofline.attainable(self.ceilings, work.intensity, precision)
            limited = "arithmetic" if limit == self.ceilings.peaks[precision] else "memory"
            allowed.set_data([work.intensity], [limit])
            title = f"{layer}, {precision}: limited by {limited}"
            sentence = (
                f"{layer} in {precision} makes {work.operations / 1e6:,.1f} million operations and moves "
                f"{work.bytes / 1e6:,.2f} MB, {work.intensity:.1f} operations a byte. {limited.capitalize()} limits it, to "
                f"{limit / 1e9:,.1f} G operations/s (triangle)."
            )
            reached = self._reached[precision].get(layer)
            for artist in (gap, star):
                artist.set_visible(reached is not None)
            if reached:
                star.set_data([work.intensity], [reached])
                gap.set_data([work.intensity] * 2, [reached, limit])
                title += f", {reached / limit:.0%} of the roof"
                sentence += f" It reached {reached / 1e9:,.1f} (star): {reached / limit:.0%} of that."
            axis.set_title(title)
            return paragraph(sentence)

        return show

    def _roofs(self, axis):
        """Draw all roofs; return dict of precision → (its roof, the layers that were measured in it)."""
        bandwidth = self.ceilings.bandwidth
        peaks = {name: self.ceilings.peaks[name] for name in self._work}
        intensities = [w.intensity for found in self._work.values() for w in found.values()]
        rates = [rate for found in self._reached.values() for rate in found.values()]
        ridges = {name: peak / bandwidth for name, peak in peaks.items()}
        left, ridge = min(*intensities, *ridges.values()) / 2, max(ridges.values())
        right = max(*intensities, ridge) * 12  # room for the names of the roofs
        axis.plot([left, ridge], [left * bandwidth, ridge * bandwidth], color="black", lw=1)
        near = {"textcoords": "offset points"}
        axis.annotate(f"memory: {bandwidth / 1e9:.0f} GB/s", (left, left * bandwidth), (28, 4), **near)
        roofs = {}
        for name in peaks:
            colour, (dashes, marker) = COLOURS[name], LOOKS[name]
            (line,) = axis.plot([ridges[name], right], [peaks[name]] * 2, color=colour, ls=dashes)
            label = f"{name}: {peaks[name] / 1e9:,.0f} G/s"
            axis.annotate(label, (right, peaks[name]), (0, 3), ha="right", **near)
            x = [self._work[name][layer].intensity for layer in self._reached[name]]
            (dots,) = axis.plot(x, self._reached[name].values(), marker, color=colour, ms=4, alpha=0.5, mew=0)
            roofs[name] = line, dots
        axis.set(xscale="log", yscale="log", xlim=(left, right))
        axis.set_ylim(min([*rates, left * bandwidth]) / 2, max(peaks.values()) * 2)
        axis.minorticks_off()  # they take most of the time
        axis.set(xlabel="operations for each byte moved", ylabel="operations a second")
        return roofs
