"""Exercises of notebook 02: what the file weighs, what flipped, folding, the two repairs without training, integer sums."""

import math

import torch

from .exercise import Case, Exercise, Mistake


def int8_bytes(layers):
    """Return how many bytes, an int, the tensors of an INT8 network take. `layers`: a list of (shape of the weight, has a bias).

    Shapes are tuples of ints, output channels first: (out, in) or (out, in / groups, height, width). A weight is one byte.
    Every output channel has a scale (float32) and a zero point (int32), and in layers with a bias (True) a bias (float32).
    """
    total = 0
    for shape, has_bias in layers:
        per_channel = 4 + 4 + (4 if has_bias else 0)
        total += torch.Size(shape).numel() + shape[0] * per_channel
    return total


def _bytes(layers, *, weight=1, axis=0, shared=False, parameters=8, bias=4, biases=None):
    total = 0
    for shape, has_bias in layers:
        channels = shape[axis]
        total += math.prod(shape) * weight + (1 if shared else channels) * parameters
        total += channels * bias * (has_bias if biases is None else biases)
    return total


def _bytes_cases(generator):
    stem, wide, head = ((64, 3, 7, 7), True), ((128, 64, 3, 3), True), ((10, 512), True)
    yield Case("one convolution", ([stem],))
    yield Case("one linear layer", ([head],))
    yield Case("three layers", ([stem, wide, head],))
    yield Case("no bias", ([((128, 64, 1, 1), False)],))
    yield Case("with and without", ([stem, ((32, 16, 3, 3), False), head],))
    yield Case("depthwise: one input channel a filter", ([((32, 1, 3, 3), True), ((16, 32, 1, 1), True)],))
    yield Case("a single weight", ([((1, 1), False)],))
    yield Case("no layers", ([],))
    for _ in range(3):
        sizes = torch.randint(1, 40, (5, 2), generator=generator).tolist()
        yield Case("random", ([((a, b, 3, 3), (a + b) % 2 == 0) for a, b in sizes],))


def count_flips(first, second, labels):
    """Return `(flips, fixed, broke, p)` of two models on the same images, from their classes and the true ones, int64 (images,).

    flips: images where the two models differ, fixed: where only `second` is right, broke: where only `first` is; three ints.
    p, a float: the exact McNemar test, two-sided. It is twice the chance of at most min(fixed, broke) heads in fixed + broke
    tosses of a fair coin, but never more than 1.
    """
    import math

    fixed = int(((first != labels) & (second == labels)).sum())
    broke = int(((first == labels) & (second != labels)).sum())
    tosses, fewer = fixed + broke, min(fixed, broke)
    chance = sum(math.comb(tosses, heads) for heads in range(fewer + 1)) / 2**tosses
    return int((first != second).sum()), fixed, broke, min(1.0, 2 * chance)


def _flips(
    first, second, labels, *, sides=2, cap=1.0, end=1, right_only=False, all_tosses=False, swap=False, normal=False
):
    fixed = int(((first != labels) & (second == labels)).sum())
    broke = int(((first == labels) & (second != labels)).sum())
    flips, n, k = int((first != second).sum()), fixed + broke, min(fixed, broke)
    tosses = flips if all_tosses else n
    p = min(cap, sides * sum(math.comb(tosses, i) for i in range(k + end)) / 2**tosses)
    if normal:
        p = math.erfc(abs(fixed - broke) / math.sqrt(2 * n)) if n else 1.0
    return (n if right_only else flips), *((broke, fixed) if swap else (fixed, broke)), p


def _flips_cases(generator):
    def guess(labels, wrong):
        """The labels, every one of them replaced by any class with the chance `wrong`."""
        other = torch.randint(0, 10, labels.shape, generator=generator)
        return torch.where(torch.rand(labels.shape, generator=generator) < wrong, other, labels)

    labels = torch.randint(0, 10, (500,), generator=generator)
    first = guess(labels, 0.1)
    second = torch.where(torch.rand(500, generator=generator) < 0.05, labels, guess(first, 0.03))
    yield Case("a network and its INT8 version", (first, second, labels))
    yield Case("the second is worse", (first, guess(first, 0.3), labels))
    yield Case("two strangers, equally good", (guess(labels, 0.2), guess(labels, 0.2), labels))
    zeros, evens = torch.zeros(8, dtype=torch.int64), torch.arange(8) % 2
    yield Case("as many fixed as broke", (evens, 1 - evens, zeros))
    yield Case("from one wrong class to another", (evens + 1, evens + 2, zeros))
    yield Case("nothing changed", (first, first.clone(), labels))
    yield Case("sixty fixed, none broken", (torch.ones(60).long(), *torch.zeros(2, 60).long()))
    yield Case("every second image of a tensor", (first[::2], guess(first, 0.2)[::2], labels[::2]))
    yield Case("no images", (zeros[:0], zeros[:0], zeros[:0]))


