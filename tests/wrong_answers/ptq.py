"""Wrong answers to the exercises of notebook 02."""

import math
from fractions import Fraction

import torch


def file_size(
    layers, per_weight=1, per_channel=lambda has_bias: 12 if has_bias else 8, channels=lambda shape: shape[0]
):
    size = 0
    for shape, has_bias in layers:
        n = 1
        for length in shape:
            n *= length
        size += n * per_weight + channels(shape) * per_channel(has_bias)
    return size


def one_scale_a_layer(layers):
    return sum(torch.empty(s, device="meta").numel() + 8 + (4 * s[0] if b else 0) for s, b in layers)


def counted(first, second, labels):
    pairs = list(zip((first == labels).tolist(), (second == labels).tolist(), strict=True))
    return pairs.count((False, True)), pairs.count((True, False))


def tail(n, k):
    """The chance of at most k heads in n tosses."""
    return float(sum((Fraction(math.comb(n, i), 2**n) for i in range(k + 1)), Fraction(0)))


def verdict(first, second, labels, p):
    fixed, broke = counted(first, second, labels)
    return (first - second).count_nonzero().item(), fixed, broke, p(fixed, broke)


def exact_p(fixed, broke):
    return min(1.0, 2 * tail(fixed + broke, min(fixed, broke)))


def fixed_or_broke(first, second, labels):
    fixed, broke = counted(first, second, labels)
    return fixed + broke, fixed, broke, exact_p(fixed, broke)


def chi_square(fixed, broke):
    if fixed == broke == 0:
        return 1.0
    z = (fixed - broke) / (fixed + broke) ** 0.5
    return 2 * float(torch.special.ndtr(torch.tensor(-abs(z), dtype=torch.float64)))


def all_flips(first, second, labels):
    flips = (first != second).sum().item()
    return verdict(first, second, labels, lambda fixed, broke: min(1.0, 2 * tail(flips, min(fixed, broke))))


def swapped(first, second, labels):
    flips, fixed, broke, p = verdict(first, second, labels, exact_p)
    return flips, broke, fixed, p


def folded(w, b, gamma, beta, mean, std):
    """Fold with any standard deviation (out,), filter by filter."""
    b = torch.zeros(len(w)) if b is None else b
    filters = [f * g / s for f, g, s in zip(w, gamma, std, strict=True)]
    return torch.stack(filters), gamma * (b - mean) / std + beta


def fold_into_the_weight(w, b, gamma, beta, mean, var, eps=1e-5):
    std = (var + eps) ** 0.5
    b = torch.zeros_like(beta) if b is None else b
    w *= (gamma / std)[:, None, None, None]
    return w, (b - mean) * gamma / std + beta


def bias_past_the_norm(w, b, gamma, beta, mean, var, eps=1e-5):
    w, shift = folded(w, None, gamma, beta, mean, (var + eps) ** 0.5)
    return w, shift if b is None else shift + b


def uncentred(w, b, gamma, beta, mean, var, eps=1e-5):
    return folded(w, b, gamma, beta, torch.zeros_like(mean), (var + eps) ** 0.5)


def into_the_inputs(w, b, gamma, beta, mean, var, eps=1e-5):
    factor = gamma * (var + eps).rsqrt()
    b = (0 if b is None else b) - mean
    return w * factor[None, :, None, None], b * factor + beta


def means(x, w):
    """The mean output of a layer without bias, (out,), sample by sample."""
    outputs = torch.cat([sample.reshape(-1, sample.shape[-1]) @ w.T for sample in x])
    return outputs.sum(0) / len(outputs)


def shift_back(w, wq, b, x, xq):
    off = means(x, w) - means(xq, wq)
    return off if b is None else off + b


def in_place_bias(w, wq, b, x, xq):
    if b is None:
        return shift_back(w, wq, b, x, xq)
    b -= means(xq, wq)
    b += means(x, w)
    return b


def shift_further(w, wq, b, x, xq):
    off = means(xq, wq) - means(x, w)
    return off if b is None else off + b


def one_for_all(w, wq, b, x, xq):
    off = (means(x, w) - means(xq, wq)).mean()
    return torch.ones(len(w)) * off + (0 if b is None else b)


def token_by_token(w, wq, b, x, xq):
    off = torch.nn.functional.linear(x, w).mean(dim=0) - torch.nn.functional.linear(xq, wq).mean(dim=0)
    return off if b is None else b + off


def scaled(w1, b1, w2, s):
    return torch.diag(1 / s) @ w1, b1 / s, w2 @ torch.diag(s)


def widths(w1, w2):
    """The largest magnitudes of each hidden channel, and where neither is zero."""
    r1 = torch.stack([row.abs().max() for row in w1])
    r2 = torch.stack([column.abs().max() for column in w2.T])
    return r1, r2, (r1 != 0) & (r2 != 0)


def even(w1, w2):
    r1, r2, alive = widths(w1, w2)
    s = torch.ones(len(w1))
    s[alive] = r1[alive].sqrt() / r2[alive].sqrt()
    return s


