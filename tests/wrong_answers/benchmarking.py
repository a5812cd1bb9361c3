"""Wrong answers to the exercises of notebook 04."""

import statistics

import torch


def each_round(summary, ratio):
    return lambda baseline, contender: summary([ratio(*pair) for pair in zip(baseline, contender, strict=True)])


def apart(summary):
    return lambda baseline, contender: summary(baseline) / summary(contender)


def turning(names, rounds, step=1):
    found, queue = [], list(names)
    for _ in range(rounds):
        found.append(list(queue))
        queue = queue[step:] + queue[:step]
    return found


def second_first(names, rounds):
    n = len(names)
    cycle = [names[i:] + names[:i] for i in [*range(1, n), 0]]
    cycle += [list(reversed(order)) for order in cycle]
    return [cycle[i % (2 * n)] for i in range(rounds)]


def other_direction(names, rounds):
    n = len(names)
    cycle = turning(names, n, step=-1)
    cycle = cycle + [list(reversed(order)) for order in cycle]
    return (cycle * (rounds // n + 1))[:rounds]


def there_and_back(names, rounds):
    return [list(reversed(order)) if i & 1 else order for i, order in enumerate(turning(names, rounds))]


def same_first_on_the_way_back(names, rounds):
    n, found = len(names), []
    for i in range(rounds):
        step = -1 if i % (2 * n) >= n else 1
        found.append([names[(i + step * k) % n] for k in range(n)])
    return found


def counted(image, weight, stride, padding, bits, rows=None, channels=None, moved=None, operations=2, per_byte=8):
    """Return a cost with one thing different: the length of a side, the channels of a filter, the numbers that are moved."""
    rows = rows or (lambda size, kernel: (size + padding * 2 - kernel) // stride + 1)
    n, c, h, w = image
    o, per_group, kh, kw = weight
    positions = n * rows(h, kh) * rows(w, kw)
    macs = positions * o * kh * kw * (channels or per_group)
    numbers = {"weights": o * per_group * kh * kw, "inputs": n * c * h * w, "outputs": positions * o}
    size = (moved(numbers) if moved else sum(numbers.values())) * bits / per_byte
    return macs, size, operations * macs / size


def layer_by_layer(layers, peak, bandwidth, time, limit=None):
    """Return the sum of what `time` makes of a layer's two times, and what `limit` makes of them."""
    limit = limit or (lambda computing, moving: "memory" if moving > computing else "arithmetic")
    pairs = [(o / peak, b / bandwidth) for o, b in layers]
    return sum(time(*pair) for pair in pairs), [limit(*pair) for pair in pairs]


def whole_network(layers, peak, bandwidth):
    operations, size = sum(o for o, _ in layers), sum(b for _, b in layers)
    limits = layer_by_layer(layers, peak, bandwidth, max)[1]
    return (operations / peak if operations / peak > size / bandwidth else size / bandwidth), limits


def wrong_ridge(layers, peak, bandwidth):
    seconds, _ = layer_by_layer(layers, peak, bandwidth, max)
    return seconds, ["memory" if o / b < bandwidth / peak else "arithmetic" for o, b in layers]


def experiments(draws, one):
    return torch.stack([torch.as_tensor(one(rounds), dtype=torch.float64) for rounds in draws])


def ends(values, low=0.025, high=0.975):
    return tuple(torch.quantile(values, torch.tensor([low, high], dtype=values.dtype)).tolist())


def median(values):
    return statistics.median(values.tolist())


def normal_interval(a, b, draws):
    found = experiments(draws, lambda rounds: median(a[rounds] / b[rounds]))
    half = 1.96 * statistics.stdev(found.tolist())
    return found.mean() - half, found.mean() + half


WRONG = {
    "speed-up": {
        "lower of the middle two": each_round(statistics.median_low, lambda before, now: before / now),
        "upside down": each_round(statistics.median, lambda before, now: now / before),
        "ratio of the medians": apart(statistics.median),
        "ratio of the means": apart(sum),
        "ratio of the fastest": apart(min),
        "mean of the ratios": each_round(statistics.fmean, lambda before, now: before / now),
        "time saved": each_round(statistics.median, lambda before, now: (before - now) / before),
    },
    "interleave": {
        "always the same order": lambda names, rounds: [names] * rounds,
        "never back to front": turning,
        "turns the other way": other_direction,
        "starts with the second": second_first,
        "every other round backwards": there_and_back,
        "backwards from the same one": same_first_on_the_way_back,
    },
    "convolution-cost": {
        "groups forgotten": lambda image, *rest: counted(image, *rest, channels=image[1]),
        "weights once an image": lambda image, *rest: counted(
            image, *rest, moved=lambda each: image[0] * each["weights"] + each["inputs"] + each["outputs"]
        ),
        "multiply-accumulates for operations": lambda *a: counted(*a, operations=1),
        "padding on one side": lambda image, weight, stride, padding, bits: counted(
            image, weight, stride, padding, bits, rows=lambda size, kernel: 1 + (size + padding - kernel) // stride
        ),
        "output too small by one": lambda image, weight, stride, padding, bits: counted(
            image, weight, stride, padding, bits, rows=lambda size, kernel: (size + padding * 2 - kernel) // stride
        ),
        "outputs not moved": lambda *a: counted(*a, moved=lambda each: each["weights"] + each["inputs"]),
        "bits for bytes": lambda *a: counted(*a, per_byte=1),
    },
    "roofline": {
        "memory where both are equal": lambda *a: layer_by_layer(
            *a, max, lambda computing, moving: "memory" if moving >= computing else "arithmetic"
        ),
        "limits swapped": lambda *a: layer_by_layer(
            *a, max, lambda computing, moving: "arithmetic" if moving > computing else "memory"
        ),
        "ridge upside down": wrong_ridge,
        "all layers at once": whole_network,
        "one after the other": lambda *a: layer_by_layer(*a, lambda computing, moving: computing + moving),
        "the faster of the two": lambda *a: layer_by_layer(*a, min),
        "arithmetic alone": lambda *a: layer_by_layer(*a, lambda computing, moving: computing),
    },
    "bootstrap": {
        "lower of the middle two": lambda a, b, draws: ends(
            experiments(draws, lambda rounds: (a[rounds] / b[rounds]).median())
        ),
        "ratio of the medians": lambda a, b, draws: ends(
            experiments(draws, lambda rounds: median(a[rounds]) / median(b[rounds]))
        ),
        "upside down": lambda a, b, draws: ends(experiments(draws, lambda rounds: median(b[rounds] / a[rounds]))),
        "90 per cent": lambda a, b, draws: ends(
            experiments(draws, lambda rounds: median(a[rounds] / b[rounds])), 0.05, 0.95
        ),
        "smallest and largest": lambda a, b, draws: (
            (found := experiments(draws, lambda rounds: median(a[rounds] / b[rounds]))).min(),
            found.max(),
        ),
        "spread of the rounds": lambda a, b, draws: ends((a / b)[draws.flatten()]),
        "means for medians": lambda a, b, draws: ends(
            experiments(draws, lambda rounds: (a[rounds] / b[rounds]).mean())
        ),
        "a bell curve": normal_interval,
    },
}
ELSE = {
    "speed-up": {"a number was asked for": lambda baseline, contender: list(zip(baseline, contender, strict=True))},
    "interleave": {"values were asked for": lambda names, rounds: names * rounds},
    "convolution-cost": {"an integer was asked for": lambda *a: (float(counted(*a)[0]), *counted(*a)[1:])},
    "roofline": {"it is another value": lambda *a: (layer_by_layer(*a, max)[0], ["compute"] * len(a[0]))},
    "bootstrap": {"2 values were asked for": lambda a, b, draws: (a / b).median()},
}
