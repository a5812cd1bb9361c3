"""Exercises of notebook 04: ratios of noisy times, fair rounds, what a layer costs, the roofline."""

import torch

from .exercise import Case, Exercise, Mistake


def speed_up(baseline, contender):
    """Return how many times as fast as the baseline a contender is, a float: the median over the rounds of their ratio.

    baseline, contender: lists of positive floats of equal length, not empty: milliseconds, one for each round, in which both ran
    one after the other. Faster than the baseline means more than 1. The median of an even number is the mean of the middle two.
    """
    from statistics import median

    return median(before / now for before, now in zip(baseline, contender, strict=True))


def _ratio_of(summary):
    return lambda baseline, contender: float(summary(torch.tensor(baseline)) / summary(torch.tensor(contender)))


def _median_of(ratio):
    def answer(baseline, contender):
        return torch.tensor([ratio(b, c) for b, c in zip(baseline, contender, strict=True)]).quantile(0.5).item()

    return answer


def _of_ratios(summary):
    return lambda baseline, contender: float(summary(torch.tensor(baseline) / torch.tensor(contender)))


def _ms(generator, middle, rounds):
    return (middle * (1 + 0.1 * torch.rand(rounds, generator=generator))).double()


def _speed_up_cases(generator):
    def pair(rounds, before=30.0, now=12.0):
        return _ms(generator, before, rounds), _ms(generator, now, rounds)

    baseline, contender = pair(9)
    yield Case("nine quiet rounds", (baseline.tolist(), contender.tolist()))
    baseline, contender = pair(8)
    yield Case("an even number of rounds", (baseline.tolist(), contender.tolist()))
    drift = torch.linspace(1, 3, 11).double()
    baseline, contender = pair(11)
    yield Case("the machine heats up", ((baseline * drift).tolist(), (contender * drift).tolist()))
    baseline, contender = pair(7)
    baseline[2] *= 40
    yield Case("one interruption, while the baseline ran", (baseline.tolist(), contender.tolist()))
    baseline, contender = pair(6, before=10.0, now=16.0)
    yield Case("slower than the baseline", (baseline.tolist(), contender.tolist()))
    yield Case("the load changes from round to round", ([10.0, 40.0, 30.0, 11.0], [9.0, 12.0, 31.0, 2.0]))
    yield Case("A against A", ([5.0, 7.0, 6.0], [5.0, 7.0, 6.0]))
    yield Case("a single round", ([9.0], [3.0]))


def interleave(names, rounds):
    """Return the order of the contenders in each of so many rounds: a list of `rounds` lists, each of all the `names`.

    names: a list of n strings, n >= 1. The first n rounds turn: number 0 is the order of `names`, and each one after it starts
    one contender further, and goes on from the first where the list ends. The next n rounds are these n again, in the same
    sequence, but each of them from back to front. Then it all starts again, for as many rounds as were asked for.
    """
    turned = [names[start:] + names[:start] for start in range(len(names))]
    orders = turned + [order[::-1] for order in turned]
    return [orders[index % len(orders)] for index in range(rounds)]


def _turns(names, rounds, *, turn=1, first=0, backwards="second half"):
    n, found = len(names), []
    for index in range(rounds):
        order = [names[(first + turn * index + place) % n] for place in range(n)]
        back = index % 2 if backwards == "every other round" else index // n % 2
        if back and backwards == "from the same one":
            order = order[:1] + order[:0:-1]
        elif back and backwards is not None:
            order = order[::-1]
        found.append(order)
    return found


def _round_cases(generator):
    three = ["FP32", "PTQ INT8", "QAT INT8"]
    yield Case("three contenders, once through", (three, 3))
    yield Case("three contenders, there and back", (three, 6))
    yield Case("two contenders", (["A", "A again"], 4))
    yield Case("rounds that do not come out even", (["a", "b", "c", "d"], 11))
    yield Case("many rounds", (three, 20))
    yield Case("five contenders, less than once through", (list("abcde"), 2))
    yield Case("alone", (["FP32"], 3))
    yield Case("no rounds", (three, 0))


