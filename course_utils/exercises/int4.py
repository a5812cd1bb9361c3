"""Exercises of notebook 05: nibbles in bytes, the honest size, scales per group, activation-aware scaling, GPTQ."""

import torch

from .exercise import Case, Exercise, Mistake


def pack_nibbles(q):
    """Return the signed 4-bit integers `q` packed two to a byte: uint8 of shape (ceil(numel / 2),).

    `q`: int8, any shape, values -8 .. 7, taken row by row. The first of each pair goes into the low four bits, its neighbour
    into the high four. Two's complement: -2 is 14. An odd last one has zeros above it. Not with course_utils.int4.
    """
    codes = (q.flatten() & 15).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return codes[0::2] | codes[1::2] << 4


def _pack(q, *, code=lambda q: q & 15, fill=True, swap=False, halves=False, dtype=torch.uint8):
    codes = code(q.flatten()).to(dtype)
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2)) if fill else codes[: len(codes) // 2 * 2]
    low, high = codes.chunk(2) if halves and len(codes) else (codes[0::2], codes[1::2])
    return high | low << 4 if swap else low | high << 4


def _pack_cases(generator):
    yield Case("one pair", (torch.tensor([3, -2], dtype=torch.int8),))
    yield Case("none is negative", (torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int8),))
    yield Case("every integer there is", (torch.arange(-8, 8, dtype=torch.int8),))
    yield Case("an odd number", (torch.tensor([7, -8, -1], dtype=torch.int8),))
    yield Case("only one", (torch.tensor([-5], dtype=torch.int8),))
    yield Case("a matrix, pairs run on over its rows", (_integers(generator, 3, 5),))
    yield Case("a convolution", (_integers(generator, 4, 2, 3, 3),))
    yield Case("not contiguous", (_integers(generator, 6, 4).T,))
    yield Case("empty", (torch.empty(0, 3, dtype=torch.int8),))


def _integers(generator, *shape):
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)


def unpack_nibbles(packed, shape):
    """Return the signed 4-bit integers in the bytes `packed`: int8 of the shape `shape`, a tuple, filled row by row.

    `packed`: uint8 of shape (ceil(numel / 2),), the first of each pair in the low four bits. Two's complement: 8 is -8, 14 is
    -2. When their number is odd, the high four bits of the last byte mean nothing. Not with course_utils.int4.
    """
    codes = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    codes = codes[: torch.Size(shape).numel()].to(torch.int8)
    return torch.where(codes >= 8, codes - 16, codes).reshape(shape)


def _unpack(packed, shape, *, sign=lambda c: torch.where(c >= 8, c - 16, c), swap=False, halves=False, cut=True):
    pair = [packed & 15, packed >> 4]
    codes = torch.stack(pair[::-1] if swap else pair, dim=0 if halves else 1).flatten()
    codes = codes[: torch.Size(shape).numel()] if cut else codes
    return sign(codes.to(torch.int8)).reshape(shape)


def _unpack_cases(generator):
    yield Case("one byte", (torch.tensor([227], dtype=torch.uint8), (2,)))
    yield Case("none is negative", (torch.tensor([0x21, 0x43, 0x65], dtype=torch.uint8), (6,)))
    yield Case("the smallest and the largest", (torch.tensor([0x78, 0x8F], dtype=torch.uint8), (4,)))
    yield Case("an odd number", (torch.tensor([0x8F, 0x07], dtype=torch.uint8), (3,)))
    yield Case("something in the unused bits", (torch.tensor([0xD9], dtype=torch.uint8), (1,)))
    yield Case("a matrix, pairs run on over its rows", (_bytes(generator, 8), (3, 5)))
    yield Case("a convolution", (_bytes(generator, 36), (4, 2, 3, 3)))
    yield Case("not contiguous", (_bytes(generator, 24)[::2], (4, 6)))
    yield Case("empty", (torch.empty(0, dtype=torch.uint8), (0, 3)))


