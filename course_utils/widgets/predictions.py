"""What a network sees and believes as its weights get fewer bits."""

import ipywidgets
import torch

from .. import data, weights
from ..plots import BLUE, GREY, ORANGE
from .base import Explorer, paragraph, table

FLOAT = "32 bits"
PLACES = 6  # for images


class Predictions(Explorer):
    """Pictures, what the first layer makes of them, and the probabilities that the network gives to the classes, by bits.

    All is computed at the start, and no network is kept. Of the first layer one channel is shown, always the same in the same
    colours: that which varies most in float32.

    model: float network, images → logits. images: `data.Images`, 1 to 6 of them. bits: widths to show after float32. reduce:
    function of `(model, bits=...)` that returns the network with so many bits, by default `weights.fake_quantize_weights`.
    Raises `ValueError` for another number of images.
    """

    size = (5.2, 3.8)

    def __init__(self, model, images, *, bits=range(8, 1, -1), reduce=weights.fake_quantize_weights):
        if not 1 <= len(images) <= PLACES:
            raise ValueError(
                f"room for 1 to {PLACES} images, got {len(images)}: take images.subset(slice(0, {PLACES}))"
            )
        self._labels, self._pictures = images.labels, _row(images.pixels)
        batch, _ = next(iter(data.batches(images, len(images))))
        self._shares, maps = {}, {}
        for name, width in {FLOAT: None, **{f"{width} bits": width for width in bits}}.items():
            network = model if width is None else reduce(model, bits=width)
            self._shares[name], maps[name] = _look(network, batch)
        channel = maps[FLOAT].var((0, 2, 3)).argmax()
        self._seen = {name: _row(found[:, channel]) for name, found in maps.items()}
        names = list(maps)
        controls = {"bits": ipywidgets.SelectionSlider(description="weights", options=names)}
        super().__init__(controls, [{"bits": name} for name in dict.fromkeys([FLOAT, *names[-3:]])])

    def build(self, figure):
        n, classes = self._shares[FLOAT].shape
        titles = [data.CLASSES[label] for label in self._labels]
        limit = float(self._seen[FLOAT].abs().max())
        heading = figure.text(0.5, 0.95, "", ha="center", fontsize=9)
        top = figure.add_axes([0.1, 0.68, 0.89, 0.2])
        _strip(top, self._pictures, n, "picture", cmap="gray_r", vmin=0, vmax=255)
        middle = figure.add_axes([0.1, 0.46, 0.89, 0.2])
        seen = _strip(middle, self._seen[FLOAT], n, "first\nlayer", cmap="RdBu", vmin=-limit, vmax=limit)
        bottom = figure.add_axes([0.1, 0.16, 0.89, 0.27])
        bottom.set(xlim=(0, PLACES), ylim=(0, 1), xticks=[], yticks=[0, 1], ylabel="probability")
        x = torch.arange(n)[:, None] + (torch.arange(classes) + 1) / (classes + 1)
        bars = bottom.vlines(x.flatten(), 0, 1, lw=230 / PLACES / (classes + 3))
        bottom.plot(x[range(n), self._labels], [-0.07] * n, "^", color="black", ms=3, clip_on=False)
        labels = []
        for i, title in enumerate(titles):
            top.text(i + 0.5, 1.06, title, ha="center", fontsize=7)
            labels.append(bottom.text(i + 0.5, -0.14, "", ha="center", va="top", fontsize=7))

        def show(bits):
            shares = self._shares[bits]
            highest, best = shares.max(1)
            right = (best == self._labels).tolist()
            beliefs = [data.CLASSES[label] for label in best]
            colours = [[GREY] * classes for _ in range(n)]
            for i, ok in enumerate(right):
                colours[i][best[i]] = BLUE if ok else ORANGE
                labels[i].set_text(f"{'✓' if ok else '✗'} {beliefs[i]}\n{highest[i]:.0%}")
            seen.set_data(self._seen[bits].numpy())
            bars.set_segments([[(at, 0), (at, share)] for at, share in zip(x.flatten(), shares.flatten(), strict=True)])
            bars.set_color([colour for row in colours for colour in row])
            heading.set_text(f"weights of {bits}: {sum(right)} of {n} right")
            rows = [
                [title, belief, f"{share:.0%}", "yes" if ok else "no"]
                for title, belief, share, ok in zip(titles, beliefs, highest, right, strict=True)
            ]
            return paragraph(
                f"With weights of {bits}, {sum(right)} of {n} pictures are recognised. Probabilities are drawn class by class: "
                "a triangle marks the true class, ✓ or ✗ says whether the most probable one is right."
            ) + table(["picture", "the network says", "probability", "right"], rows)

        return show


@torch.no_grad()
def _look(network, batch):
    """Return the probabilities `(n, classes)` and what comes out of the first layer `(n, channels, height, width)`."""
    seen, training = [], network.training
    first = next(iter(weights.layers(network).values()))
    hook = first.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    try:
        return network.eval()(batch).softmax(1), seen[0]
    finally:
        hook.remove()
        network.train(training)


def _row(images):
    """Return images `(n, height, width)` side by side: `(height, n · width)`."""
    return images.permute(1, 0, 2).flatten(1)


def _strip(axis, row, n, name, **colours):
    """Draw `n` images that lie side by side; return the artist."""
    drawn = axis.imshow(row.numpy(), extent=(0, n, 0, 1), aspect="auto", interpolation="nearest", **colours)
    axis.set(xlim=(0, PLACES), xticks=[], yticks=[0.5], yticklabels=[name])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return drawn