def fold_norm(weight, bias, gamma, beta, mean, variance, eps=1e-5):
    """Return `(weight, bias)` of the one convolution that computes what a convolution and a batch norm after it compute.

    The norm is in evaluation mode: gamma · (x - mean) / √(variance + eps) + beta, channel by channel. All float32: `weight`
    (out, in / groups, height, width), `bias` (out,) or None for none, the other four (out,). What is returned has the shapes
    (out, in / groups, height, width) and (out,).
    """
    factor = gamma / torch.sqrt(variance + eps)
    centre = mean if bias is None else mean - bias
    return weight * factor.reshape(-1, 1, 1, 1), beta - centre * factor


def _fold(
    weight, bias, gamma, beta, mean, variance, eps=1e-5, *, std="right", old="scaled", centred=True, shape=(-1, 1, 1, 1)
):
    widths = {"right": (variance + eps).sqrt(), "eps outside": variance.sqrt() + eps, "no eps": variance.sqrt()}
    factor = gamma / (variance + eps if std == "variance" else widths[std])
    shift = beta - mean * factor if centred else beta
    if bias is not None and old != "dropped":
        shift = shift + (bias * factor if old == "scaled" else bias)
    return weight * factor.reshape(shape), shift


def _fold_in_place(weight, bias, gamma, beta, mean, variance, eps=1e-5):
    folded = _fold(weight, bias, gamma, beta, mean, variance, eps)
    return weight.copy_(folded[0]), folded[1]


def _fold_cases(generator):
    def norm(channels, width=1.0):
        gamma, beta, mean = torch.randn(3, channels, generator=generator)
        return gamma, beta, mean, width * (0.5 + torch.rand(channels, generator=generator))

    def weight(*shape):
        return torch.randn(shape, generator=generator)

    yield Case("no bias yet, as many inputs as outputs", (weight(4, 4, 3, 3), None, *norm(4), 1e-5))
    yield Case("a bias", (weight(5, 2, 3, 3), weight(5), *norm(5), 1e-5))
    yield Case("another eps", (weight(3, 4, 1, 1), weight(3), *norm(3), 0.1))
    yield Case("depthwise", (weight(6, 1, 3, 3), None, *norm(6), 1e-5))
    yield Case("channels that hardly vary", (weight(4, 2, 1, 1), None, *norm(4, 1e-6), 1e-5))
    gamma, beta, mean, variance = norm(3)
    off = gamma * torch.tensor([1.0, 0.0, -1.0])
    yield Case("a channel switched off", (weight(3, 2, 3, 3), None, off, beta, mean, variance, 1e-5))
    yield Case("a channel that never varied", (weight(3, 2, 1, 1), weight(3), gamma, beta, mean, variance * 0, 1e-5))
    yield Case("a single channel", (weight(1, 3, 2, 2), weight(1), *norm(1), 1e-3))
    yield Case("not contiguous", (weight(3, 5, 2, 2).transpose(0, 1), weight(10)[::2], *norm(5), 1e-5))


def corrected_bias(weight, quantized_weight, bias, x, quantized_x):
    """Return the bias, float32 (out,), with which a quantized layer puts out the same mean as the float layer, per channel.

    The float layer computes x @ weight.T + bias, the quantized one quantized_x @ quantized_weight.T + the bias asked for.
    Both weights: float32 (out, in). `bias`: float32 (out,), or None for none. Both inputs, float32 (images, in) or
    (images, tokens, in), come from the same calibration images; a channel's mean is over images and tokens.
    """
    means, quantized_means = x.flatten(0, -2).mean(0), quantized_x.flatten(0, -2).mean(0)
    shift = quantized_means @ quantized_weight.T - means @ weight.T
    return -shift if bias is None else bias - shift


def _correct(weight, quantized_weight, bias, x, quantized_x, *, sign=1, inputs="both", mean="channels", keep=True):
    x, quantized_x = {"both": (x, quantized_x), "float": (x, x), "quantized": (quantized_x,) * 2}[inputs]
    off = x @ weight.T - quantized_x @ quantized_weight.T
    if mean == "everything":
        off = off.mean().expand(len(weight)).clone()
    off = off.mean(0) if mean == "images" else off.reshape(-1, len(weight)).mean(0)
    return sign * off if bias is None or not keep else bias + sign * off


