"""Exercises of notebook 06: types of integers, engines compared, the operations of ONNX, and what an engine can fuse."""

import math

import torch

from .exercise import Case, Exercise, Mistake

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def in_type(q, zero_point, signed):
    """Return `(q, zero_point)` as int8 (`signed` True) or uint8 (False), with scale · (q - zero_point) the same as before.

    `q`: int8 or uint8, any shape; `zero_point`: of the same type, shape () or (channels,). The scale stays as it is, so no
    value may change at all. Where they are of the wanted type already, nothing is to be done.
    """
    if q.dtype == (torch.int8 if signed else torch.uint8):
        return q, zero_point
    move, wanted = (-128, torch.int8) if signed else (128, torch.uint8)
    return (q.int() + move).to(wanted), (zero_point.int() + move).to(wanted)


def _in_type(q, zero_point, signed, *, move=128, saturate=False, halve=False, both=True, always=False):
    wanted = torch.int8 if signed else torch.uint8
    if q.dtype == wanted and not always:
        return q, zero_point

    def convert(x, move):
        moved = x.int() // 2 if halve else x.int() + (-move if signed else move)
        limits = torch.iinfo(wanted)
        return (moved.clamp(limits.min, limits.max) if saturate else moved).to(wanted)

    return convert(q, move), convert(zero_point, move if both else 0)


def _in_type_cases(generator):
    def integers(dtype, *shape):
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)

    yield Case("unsigned to signed", (integers(torch.uint8, 8), torch.tensor(113, dtype=torch.uint8), True))
    yield Case("signed to unsigned", (integers(torch.int8, 8), torch.tensor(-15, dtype=torch.int8), False))
    yield Case("after a ReLU: zero point 0", (integers(torch.uint8, 2, 3), torch.tensor(0, dtype=torch.uint8), True))
    yield Case("symmetric: zero point 0", (integers(torch.int8, 2, 3), torch.tensor(0, dtype=torch.int8), False))
    ends = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    yield Case("both ends and the middle", (ends, torch.tensor(255, dtype=torch.uint8), True))
    yield Case("unsigned already", (ends, torch.tensor(7, dtype=torch.uint8), False))
    yield Case("signed already", (integers(torch.int8, 6), torch.tensor(-128, dtype=torch.int8), True))
    yield Case("a zero point per channel", (integers(torch.int8, 3, 4, 4), integers(torch.int8, 3), False))
    yield Case("not contiguous", (integers(torch.uint8, 4, 6).T[::2], integers(torch.uint8, 3), True))
    yield Case("empty", (integers(torch.uint8, 0, 2), torch.tensor(128, dtype=torch.uint8), True))


def agreement_interval(first, second, z=1.96):
    """Return `(share, low, high)`, floats: on which share of the images two engines predict the same class, and its interval.

    `first`, `second`: their logits, float32 (images, classes), at least one image; the largest is the class. With the share p
    of n images the Wilson interval is (p + z² / 2n ± z · √(p (1 - p) / n + z² / 4n²)) / (1 + z² / n).
    """
    n = len(first)
    p = int((first.argmax(1) == second.argmax(1)).sum()) / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def _agreement(first, second, z=1.96, *, same="class", formula="wilson"):
    agree = {
        "class": lambda: first.argmax(1) == second.argmax(1),
        "image": lambda: first.argmax(0) == second.argmax(0),
        "logits": lambda: torch.isclose(first, second).all(1),
        "each logit": lambda: torch.isclose(first, second),
    }[same]().double()
    n, p = agree.numel(), float(agree.mean())
    z2 = z if formula == "no square" else z * z
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    if formula == "wald":
        half = z * math.sqrt(p * (1 - p) / n)
        return p, p - half, p + half
    whole = 1 if formula == "no divisor" else 1 + z2 / n
    return p, (p + z2 / (2 * n) - half) / whole, (p + z2 / (2 * n) + half) / whole


def _agreement_cases(generator):
    def logits(n, classes=10):
        return 3 * torch.randn(n, classes, generator=generator)

    def engines(n, noise, classes=10):
        first = logits(n, classes)
        return first, first + noise * torch.randn(first.shape, generator=generator)

    yield Case("a network and its INT8 version", (*engines(200, 0.3), 1.96))
    yield Case("as many images as classes", (*engines(10, 1.0), 1.96))
    yield Case("rounded otherwise: other logits, the same classes", (*engines(100, 1e-3), 1.96))
    first = logits(50)
    yield Case("the same logits", (first, first.clone(), 1.96))
    yield Case("never the same class", (first, -first, 1.96))
    yield Case("a 99 % interval", (*engines(300, 0.5), 2.576))
    yield Case("a single image", (*engines(1, 1e-3), 1.96))
    yield Case("two classes", (*engines(40, 2.0, classes=2), 1.96))
    yield Case("not contiguous", (logits(10, 30).T, logits(60)[::2], 1.96))


