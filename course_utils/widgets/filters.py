"""What few bits do to the filters of a convolution."""

import math

import ipywidgets
import torch

from .. import affine, simulate
from .base import Explorer, paragraph, table

BITS = range(8, 1, -1)
TILES = 64  # filters that are drawn
LEAST = -3  # log10 of the smallest error that is told from none, in units of the largest weight


class FilterError(Explorer):
    """The filters of a convolution with fewer and fewer bits, and where they are wrong, by how many weights share a scale.

    Weights are rounded to nearest, symmetric, in min-max ranges, with scales in FP16 (`simulate.weight_qparams`). The picture
    shows the first input channel of the first 64 filters; the numbers are those of all weights.

    weight: float tensor `(out, in, height, width)`. title: what it is. granularities: as in `simulate.Policy`: `"tensor"`,
    `"channel"` or the number of weights in a group. Raises `ValueError` for another shape, nothing but zeros, and where
    `simulate.Policy` and `affine.choose_qparams` do.
    """

    size = (5.2, 3.0)

    def __init__(self, weight, *, title="filters", granularities=("tensor", "channel", 32)):
        if weight.ndim != 4:
            raise ValueError(f"expected filters (out, in, height, width), got a tensor of shape {tuple(weight.shape)}")
        weight = weight.detach().float()
        self.title, self._largest = title, float(weight.abs().max())
        if self._largest == 0:
            raise ValueError("the filters hold nothing but zeros: there is no error to show")
        self._weight = _mosaic(weight)
        self._names = {g: f"groups of {g}" if isinstance(g, int) else f"per {g}" for g in granularities}
        self._found = {}
        for bits in BITS:
            for granularity in granularities:
                policy = simulate.Policy(weights=bits, granularity=granularity)
                rounded = affine.fake_quantize(weight, simulate.weight_qparams(weight, policy, bits))
                pairs = [(w, r) for w, r in zip(weight, rounded, strict=True) if w.any()]
                self._found[bits, granularity] = (
                    _mosaic(rounded),
                    affine.sqnr(weight, rounded),
                    min(affine.sqnr(*pair) for pair in pairs),
                    bits + 16 * simulate.weight_scales(weight, policy) / weight.numel(),
                )
        options = [(name, granularity) for granularity, name in self._names.items()]
        controls = {
            "bits": ipywidgets.SelectionSlider(options=BITS, value=4),
            "granularity": ipywidgets.ToggleButtons(options=options, description="scales"),
        }
        coarse, fine = granularities[0], granularities[-1]
        super().__init__(controls, [{"bits": b, "granularity": g} for g in (coarse, fine) for b in (4, 2)])

    def build(self, figure):
        limit, picture = self._largest, {"interpolation": "nearest", "aspect": "auto"}
        heading = figure.text(0.5, 0.93, "", ha="center", fontsize=9)
        axes = [figure.add_axes([left, 0.02, 0.42, 0.8]) for left in (0.02, 0.46)]
        for axis, title in zip(axes, ("rounded", "|error| / largest |weight|"), strict=True):
            axis.set_title(title, fontsize=8)
            axis.axis("off")
        shown = axes[0].imshow(self._weight.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, **picture)
        wrong = axes[1].imshow(self._weight.numpy(), cmap="cividis", vmin=LEAST, vmax=0, **picture)
        bar = figure.colorbar(wrong, cax=figure.add_axes([0.895, 0.02, 0.02, 0.8]), ticks=range(LEAST, 1))
        bar.set_ticklabels([f"{100 * 10.0**power:g} %" for power in range(LEAST, 1)], fontsize=6)

        def show(bits, granularity):
            rounded, sqnr, worst, stored = self._found[bits, granularity]
            error = (rounded - self._weight).abs() / limit
            shown.set_data(rounded.numpy())
            wrong.set_data(error.log10().clamp(min=LEAST).numpy())
            name = self._names[granularity]
            heading.set_text(f"{self.title}, {bits} bits, {name}: SQNR {sqnr:.1f} dB")
            rows = [[title, *(f"{self._found[b, g][1]:.1f}" for b in BITS)] for g, title in self._names.items()]
            return paragraph(
                f"{bits} bits, {name}: SQNR {sqnr:.1f} dB over all weights, {worst:.1f} dB in the worst filter. The largest "
                f"error in the picture is {float(error.nan_to_num().max()):.1%} of the largest weight. With its scales in FP16 a "
                f"weight takes {stored:.2f} bits. All SQNR, in dB:"
            ) + table(["", *(f"{b} bits" for b in BITS)], rows)

        return show


def _mosaic(weight):
    """Return the first channel of the first filters side by side with gaps of NaN between them: float32 `(height, width)`."""
    tiles = torch.nn.functional.pad(weight[:TILES, 0], (0, 1, 0, 1), value=math.nan)
    columns = math.ceil(math.sqrt(len(tiles)))
    blank = torch.full((-len(tiles) % columns, *tiles.shape[1:]), math.nan)
    rows = torch.cat([tiles, blank]).unflatten(0, (-1, columns))
    return rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]
