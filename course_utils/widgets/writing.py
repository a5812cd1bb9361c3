"""What a language model writes as its weights get fewer bits."""

import html
import os
import textwrap

import ipywidgets

from ..plots import BLUE, GREY
from .base import Explorer, paragraph

COLUMNS, LINES = 76, 8  # of text that the picture has room for


class WrittenText(Explorer):
    """The text that a language model wrote with each kind of weights, and its loss where there is one.

    Grey is what the first text begins with too: so far both models chose the same. What the picture has no room for is in the
    text below it, which folds out.

    texts: dict of label → text, the float model first. losses: dict of the same labels → nats per character.
    Raises `ValueError` for fewer than two texts and when the labels of both differ.
    """

    size = (5.2, 2.2)

    def __init__(self, texts, losses=None):
        if len(texts) < 2:
            raise ValueError(f"need the texts of at least two models, got {len(texts)}")
        if losses is not None and set(losses) != set(texts):
            raise ValueError(f"there is a text or a loss, but not both, for {', '.join(set(texts) ^ set(losses))}")
        self.texts, self.losses = dict(texts), losses
        labels = list(texts)
        controls = {"label": ipywidgets.SelectionSlider(description="weights", options=labels)}
        frames = [labels[i * (len(labels) - 1) // 3] for i in range(4)]
        super().__init__(controls, [{"label": label} for label in dict.fromkeys(frames)])

    def build(self, figure):
        first = next(iter(self.texts))
        page = {"family": "DejaVu Sans Mono", "fontsize": 7.5, "va": "top", "linespacing": 1.3, "parse_math": False}
        parts = [figure.text(0.03, 0.86, "", color=colour, **page) for colour in ("#718096", "black")]
        heading = figure.text(0.5, 0.91, "", ha="center", fontsize=9, parse_math=False)
        if self.losses:
            axis = figure.add_axes([0.05, 0.2, 0.9, 0.09])
            axis.plot(list(self.losses.values()), [0] * len(self.losses), "|", color=GREY, ms=12, mew=2)
            (dot,) = axis.plot(self.losses[first], 0, "o", color=BLUE, ms=8)
            axis.set(yticks=[], ylim=(-1, 1))
            axis.set_xlabel("nats per character | dot: of this text, bars: of all", labelpad=1)
            axis.spines["left"].set_visible(False)

        def show(label):
            written = self.texts[label]
            shared = 0 if label == first else len(os.path.commonprefix([self.texts[first], written]))
            for part, lines in zip(parts, _wrapped(written, shared), strict=True):
                part.set_text(lines)
            title, sentence = label, f"{len(written):,} characters"
            if label != first:
                sentence += f", the first {shared:,} as with {first}"
            if self.losses:
                loss = self.losses[label]
                dot.set_xdata([loss])
                title += f": {loss:.2f} nats per character"
                sentence += f". Loss: {loss:.2f} nats per character, {loss - self.losses[first]:+.2f} against {first}"
            heading.set_text(title)
            return (
                paragraph(f"{label}: {sentence}.")
                + f"<details><summary>the text</summary><pre>{html.escape(written)}</pre></details>"
            )

        return show


def _wrapped(text, shared):
    """Return the lines of `text` twice, cut to the page: its first `shared` characters alone, and all others in their places."""
    before, after, at = [], [], 0
    for line in text.split("\n"):
        for piece in textwrap.wrap(line, COLUMNS, drop_whitespace=False, expand_tabs=False) or [""]:
            cut = min(max(shared - at, 0), len(piece))
            before.append(piece[:cut])
            after.append(" " * cut + piece[cut:])
            at += len(piece)
        at += 1  # the end of the line
    return ["\n".join(part[:LINES]) for part in (before, after)]