def equalized_in_place(w1, b1, w2):
    s = even(w1, w2)
    w1 /= s.unsqueeze(1)
    b1 /= s
    w2 *= s
    return w1, b1, w2


def nan_for_zeros(w1, b1, w2):
    r1, r2, _ = widths(w1, w2)
    s = (r1 / r2).sqrt()
    return w1 / s.unsqueeze(1), b1 / s, w2 * s


def no_root(w1, b1, w2):
    r1, r2, alive = widths(w1, w2)
    return scaled(w1, b1, w2, torch.where(alive, r1, 1.0) / torch.where(alive, r2, 1.0))


def largest_value(w1, b1, w2):
    r1, r2 = w1.max(dim=1).values, w2.max(dim=0).values
    s = torch.sqrt(r1 / r2)
    s[(r1 == 0) | (r2 == 0)] = 1.0
    return w1 / s.unsqueeze(1), b1 / s, w2 * s


def by_the_outputs(w1, b1, w2):
    s = (w1.abs().amax(1) / w2.abs().amax(1)).sqrt()
    s = torch.where((w1 == 0).all(1) | (w2 == 0).all(1), 1.0, s)
    return (w1.T / s).T, b1 / s, (w2.T * s).T


def summed(q, weight, zero_point, pair_up, correct=True):
    """Sum, number by number, what `pair_up` makes of the products of one output."""
    rows = [
        [
            sum(pair_up([a * b for a, b in zip(x, w, strict=True)])) - correct * zero_point * sum(w)
            for w in weight.tolist()
        ]
        for x in q.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(q), len(weight))


def int16(total):
    return max(-(2**15), min(2**15 - 1, total))


def neighbours(products, limit=int16):
    return [limit(sum(products[i : i + 2])) for i in range(0, len(products), 2)]


def across(products):
    half = (len(products) + 1) // 2
    return [int16(sum(products[i::half])) for i in range(half)]


def wrapped(total):
    return total % 2**16 - 2**16 * (total % 2**16 >= 2**15)


def signed_bytes(q, weight, zero_point):
    return summed(q.int() - zero_point, weight, 0, neighbours)


def fixed_point(acc, m0, shift, zero_point, qmin, qmax, rounding):
    """Requantize number by number, with fractions."""
    q = [rounding(Fraction(a * m0, 2**shift)) + zero_point for a in acc.flatten().tolist()]
    return torch.tensor([min(max(each, qmin), qmax) for each in q], dtype=torch.int32).reshape(acc.shape)


def overflowing(acc, m0, shift, zero_point, qmin=0, qmax=255):
    product = acc * m0
    return (torch.round(product.double() / 2**shift) + zero_point).clamp(qmin, qmax).int()


def doubles(acc, m0, shift, zero_point, qmin=0, qmax=255):
    return (torch.round(acc.double() * (m0 / 2**shift)) + zero_point).clamp(qmin, qmax).to(torch.int32)


def floats(acc, m0, shift, zero_point, qmin=0, qmax=255):
    return (torch.round(acc * (m0 / 2**shift)) + zero_point).clamp(qmin, qmax).to(torch.int32)


def away(x):
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def saturates_early(acc, m0, shift, zero_point, qmin=0, qmax=255):
    return fixed_point(acc, m0, shift, 0, qmin, qmax, round) + zero_point