def convolution_cost(image_shape, weight_shape, stride=1, padding=0, bits=32):
    """Return `(macs, bytes, intensity)` of a convolution: an int, a float, and a float, the operations for each byte.

    image_shape: (images, channels, height, width). weight_shape: (out channels, channels / groups, kernel height, kernel width), as
    torch has it. stride, padding: ints, for both directions. macs: multiply-accumulates, those with padding included, two
    operations each. bytes: all weights, inputs and outputs, each moved once, without padding and bias, `bits` wide.
    """
    images, channels, height, width = image_shape
    out_channels, per_group, kernel_height, kernel_width = weight_shape
    out_height = (height + 2 * padding - kernel_height) // stride + 1
    out_width = (width + 2 * padding - kernel_width) // stride + 1
    outputs = images * out_channels * out_height * out_width
    macs = outputs * per_group * kernel_height * kernel_width
    weights = out_channels * per_group * kernel_height * kernel_width
    size = (weights + images * channels * height * width + outputs) * bits / 8
    return macs, size, 2 * macs / size


def _cost(image, weight, stride, padding, bits, *, sides=2, plus=1, grouped=True, once=True, moved=3, wide=8):
    images, channels, height, width = image
    out_channels, per_group, *kernel = weight
    out = [(size + sides * padding - k) // stride + plus for size, k in zip((height, width), kernel, strict=True)]
    outputs = images * out_channels * out[0] * out[1]
    weights = out_channels * per_group * kernel[0] * kernel[1] * (1 if once else images)
    size = sum((weights, images * channels * height * width, outputs)[:moved]) * bits / wide
    macs = outputs * (per_group if grouped else channels) * kernel[0] * kernel[1]
    return macs, size, 2 * macs / size


def _macs_for_operations(*args):
    macs, size, intensity = _cost(*args)
    return macs, size, intensity / 2


def _cost_cases(generator):
    yield Case("one input channel, one output channel", ((1, 1, 5, 5), (1, 1, 3, 3), 1, 0, 32))
    yield Case("the first layer of ResNet18", ((1, 3, 224, 224), (64, 3, 7, 7), 2, 3, 32))
    yield Case("3 × 3, in eight bits", ((1, 64, 56, 56), (64, 64, 3, 3), 1, 1, 8))
    yield Case("depthwise: as many groups as channels", ((1, 32, 14, 14), (32, 1, 3, 3), 1, 1, 8))
    yield Case("two groups", ((1, 8, 10, 10), (12, 4, 3, 3), 1, 1, 16))
    yield Case("a 1 × 1 shortcut with stride 2", ((1, 64, 56, 56), (128, 64, 1, 1), 2, 0, 8))
    yield Case("a stride that does not come out even", ((1, 4, 8, 8), (4, 4, 3, 3), 2, 0, 32))
    yield Case("neither image nor kernel is square", ((1, 2, 9, 20), (3, 2, 3, 5), 2, 1, 32))
    yield Case("a batch, four bits", ((16, 3, 12, 12), (5, 3, 3, 3), 1, 1, 4))
    yield Case("a linear layer: one position", ((1, 512, 1, 1), (10, 512, 1, 1), 1, 0, 32))


def least_seconds(layers, peak, bandwidth):
    """Return `(seconds, limits)`: the least time that all `layers` take, one after the other, and a list of what limits each.

    layers: a list of (operations, bytes), both positive. peak: operations a second; bandwidth: bytes a second. Within a layer
    arithmetic and traffic go on at the same time, so the slower of the two sets its time and is its limit: "arithmetic" or
    "memory", and "arithmetic" where both take equally long. No layer starts before the one before it has ended.
    """
    seconds, limits = 0.0, []
    for operations, size in layers:
        computing, moving = operations / peak, size / bandwidth
        seconds += max(computing, moving)
        limits.append("arithmetic" if computing >= moving else "memory")
    return seconds, limits


def _roof(layers, peak, bandwidth, *, layer=max, swapped=False, tie="arithmetic", ridge=None):
    times = [(operations / peak, size / bandwidth) for operations, size in layers]
    limits = ["arithmetic" if c > m else "memory" if c < m else tie for c, m in times]
    if swapped:
        limits = ["memory" if limit == "arithmetic" else "arithmetic" for limit in limits]
    if ridge:
        limits = ["arithmetic" if o / size >= ridge(peak, bandwidth) else "memory" for o, size in layers]
    return float(sum(layer(pair) for pair in times)), limits


def _all_at_once(layers, peak, bandwidth):
    computing, moving = (sum(numbers) for numbers in zip(*layers, strict=True))
    return max(computing / peak, moving / bandwidth), _roof(layers, peak, bandwidth)[1]


def _roof_cases(generator):
    convolution, linear = (2.0e8, 1.0e6), (1.0e6, 2.0e6)
    yield Case("a convolution", ([convolution], 1e11, 1e10))
    yield Case("a linear layer", ([linear], 1e11, 1e10))
    yield Case("both, one after the other", ([convolution, linear], 1e11, 1e10))
    yield Case("the same on a machine with slower memory", ([convolution, linear], 1e11, 2e8))
    yield Case("exactly at the ridge", ([(80.0, 8.0), (160.0, 8.0)], 1e3, 1e2))
    yield Case("arithmetic that can hardly be fed", ([(6.0, 2.0), (1.0, 9.0)], 1e6, 1e2))
    random = (10 ** (3 + 3 * torch.rand(6, 2, generator=generator, dtype=torch.float64))).tolist()
    yield Case("six layers", ([tuple(layer) for layer in random], 5e8, 2e8))


def bootstrap_interval(baseline, contender, draws):
    """Return `(low, high)`, floats: the 95 % bootstrap interval of a speed-up, the median over the rounds of the ratio.

    baseline, contender: float64 (rounds,), positive: milliseconds in the same rounds. draws: int64 (many, rounds); each row
    is an experiment that could have been: which rounds it consists of, some of them several times. low and high are the
    0.025 and 0.975 quantiles of the speed-ups of these experiments. Quantiles, the median too, interpolate as `torch.quantile`.
    """
    ratios = baseline / contender
    found = ratios[draws].quantile(0.5, dim=1)
    return found.quantile(0.025).item(), found.quantile(0.975).item()


def _middle(values):
    return values.quantile(0.5, dim=1)


def _interval(baseline, contender, draws, *, middle=_middle, outside=0.025, upside_down=False, paired=True):
    if upside_down:
        baseline, contender = contender, baseline
    found = middle((baseline / contender)[draws]) if paired else middle(baseline[draws]) / middle(contender[draws])
    return found.quantile(outside).item(), found.quantile(1 - outside).item()


def _bell(baseline, contender, draws):
    found = _middle((baseline / contender)[draws])
    return (found.mean() - 1.96 * found.std()).item(), (found.mean() + 1.96 * found.std()).item()


def _interval_cases(generator):
    def draws(rounds, many=400):
        return torch.randint(0, rounds, (many, rounds), generator=generator)

    for label, rounds, before, now in (
        ("fifteen rounds", 15, 30.0, 12.0),
        ("an even number of rounds", 8, 30.0, 12.0),
        ("A against A", 20, 7.0, 7.0),
    ):
        yield Case(label, (_ms(generator, before, rounds), _ms(generator, now, rounds), draws(rounds)))
    drift = torch.linspace(1, 4, 12).double()
    yield Case("the machine heats up", (_ms(generator, 9.0, 12) * drift, _ms(generator, 6.0, 12) * drift, draws(12)))
    interrupted = _ms(generator, 9.0, 11)
    interrupted[4] *= 30
    yield Case("one interruption", (interrupted, _ms(generator, 6.0, 11), draws(11)))
    yield Case("a single round", (_ms(generator, 9.0, 1), _ms(generator, 6.0, 1), draws(1, many=50)))
    table = torch.stack([_ms(generator, 9.0, 10), _ms(generator, 6.0, 10)], 1)
    yield Case("not contiguous", (table[:, 0], table[:, 1], draws(10).T.contiguous().T))


EXERCISES = (
    Exercise(
        id="speed-up",
        title="How many times as fast",
        notebook="04",
        minutes=5,
        difficulty="easy",
        objective="take the ratio within each round, so that what met both in it cancels",
        solution=speed_up,
        cases=_speed_up_cases,
        mistakes=(
            Mistake(
                "lower of the middle two",
                _of_ratios(torch.median),
                "with an even number of rounds this takes the lower of the middle two, as `torch.median` does",
                "try it on [1, 2, 3, 4]",
            ),
            Mistake(
                "upside down",
                _median_of(lambda before, now: now / before),
                "the ratio is upside down: what is faster comes out below 1",
                "who needs 12 ms where the baseline needs 30 is 2.5 times as fast",
            ),
            Mistake(
                "ratio of the medians",
                _ratio_of(lambda times: times.quantile(0.5)),
                "the medians were divided by each other; they may come from different rounds, hours of heat and load apart",
                "divide first, round by round",
            ),
            Mistake(
                "ratio of the means",
                _ratio_of(torch.mean),
                "the sums were divided by each other, so one interruption decides",
                "divide first, round by round, and take what one odd round cannot move",
            ),
            Mistake(
                "ratio of the fastest",
                _ratio_of(torch.min),
                "the best of one was divided by the best of the other: luck against luck, and not of the same round",
                "all the rounds count",
            ),
            Mistake(
                "mean of the ratios",
                _of_ratios(torch.mean),
                "the ratios are right, but one interruption moves their mean as far as it likes",
                "there is a middle that one odd round cannot move",
            ),
            Mistake(
                "time saved",
                _median_of(lambda before, now: 1 - now / before),
                "that is the share of the time that is saved, not how many times as fast it became",
                "A against A has to give 1",
            ),
        ),
        hints=(
            "zip(baseline, contender) gives the two times of one round after the other",
            "one ratio for each round; which of the two times goes on top, so that faster means more than 1?",
            "the last step is statistics.median of the ratios, which does what was asked with an even number",
        ),
    ),
    Exercise(
        id="interleave",
        title="Fair rounds",
        notebook="04",
        minutes=10,
        difficulty="medium",
        objective="let drift, and what the one before leaves behind, meet all contenders alike",
        solution=interleave,
        cases=_round_cases,
        mistakes=(
            Mistake(
                "always the same order",
                lambda *a: _turns(*a, turn=0, backwards=None),
                "the first contender is first in every round, and every other one always comes behind the same one",
                "where does round 1 start?",
            ),
            Mistake(
                "never back to front",
                lambda *a: _turns(*a, backwards=None),
                "it turns, but never goes from back to front, so each contender follows the same one in nearly all rounds",
                "what changes after the first n rounds?",
            ),
            Mistake(
                "turns the other way",
                lambda *a: _turns(*a, turn=-1),
                "round 1 starts with the last contender: it turns in the other direction",
                "with a, b, c the rounds start with a, then b, then c",
            ),
            Mistake(
                "starts with the second",
                lambda *a: _turns(*a, first=1),
                "the first round has been turned already",
                "rounds are counted from 0",
            ),
            Mistake(
                "every other round backwards",
                lambda *a: _turns(*a, backwards="every other round"),
                "every other round was turned back to front, instead of n rounds as they are and then n rounds reversed",
                "the rounds that go forwards come first, all n of them",
            ),
            Mistake(
                "backwards from the same one",
                lambda *a: _turns(*a, backwards="from the same one"),
                "on the way back the rounds start with the same contender as on the way there: right orders, one round too early",
                "from back to front the last comes first",
            ),
        ),
        hints=(
            "names[k:] + names[:k] is the list that starts at number k",
            "make the n turned orders first, then the same ones reversed: 2 n orders in all",
            "round number i takes order i % (2 * n); order[::-1] is a reversed copy",
        ),
    ),
    Exercise(
        id="convolution-cost",
        title="What a convolution costs",
        notebook="04",
        minutes=10,
        difficulty="medium",
        objective="count multiplications and bytes, and see which layers have much to compute for each byte",
        solution=convolution_cost,
        cases=_cost_cases,
        mistakes=(
            Mistake(
                "groups forgotten",
                lambda *a: _cost(*a, grouped=False),
                "every filter was counted as if it looked at all channels; with groups it sees only those of its own",
                "the second number of weight_shape says how many channels a filter sees",
            ),
            Mistake(
                "weights once an image",
                lambda *a: _cost(*a, once=False),
                "the weights were moved again for every image of the batch",
                "each number is moved once, whoever uses it",
            ),
            Mistake(
                "multiply-accumulates for operations",
                _macs_for_operations,
                "counts and bytes are right, but the intensity has one operation for each multiply-accumulate",
                "a multiplication and an addition",
            ),
            Mistake(
                "padding on one side",
                lambda *a: _cost(*a, sides=1),
                "the padding was added to one side of the image only",
                "an image has a left and a right, a top and a bottom",
            ),
            Mistake(
                "output too small by one",
                lambda *a: _cost(*a, plus=0),
                "the output is one row and one column too small",
                "a 3 × 3 kernel fits into a 3 × 3 image, once",
            ),
            Mistake(
                "outputs not moved",
                lambda *a: _cost(*a, moved=2),
                "the bytes hold weights and inputs, but the outputs have to be written too",
                "three kinds of numbers are moved",
            ),
            Mistake(
                "bits for bytes",
                lambda *a: _cost(*a, wide=1),
                "those are bits",
                "eight bits a byte",
            ),
        ),
        hints=(
            "the output has (size + 2 · padding - kernel) // stride + 1 rows, and columns",
            "each number of the output is a sum of channels / groups · kernel height · kernel width products",
            "bytes = (weights + inputs + outputs) · bits / 8; intensity = 2 · macs / bytes",
        ),
        rtol=1e-9,
        atol=0.0,
    ),
    Exercise(
        id="roofline",
        title="Under the roof",
        notebook="04",
        minutes=10,
        difficulty="medium",
        objective="say how fast a network could be at most, and what holds each layer back",
        solution=least_seconds,
        cases=_roof_cases,
        mistakes=(
            Mistake(
                "memory where both are equal",
                lambda *a: _roof(*a, tie="memory"),
                "a layer exactly at the ridge was called limited by memory",
                "look at what the docstring says for equal times",
            ),
            Mistake(
                "limits swapped",
                lambda *a: _roof(*a, swapped=True),
                "the time is right, but each limit has the other one's name",
                "what takes longer is what limits",
            ),
            Mistake(
                "ridge upside down",
                lambda *a: _roof(*a, ridge=lambda peak, bandwidth: bandwidth / peak),
                "the time is right, but the intensity was compared with bandwidth / peak",
                "intensity is operations a byte, so the ridge must be that too",
            ),
            Mistake(
                "all layers at once",
                _all_at_once,
                "the operations of all layers were summed, and the bytes, before the slower was chosen, as if one layer could "
                "compute while another one moves",
                "choose within a layer, then add up",
            ),
            Mistake(
                "one after the other",
                lambda *a: _roof(*a, layer=sum),
                "the two times of a layer were added: then nothing is computed while numbers are moved",
                "of two things that go on at the same time, the slower sets the time",
            ),
            Mistake(
                "the faster of the two",
                lambda *a: _roof(*a, layer=min),
                "each layer got the shorter of its two times, as if the other could be skipped",
                "of two things that go on at the same time, which one ends last?",
            ),
            Mistake(
                "arithmetic alone",
                lambda *a: _roof(*a, layer=lambda pair: pair[0]),
                "only the arithmetic was timed: a layer with few operations and many bytes looks free",
                "its bytes have to come from somewhere, too",
            ),
        ),
        hints=(
            "a layer has two times: operations / peak and bytes / bandwidth",
            "both go on at once, so a layer ends when the longer of them does",
            "sum of max(operations / peak, bytes / bandwidth) over the layers",
        ),
        rtol=1e-9,
        atol=0.0,
    ),
    Exercise(
        id="bootstrap",
        title="How sure is the speed-up",
        notebook="04",
        minutes=15,
        difficulty="hard",
        objective="put an interval around a median of ratios without assuming a bell curve",
        solution=bootstrap_interval,
        cases=_interval_cases,
        mistakes=(
            Mistake(
                "lower of the middle two",
                lambda *a: _interval(*a, middle=lambda values: values.median(1).values),
                "with an even number of rounds the lower of the middle two was taken, as `torch.median` does",
                "the docstring asks for the median as `torch.quantile` has it",
            ),
            Mistake(
                "ratio of the medians",
                lambda *a: _interval(*a, paired=False),
                "in each experiment the medians were divided by each other, which loses what the two had in common in a round",
                "divide round by round, before anything is drawn",
            ),
            Mistake(
                "upside down",
                lambda *a: _interval(*a, upside_down=True),
                "the ratio is upside down: what is faster comes out below 1",
                "the baseline's time goes on top",
            ),
            Mistake(
                "90 per cent",
                lambda *a: _interval(*a, outside=0.05),
                "five per cent were cut off at each end, so only 90 % are left between them",
                "95 % inside leaves 5 % for both ends together",
            ),
            Mistake(
                "smallest and largest",
                lambda *a: _interval(*a, outside=0.0),
                "those are the smallest and the largest experiment; the more are drawn, the wider that gets",
                "2.5 % of the experiments lie beyond each end",
            ),
            Mistake(
                "spread of the rounds",
                lambda *a: _interval(*a, middle=torch.flatten),
                "this is how far single rounds lie apart, not how uncertain their median is",
                "first one number for each row of `draws`",
            ),
            Mistake(
                "means for medians",
                lambda *a: _interval(*a, middle=lambda values: values.mean(1)),
                "each experiment was summed up by its mean, which one interruption can move as far as it likes",
                "a speed-up is the *median* over the rounds",
            ),
            Mistake(
                "a bell curve",
                _bell,
                "mean ± 1.96 standard deviations is the interval of a bell curve, which medians of a few rounds are not",
                "the experiments themselves say where 95 % of them lie",
            ),
        ),
        hints=(
            "one ratio for each round; the rounds, not the times, are what is drawn",
            "ratios[draws] has the shape (many, rounds): one experiment a row",
            "ratios[draws].quantile(0.5, dim=1) has one speed-up for each experiment; two quantiles of that are left",
        ),
    ),
)
