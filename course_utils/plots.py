"""The course's pictures: each function draws one idea on a matplotlib figure and returns it."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import transforms

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#222222"
CYCLE = (BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK)
BIT_ALPHA = {"0": 0.25, "1": 0.85}
# One colour a method through the whole course; a label belongs to the first of these that it begins with.
COLOURS = {
    "FP32": BLACK,
    "BF16": SKY,
    "INT8": BLUE,
    "INT4": PINK,
    "nearest": GREY,
    "rounded to nearest": GREY,
    "bias correction": ORANGE,
    "AdaRound": SKY,
    "GPTQ": BLUE,
    "AWQ": PINK,
    "QAT": GREEN,
    "PTQ": BLUE,
    "per tensor": RED,
    "per channel": BLUE,
    "groups of": GREEN,
    "per group": GREEN,
    "as many at random": RED,
}


def setup():
    """Set the course's style, and make notebook pictures that are the same bytes for the same data."""
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.prop_cycle": plt.cycler(color=CYCLE),
            "legend.frameon": False,
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("png", metadata={"Software": None})


def _colours(labels):
    """Return a dict of label → colour: that of the method it begins with, else the next of the cycle that is still free."""
    found = {label: next((c for name, c in COLOURS.items() if label.startswith(name)), None) for label in labels}
    free = itertools.cycle([colour for colour in CYCLE if colour not in found.values()] or CYCLE)
    return {label: colour or next(free) for label, colour in found.items()}