def _correct_in_place(weight, quantized_weight, bias, x, quantized_x):
    found = _correct(weight, quantized_weight, bias, x, quantized_x)
    return found if bias is None else bias.copy_(found)


def _correct_cases(generator):
    def case(out, *shape, steps=1.0, moved=0.1, bias=True):
        """Weights rounded to whole steps, inputs after a ReLU, and the same inputs as a quantized network has them."""
        weight = torch.randn(out, shape[-1], generator=generator)
        x = torch.randn(shape, generator=generator).relu()
        quantized_x = x + moved * torch.rand(shape, generator=generator)
        bias = torch.randn(out, generator=generator) if bias else None
        return weight, torch.round(weight / steps) * steps, bias, x, quantized_x

    yield Case("the first layer: both see the same images", case(4, 16, 6, moved=0.0))
    yield Case("a later layer: what comes in was quantized too", case(4, 16, 6))
    yield Case("no bias yet", case(3, 10, 5, bias=False))
    yield Case("tokens", case(4, 6, 3, 5))
    yield Case("weights that rounding hardly changed", case(3, 8, 4, steps=2**-20, moved=0.5))
    yield Case("a single image", case(3, 1, 4))
    yield Case("a single channel", case(1, 12, 4))
    weight, rounded, bias, x, quantized_x = case(5, 9, 5)
    yield Case("not contiguous", (weight.T, rounded.T, bias, x.T[:, ::2].T, quantized_x[::2]))
    yield Case("an input that is always the same", (weight, rounded, bias, torch.ones(7, 5), torch.ones(7, 5)))


def equalize_pair(w1, b1, w2):
    """Return `(w1, b1, w2)` of two linear layers with a ReLU between, equalized: relu(x @ w1.T + b1) @ w2.T stays the same.

    Hidden channel i leaves the first layer divided by some s_i > 0, and the second layer multiplies it by s_i, such that row i
    of w1 and column i of w2 get the same largest magnitude. Where one of the two is all zeros, s_i = 1.
    float32: `w1` (hidden, in), `b1` (hidden,), `w2` (out, hidden).
    """
    r1, r2 = w1.abs().amax(1), w2.abs().amax(0)
    s = torch.where((r1 > 0) & (r2 > 0), torch.sqrt(r1 / r2), 1.0)
    return w1 / s[:, None], b1 / s, w2 * s


def _equalize(w1, b1, w2, *, power=0.5, bias=True, second=True, axis=0, magnitude=True, zeros=True):
    size = torch.abs if magnitude else torch.clone
    r1, r2 = size(w1).amax(1), size(w2).amax(axis)
    s = (r1 / r2) ** abs(power)
    if zeros:
        s = torch.where((r1 == 0) | (r2 == 0), torch.ones_like(s), s)
    s = 1 / s if power < 0 else s
    return w1 / s[:, None], (b1 / s if bias else b1), (w2 * (s[:, None] if axis else s) if second else w2)


def _equalize_in_place(w1, b1, w2):
    for mine, found in zip((w1, b1, w2), _equalize(w1, b1, w2), strict=True):
        mine.copy_(found)
    return w1, b1, w2


def _equalize_cases(generator):
    def case(hidden, inputs, outputs, spread=1.0):
        w1, b1, w2 = (torch.randn(s, generator=generator) for s in ((hidden, inputs), (hidden,), (outputs, hidden)))
        widths = torch.exp(spread * torch.randn(hidden, generator=generator))
        return w1 * widths[:, None], b1 * widths, w2

    yield Case("as many outputs as hidden channels", case(4, 3, 4))
    yield Case("fewer outputs", case(5, 3, 2))
    yield Case("channels of very different width", case(6, 4, 3, spread=4))
    w1, b1, w2 = case(3, 4, 2)
    yield Case("the largest magnitude is negative", (-w1.abs(), b1, -w2.abs()))
    off = torch.tensor([1.0, 0.0, 1.0])
    yield Case("a channel that computes nothing", (w1 * off[:, None], b1, w2))
    yield Case("a channel that nobody reads", (w1, b1, w2 * off))
    yield Case("a single hidden channel", case(1, 3, 2))
    yield Case("a bias of zeros", (w1, torch.zeros(3), w2))
    yield Case("not contiguous", (w2.T, b1, w1.T))


