"""Exercises of notebook 01: formats, rounding, the affine map, granularity, clipping."""

import torch

from .exercise import Case, Exercise, Mistake


def decode_float(code, exponent_bits, mantissa_bits):
    """Return the number, a float, that the bits of the integer `code` stand for: sign, exponent, mantissa, highest bit first.

    The bias is 2 ** (exponent_bits - 1) - 1. An exponent field of 0 means subnormal. There are no infinities and no NaN.
    """
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


def _decode(code, exponent_bits, mantissa_bits, *, signed=True, bias_off=0, subnormal="right", hidden=True):
    sign = -1.0 if signed and code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1 + bias_off
    if exponent == 0 and subnormal == "right":
        return sign * fraction * 2.0 ** (1 - bias)
    if exponent == 0 and subnormal == "exponent":
        return sign * fraction * 2.0 ** (0 - bias)
    return sign * ((1 if hidden else 0) + fraction) * 2.0 ** (exponent - bias)


def _decode_cases(generator):
    yield Case("1.0 in FP8 E4M3", (0b0_0111_000, 4, 3))
    yield Case("a mantissa, and a sign", (0b1_1000_101, 4, 3))
    yield Case("the smallest subnormal", (0b0_0000_001, 4, 3))
    yield Case("a subnormal of E5M2", (0b1_00000_10, 5, 2))
    yield Case("zero", (0, 2, 1))
    for code in torch.randperm(16, generator=generator)[:5].tolist():
        yield Case("FP4 E2M1", (code, 2, 1))
    for code in torch.randint(0, 2**16, (4,), generator=generator).tolist():
        yield Case("sixteen bits, as in BF16", (code, 8, 7))


def round_half_even(x):
    """Return the float tensor `x` rounded to whole numbers, those halfway between two to the even one. Not with torch.round.

    `x`: float32, any shape. Example: 0.5, 1.5, 2.5, -0.5 become 0, 2, 2, 0 (the sign of a zero does not count).
    """
    below = torch.floor(x)
    rest = x - below
    up = (rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))
    return below + up.to(x.dtype)


def _ties_in_place(x):
    x += 0.5
    return x.floor_()


def _half_cases(generator):
    yield Case("nothing halfway", (torch.tensor([0.2, 0.8, 1.3, -0.4, -1.9]),))
    yield Case("positive, halfway", (torch.tensor([0.5, 1.5, 2.5, 3.5]),))
    yield Case("negative, halfway", (torch.tensor([-0.5, -1.5, -2.5, -3.5]),))
    yield Case("random, two dimensions", (torch.randn(3, 5, generator=generator) * 4,))
    yield Case("not contiguous", (torch.arange(12.0).reshape(3, 4).T / 2,))
    yield Case("empty", (torch.empty(0),))
    # Above 2²³ a float32 has no room for halves: adding 0.5 there gives a neighbour.
    yield Case("whole numbers above 2²³", (torch.tensor([8388609.0, 8388611.0, -8388609.0]),))