def _bytes(generator, count):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def stored_size(shape, bits, group_size, zero_points):
    """Return `(n_bytes, bits_per_weight)`, an int and a float: what the weights of a layer take with all that they need.

    `shape`: a tuple, output channels first; all other dimensions together are a row. Rows are cut into groups of `group_size`
    weights, the last one maybe shorter. Integers of `bits` bits are packed without gaps from the first weight of the layer to
    the last. Each group has an FP16 scale and, if `zero_points` is True, a zero point of `bits` bits, packed likewise but
    apart from the weights. Each of the two packed runs ends with a full byte.
    """
    row = torch.Size(shape[1:]).numel()
    groups = shape[0] * -(-row // group_size)  # rounded up
    n_bytes = -(-shape[0] * row * bits // 8) + 2 * groups
    if zero_points:
        n_bytes += -(-groups * bits // 8)
    return n_bytes, 8 * n_bytes / (shape[0] * row)


def _ceil(a, b):
    return -(-a // b)


def _size(shape, bits, group_size, zero_points, *, scale=2, zero="packed", ragged="up", ends="up"):
    row = torch.Size(shape[1:]).numel()
    n = shape[0] * row
    per_row = row // group_size if ragged == "down" else _ceil(row, group_size)
    groups = _ceil(n, group_size) if ragged == "across" else shape[0] * per_row
    if ends == "row":
        n_bytes = shape[0] * _ceil(row * bits, 8)
    else:
        n_bytes = n * bits // 8 if ends == "down" else _ceil(n * bits, 8)
    n_bytes += scale * groups
    if zero_points and zero != "none":
        n_bytes += groups if zero == "byte" else groups * bits // 8 if ends == "down" else _ceil(groups * bits, 8)
    return n_bytes, 8 * n_bytes / n


def _size_cases(generator):
    yield Case("a linear layer", ((128, 256), 4, 32, False))
    yield Case("the same with zero points", ((128, 256), 4, 32, True))
    yield Case("a convolution", ((64, 32, 3, 3), 4, 32, False))
    yield Case("three bits", ((64, 32, 3, 3), 3, 64, True))
    yield Case("the first filters of ResNet18: 147 weights a row", ((64, 3, 7, 7), 4, 32, False))
    yield Case("the same, two bits, zero points", ((64, 3, 7, 7), 2, 64, True))
    yield Case("depthwise: 9 weights a row", ((32, 1, 3, 3), 4, 32, True))
    yield Case("an odd number of weights and of groups", ((3, 5), 4, 2, True))
    yield Case("one scale a row", ((10, 512), 8, 512, False))
    rows, columns, bits, size = (int(torch.randint(2, most, (1,), generator=generator)) for most in (50, 90, 9, 40))
    yield Case("random", ((rows, columns), bits, size, True))


def quantize_in_groups(w, bits, group_size):
    """Return `(q, scale)`: the weights `w`, float32 (rows, columns), as integers, int8, and float16 scales (rows, groups).

    Groups run within a row; the last one of each row may be shorter. Scale: the group's largest magnitude over
    2 ** (bits - 1) - 1, rounded to float16; where that gives 0, it is 1. q = w / scale rounded half to even, with the scale as
    it is stored, and saturated at -(2 ** (bits - 1)) and 2 ** (bits - 1) - 1.
    """
    largest = 2 ** (bits - 1) - 1
    missing = -w.shape[1] % group_size
    groups = torch.nn.functional.pad(w, (0, missing)).unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(2) / largest).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = torch.round(groups / scale.float()[..., None]).clamp(-largest - 1, largest)
    return q.flatten(1)[:, : w.shape[1]].to(torch.int8), scale


def _in_groups(
    w, bits, group_size, *, pad=True, per_row=False, stored=True, magnitude=True, steps=0, rounding=torch.round
):
    largest, columns = 2 ** (bits - 1) - 1, w.shape[1]
    if pad:
        w = torch.nn.functional.pad(w, (0, -columns % group_size))
    groups = w.reshape(len(w), -1, group_size)
    extent = (groups.abs() if magnitude else groups).amax(2)
    if per_row:
        extent = extent.amax(1, keepdim=True).expand_as(extent)
    exact = extent / (largest + steps)
    scale = exact.half()
    exact, scale = (torch.where(scale == 0, torch.ones_like(each), each) for each in (exact, scale))
    q = rounding(groups / (scale.float() if stored else exact)[..., None]).clamp(-largest - 1, largest)
    return q.flatten(1)[:, :columns].to(torch.int8), scale


def _down_columns(w, bits, group_size):
    q, scale = _in_groups(w.T, bits, group_size)
    return q.T, scale.T


def _group_cases(generator):
    yield Case("two groups a row", (torch.randn(3, 16, generator=generator), 4, 8))
    uneven = torch.randn(4, 64, generator=generator) * torch.tensor([0.01, 1.0, 0.1, 3.0]).repeat_interleave(16)
    yield Case("groups of very different size", (uneven, 4, 16))
    yield Case("a whole layer", (torch.randn(64, 128, generator=generator) / 10, 4, 32))
    yield Case("the last group is shorter", (torch.randn(4, 20, generator=generator), 4, 8))
    yield Case("rows shorter than a group", (torch.randn(8, 9, generator=generator), 3, 32))
    yield Case("a group of zeros", (torch.tensor([[0.0, 0.0, 0.5, -1.0], [0.3, 0.1, 0.0, 0.0]]), 4, 2))
    yield Case("the largest magnitude is negative", (torch.tensor([[-3.0, 1.0, 0.2, 0.7]]), 4, 4))
    yield Case("not contiguous", (torch.randn(12, 6, generator=generator).T, 8, 4))
    yield Case("two bits", (torch.randn(5, 12, generator=generator), 2, 4))
    tiny = torch.tensor([[4e-7, -7e-7, 2e-7, 1e-8, 6e-7, -6e-7]])
    yield Case("so small that float16 has hardly a scale for it", (tiny, 4, 2))


def awq_weights(w, x, strength, bits):
    """Return the weights that a linear layer computes with after activation-aware scaling (AWQ): float32, shape of `w`.

    `w`: float32 (outputs, inputs). `x`: its inputs, float32 (samples, inputs). Each input channel has a factor, its mean |x|,
    but at least 1e-8, to the power of `strength`. The weights of the channel are multiplied by it, then rounded half to even
    with one scale per output, the row's largest magnitude over 2 ** (bits - 1) - 1, or 1 for a row of zeros, and divided by
    the factor again. In the layer it is `x` that is divided; the product is the same.
    """
    factors = x.abs().mean(0).clamp(min=1e-8) ** strength
    larger = w * factors
    scale = larger.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(larger / scale) * scale / factors


def _awq(w, x, strength, bits, *, size=lambda w, x: x.abs().mean(0), least=1e-8, up=True, early=False, back=True):
    factors = size(w, x).clamp(min=least) ** (strength if up else -strength)
    larger = w * factors
    scale = (w if early else larger).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = torch.round(larger / scale) * scale
    return rounded / factors if back else rounded


def _awq_cases(generator):
    w, x = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    large = x * torch.tensor([1.0, 1.0, 30.0, 1.0, 1.0, 0.2, 1.0, 1.0])
    yield Case("one large input channel", (w, large, 0.5, 3))
    yield Case("the same, strength 0: nothing but rounding", (w, large, 0.0, 3))
    yield Case("the same, strength 1", (w, large, 1.0, 4))
    yield Case("inputs behind a ReLU", (w, large.relu(), 0.5, 4))
    yield Case("as many inputs as outputs", (w[:, :6], large[:, :6], 0.75, 3))
    yield Case("a channel that is always zero", (w, large * (torch.arange(8) != 4), 0.5, 3))
    yield Case("a row of zeros", (w * (torch.arange(6) != 1)[:, None], large, 0.5, 4))
    yield Case("inputs that are not contiguous", (w, large.T.contiguous().T, 0.25, 2))
    yield Case("one sample", (w, large[:1], 0.5, 4))


def gptq_round(w, h, scale):
    """Return the weights `w`, float32 (rows, columns), rounded by GPTQ: float32 multiples of `scale` (rows,), factors -8 .. 7.

    `h`: XᵀX of the layer's inputs, float32 (columns, columns), positive definite. U: upper triangular, UᵀU the inverse of `h`.
    Column after column is rounded, half to even and saturated, as the earlier ones have left it. Then its error (what it was
    minus what it became) divided by U[j, j], times U[j, k], is taken from each later column k.
    """
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = w.clone()
    for j in range(w.shape[1]):
        rounded = torch.round(w[:, j] / scale).clamp(-8, 7) * scale
        error = (w[:, j] - rounded) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        w[:, j] = rounded
    return w


def _gptq(w, h, scale, *, factor=None, copy=True, sign=1, divide=True, reach=None, clip=True):
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True) if factor is None else factor(h)
    w = w.clone() if copy else w
    for j in range(w.shape[1]):
        q = torch.round(w[:, j] / scale)
        rounded = (q.clamp(-8, 7) if clip else q) * scale
        error = sign * (w[:, j] - rounded) / (u[j, j] if divide else 1)
        later = slice(j + 1, reach and j + 1 + reach)
        w[:, later] -= error[:, None] * u[j, later]
        w[:, j] = rounded
    return w


def _gptq_cases(generator):
    together = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    yield Case("two inputs that go together", (torch.tensor([[0.4, 0.4]]), together, torch.ones(1)))
    yield Case("a layer", (*_layer(generator, 4, 8), torch.full((4,), 0.5)))
    yield Case("a scale for each row", (*_layer(generator, 3, 12), torch.tensor([0.6, 0.8, 1.0])))
    yield Case(
        "inputs that have nothing to do with each other", (_layer(generator, 3, 5)[0], torch.eye(5), torch.ones(3))
    )
    w, h = _layer(generator, 4, 6)
    yield Case("some weights are out of range", (w, h, torch.full((4,), 0.1)))
    yield Case(
        "one large input channel", (w, h + torch.diag(torch.tensor([0.0, 0, 50, 0, 0, 0])), torch.full((4,), 0.4))
    )
    yield Case("one row", (w[:1], h, torch.tensor([0.25])))
    yield Case("one column", (w[:, :1], h[:1, :1], torch.full((4,), 0.25)))
    yield Case("not contiguous", (w.T.contiguous().T, h, torch.full((4,), 0.35)))


def _layer(generator, rows, columns):
    """Return weights, and H of inputs that share a good part of what they carry."""
    x = torch.randn(200, columns, generator=generator) + 1.5 * torch.randn(200, 1, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / 200


EXERCISES = (
    Exercise(
        id="pack-nibbles",
        title="Two integers in a byte",
        notebook="05",
        minutes=5,
        difficulty="easy",
        objective="store 4-bit integers in half a byte each",
        solution=pack_nibbles,
        cases=_pack_cases,
        mistakes=(
            Mistake(
                "signed bytes",
                lambda q: _pack(q, dtype=torch.int8),
                "the bits are right, but they are returned as int8",
                "a byte that holds two integers has no sign of its own: uint8",
            ),
            Mistake(
                "sign bits spill over",
                lambda q: _pack(q, code=lambda q: q),
                "a negative integer was not cut to four bits: the ones above them overwrite its neighbour",
                "-2 is 11111110 as a byte; only 1110 may go in",
            ),
            Mistake(
                "stores q + 8",
                lambda q: _pack(q, code=lambda q: q + 8),
                "8 was added to make all codes positive; some file formats do that, two's complement does not",
                "the last four bits of the int8 are the code already",
            ),
            Mistake(
                "high nibble first",
                lambda q: _pack(q, swap=True),
                "the two integers of each byte are the wrong way round",
                "the first of a pair belongs where nothing has to be shifted",
            ),
            Mistake(
                "halves instead of neighbours",
                lambda q: _pack(q, halves=True),
                "the first half of all integers went into the low bits, the second into the high ones, as in a block of GGUF",
                "integers 0 and 1 share the first byte, 2 and 3 the second",
            ),
            Mistake(
                "drops an odd one",
                lambda q: _pack(q, fill=False),
                "with an odd number of integers the last one is missing",
                "give it a neighbour before you take pairs",
            ),
        ),
        hints=(
            "`& 15` keeps the lowest four bits of an int8, of a negative one too",
            "codes[0::2] are the first ones of all pairs, codes[1::2] the second ones; both have to be equally long",
            "pad with a zero if the length is odd, then low | high << 4",
        ),
    ),
    Exercise(
        id="unpack-nibbles",
        title="And out again",
        notebook="05",
        minutes=5,
        difficulty="easy",
        objective="get signed integers back out of bytes: sign extension",
        solution=unpack_nibbles,
        cases=_unpack_cases,
        mistakes=(
            Mistake(
                "no sign extension",
                lambda *a: _unpack(*a, sign=lambda c: c),
                "codes from 8 on stand for negative integers, and were left positive",
                "the highest of the four bits counts -8, not 8",
            ),
            Mistake(
                "8 taken for positive",
                lambda *a: _unpack(*a, sign=lambda c: torch.where(c > 8, c - 16, c)),
                "the code 8 was left positive; it is the smallest integer there is",
                "look at the border: 7 is the last positive code",
            ),
            Mistake(
                "subtracts 8 from all",
                lambda *a: _unpack(*a, sign=lambda c: c - 8),
                "8 was taken from every code, as if 8 had been added before; two's complement keeps 0 .. 7 as they are",
                "the code 0 means 0",
            ),
            Mistake(
                "sign and magnitude",
                lambda *a: _unpack(*a, sign=lambda c: torch.where(c >= 8, -(c & 7), c)),
                "the highest bit was read as a minus before the other three",
                "14 is 1110, and it means -8 + 6",
            ),
            Mistake(
                "high nibble first",
                lambda *a: _unpack(*a, swap=True),
                "the two integers of each byte are the wrong way round",
                "the first of a pair is in the low four bits",
            ),
            Mistake(
                "halves instead of neighbours",
                lambda *a: _unpack(*a, halves=True),
                "all low nibbles came first and then all high ones: neighbours were torn apart",
                "low and high have to alternate",
            ),
            Mistake(
                "keeps the padding",
                lambda *a: _unpack(*a, cut=False),
                "with an odd number of integers there is one too many for the shape",
                "`shape` says how many there are",
            ),
        ),
        hints=(
            "packed & 15 and packed >> 4 are the two integers of each byte, both 0 .. 15",
            "torch.stack(..., dim=1).flatten() lets two vectors alternate",
            "as int8: codes from 8 on need 16 less",
        ),
    ),
    Exercise(
        id="honest-size",
        title="The honest size",
        notebook="05",
        minutes=10,
        difficulty="medium",
        objective="predict the bytes of a quantized layer, scales and zero points counted",
        solution=stored_size,
        cases=_size_cases,
        mistakes=(
            Mistake(
                "no scales",
                lambda *a: _size(*a, scale=0, zero="none"),
                "only the integers were counted; without their scales nobody can read them",
                "how many groups are there, and what does each bring along?",
            ),
            Mistake(
                "scales in FP32",
                lambda *a: _size(*a, scale=4),
                "four bytes were counted for a scale",
                "FP16 has 16 bits",
            ),
            Mistake(
                "no zero points",
                lambda *a: _size(*a, zero="none"),
                "zero points were left out where there are some",
                "an asymmetric group stores two things",
            ),
            Mistake(
                "a byte for each zero point",
                lambda *a: _size(*a, zero="byte"),
                "each zero point was given a byte; it has as many bits as a weight, and is packed like one",
                "count the bits of all zero points, and round up once",
            ),
            Mistake(
                "groups run over the ends of rows",
                lambda *a: _size(*a, ragged="across"),
                "all weights were divided into groups in one go, but a group ends with its row",
                "count the groups of one row first",
            ),
            Mistake(
                "shorter groups not counted",
                lambda *a: _size(*a, ragged="down"),
                "the shorter group at the end of a row needs a scale as well",
                "round up, not down: 147 weights in groups of 32",
            ),
            Mistake(
                "rounds down to bytes",
                lambda *a: _size(*a, ends="down"),
                "the last, half-filled byte was dropped",
                "-(-a // b) rounds up",
            ),
            Mistake(
                "each row starts a new byte",
                lambda *a: _size(*a, ends="row"),
                "every row was rounded up to a full byte, but the rows are packed one right after the other",
                "multiply first, round once",
            ),
        ),
        hints=(
            "the bytes are a sum of three: integers, scales, zero points",
            "groups of one row: its weights / group_size, rounded up; times the number of rows",
            "integers: rows · row · bits / 8, rounded up; scales: 2 a group; zero points: groups · bits / 8, rounded up",
        ),
        rtol=1e-9,
    ),
    Exercise(
        id="groups",
        title="One scale per group",
        notebook="05",
        minutes=10,
        difficulty="medium",
        objective="quantize in groups within rows, with scales as they will be stored",
        solution=quantize_in_groups,
        cases=_group_cases,
        mistakes=(
            Mistake(
                "whole groups only",
                lambda *a: _in_groups(*a, pad=False),
                "it needs rows that are a multiple of the group long; real layers are not",
                "zeros at the end of a row change no largest magnitude",
            ),
            Mistake(
                "one scale per row",
                lambda *a: _in_groups(*a, per_row=True),
                "all groups of a row share the scale of the widest",
                "take the maximum within each group only",
            ),
            Mistake(
                "groups down the columns",
                _down_columns,
                "the groups run over several output channels; a kernel that computes one output could not use them",
                "a row holds the weights of one output: stay in it",
            ),
            Mistake(
                "rounds with a scale that nobody stores",
                lambda *a: _in_groups(*a, stored=False),
                "the weights were divided by the scale before it was rounded to float16, which is the one they are read with",
                "first make the scale final, then the integers",
            ),
            Mistake(
                "largest value, not largest magnitude",
                lambda *a: _in_groups(*a, magnitude=False),
                "the scale comes from the largest value; a group whose largest magnitude is negative is clipped",
                "abs() before amax()",
            ),
            Mistake(
                "off by one in the largest integer",
                lambda *a: _in_groups(*a, steps=1),
                "the magnitude was divided by 2 ** (bits - 1), so the largest positive weight does not fit",
                "four bits: 7, not 8",
            ),
            Mistake(
                "truncates instead of rounding",
                lambda *a: _in_groups(*a, rounding=torch.trunc),
                "the fraction was cut off: a conversion to int8 does that to floats",
                "round before you convert",
            ),
        ),
        hints=(
            "fill each row up with zeros to a multiple of group_size, and take them off again at the end",
            "w.unflatten(1, (-1, group_size)) has the groups in a dimension of their own: reduce over the last one",
            "scale.float()[..., None] divides all weights of a group at once; .half() on the scale comes before",
        ),
    ),
    Exercise(
        id="awq-scaling",
        title="Large inputs, careful weights",
        notebook="05",
        minutes=10,
        difficulty="medium",
        objective="scale weights by what they meet, so that rounding hurts where it matters least",
        solution=awq_weights,
        cases=_awq_cases,
        mistakes=(
            Mistake(
                "no scaling",
                lambda *a: _awq(*a, size=lambda w, x: torch.ones_like(w[0])),
                "these are weights rounded to nearest: the factors have no effect",
                "the scale of each row has to be chosen after the multiplication",
            ),
            Mistake(
                "not scaled back",
                lambda *a: _awq(*a, back=False),
                "the weights are still multiplied by the factors: with the inputs as they are, that is another layer",
                "with enough bits the result has to be w",
            ),
            Mistake(
                "the wrong way round",
                lambda *a: _awq(*a, up=False),
                "weights that meet large inputs were made smaller before the rounding, so they suffer most",
                "who should be large in the row: the channels that matter",
            ),
            Mistake(
                "scales from the weights before",
                lambda *a: _awq(*a, early=True),
                "the scales were taken from the weights before they were multiplied, so they do not fit what is rounded",
                "the row that is rounded decides its own scale",
            ),
            Mistake(
                "mean without magnitude",
                lambda *a: _awq(*a, size=lambda w, x: x.mean(0).abs()),
                "positive and negative inputs cancelled in the mean: a channel can be large with a mean of zero",
                "abs() before mean()",
            ),
            Mistake(
                "largest input instead of the mean",
                lambda *a: _awq(*a, size=lambda w, x: x.abs().amax(0)),
                "the factor comes from the largest input of a channel, so one outlier decides",
                "the mean of |x| over all samples",
            ),
            Mistake(
                "factors from the weights",
                lambda *a: _awq(*a, size=lambda w, x: w.abs().mean(0)),
                "the factors come from the weights, but it is the inputs that make an error count",
                "activation-aware: look at x",
            ),
            Mistake(
                "no answer for a silent channel",
                lambda *a: _awq(*a, least=0.0),
                "a channel whose inputs are all zero has a factor of 0, and 0 / 0 is NaN",
                "keep the mean away from zero",
            ),
        ),
        hints=(
            "one factor per input channel: x.abs().mean(0) has one number for each column of w",
            "w * factors multiplies column by column; the scale of a row, amax(1, keepdim=True), comes after that",
            "torch.round(larger / scale) * scale, and then divided by the factors",
        ),
    ),
    Exercise(
        id="gptq",
        title="GPTQ in ten lines",
        notebook="05",
        minutes=15,
        difficulty="hard",
        objective="let later weights make up for the rounding errors of earlier ones",
        solution=gptq_round,
        cases=_gptq_cases,
        mistakes=(
            Mistake(
                "changes its input",
                lambda *a: _gptq(*a, copy=False),
                "the values are right, but w itself was changed: the caller's weights are gone",
                "`-=` works in place, on a slice too",
            ),
            Mistake(
                "rounds to nearest",
                lambda *a: _gptq(*a, sign=0),
                "no later column was moved before it was rounded",
                "round the corrected column; and right of its diagonal a lower triangular factor holds nothing but zeros",
            ),
            Mistake(
                "the inverse instead of its factor",
                lambda *a: _gptq(*a, factor=torch.linalg.inv),
                "H⁻¹ itself was used: that is right for the first column, but then its error counts on columns that are fixed",
                "the Cholesky factor is what takes the finished columns out",
            ),
            Mistake(
                "factor of H, not of its inverse",
                lambda *a: _gptq(*a, factor=lambda h: torch.linalg.cholesky(h, upper=True)),
                "it is the inverse of H that has to be factored",
                "UᵀU = H⁻¹: try it with your U",
            ),
            Mistake(
                "wrong sign",
                lambda *a: _gptq(*a, sign=-1),
                "later columns were moved the wrong way, so errors add up instead of cancelling",
                "for inputs that go together, a weight that lost something has to be made up for by another that gains",
            ),
            Mistake(
                "not divided by the diagonal",
                lambda *a: _gptq(*a, divide=False),
                "the error was not divided by U[j, j], so the correction has the wrong size",
                "multiply H by a constant: the result may not change",
            ),
            Mistake(
                "corrects the next column only",
                lambda *a: _gptq(*a, reach=1),
                "only the next column was corrected; all later ones can help",
                "a slice that runs to the end",
            ),
            Mistake(
                "forgets to saturate",
                lambda *a: _gptq(*a, clip=False),
                "integers beyond -8 .. 7 came out, and four bits cannot hold them",
                "what a saturated weight cannot say is an error too, and later columns may make up for it",
            ),
        ),
        hints=(
            "torch.linalg.cholesky(..., upper=True) gives an upper triangular U with UᵀU = its argument",
            "work on a copy of w, in a loop over its columns: round, compute the error, correct what comes later",
            "w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :], with error = (w[:, j] - rounded) / u[j, j]",
        ),
    ),
)