def pair_sums(q, weight, zero_point):
    """Return the int32 sums (n, out) of the linear layer `weight`, int8 (out, in), as the instruction vpmaddubsw makes them.

    It multiplies the bytes `q`, uint8 (n, in), as they are, with their zero point (an int) still in them. Products of two
    neighbours (inputs 0 and 1, 2 and 3, ...; an odd last one is alone) are added, and each such pair saturates to 16 bits,
    signed. Pairs are added in 32 bits, and zero_point times the sum of the output's weights comes off at the end.
    """
    products = q.int()[:, None] * weight.int()
    pairs = products[..., 0::2].clone()
    pairs[..., : products.shape[-1] // 2] += products[..., 1::2]
    pairs = pairs.clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - zero_point * weight.int().sum(1)).int()


def _pair_sums(q, weight, zero_point, *, pairs="neighbours", limit="saturate", odd=True, zero="after"):
    raw = q.int() - zero_point if zero == "before" else q.int()
    products = raw[:, None] * weight.int()
    single = products.shape[-1] % 2
    products = torch.nn.functional.pad(products, (0, single if odd else -single))
    half = products.shape[-1] // 2
    sums = (
        products[..., :half] + products[..., half:] if pairs == "halves" else products.unflatten(-1, (half, 2)).sum(-1)
    )
    if limit == "saturate":
        sums = sums.clamp(-32768, 32767)
    if limit == "wrap":
        sums = (sums + 32768) % 65536 - 32768
    total = sums.sum(-1)
    if limit == "end":
        total = total.clamp(-32768, 32767)
    return (total - (zero_point * weight.int().sum(1) if zero == "after" else 0)).int()


def _pair_sums_cases(generator):
    def case(n, inputs, outputs, zero_point, low=0, high=256, weights=128):
        q = torch.randint(low, high, (n, inputs), generator=generator).to(torch.uint8)
        weight = torch.randint(-weights, weights, (outputs, inputs), generator=generator).to(torch.int8)
        return q, weight, zero_point

    yield Case("small weights: no pair is too large", case(2, 4, 3, 0, weights=20))
    yield Case(
        "one pair, too large",
        (torch.tensor([[255, 255]], dtype=torch.uint8), torch.tensor([[127, 127]], dtype=torch.int8), 0),
    )
    yield Case(
        "one pair, too negative",
        (torch.tensor([[250, 240]], dtype=torch.uint8), torch.tensor([[-128, -99]], dtype=torch.int8), 0),
    )
    yield Case("a zero point", case(2, 6, 3, 113, weights=30))
    yield Case("all bits in use", case(4, 12, 5, 128))
    yield Case("large bytes", case(3, 8, 4, 7, low=200))
    yield Case("an odd number of inputs", case(3, 7, 4, 60, low=128))
    yield Case("a single input", case(3, 1, 2, 5))
    yield Case("seven-bit bytes: nothing can saturate", case(3, 10, 4, 64, high=128))
    q, weight, zero_point = case(6, 8, 8, 31, low=100)
    yield Case("not contiguous", (q[::2], weight.T, zero_point))
    yield Case("no images", (q[:0], weight, zero_point))


def requantize_sums(acc, m0, shift, zero_point, qmin=0, qmax=255):
    """Return round(acc · m0 / 2 ** shift) + zero_point, saturated at qmin .. qmax: int32 in the shape of `acc`, no floats.

    `acc`: int32, any shape, any sign; ints 2 ** 30 <= m0 < 2 ** 31 and 1 <= shift <= 62. The product does not fit 32 bits, and
    a double has no room for all of its bits either: every one counts. Round half to even, below zero too.
    """
    product = acc.long() * m0
    below = product >> shift
    rest, half = product - (below << shift), 1 << (shift - 1)
    up = (rest > half) | ((rest == half) & (below % 2 == 1))
    return (below + up + zero_point).clamp(qmin, qmax).int()


def _requantize(acc, m0, shift, zero_point, qmin=0, qmax=255, *, ties="even", product="exact", saturate="end"):
    exact = (acc * m0).long() if product == "32 bits" else acc.long() * m0
    half = 1 << (shift - 1)
    if product == "double":
        q = torch.round(acc.double() * m0 / 2**shift).long()
    elif product == "float32":
        q = torch.round(acc.float() * (m0 / 2**shift)).long()
    elif ties == "down":
        q = exact >> shift
    elif ties == "away":
        q = exact.sign() * ((exact.abs() + half) >> shift)
    else:
        odd = (exact >> shift) & 1
        q = (exact + half - (1 - odd if ties == "even" else 0)) >> shift
    if saturate == "before":
        return (q.clamp(qmin, qmax) + zero_point).int()
    return (q + zero_point).clamp(qmin, qmax).int() if saturate else (q + zero_point).int()