def affine_range(low, high, bits=8):
    """Return `(scale, zero_point)`, a float and an int, for numbers between `low` and `high` (floats, low <= high).

    The integers are 0 .. 2 ** bits - 1. Zero has to be one of the numbers exactly, so a range without it is widened first;
    the zero point is rounded half to even. A range that is just zero gets a scale of 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    scale = (high - low) / (2**bits - 1)
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def _range(low, high, bits=8, *, widen=True, steps=0, rounding=round, sign=-1, empty=True):
    if widen:
        low, high = min(low, 0.0), max(high, 0.0)
    if empty and low == high:
        return 1.0, 0
    scale = (high - low) / (2**bits - 1 + steps)
    return scale, rounding(sign * low / scale)


def _range_cases(generator):
    yield Case("zero in the middle", (-1.0, 1.0, 8))
    yield Case("uneven", (-0.37, 2.11, 8))
    yield Case("four bits", (-0.5, 1.9, 4))
    yield Case("all positive", (0.7, 3.0, 8))
    yield Case("all negative", (-3.0, -0.7, 8))
    yield Case("nothing but zero", (0.0, 0.0, 8))
    yield Case("halfway, and the even integer is below", (-1.0, 5.0, 2))
    for _ in range(6):
        low, high = sorted((torch.randn(2, generator=generator) * 3).tolist())
        yield Case("random", (low, high, int(torch.randint(2, 9, (1,), generator=generator))))


def fake_quantize(x, scale, zero_point, bits=8):
    """Return `x` (float32, any shape) as the quantized network sees it: to integers and back, float32 again.

    The integers are 0 .. 2 ** bits - 1: round half to even, then add the zero point, then saturate.
    """
    q = (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1)
    return (q - zero_point) * scale


def _fake(x, scale, zero_point, bits=8, *, rounding=torch.round, low=0, high=-1, clip=True, back=True):
    q = rounding(x / scale) + zero_point
    if clip:
        q = q.clamp(low, 2**bits + high)
    return (q - zero_point if back else q) * scale


def _wraps(x, scale, zero_point, bits=8):
    q = (torch.round(x / scale) + zero_point) % 2**bits
    return (q - zero_point) * scale


def _fake_in_place(x, scale, zero_point, bits=8):
    return x.div_(scale).round_().add_(zero_point).clamp_(0, 2**bits - 1).sub_(zero_point).mul_(scale)


def _fake_cases(generator):
    yield Case("inside the range", (torch.tensor([-1.0, -0.26, 0.0, 0.3, 1.0]), 0.01, 128, 8))
    yield Case("halfway between two steps", (torch.tensor([0.25, 0.75, 1.25, -0.25]), 0.5, 3, 4))
    yield Case("below and above the range", (torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), 0.01, 100, 8))
    yield Case("zero point at the lower end", (torch.tensor([-1.0, 0.0, 2.0, 5.0]), 0.02, 0, 8))
    yield Case("two bits", (torch.tensor([-1.0, -0.3, 0.0, 0.4, 2.0]), 0.5, 1, 2))
    yield Case("a matrix that is not contiguous", (torch.randn(4, 6, generator=generator).T, 0.03, 117, 8))
    yield Case("an outlier", (torch.tensor([1e6, -1e6, 0.1]), 0.05, 128, 8))
    yield Case("empty", (torch.empty(0, 3), 0.1, 0, 8))


def per_channel(w, bits=8):
    """Return `(fake, scale)`: the weights `w` (float32, output channels first) to symmetric integers and back, and the scales.

    One scale per output channel: its largest magnitude over 2 ** (bits - 1) - 1, float32 of shape (channels,). The integers
    go from -(2 ** (bits - 1) - 1) to 2 ** (bits - 1) - 1. A channel of zeros gets a scale of 1.
    """
    largest = 2 ** (bits - 1) - 1
    scale = w.flatten(1).abs().amax(1) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    spread = scale.reshape(-1, *[1] * (w.dim() - 1))
    return torch.round(w / spread).clamp(-largest, largest) * spread, scale


def _channels(w, bits=8, *, axis=0, steps=0, magnitude=True, zeros=True, shared=False):
    largest = 2 ** (bits - 1) - 1
    rows = w.transpose(0, axis).flatten(1)
    scale = (rows.abs() if magnitude else rows).amax(1) / (largest + steps)
    if shared:
        scale = scale.max().expand(len(scale)).clone()
    if zeros:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    shape = [1] * w.dim()
    shape[axis] = -1
    spread = scale.reshape(shape)
    return torch.round(w / spread).clamp(-largest, largest) * spread, scale


def _channel_cases(generator):
    yield Case("a linear layer", (torch.randn(4, 6, generator=generator), 8))
    uneven = torch.randn(3, 5, generator=generator) * torch.tensor([[0.01], [1.0], [30.0]])
    yield Case("filters of very different size", (uneven, 4))
    yield Case("a convolution", (torch.randn(5, 3, 2, 2, generator=generator), 8))
    yield Case("as many inputs as outputs", (torch.randn(4, 4, 3, 3, generator=generator), 3))
    yield Case("one channel of zeros", (torch.tensor([[0.5, -1.0], [0.0, 0.0]]), 8))
    yield Case("the largest magnitude is negative", (torch.tensor([[-3.0, 1.0, 0.2], [0.1, 0.2, -0.9]]), 8))
    yield Case("a single channel", (torch.randn(1, 7, generator=generator), 2))
    yield Case("not contiguous", (torch.randn(6, 4, generator=generator).T, 8))


def best_threshold(x, bits, candidates):
    """Return the one of `candidates` (positive floats, rising) that quantizes `x` with the least squared error, a float.

    A threshold t stands for the symmetric range [-t, t]: scale t / (2 ** (bits - 1) - 1), integers from -(2 ** (bits - 1) - 1)
    to 2 ** (bits - 1) - 1, round half to even. `x`: float32, any shape. Of equals, return the smallest.
    """
    largest = 2 ** (bits - 1) - 1

    def error(t):
        scale = t / largest
        return float((torch.round(x / scale).clamp(-largest, largest) * scale - x).double().square().sum())

    return min(candidates, key=error)


def _threshold(x, bits, candidates, *, power=2, clip=True, only=None, steps=0):
    largest = 2 ** (bits - 1) - 1 + steps

    def error(t):
        scale = t / largest
        q = torch.round(x / scale)
        if clip:
            q = q.clamp(-largest, largest)
        wrong = (q * scale - x).double().abs() ** power
        inside = x.abs() <= t
        if only == "rounding":
            wrong = wrong[inside]
        if only == "clipping":
            wrong = wrong[~inside]
        return float(wrong.sum())

    return min(candidates, key=error)


def _threshold_cases(generator):
    steps = [0.25 * i for i in range(1, 25)]
    normal = torch.randn(2000, generator=generator)
    yield Case("a bell curve, four bits", (normal, 4, steps))
    yield Case("the same, three bits", (normal, 3, steps))
    yield Case("the same, eight bits", (normal, 8, steps))
    yield Case("long tails", (normal**3 / 4, 4, steps))
    yield Case("one outlier", (torch.cat([normal, torch.tensor([60.0])]), 4, [*steps, 60.0]))
    yield Case("a constant", (torch.full((8,), 1.5), 4, steps))
    yield Case("not contiguous", (torch.randn(40, 30, generator=generator).T[::2], 2, steps))


EXERCISES = (
    Exercise(
        id="decode-float",
        title="Bits to a number",
        notebook="01",
        minutes=5,
        difficulty="easy",
        objective="read sign, exponent and mantissa of any floating-point format",
        solution=decode_float,
        cases=_decode_cases,
        mistakes=(
            Mistake(
                "no sign",
                lambda *a: _decode(*a, signed=False),
                "the highest bit was ignored: numbers that start with 1 are negative",
                "shift `code` right by all the other bits, and look at what is left",
            ),
            Mistake(
                "no subnormals",
                lambda *a: _decode(*a, subnormal="none"),
                "an exponent field of 0 was read like the others, so even zero is not zero",
                "with an exponent field of 0 the hidden 1 is missing",
            ),
            Mistake(
                "subnormal exponent one too small",
                lambda *a: _decode(*a, subnormal="exponent"),
                "subnormals use the exponent 0 - bias; they share 1 - bias with the smallest normal numbers",
                "the step must not jump where subnormals end: compare the largest of them with the smallest normal number",
            ),
            Mistake(
                "bias off by one",
                lambda *a: _decode(*a, bias_off=1),
                "every number is half of what it should be: the bias is one too large",
                "for four exponent bits the bias is 7, not 8",
            ),
            Mistake(
                "no hidden one",
                lambda *a: _decode(*a, hidden=False),
                "the 1 before the mantissa, which is not stored, was not added",
                "a normal number is (1 + mantissa) · 2^(exponent - bias)",
            ),
        ),
        hints=(
            "take the three fields apart first: `code >> n` drops the n lowest bits, `code & (2**n - 1)` keeps them",
            "the mantissa field is a whole number; divide it by 2 ** mantissa_bits to get the fraction",
            "normal: (1 + fraction) · 2 ** (exponent - bias); exponent field 0: fraction · 2 ** (1 - bias)",
        ),
        rtol=1e-12,
        atol=0.0,
    ),
    Exercise(
        id="round-half-even",
        title="Round half to even",
        notebook="01",
        minutes=5,
        difficulty="easy",
        objective="round without bias, as IEEE 754 and ONNX do",
        solution=round_half_even,
        cases=_half_cases,
        mistakes=(
            Mistake(
                "changes its input",
                _ties_in_place,
                "it rounds half up, and in the learner's own tensor",
                "work on a copy",
            ),
            Mistake(
                "half up",
                lambda x: torch.floor(x + 0.5),
                "ties always go up; in a long sum that is a bias of half a step for each",
                "look at whether the number below is even or odd",
            ),
            Mistake(
                "half away from zero",
                lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5),
                "ties go away from zero, as in school",
                "2.5 has to become 2, and 3.5 has to become 4",
            ),
            Mistake(
                "half down",
                lambda x: torch.ceil(x - 0.5),
                "ties always go down",
                "1.5 has to become 2",
            ),
            Mistake(
                "truncates",
                torch.trunc,
                "the fraction was cut off, not rounded",
                "0.8 is nearer to 1 than to 0",
            ),
            Mistake(
                "floor",
                torch.floor,
                "it always takes the number below",
                "0.8 is nearer to 1 than to 0",
            ),
        ),
        hints=(
            "torch.floor(x) is the number below, and x - torch.floor(x) says how far above it x is",
            "three cases: the rest is below one half, above it, or exactly one half",
            "exactly one half goes up only if the number below is odd: torch.floor(x) % 2 == 1, for negative ones as well",
        ),
        rtol=0.0,
        atol=0.0,
    ),
    Exercise(
        id="zero-point",
        title="Scale and zero point",
        notebook="01",
        minutes=10,
        difficulty="medium",
        objective="choose the affine map of a range, with zero exactly representable",
        solution=affine_range,
        cases=_range_cases,
        mistakes=(
            Mistake(
                "zero point not an integer",
                lambda *a: _range(*a, rounding=float),
                "the zero point is a float: then no integer stands for 0.0, and padding and ReLU are wrong everywhere",
                "round it, and return an int",
            ),
            Mistake(
                "zero point truncated",
                lambda *a: _range(*a, rounding=int),
                "the zero point was cut off, not rounded",
                "int() drops the fraction; round() does not",
            ),
            Mistake(
                "off by one in the number of steps",
                lambda *a: _range(*a, steps=1),
                "2 ** bits integers have 2 ** bits - 1 steps between them",
                "count the gaps of a fence, not its posts",
            ),
            Mistake(
                "range not widened to zero",
                lambda *a: _range(*a, widen=False),
                "a range without zero was taken as it is, and the zero point lies outside the integers",
                "low = min(low, 0), high = max(high, 0), before anything else",
            ),
            Mistake(
                "wrong sign",
                lambda *a: _range(*a, sign=1),
                "the zero point has the wrong sign",
                "`low` has to become the integer 0: low / scale + zero_point = 0",
            ),
            Mistake(
                "divides by zero on an empty range",
                lambda *a: _range(*a, empty=False),
                "a range that is just zero has no steps",
                "return a scale of 1 and a zero point of 0 there",
            ),
        ),
        hints=(
            "widen first: zero has to lie in the range",
            "scale = (high - low) / (number of steps), and there is one step less than there are integers",
            "zero_point = round(-low / scale), which makes `low` the integer 0",
        ),
        rtol=1e-9,
        atol=0.0,
    ),
    Exercise(
        id="fake-quantize",
        title="To integers and back",
        notebook="01",
        minutes=5,
        difficulty="easy",
        objective="quantize and dequantize a tensor, with rounding and saturation in the right order",
        solution=fake_quantize,
        cases=_fake_cases,
        mistakes=(
            Mistake(
                "changes its input",
                _fake_in_place,
                "x itself was changed: the caller's weights are gone",
                "methods that end in an underscore work in place",
            ),
            Mistake(
                "truncates instead of rounding",
                lambda *a: _fake(*a, rounding=torch.trunc),
                "x / scale was cut off instead of rounded: the error is up to a whole step, and always towards zero",
                "torch.round",
            ),
            Mistake(
                "floors instead of rounding",
                lambda *a: _fake(*a, rounding=torch.floor),
                "x / scale was rounded down: every value comes back too small, half a step on average",
                "torch.round",
            ),
            Mistake(
                "forgets to saturate",
                lambda *a: _fake(*a, clip=False),
                "values beyond the range came back unharmed: no integer of so many bits could do that",
                "clamp the integers to 0 .. 2 ** bits - 1",
            ),
            Mistake(
                "wraps around",
                _wraps,
                "a value beyond the range came out at the other end, as an overflow does; quantization saturates",
                "clamp before anything is converted to a small integer type",
            ),
            Mistake(
                "range off by one",
                lambda *a: _fake(*a, high=0),
                "2 ** bits itself is not an integer of so many bits",
                "eight bits end at 255",
            ),
            Mistake(
                "saturates to a signed range",
                lambda x, s, z, bits=8: (
                    ((torch.round(x / s) + z).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - z) * s
                ),
                "the integers here are unsigned",
                "0 .. 2 ** bits - 1, not -2 ** (bits - 1) .. 2 ** (bits - 1) - 1",
            ),
            Mistake(
                "forgets the zero point on the way back",
                lambda *a: _fake(*a, back=False),
                "the zero point was added, but not taken off again",
                "scale · (q - zero_point)",
            ),
        ),
        hints=(
            "three steps to the integer: divide and round, add the zero point, saturate",
            "and two steps back: take the zero point off, multiply",
            "(torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1)",
        ),
    ),
    Exercise(
        id="per-channel",
        title="One scale per channel",
        notebook="01",
        minutes=10,
        difficulty="medium",
        objective="give every output channel the scale that fits it",
        solution=per_channel,
        cases=_channel_cases,
        mistakes=(
            Mistake(
                "one scale for all",
                lambda *a: _channels(*a, shared=True),
                "all channels share the scale of the widest one",
                "reduce over all dimensions but the first",
            ),
            Mistake(
                "scale from the wrong axis",
                lambda *a: _channels(*a, axis=1),
                "there is a scale per *input* channel: the kernel could not take it out of its sum",
                "output channels come first",
            ),
            Mistake(
                "largest value, not largest magnitude",
                lambda *a: _channels(*a, magnitude=False),
                "the scale comes from the largest value; a filter whose largest magnitude is negative is clipped",
                "abs() before amax()",
            ),
            Mistake(
                "off by one in the largest integer",
                lambda *a: _channels(*a, steps=1),
                "the scale was divided by 2 ** (bits - 1), so the largest weight does not fit",
                "eight bits: 127, not 128",
            ),
            Mistake(
                "no answer for a channel of zeros",
                lambda *a: _channels(*a, zeros=False),
                "a channel of zeros has a scale of 0, and 0 / 0 is NaN",
                "torch.where(scale == 0, 1, scale)",
            ),
        ),
        hints=(
            "w.flatten(1) has one row per output channel",
            "to divide, the scales need as many dimensions as w: scale.reshape(-1, 1, 1, 1) for a convolution",
            "scale.reshape(-1, *[1] * (w.dim() - 1)) works for any number of dimensions",
        ),
    ),
    Exercise(
        id="clip-or-round",
        title="The best threshold",
        notebook="01",
        minutes=15,
        difficulty="hard",
        objective="balance clipping against rounding, and see the optimum move as bits fall",
        solution=best_threshold,
        cases=_threshold_cases,
        mistakes=(
            Mistake(
                "takes the largest value",
                lambda x, bits, candidates: min(candidates, key=lambda t: abs(t - float(x.abs().max()))),
                "nothing is clipped: that is min-max, which lets one outlier set the step of all others",
                "try every candidate, and measure its error",
            ),
            Mistake(
                "counts rounding only",
                lambda *a: _threshold(*a, only="rounding"),
                "only the error inside the range was counted, so the smallest threshold wins",
                "what lies outside is clipped, and clipping is an error too",
            ),
            Mistake(
                "counts clipping only",
                lambda *a: _threshold(*a, only="clipping"),
                "only the error outside the range was counted, so a wide range wins",
                "a wide range has wide steps",
            ),
            Mistake(
                "forgets to clip",
                lambda *a: _threshold(*a, clip=False),
                "without saturation a small threshold is nothing but a fine grid",
                "clamp the integers",
            ),
            Mistake(
                "absolute error",
                lambda *a: _threshold(*a, power=1),
                "the absolute error was summed; squares punish the large errors of clipping more",
                "square before you sum",
            ),
            Mistake(
                "off by one in the largest integer",
                lambda *a: _threshold(*a, steps=1),
                "the integers go to 2 ** (bits - 1), one too far",
                "four bits: -7 .. 7",
            ),
        ),
        hints=(
            "write the error of one threshold as a function, and use min(candidates, key=...)",
            "the error is that of `quantize and come back` against x, squared and summed: both kinds are in it",
            "scale = t / (2 ** (bits - 1) - 1); round, clamp, multiply, subtract x, square, sum",
        ),
        rtol=1e-9,
    ),
)