def _name_at_the_right(axis, lines, gap=12):
    """Write the labels of `lines`, a dict of label → line, beside their last points; `gap`: pixels between two at least."""
    axis.figure.canvas.draw()  # only then is it known where a point lies
    ends = []
    for label, line in lines.items():
        y = np.asarray(line.get_ydata(), dtype=float)
        # In an inverted axis the last point is the one with the smallest x.
        last = y[-1] if len(y) < 2 or (line.get_xdata()[-1] > line.get_xdata()[0]) != axis.xaxis_inverted() else y[0]
        ends.append((axis.transData.transform((axis.get_xlim()[1], last))[1], label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    places = [height for height, *_ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    too_high = max(0.0, places[-1] - axis.transAxes.transform((1, 1))[1]) if places else 0.0
    for place, (_, label, colour) in zip(places, ends, strict=True):
        y = axis.transAxes.inverted().transform((0, place - too_high))[1]
        axis.annotate(
            label,
            (1.01, y),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )


def _label_points(axis, points):
    """Write a label beside each of `points`, `(x, y, label, colour)`: at its lower right, or where it covers least."""
    axis.figure.canvas.draw()
    spots = axis.transData.transform([point[:2] for point in points])
    taken = [transforms.Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]  # the markers
    for x, y, label, colour in points:
        tried = [
            axis.annotate(label, (x, y), to, textcoords="offset points", ha=side, fontsize=8, color=colour)
            for to, side in (((4, -11), "left"), ((4, 5), "left"), ((-4, -11), "right"), ((-4, 5), "right"))
        ]
        boxes = [text.get_window_extent() for text in tried]
        common = [[transforms.Bbox.intersection(box, other) for other in taken] for box in boxes]
        covered = [sum(part.width * part.height for part in parts if part) for parts in common]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        for text in tried[:best] + tried[best + 1 :]:
            text.remove()


def number_bits(rows, title="", axis=None):
    """Draw the bits of numbers: rows of `(label, bits, exponent_bits)` with bits as text of 0 and 1, sign bit first.

    axis: draw into these axes instead of a new figure.
    """
    width = max(len(bits) for _, bits, _ in rows)
    if axis is None:
        _, axis = plt.subplots(figsize=(0.27 * width + 2.2, 0.5 * len(rows) + 0.6))
    for y, (label, bits, exponent_bits) in enumerate(reversed(rows)):
        for x, bit in enumerate(bits):
            colour = RED if x == 0 else (GREEN if x <= exponent_bits else BLUE)
            # Not add_patch, which would look for the limits again each time.
            axis.add_artist(plt.Rectangle((x, y + 0.1), 0.94, 0.8, color=colour, alpha=BIT_ALPHA[bit], lw=0))
            axis.text(x + 0.47, y + 0.5, bit, ha="center", va="center", fontsize=8)
        axis.text(-0.4, y + 0.5, label, ha="right", va="center")
    axis.set(xlim=(-0.2, width), ylim=(0, len(rows)), title=title)
    axis.axis("off")
    return axis.figure


def number_lines(grids, *, xlabel, title="", log=False):
    """Draw the numbers of formats as ticks, one line a format: grids is a dict of label → values; `log`: positive ones only."""
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(grids) + 1.1))
    for y, values in enumerate(reversed(grids.values())):
        values = np.asarray(values)
        axis.vlines(values[values > 0] if log else values, y - 0.32, y + 0.32, color=BLUE, lw=0.9)
        axis.axhline(y, color=GREY, lw=0.5, zorder=0)
    axis.set(yticks=range(len(grids)), yticklabels=reversed(grids), xlabel=xlabel, title=title)
    if log:
        axis.set_xscale("log", base=2)
    return figure


def histogram_with_grid(values, grids, *, bins=200, title=""):
    """Draw one panel a grid: the histogram of `values` (tensor) and, as ticks below it, the values a grid can represent.

    grids: dict of label → float tensor of representable values.
    """
    figure, axes = plt.subplots(len(grids), 1, figsize=(7.5, 1.5 * len(grids) + 0.4), sharex=True, squeeze=False)
    flat = values.detach().flatten()
    span = float(flat.abs().max()) * 1.05
    low = min(0.0, float(flat.min()) * 1.05)
    for axis, (label, grid) in zip(axes[:, 0], grids.items(), strict=True):
        axis.hist(flat.numpy(), bins=bins, range=(low, span), color=BLUE, alpha=0.6, log=True)
        bottom, top = 0.5, axis.get_ylim()[1]
        axis.set_ylim(bottom / 6, top)
        axis.vlines(grid.numpy(), bottom / 6, bottom, color=ORANGE, lw=0.8)
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set_yticks([])
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("value (orange: what the format can represent)")
    return figure


def predictions(pixels, labels, probabilities, classes):
    """Draw grey images, and under each what every model believes.

    pixels: uint8 `(n, 28, 28)`; labels: `(n,)`; probabilities: dict of model name → `(n, classes)`.
    """
    n = len(pixels)
    figure, axes = plt.subplots(
        1 + len(probabilities), n, figsize=(1.45 * n + 1, 1.5 + 1.0 * len(probabilities)), squeeze=False
    )
    for i in range(n):
        axes[0, i].imshow(pixels[i].numpy(), cmap="gray_r")
        axes[0, i].set_title(classes[int(labels[i])], fontsize=9)
        axes[0, i].axis("off")
        for axis, (name, shares) in zip(axes[1:, i], probabilities.items(), strict=True):
            best = int(shares[i].argmax())
            colours = [GREY] * len(classes)
            colours[best] = GREEN if best == int(labels[i]) else RED
            axis.bar(range(len(classes)), shares[i].numpy(), color=colours)
            axis.set(ylim=(0, 1), xticks=[], yticks=[])
            axis.set_xlabel(classes[best], fontsize=8, color=colours[best])
            if i == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def filters(weights, labels):
    """Draw the first filters of a convolution side by side at several precisions: one row a weight `(out, in, h, w)`."""
    n = min(16, len(weights[0]))
    weights = [weight.detach() for weight in weights]
    figure, axes = plt.subplots(len(weights), n, figsize=(9, 0.62 * len(weights) + 0.2), squeeze=False)
    limit = float(weights[0][:n, 0].abs().max())
    for row, weight, label in zip(axes, weights, labels, strict=True):
        for i, axis in enumerate(row):
            axis.imshow(weight[i, 0].numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def ladder(results, *, chance=0.1, title="", reference=None):
    """Draw accuracy against bits: results is a dict of scheme → {bits: Proportion}; bars show the 95 % interval."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    markers, colours = itertools.cycle("osD^v"), _colours(results)
    for scheme, by_bits in results.items():
        bits = sorted(by_bits, reverse=True)
        value = np.array([by_bits[b].value for b in bits])
        below = value - np.array([by_bits[b].low for b in bits])
        above = np.array([by_bits[b].high for b in bits]) - value
        axis.errorbar(
            bits,
            100 * value,
            yerr=100 * np.stack([below, above]),
            marker=next(markers),
            capsize=3,
            label=scheme,
            color=colours[scheme],
        )
    ends = {scheme: container.lines[0] for scheme, container in zip(results, axis.containers, strict=True)}
    if reference is not None:
        ends["FP32"] = axis.axhline(100 * reference.value, color=BLACK, lw=1, ls="--")
    ends["guessing"] = axis.axhline(100 * chance, color=GREY, lw=1, ls=":")
    axis.invert_xaxis()
    axis.set(xlabel="bits per weight", ylabel="accuracy, %", title=title, ylim=(0, 100), xticks=bits)
    _name_at_the_right(axis, ends)
    return figure


def intervals(rows, *, xlabel, title="", baseline=None):
    """Draw one dot with its interval a row: rows of `(label, value, low, high)`; `baseline` is a dashed line."""
    figure, axis = plt.subplots(figsize=(7, 0.42 * len(rows) + 1))
    for y, (_, value, low, high) in enumerate(reversed(rows)):
        axis.plot([low, high], [y, y], color=BLUE, lw=2)
        axis.plot(value, y, "o", color=BLUE)
    axis.set(yticks=range(len(rows)), yticklabels=[row[0] for row in reversed(rows)], xlabel=xlabel, title=title)
    if baseline is not None:
        axis.axvline(baseline, color=GREY, ls="--", lw=1)
    return figure


def clip_or_round(thresholds, errors, marks, *, xlabel, title=""):
    """Draw one panel a width: mean squared error against the threshold, split into its two parts, and where observers land.

    errors: dict of panel title → `(rounding, clipping)`, each with one value a threshold. marks: dict of panel title →
    {observer: threshold}.
    """
    figure, axes = plt.subplots(1, len(errors), figsize=(3.4 * len(errors), 3.6), sharex=True, squeeze=False)
    for axis, (panel, (rounding, clipping)) in zip(axes[0], errors.items(), strict=True):
        rounding, clipping = np.asarray(rounding), np.asarray(clipping)
        axis.plot(thresholds, rounding, color=BLUE, label="rounding error")
        axis.plot(thresholds, clipping, color=RED, label="clipping error")
        axis.plot(thresholds, rounding + clipping, color="black", lw=1, ls="--", label="both")
        for (name, threshold), colour, style in zip(
            marks[panel].items(), [GREY, GREEN, ORANGE, "purple"], ["-", ":", "-", "-."], strict=False
        ):
            axis.axvline(threshold, color=colour, ls=style, lw=1.6, label=name)
        total = rounding + clipping
        axis.set(ylim=(0, 4 * total.min()), title=panel, xlabel=xlabel, yticks=[])
    axes[0, 0].set_ylabel("mean squared error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize="medium")
    return figure


def channel_ranges(weight, *, title=""):
    """Draw the smallest and largest weight of each output channel of `weight` (out, ...), sorted by range."""
    rows = weight.detach().flatten(1)
    order = (rows.amax(1) - rows.amin(1)).argsort(descending=True)
    low, high = rows.amin(1)[order], rows.amax(1)[order]
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    axis.bar(range(len(rows)), (high - low).numpy(), bottom=low.numpy(), color=BLUE, width=0.85)
    axis.axhline(0, color="black", lw=0.6)
    axis.set(xlabel="output channel, widest first", ylabel="weight range", title=title)
    return figure


def bars(values, *, xlabel, title="", colours=None):
    """Draw horizontal bars: values is a dict of label → number."""
    figure, axis = plt.subplots(figsize=(7, 0.42 * len(values) + 0.9))
    axis.barh(list(values)[::-1], list(values.values())[::-1], color=(colours or [BLUE] * len(values))[::-1])
    axis.set(xlabel=xlabel, title=title)
    return figure


def lines(x, series, *, xlabel, ylabel, title="", log=False):
    """Draw curves over a common axis: series is a dict of label → values; `log` makes both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    colours = _colours(series)
    for label, values in series.items():
        axis.plot(np.asarray(x), np.asarray(values), label=label, lw=1.2, color=colours[label])
    if log:
        axis.set(xscale="log", yscale="log")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        _name_at_the_right(axis, dict(zip(series, axis.lines, strict=True)))
    return figure


def interval_lines(x, series, *, xlabel, ylabel, title="", log2=False, baseline=None):
    """Draw curves with their intervals as bands: series is a dict of label → `(values, lows, highs)`, one of each an x.

    x: from left to right, so if they fall the axis falls too.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6))
    markers, colours = itertools.cycle("osD^v"), _colours(series)
    for label, (values, lows, highs) in series.items():
        (line,) = axis.plot(x, values, marker=next(markers), ms=4, lw=1.2, label=label, color=colours[label])
        axis.fill_between(x, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
    named = dict(zip(series, axis.lines, strict=True))
    if baseline is not None:
        axis.axhline(baseline, color=GREY, ls="--", lw=1)
    if log2:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(value) for value in x])
    if x[-1] < x[0]:
        axis.invert_xaxis()
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _name_at_the_right(axis, named)
    return figure


def curves(series, *, labels, xlabel, ylabel, title=""):
    """Draw curves through labelled points: series is a dict of name → `(x, y)`, and `labels` are those of each curve's points."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    markers, colours = itertools.cycle("osD^v"), _colours(series)
    for name, (x, y) in series.items():
        (line,) = axis.plot(x, y, marker=next(markers), ms=4, lw=1.2, label=name, color=colours[name])
        for label, *point in zip(labels, x, y, strict=True):
            axis.annotate(label, point, (4, -11), textcoords="offset points", fontsize=8, color=line.get_color())
        right = max(zip(x, y, strict=True))
        axis.annotate(name, right, (9, -3), textcoords="offset points", fontsize=8, color=line.get_color())
    axis.margins(x=0.1, y=0.12)  # room for the names and labels
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure


def pareto(series, *, xlabel, ylabel, title="", baseline=None, log=False):
    """Draw points `(size, value, low, high, label)` by strategy: series is a dict of strategy → list of points, joined.

    log: sizes on a logarithmic axis.
    """
    figure, axis = plt.subplots(figsize=(7, 3.8))
    markers, colours, labelled = itertools.cycle("osD^v"), _colours(series), []
    for strategy, points in series.items():
        sizes, values, lows, highs, labels = zip(*sorted(points), strict=True)
        below, above = np.subtract(values, lows), np.subtract(highs, values)
        axis.errorbar(
            sizes,
            values,
            yerr=np.stack([below, above]),
            marker=next(markers),
            capsize=3,
            lw=1.2,
            label=strategy,
            color=colours[strategy],
        )
        labelled += [(*point, colours[strategy]) for point in zip(sizes, values, labels, strict=True)]
    if baseline is not None:
        axis.axhline(baseline, color=GREY, ls="--", lw=1)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.tick_params(axis="x", which="minor", pad=5)  # all numbers in one row
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_points(axis, labelled)
    axis.legend()
    return figure


def clusters(frames, *, qmin, qmax, title=""):
    """Draw how weights lie between the integers they round to: frames is a dict of label → weights / scale, one picture each."""
    figure, axes = plt.subplots(1, len(frames), figsize=(7.5, 2.4), sharey=True, squeeze=False)
    edges = np.linspace(qmin - 1, qmax + 1, 24 * (qmax - qmin + 2) + 1)
    for axis, (label, w) in zip(axes[0], frames.items(), strict=True):
        axis.hist(np.asarray(w.flatten()).clip(qmin - 1, qmax + 1), bins=edges, color=BLUE)
        for q in range(qmin, qmax):
            axis.axvline(q + 0.5, color=GREY, ls=":", lw=0.8)  # where rounding changes
        axis.set(title=label, xticks=range(qmin, qmax + 1), yticks=[], xlabel="weight / scale")
    figure.suptitle(title, fontsize="medium")
    return figure


def roofline(peaks, bandwidth, points, *, title="", named=()):
    """Draw layers below the machine's roofs, both axes logarithmic: memory bounds the left part, arithmetic the right one.

    peaks: dict of precision → operations a second; bandwidth: bytes a second. points: dict of label → list of
    `(operations a byte, operations a second, name)`, in the colour of the precision of that name if there is one. named: the
    names to write beside their points.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    colours = _colours(peaks)
    intensities = [point[0] for found in points.values() for point in found]
    ridges = {name: peak / bandwidth for name, peak in peaks.items()}
    left = min([*intensities, *ridges.values()]) / 2
    right = max([*intensities, *ridges.values()]) * 8  # room for the names of the roofs
    highest = max(peaks, key=peaks.get)
    axis.plot([left, ridges[highest]], [left * bandwidth, peaks[highest]], color="black", lw=1)
    axis.annotate(
        f"{bandwidth / 1e9:.0f} GB/s", (left, left * bandwidth), (4, 22), textcoords="offset points", fontsize=8
    )
    for name, peak in peaks.items():
        axis.plot([ridges[name], right], [peak, peak], color=colours[name], lw=1.4)
        axis.annotate(
            f"{name}: {peak / 1e9:,.0f} G/s",
            (right, peak),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colours[name],
        )
    markers = itertools.cycle("osD^v")
    for label, found in points.items():
        x, y, names = zip(*found, strict=True)
        colour = colours.get(label)
        drawn = axis.scatter(x, y, s=22, marker=next(markers), color=colour, label=label, zorder=3, alpha=0.85)
        for layer, point in zip(names, zip(x, y, strict=True), strict=True):
            if layer in named:
                colour = drawn.get_facecolor()[0]
                axis.annotate(layer, point, (5, -9), textcoords="offset points", fontsize=8, color=colour)
    axis.set(xscale="log", yscale="log", xlim=(left, right), title=title)
    axis.set(xlabel="operations for each byte moved", ylabel="operations a second")
    axis.legend(loc="lower right")
    return figure