def _requantize_cases(generator):
    def sums(*shape, width=20000):
        return torch.randint(-width, width, shape, generator=generator).int()

    def multiplier():
        return int(torch.randint(2**30, 2**31, (1,), generator=generator))

    yield Case("sums of both signs", (sums(8), multiplier(), 38, 128, 0, 255))
    yield Case("a ReLU: the range begins at the zero point", (sums(8), multiplier(), 39, 30, 30, 255))
    yield Case("signed integers", (sums(2, 5, width=10000), multiplier(), 38, -7, -128, 127))
    yield Case("four bits", (sums(8, width=300), multiplier(), 37, 3, 0, 15))
    halves = torch.arange(-7, 8, 2).int()
    yield Case("halfway between two integers", (halves, 2**30, 31, 100, 0, 255))
    yield Case("halfway, and an odd zero point", (halves, 2**30, 31, 101, 0, 255))
    yield Case("too large and too small", (sums(6, width=2**31 - 1), multiplier(), 40, 128, 0, 255))
    yield Case(
        "just above halfway: a float32 does not see it", (torch.tensor([201, -203]).int(), 2**30 + 1, 31, 128, 0, 255)
    )
    # The products are 219 · 2⁵³ - 1 and 197 · 2⁵³ + 1: one bit off halfway, far beyond the 53 bits of a double.
    yield Case(
        "just below halfway: a double does not see it", (torch.tensor([925600091]).int(), 2131132717, 54, 0, 0, 255)
    )
    yield Case("just above halfway, negative", (torch.tensor([-1415670191]).int(), 1253412175, 54, 128, 0, 255))
    yield Case("the largest shift", (sums(5, width=2**31 - 1), multiplier(), 62, 4, 0, 255))
    yield Case("not contiguous", (sums(4, 6).T, multiplier(), 38, 120, 0, 255))
    yield Case("empty", (sums(0, 3), multiplier(), 38, 0, 0, 255))