def quantize_linear(x, scale, zero_point, axis=1):
    """Return `(q, x_back)`: what ONNX's QuantizeLinear makes of `x`, and what DequantizeLinear makes of that, as float32.

    `x`: float32, at least one dimension. `scale`, float32, and `zero_point`, int8 or uint8, have the shape () for the whole
    tensor, or (channels,), one for each index of dimension `axis`, which may be negative. x / scale is rounded half to even,
    then zero_point added, then saturated to all of the type of zero_point, which is also that of q.
    """
    shape = [1] * x.dim()
    if scale.dim() == 1:
        shape[axis] = -1
    scale, zero = scale.reshape(shape), zero_point.reshape(shape).int()
    ends = torch.iinfo(zero_point.dtype)
    q = (torch.round(x / scale) + zero).clamp(ends.min, ends.max).to(zero_point.dtype)
    return q, (q.int() - zero) * scale


def _quantize_linear(x, scale, zero_point, axis=1, *, on=None, ties="even", end="saturate", back="wide"):
    shape = [1] * x.dim()
    if scale.dim():
        shape[axis if on is None else on] = -1
    scale, zero, dtype = scale.reshape(shape), zero_point.reshape(shape).int(), zero_point.dtype
    u = x / scale
    q = {
        "even": lambda: u.round() + zero,
        "away": lambda: u.sign() * (u.abs() + 0.5).floor() + zero,
        "none": lambda: u.trunc() + zero,
        "late": lambda: (u + zero).round(),
    }[ties]()
    ends = torch.iinfo(torch.uint8 if end == "unsigned" else dtype)
    q = (q if end == "wrap" else q.clamp(ends.min, ends.max)).int().to(dtype)
    return q, (q.int() - zero if back == "wide" else q - zero.to(dtype)) * scale


def _quantize_linear_cases(generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def scales(channels):
        return 0.005 + 0.02 * torch.rand(channels, generator=generator)

    def zeros(channels, dtype):
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min // 2, limits.max + 1, (channels,), generator=generator).to(dtype)

    tensor = torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8)
    yield Case("one scale for all", (normal(2, 6) / 2, *tensor, 1))
    yield Case("weights: output channels first", (normal(4, 4) / 2, scales(4) * 2, torch.zeros(4).to(torch.int8), 0))
    yield Case("activations: channels second", (normal(2, 3, 2, 2), scales(3), zeros(3, torch.uint8), 1))
    yield Case("the last dimension, counted from the end", (normal(3, 5), scales(5), zeros(5, torch.int8), -1))
    yield Case("a convolution's weights", (normal(5, 2, 3, 3), scales(5), zeros(5, torch.int8), 0))
    halves = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    yield Case("halfway, and an even zero point", (halves, torch.tensor(1.0), torch.tensor(10, dtype=torch.int8), 0))
    yield Case("halfway, and an odd zero point", (halves, torch.tensor(1.0), torch.tensor(7, dtype=torch.int8), 0))
    far = torch.tensor([-1000.0, -3.0, 0.0, 3.0, 1000.0])
    yield Case("beyond the range, unsigned", (far, *tensor, 0))
    yield Case("beyond the range, signed", (far, torch.tensor(0.02), torch.tensor(-128, dtype=torch.int8), 0))
    yield Case("a single channel", (normal(3, 1, 4), scales(1), zeros(1, torch.uint8), 1))
    yield Case("not contiguous", (normal(6, 4).T, scales(6), zeros(6, torch.uint8), 1))
    yield Case("empty", (normal(0, 3), scales(3), zeros(3, torch.uint8), 1))