WRONG = {
    "int8-file-size": {
        "input channels instead of output channels": lambda layers: file_size(layers, channels=lambda s: s[1]),
        "one scale a layer": one_scale_a_layer,
        "no zero points": lambda layers: file_size(layers, per_channel=lambda b: 8 if b else 4),
        "no biases": lambda layers: file_size(layers, per_channel=lambda b: 8),
        "a bias for every layer": lambda layers: file_size(layers, per_channel=lambda b: 12),
        "a bias in one byte": lambda layers: file_size(layers, per_channel=lambda b: 8 + b),
        "four bytes a weight": lambda layers: file_size(layers, per_weight=4),
    },
    "fixed-and-broke": {
        "p above 1": lambda a, b, y: verdict(a, b, y, lambda f, g: 2 * tail(f + g, min(f, g))),
        "flips between wrong classes not counted": fixed_or_broke,
        "one-sided": lambda a, b, y: verdict(a, b, y, lambda f, g: tail(f + g, min(f, g))),
        "tail without its end": lambda a, b, y: verdict(a, b, y, lambda f, g: min(1.0, 2 * tail(f + g, min(f, g) - 1))),
        "the approximation": lambda a, b, y: verdict(a, b, y, chi_square),
        "every flip is a toss": all_flips,
        "fixed and broke swapped": swapped,
    },
    "fold-batch-norm": {
        "changes its input": fold_into_the_weight,
        "forgets eps": lambda w, b, gamma, beta, mean, var, eps=1e-5: folded(w, b, gamma, beta, mean, var**0.5),
        "eps outside the root": lambda w, b, gamma, beta, mean, var, eps=1e-5: folded(
            w, b, gamma, beta, mean, var**0.5 + eps
        ),
        "divides by the variance": lambda w, b, gamma, beta, mean, var, eps=1e-5: folded(
            w, b, gamma, beta, mean, var + eps
        ),
        "the old bias not scaled": bias_past_the_norm,
        "the old bias dropped": lambda w, b, gamma, beta, mean, var, eps=1e-5: folded(
            w, None, gamma, beta, mean, (var + eps) ** 0.5
        ),
        "forgets the mean": uncentred,
        "scales the input channels": into_the_inputs,
    },
    "correct-the-bias": {
        "changes its input": in_place_bias,
        "wrong sign": shift_further,
        "the float inputs for both": lambda w, wq, b, x, xq: shift_back(w, wq, b, x, x),
        "the quantized inputs for both": lambda w, wq, b, x, xq: shift_back(w, wq, b, xq, xq),
        "one shift for all channels": one_for_all,
        "the mean over images only": token_by_token,
        "the old bias forgotten": lambda w, wq, b, x, xq: means(x, w) - means(xq, wq),
    },
    "equalize": {
        "changes its input": equalized_in_place,
        "no answer for a channel of zeros": nan_for_zeros,
        "forgets the bias": lambda w1, b1, w2: (
            scaled(w1, b1, w2, even(w1, w2))[0],
            b1,
            scaled(w1, b1, w2, even(w1, w2))[2],
        ),
        "leaves the second layer alone": lambda w1, b1, w2: (*scaled(w1, b1, w2, even(w1, w2))[:2], w2),
        "no root": no_root,
        "the wrong way round": lambda w1, b1, w2: scaled(w1, b1, w2, 1 / even(w1, w2)),
        "largest value, not largest magnitude": largest_value,
        "rows of the second layer": by_the_outputs,
    },
    "pair-sums": {
        "drops the odd one": lambda q, w, z: summed(
            q, w, z, lambda p: [int16(a + b) for a, b in zip(p[::2], p[1::2], strict=False)]
        ),
        "nothing saturates": lambda q, w, z: ((q.long() - z) @ w.long().T).int(),
        "wraps around": lambda q, w, z: summed(q, w, z, lambda p: neighbours(p, wrapped)),
        "saturates the whole sum": lambda q, w, z: summed(q, w, z, lambda p: [int16(sum(p))]),
        "halves instead of neighbours": lambda q, w, z: summed(q, w, z, across),
        "zero point taken off first": signed_bytes,
        "zero point forgotten": lambda q, w, z: summed(q, w, z, neighbours, correct=False),
    },
    "requantize": {
        "computes with a double": doubles,
        "computes with a float32": floats,
        "the product overflows": overflowing,
        "rounds down": lambda acc, m0, n, z, low=0, high=255: fixed_point(acc, m0, n, z, low, high, math.floor),
        "half up": lambda acc, m0, n, z, low=0, high=255: fixed_point(
            acc, m0, n, z, low, high, lambda x: math.floor(x + Fraction(1, 2))
        ),
        "half away from zero": lambda acc, m0, n, z, low=0, high=255: fixed_point(acc, m0, n, z, low, high, away),
        "saturates before the zero point": saturates_early,
        "forgets to saturate": lambda acc, m0, n, z, low=0, high=255: fixed_point(
            acc, m0, n, z, -(2**31), 2**31 - 1, round
        ),
    },
}
ELSE = {
    "int8-file-size": {"a number was asked for": lambda layers: "large"},
    "fixed-and-broke": {
        "4 values were asked for": lambda first, second, labels: counted(first, second, labels),
        "ZeroDivisionError": lambda a, b, y: verdict(a, b, y, lambda f, g: exact_p(f, g) * len(a) / len(a)),
    },
    "fold-batch-norm": {
        "TypeError": lambda w, b, gamma, beta, mean, var, eps=1e-5: (w, (b - mean) * gamma / (var + eps).sqrt() + beta),
        "its shape is": lambda w, b, gamma, beta, mean, var, eps=1e-5: (w.flatten(1), beta),
    },
    "correct-the-bias": {"of 4 values differ": lambda w, wq, b, x, xq: b},
    "equalize": {
        "3 values were asked for": lambda w1, b1, w2: (w1, w2),
        "values differ": lambda w1, b1, w2: (w1, b1, w2),
    },
    "pair-sums": {"its dtype is torch.int64": lambda q, w, z: summed(q, w, z, neighbours).long()},
    "requantize": {
        "its dtype is torch.uint8": lambda acc, m0, n, z, low=0, high=255: fixed_point(
            acc, m0, n, z, low, high, round
        ).to(torch.uint8),
        "halfway between two integers": lambda acc, m0, n, z, low=0, high=255: fixed_point(
            acc, m0, n, z, low, high, lambda x: math.ceil(x - Fraction(1, 2))
        ),
    },
}