EXERCISES = (
    Exercise(
        id="int8-file-size",
        title="Predict the file",
        notebook="02",
        minutes=5,
        difficulty="easy",
        objective="know what an INT8 file holds, and so how large it will be, before anything runs",
        solution=int8_bytes,
        cases=_bytes_cases,
        mistakes=(
            Mistake(
                "input channels instead of output channels",
                lambda layers: _bytes(layers, axis=1),
                "scales, zero points and biases were counted per input channel",
                "which end of the shape is the output?",
            ),
            Mistake(
                "one scale a layer",
                lambda layers: _bytes(layers, shared=True),
                "each layer got a single scale and zero point, but every filter has its own",
                "a layer has as many scales as output channels",
            ),
            Mistake(
                "no zero points",
                lambda layers: _bytes(layers, parameters=4),
                "the zero points are missing: those of symmetric weights are all 0, and stored all the same",
                "count what one output channel takes besides its weights",
            ),
            Mistake(
                "no biases",
                lambda layers: _bytes(layers, biases=0),
                "the biases are missing",
                "the second part of each pair says whether there are any",
            ),
            Mistake(
                "a bias for every layer",
                lambda layers: _bytes(layers, biases=1),
                "layers without a bias were given one",
                "the second part of each pair says whether there is one",
            ),
            Mistake(
                "a bias in one byte",
                lambda layers: _bytes(layers, bias=1),
                "the biases were counted as INT8; with so few bits they would be far too coarse, and they are few",
                "look up the type of the bias in the text of the exercise",
            ),
            Mistake(
                "four bytes a weight",
                lambda layers: _bytes(layers, weight=4),
                "that is the size of the float32 weights",
                "how many bits has an INT8 number?",
            ),
        ),
        hints=(
            "a layer has as many weights as the product of its shape",
            "besides its weights, an output channel takes two numbers of four bytes, or three with a bias",
            "shape[0] is the number of output channels: product + shape[0] · (4 + 4 + 4 if there is a bias)",
        ),
    ),
    Exercise(
        id="fixed-and-broke",
        title="Fixed and broke",
        notebook="02",
        minutes=10,
        difficulty="medium",
        objective="compare two models on the same images, and say whether the difference could be chance",
        solution=count_flips,
        cases=_flips_cases,
        mistakes=(
            Mistake(
                "p above 1",
                lambda *a: _flips(*a, cap=math.inf),
                "a chance above 1 came out: with as many fixed as broke the two sides of the test overlap",
                "what is the largest value that p may take?",
            ),
            Mistake(
                "flips between wrong classes not counted",
                lambda *a: _flips(*a, right_only=True),
                "flips was taken for fixed + broke; an image may go from one wrong class to another, which is neither",
                "flips compares the two models with each other, and does not ask for the label",
            ),
            Mistake(
                "one-sided",
                lambda *a: _flips(*a, sides=1),
                "p is one-sided: half of what it should be",
                "before looking, either model could have been the better one",
            ),
            Mistake(
                "tail without its end",
                lambda *a: _flips(*a, end=0),
                "the chance of *fewer* than min(fixed, broke) heads was taken, not that of at most so many",
                "where does range(n) end?",
            ),
            Mistake(
                "the approximation",
                lambda *a: _flips(*a, normal=True),
                "that is McNemar's chi-square, an approximation for many flips; the exact p was asked for",
                "count the ways to get so many heads: math.comb",
            ),
            Mistake(
                "every flip is a toss",
                lambda *a: _flips(*a, all_tosses=True),
                "flips that are neither fixed nor broke went into the test, but they speak for neither model",
                "how many tosses does the text of the exercise speak of?",
            ),
            Mistake(
                "fixed and broke swapped",
                lambda *a: _flips(*a, swap=True),
                "fixed and broke changed places: fixed is what the second model gets right and the first does not",
                "read it as a story: first the one model, then the other",
            ),
        ),
        hints=(
            "first == labels says which images the first model gets right; combine such tensors with & and ~",
            "n tosses have 2 ** n outcomes, and math.comb(n, k) of them have k heads",
            "add up math.comb(n, k) for k = 0 .. min(fixed, broke), divide by 2 ** n, take it twice, and stop at 1",
        ),
        rtol=1e-9,
        atol=0.0,
    ),
    Exercise(
        id="fold-batch-norm",
        title="A batch norm disappears",
        notebook="02",
        minutes=10,
        difficulty="medium",
        objective="turn convolution and batch norm into one convolution, as every engine does first",
        solution=fold_norm,
        cases=_fold_cases,
        mistakes=(
            Mistake(
                "changes its input",
                _fold_in_place,
                "the weights of the network itself were changed",
                "`*=` works in place, `*` does not",
            ),
            Mistake(
                "forgets eps",
                lambda *a: _fold(*a, std="no eps"),
                "eps is missing, which shows where the variance is small",
                "compare your square root with that of the text of the exercise",
            ),
            Mistake(
                "eps outside the root",
                lambda *a: _fold(*a, std="eps outside"),
                "eps was added to the root, not to the variance",
                "compare your square root with that of the text of the exercise",
            ),
            Mistake(
                "divides by the variance",
                lambda *a: _fold(*a, std="variance"),
                "it divides by the variance, not by its root",
                "gamma / √(variance + eps)",
            ),
            Mistake(
                "the old bias not scaled",
                lambda *a: _fold(*a, old="added"),
                "the convolution's own bias was added as it is, but it goes through the batch norm like everything else",
                "write down what the norm makes of weight · x + bias, and only then collect the terms",
            ),
            Mistake(
                "the old bias dropped",
                lambda *a: _fold(*a, old="dropped"),
                "the convolution's own bias is missing",
                "write down what the norm makes of weight · x + bias",
            ),
            Mistake(
                "forgets the mean",
                lambda *a: _fold(*a, centred=False),
                "the running mean is missing",
                "what does the batch norm put out where the convolution puts out 0?",
            ),
            Mistake(
                "scales the input channels",
                lambda *a: _fold(*a, shape=(1, -1, 1, 1)),
                "the factors went to the input channels, but the norm comes after the convolution",
                "the output channels are the first dimension of the weight",
            ),
        ),
        hints=(
            "put conv(x) = weight · x + bias into the norm's formula: what multiplies x, and what is left without x?",
            "both parts contain gamma / √(variance + eps), one factor per output channel: compute it first",
            "bias: (bias - mean) · factor + beta; to multiply the weight, factor needs the shape (out, 1, 1, 1)",
        ),
        rtol=1e-4,
        atol=1e-5,
    ),
    Exercise(
        id="correct-the-bias",
        title="Take the shift back",
        notebook="02",
        minutes=10,
        difficulty="medium",
        objective="repair with the bias what rounding did to the means, without labels or training",
        solution=corrected_bias,
        cases=_correct_cases,
        mistakes=(
            Mistake(
                "changes its input",
                _correct_in_place,
                "the float layer's own bias was changed",
                "`+=` and `-=` work in place",
            ),
            Mistake(
                "wrong sign",
                lambda *a: _correct(*a, sign=-1),
                "the shift was added once more instead of taken back",
                "compute the two means with your bias in place: they should be equal now",
            ),
            Mistake(
                "the float inputs for both",
                lambda *a: _correct(*a, inputs="float"),
                "both layers were fed with `x`, but what reaches the quantized one went through quantized layers before",
                "each layer has an input of its own",
            ),
            Mistake(
                "the quantized inputs for both",
                lambda *a: _correct(*a, inputs="quantized"),
                "both layers were fed with `quantized_x`, so what the layers before did to the means is not repaired",
                "each layer has an input of its own",
            ),
            Mistake(
                "one shift for all channels",
                lambda *a: _correct(*a, mean="everything"),
                "the mean was taken over the channels too, so all of them get the same correction",
                "the result of the mean has to have one number per output channel",
            ),
            Mistake(
                "the mean over images only",
                lambda *a: _correct(*a, mean="images"),
                "with tokens there is a correction per token, but a bias is the same for all of them",
                "a mean over all dimensions but the last",
            ),
            Mistake(
                "the old bias forgotten",
                lambda *a: _correct(*a, keep=False),
                "only the correction was returned, without the bias that the layer had",
                "what does the quantized layer need besides the correction?",
            ),
        ),
        hints=(
            "compute what both layers put out without a bias, and compare the means",
            "flatten(0, -2) turns images and tokens into one dimension; then .mean(0)",
            "new bias = old bias + mean of the float output - mean of the quantized output",
        ),
        rtol=1e-4,
        atol=1e-5,
    ),
    Exercise(
        id="equalize",
        title="Even out two layers",
        notebook="02",
        minutes=10,
        difficulty="medium",
        objective="move width from one layer to the next without changing what the network computes",
        solution=equalize_pair,
        cases=_equalize_cases,
        mistakes=(
            Mistake(
                "changes its input",
                _equalize_in_place,
                "the network's own tensors were changed",
                "`/=` and `*=` work in place",
            ),
            Mistake(
                "no answer for a channel of zeros",
                lambda *a: _equalize(*a, zeros=False),
                "a channel of zeros gave a scale of 0 or infinity, and with it NaN",
                "such channels are to be left alone: torch.where",
            ),
            Mistake(
                "forgets the bias",
                lambda *a: _equalize(*a, bias=False),
                "the bias stayed as it was, and the network computes something else now",
                "the whole channel is divided, not only what comes from x",
            ),
            Mistake(
                "leaves the second layer alone",
                lambda *a: _equalize(*a, second=False),
                "the first layer was divided, and nothing multiplies again: the network computes something else now",
                "what goes out divided has to come in multiplied",
            ),
            Mistake(
                "no root",
                lambda *a: _equalize(*a, power=1),
                "the channel's width moved over to the other layer altogether: the two are as uneven as before, swapped",
                "r1 / s and r2 · s shall be equal: solve for s",
            ),
            Mistake(
                "the wrong way round",
                lambda *a: _equalize(*a, power=-0.5),
                "wide channels were made wider, and narrow ones narrower",
                "where row i of w1 is the wider one, s_i has to be above 1",
            ),
            Mistake(
                "largest value, not largest magnitude",
                lambda *a: _equalize(*a, magnitude=False),
                "the widths come from the largest values; weights may be negative",
                "abs() before amax()",
            ),
            Mistake(
                "rows of the second layer",
                lambda *a: _equalize(*a, axis=1),
                "the second layer was treated row by row; its rows are the outputs, its columns the hidden channels",
                "which dimension of w2 is as long as b1?",
            ),
        ),
        hints=(
            "for s > 0, relu(y / s) · s = relu(y): whatever s you choose, the network stays the same if both layers agree on it",
            "with r1 and r2 for the largest magnitudes, r1 / s = r2 · s; they are w1.abs().amax(1) and w2.abs().amax(0)",
            "s = √(r1 / r2), or 1 where either is 0; then w1 / s[:, None], b1 / s and w2 * s",
        ),
    ),
    Exercise(
        id="pair-sums",
        title="Sums in sixteen bits",
        notebook="02",
        minutes=15,
        difficulty="hard",
        objective="see how the same integers give another result on another processor",
        solution=pair_sums,
        cases=_pair_sums_cases,
        mistakes=(
            Mistake(
                "drops the odd one",
                lambda *a: _pair_sums(*a, odd=False),
                "with an odd number of inputs the last one was lost",
                "it makes a pair with nothing: with 0",
            ),
            Mistake(
                "nothing saturates",
                lambda *a: _pair_sums(*a, limit=None),
                "these are the exact sums. A single product always fits 16 bits; the sum of two may not",
                "clamp between the two additions: after the neighbours, before the rest",
            ),
            Mistake(
                "wraps around",
                lambda *a: _pair_sums(*a, limit="wrap"),
                "a pair that is too large came out at the other end, with the other sign; this instruction saturates",
                "clamp, before anything is converted to 16 bits",
            ),
            Mistake(
                "saturates the whole sum",
                lambda *a: _pair_sums(*a, limit="end"),
                "the whole sum was held to 16 bits, but only pairs are; they are added in 32",
                "when exactly does the text of the exercise say that it saturates?",
            ),
            Mistake(
                "halves instead of neighbours",
                lambda *a: _pair_sums(*a, pairs="halves"),
                "input i was paired with one half a row away",
                "0 and 1, 2 and 3: every second one begins a pair",
            ),
            Mistake(
                "zero point taken off first",
                lambda *a: _pair_sums(*a, zero="before"),
                "the zero point was subtracted before the products, but the instruction wants bytes without a sign",
                "Σ (q - z) · w = Σ q · w - z · Σ w: the second part comes at the end",
            ),
            Mistake(
                "zero point forgotten",
                lambda *a: _pair_sums(*a, zero="never"),
                "the zero point is still in the result",
                "Σ (q - z) · w = Σ q · w - z · Σ w",
            ),
        ),
        hints=(
            "convert both to int32 first: in 8 bits already the products would overflow",
            "q.int()[:, None] * weight.int() has all products, (n, out, in); [..., 0::2] and [..., 1::2] are the two of each pair",
            "add the two of each pair, clamp to -2 ** 15 .. 2 ** 15 - 1, sum(-1), and subtract zero_point · weight.int().sum(1)",
        ),
    ),
    Exercise(
        id="requantize",
        title="A division without a division",
        notebook="02",
        minutes=15,
        difficulty="hard",
        objective="bring a 32-bit sum back to eight bits with a multiplication and a shift, rounded right",
        solution=requantize_sums,
        cases=_requantize_cases,
        mistakes=(
            Mistake(
                "computes with a double",
                lambda *a: _requantize(*a, product="double"),
                "the product went through a float64, whose 53 bits are fewer than the product has",
                "stay with integers: int64 holds all of it",
            ),
            Mistake(
                "computes with a float32",
                lambda *a: _requantize(*a, product="float32"),
                "sum or multiplier went through float32, whose 24 bits do not tell a half from a little more",
                "stay with integers: int64 holds all of it",
            ),
            Mistake(
                "the product overflows",
                lambda *a: _requantize(*a, product="32 bits"),
                "the product was computed in 32 bits and wrapped around",
                "the type of the result is that of `acc`: convert first",
            ),
            Mistake(
                "rounds down",
                lambda *a: _requantize(*a, ties="down"),
                "the shift alone rounds down, always: half a step too small on average, also below zero",
                "look at the bits that the shift drops",
            ),
            Mistake(
                "half up",
                lambda *a: _requantize(*a, ties="up"),
                "adding a half before the shift sends every tie up",
                "a tie shall go up only if the integer below it is odd",
            ),
            Mistake(
                "half away from zero",
                lambda *a: _requantize(*a, ties="away"),
                "ties go away from zero, as in school",
                "a tie shall go up only if the integer below it is odd",
            ),
            Mistake(
                "saturates before the zero point",
                lambda *a: _requantize(*a, saturate="before"),
                "the result was clamped and then moved out of the range again by the zero point",
                "qmin and qmax are integers of the output, and that is the last thing computed",
            ),
            Mistake(
                "forgets to saturate",
                lambda *a: _requantize(*a, saturate=None),
                "results beyond qmin .. qmax came out as they were",
                "clamp",
            ),
        ),
        hints=(
            "acc.long() * m0 is exact; `>> shift` then divides and rounds down, for negative numbers too",
            "the rest is product - (below << shift), between 0 and 2 ** shift: compare it with half of that, 1 << (shift - 1)",
            "up by one if rest > half, or rest == half and below % 2 == 1; then + zero_point, and clamp last",
        ),
    ),
)