def fused_convolutions(nodes, outputs):
    """Return the list of names of those Conv results that an engine computes on integers, in the order of `nodes`.

    `nodes`: a list of (op, list of names of its inputs, name of its result), `outputs`: the names that the graph returns. The
    inputs of a Conv are activations, weight and perhaps a bias. Its activations and weight must be results of
    DequantizeLinear. Its own result must be read by exactly one node, a QuantizeLinear, or a Relu whose result is read by
    exactly one node, a QuantizeLinear. Where the graph returns the result of the Conv or of that Relu, it has to stay float.
    """

    def only_reader(name):
        readers = [(op, result) for op, inputs, result in nodes if name in inputs]
        return readers[0] if len(readers) == 1 and name not in outputs else (None, None)

    made_by, fused = {result: op for op, _, result in nodes}, []
    for op, inputs, result in nodes:
        before = [made_by.get(name) for name in inputs[:2]]
        after, activated = only_reader(result)
        if after == "Relu":
            after, _ = only_reader(activated)
        if op == "Conv" and before == ["DequantizeLinear"] * 2 and after == "QuantizeLinear":
            fused.append(result)
    return fused


def _fused(nodes, outputs, *, checked=(0, 2), after="right", relu="right", readers="one", returned="float"):
    made_by = {result: op for op, _, result in nodes}

    def followed(name, through_relu):
        found = [(op, result) for op, inputs, result in nodes if name in inputs]
        if (returned == "float" and name in outputs) or (readers == "one" and len(found) != 1):
            return False
        return any(
            op == QUANTIZE or (op == "Relu" and through_relu and (relu == "enough" or followed(result, False)))
            for op, result in found
        )

    return [
        result
        for op, inputs, result in nodes
        if op == "Conv"
        and all(made_by.get(name) == DEQUANTIZE for name in inputs[slice(*checked)])
        and (after == "ignored" or followed(result, relu != "ignored"))
    ]


def _fused_cases(generator):
    def dq(name):
        return DEQUANTIZE, [f"{name}_int8"], name

    def pair(name, rounded):
        return [(QUANTIZE, [name], f"{name}_q"), (DEQUANTIZE, [f"{name}_q"], rounded)]

    def conv(x, y, weight="w"):
        return "Conv", [x, weight], y

    entrance = [*pair("images", "x"), dq("w")]
    one = [*entrance, conv("x", "y"), *pair("y", "z")]
    relu = [*entrance, conv("x", "y"), ("Relu", ["y"], "a"), *pair("a", "z")]
    last = ("GlobalAveragePool", ["z"], "logits")
    yield Case("Q/DQ on both sides", ([*one, last], ["logits"]))
    yield Case("a ReLU between", ([*relu, last], ["logits"]))
    yield Case("nothing rounds the result", ([*entrance, conv("x", "y"), ("Relu", ["y"], "logits")], ["logits"]))
    yield Case("two layers, the first in float", ([dq("w"), conv("images", "x0"), *pair("x0", "x"), *one[3:]], ["z"]))
    yield Case("a weight that comes as a float", ([*pair("images", "x"), conv("x", "y"), *pair("y", "z")], ["z"]))
    yield Case("a float bias", ([*entrance, ("Conv", ["x", "w", "b"], "y"), *pair("y", "z")], ["z"]))
    added = ("Add", ["b", "x"], "sum")
    block = [*relu, dq("v"), conv("z", "b", "v"), added, ("Relu", ["sum"], "out")]
    yield Case("a residual block, pairs before layers only", (block, ["out"]))
    whole = [
        *relu,
        dq("v"),
        conv("z", "b0", "v"),
        *pair("b0", "b"),
        added,
        ("Relu", ["sum"], "out"),
        *pair("out", "end"),
    ]
    yield Case("a residual block, pairs before the addition too", (whole, ["end"]))
    yield Case("a result that is read twice", ([*one, ("Add", ["y", "z"], "sum")], ["sum"]))
    yield Case("a ReLU's result that is read twice", ([*relu, ("Add", ["a", "z"], "sum")], ["sum"]))
    twice = [*one, (QUANTIZE, ["y"], "y2"), (DEQUANTIZE, ["y2"], "z2"), ("Add", ["z", "z2"], "sum")]
    yield Case("a result that two pairs read", (twice, ["sum"]))
    yield Case("a result that the graph returns too", ([*one, last], ["logits", "y"]))
    yield Case("a ReLU's result that the graph returns too", ([*relu, last], ["logits", "a"]))
    other = [*entrance, conv("x", "y"), ("HardSwish", ["y"], "a"), *pair("a", "z")]
    yield Case("another activation between", (other, ["z"]))
    yield Case("no convolution", ([*pair("images", "x"), ("MaxPool", ["x"], "y"), *pair("y", "z")], ["z"]))
    yield Case("an empty graph", ([], ["images"]))


EXERCISES = (
    Exercise(
        id="signed-or-unsigned",
        title="The wrong sign",
        notebook="06",
        minutes=5,
        difficulty="easy",
        objective="hand integers to an engine that wants the other 8-bit type, without changing a value",
        solution=in_type,
        cases=_in_type_cases,
        mistakes=(
            Mistake(
                "moves what need not move",
                lambda *a: _in_type(*a, always=True),
                "integers that were of the wanted type already were moved all the same",
                "compare q.dtype with the wanted type first",
            ),
            Mistake(
                "only converts the type",
                lambda *a: _in_type(*a, move=0),
                "the type was converted and nothing moved, so one half of the integers wrapped around to the other sign",
                "where do 0 .. 255 have to lie among -128 .. 127, if their order is to stay?",
            ),
            Mistake(
                "saturates",
                lambda *a: _in_type(*a, move=0, saturate=True),
                "half of all integers were clamped to the nearest one of the other type, and their values are gone",
                "both types have room for 256 integers: none needs to be lost",
            ),
            Mistake(
                "zero point left where it was",
                lambda *a: _in_type(*a, both=False),
                "the integers moved and the zero point did not, so every value is off by 128 steps",
                "only q - zero_point counts",
            ),
            Mistake(
                "off by one",
                lambda *a: _in_type(*a, move=127),
                "it moves by 127, and the integer at one end falls out of the type",
                "the smallest of 0 .. 255 has to become the smallest of -128 .. 127",
            ),
            Mistake(
                "drops a bit",
                lambda *a: _in_type(*a, halve=True),
                "the integers were halved, which needs another scale and loses every second value",
                "moving is enough",
            ),
        ),
        hints=(
            "scale · (q - zero_point) does not notice when both integers move by the same amount",
            "0 .. 255 and -128 .. 127 are the same line of 256 integers, moved",
            "add or subtract 128 in int32, so that nothing overflows on the way, and convert then",
        ),
    ),
    Exercise(
        id="predictions-agree",
        title="Do two engines agree?",
        notebook="06",
        minutes=10,
        difficulty="medium",
        objective="say how far two engines agree, and how sure that is after so many images",
        solution=agreement_interval,
        cases=_agreement_cases,
        mistakes=(
            Mistake(
                "compares logits",
                lambda *a: _agreement(*a, same="logits"),
                "the logits were compared; engines round them differently and still predict the same class",
                "which class does a row of logits predict?",
            ),
            Mistake(
                "compares every logit",
                lambda *a: _agreement(*a, same="each logit"),
                "every logit was counted, as if each of them were an image",
                "which class does a row of logits predict?",
            ),
            Mistake(
                "the largest of each column",
                lambda *a: _agreement(*a, same="image"),
                "argmax went down the images, and found for each class the image that has most of it",
                "the classes are dimension 1",
            ),
            Mistake(
                "the simple interval",
                lambda *a: _agreement(*a, formula="wald"),
                "that is p ± z · √(p (1 - p) / n): it is sure of itself when all images agree, and leaves 0 .. 1 near them",
                "after a single image that agrees, would you bet on all the others?",
            ),
            Mistake(
                "not divided",
                lambda *a: _agreement(*a, formula="no divisor"),
                "the division by 1 + z² / n is missing, so the interval goes beyond 1",
                "look at what stands behind the bracket of the formula",
            ),
            Mistake(
                "z not squared",
                lambda *a: _agreement(*a, formula="no square"),
                "z stands where z² belongs",
                "one z of the formula is without a square, the others have one",
            ),
        ),
        hints=(
            "argmax(1) makes classes out of logits, and == compares them image by image",
            "compute the middle p + z² / 2n and the half width on their own, and put them together last",
            "half = z · √(p (1 - p) / n + z² / 4n²); divide middle - half and middle + half by 1 + z² / n",
        ),
    ),
    Exercise(
        id="quantize-linear",
        title="Q and DQ",
        notebook="06",
        minutes=10,
        difficulty="medium",
        objective="know what the two operations of explicit quantization compute, to the last bit",
        solution=quantize_linear,
        cases=_quantize_linear_cases,
        mistakes=(
            Mistake(
                "zero point before rounding",
                lambda *a: _quantize_linear(*a, ties="late"),
                "the zero point was added before rounding, so with an odd one ties go to the other side",
                "round x / scale alone",
            ),
            Mistake(
                "half away from zero",
                lambda *a: _quantize_linear(*a, ties="away"),
                "ties go away from zero",
                "ONNX rounds to the nearest, ties to even, as torch.round does",
            ),
            Mistake(
                "truncates",
                lambda *a: _quantize_linear(*a, ties="none"),
                "x / scale was cut off, not rounded",
                "converting to an integer type drops the fraction",
            ),
            Mistake(
                "wraps around",
                lambda *a: _quantize_linear(*a, end="wrap"),
                "a value beyond the range came out at its other end",
                "clamp before you convert to 8 bits",
            ),
            Mistake(
                "always unsigned",
                lambda *a: _quantize_linear(*a, end="unsigned"),
                "the integers were held to 0 .. 255, also where they are int8",
                "torch.iinfo(zero_point.dtype) knows the ends",
            ),
            Mistake(
                "back in 8 bits",
                lambda *a: _quantize_linear(*a, back="narrow"),
                "q is right, but q - zero_point was computed in 8 bits, where it does not fit",
                "which type has the difference of two uint8?",
            ),
            Mistake(
                "the last dimension, whatever the axis",
                lambda *a: _quantize_linear(*a, on=-1),
                "the scales were laid along the last dimension, as broadcasting does on its own",
                "reshape scale and zero point to as many dimensions as x has",
            ),
            Mistake(
                "the channels of activations, whatever the axis",
                lambda *a: _quantize_linear(*a, on=1),
                "the scales were laid along dimension 1, which is only the default",
                "use `axis`",
            ),
        ),
        hints=(
            "a scale of shape (channels,) has to become (1, ..., channels, ..., 1), with its length at `axis`",
            "shape = [1] * x.dim(), and shape[axis] = -1 if there is a scale per channel; negative axes work by themselves",
            "(torch.round(x / scale) + zero_point.int()).clamp(...).to(zero_point.dtype), and back with q.int() - zero_point.int()",
        ),
    ),
    Exercise(
        id="fused-convolutions",
        title="Who runs on integers?",
        notebook="06",
        minutes=15,
        difficulty="hard",
        objective="read from a graph which convolutions an engine can compute on integers, and which stay float",
        solution=fused_convolutions,
        cases=_fused_cases,
        mistakes=(
            Mistake(
                "the bias has to be an integer too",
                lambda *a: _fused(*a, checked=(0, None)),
                "a convolution was given up because of its float bias; the engine rounds that itself",
                "only two of its inputs are multiplied",
            ),
            Mistake(
                "forgets what the graph returns",
                lambda *a: _fused(*a, returned="integer"),
                "a result that the graph returns was fused away",
                "`outputs` read too",
            ),
            Mistake(
                "other readers overlooked",
                lambda *a: _fused(*a, readers="any"),
                "a result counts although a second node needs it as a float",
                "count the readers",
            ),
            Mistake(
                "a float weight passes",
                lambda *a: _fused(*a, checked=(0, 1)),
                "the activations were looked at, the weight was not",
                "a product of two needs both as integers",
            ),
            Mistake(
                "float activations pass",
                lambda *a: _fused(*a, checked=(1, 2)),
                "the weight was looked at, the activations were not",
                "a product of two needs both as integers",
            ),
            Mistake(
                "does not look at what comes before",
                lambda *a: _fused(*a, checked=(0, 0)),
                "only what follows was looked at",
                "an integer kernel wants integers: who made its inputs?",
            ),
            Mistake(
                "does not look at what comes after",
                lambda *a: _fused(*a, after="ignored"),
                "only what comes before was looked at; a sum that nobody rounds has to stay a float",
                "who reads the result?",
            ),
            Mistake(
                "no ReLU between",
                lambda *a: _fused(*a, relu="ignored"),
                "a ReLU between convolution and QuantizeLinear was taken for an obstacle; to integers it is a clamp",
                "look one node further there",
            ),
            Mistake(
                "a ReLU is enough",
                lambda *a: _fused(*a, relu="enough"),
                "a ReLU was accepted whatever comes after it",
                "the ReLU's result has to be rounded as well",
            ),
        ),
        hints=(
            "write down two things first: which op made each name, and which nodes read it",
            "a helper that returns the only reader of a name, or nothing, serves for the convolution and for the ReLU",
            "the reader of the result; if that is a Relu, the reader of the Relu's result; it must be a QuantizeLinear",
        ),
    ),
)
