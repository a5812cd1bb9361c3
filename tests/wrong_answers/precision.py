"""Wrong answers to the exercises of notebook 01."""

import math

import torch


def no_sign(code, exponent_bits, mantissa_bits):
    e = (code >> mantissa_bits) % 2**exponent_bits
    m = code % 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    if e == 0:
        return m / 2**mantissa_bits * 2 ** (1 - bias)
    return (1 + m / 2**mantissa_bits) * 2.0 ** (e - bias)


def no_subnormals(code, exponent_bits, mantissa_bits):
    bits = f"{code:0{1 + exponent_bits + mantissa_bits}b}"
    e, m = int(bits[1 : 1 + exponent_bits], 2), int(bits[1 + exponent_bits :], 2)
    value = math.ldexp(1 + m / 2**mantissa_bits, e - 2 ** (exponent_bits - 1) + 1)
    return -value if bits[0] == "1" else value


def early_subnormals(code, exponent_bits, mantissa_bits):
    sign = (-1) ** (code >> (exponent_bits + mantissa_bits))
    e = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    m = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * ((e > 0) + m) * 2.0 ** (e - (2 ** (exponent_bits - 1) - 1))


def big_bias(code, exponent_bits, mantissa_bits):
    sign = (-1) ** (code >> (exponent_bits + mantissa_bits))
    e = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    m = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * ((e > 0) + m) * 2.0 ** (max(e, 1) - 2 ** (exponent_bits - 1))


def no_hidden_one(code, exponent_bits, mantissa_bits):
    sign = (-1) ** (code >> (exponent_bits + mantissa_bits))
    e = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    m = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * m * 2.0 ** (max(e, 1) - 2 ** (exponent_bits - 1) + 1)


def float_zero_point(low, high, bits=8):
    low, high = (low if low < 0 else 0.0), (high if high > 0 else 0.0)
    if high - low == 0:
        return 1.0, 0
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale


def cut_zero_point(low, high, bits=8):
    scale, zero_point = float_zero_point(low, high, bits)
    return scale, math.floor(zero_point)


def fence_posts(low, high, bits=8):
    low, high = min(0.0, low), max(0.0, high)
    scale = (high - low) / 2**bits or 1.0
    return scale, round(-low / scale)


def range_as_it_is(low, high, bits=8):
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, round(-low / scale)


def wrong_sign(low, high, bits=8):
    scale, zero_point = float_zero_point(low, high, bits)
    return scale, -round(zero_point)


def no_empty_range(low, high, bits=8):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def integers_and_back(x, scale, zero_point, bits, rounding=torch.round, low=0, high=None):
    q = rounding(x / scale) + zero_point
    q = torch.minimum(torch.maximum(q, torch.tensor(float(low))), torch.tensor(float(high or 2**bits - 1)))
    return scale * (q - zero_point)


def overflowing(x, scale, zero_point, bits=8):
    q = torch.remainder(torch.round(x / scale) + zero_point, 2**bits)
    return scale * (q - zero_point)


def in_place(x, scale, zero_point, bits=8):
    x /= scale
    x.round_()
    x += zero_point
    x.clamp_(0, 2**bits - 1)
    x -= zero_point
    x *= scale
    return x


def one_scale(w, bits=8):
    n = 2 ** (bits - 1) - 1
    scale = float(w.abs().max()) / n
    return torch.round(w / scale).clamp(-n, n) * scale, torch.full((w.shape[0],), scale)


def by_rows(w, bits, scale):
    n = 2 ** (bits - 1) - 1
    scale = torch.where(scale > 0, scale, 1.0)
    back = torch.stack([torch.round(row / s).clamp(-n, n) * s for row, s in zip(w, scale, strict=True)])
    return back, scale


def input_channels(w, bits=8):
    back, scale = by_rows(
        w.transpose(0, 1), bits, torch.stack([c.abs().max() for c in w.unbind(1)]) / (2 ** (bits - 1) - 1)
    )
    return back.transpose(0, 1), scale


def largest_value(w, bits=8):
    n = 2 ** (bits - 1) - 1
    scale = torch.stack([c.max() for c in w]) / n
    scale = torch.where(scale == 0, 1.0, scale)
    back = torch.stack([torch.round(row / s).clamp(-n, n) * s for row, s in zip(w, scale, strict=True)])
    return back, scale


def one_too_many(w, bits=8):
    return by_rows(w, bits, torch.stack([c.abs().max() for c in w]) / 2 ** (bits - 1))


def nan_for_zeros(w, bits=8):
    n = 2 ** (bits - 1) - 1
    scale = torch.stack([c.abs().max() for c in w]) / n
    back = torch.stack([torch.round(row / s).clamp(-n, n) * s for row, s in zip(w, scale, strict=True)])
    return back, scale


def threshold(x, bits, candidates, error):
    n = 2 ** (bits - 1) - 1
    best, least = None, math.inf
    for t in candidates:
        s = t / n
        found = error(x.double(), s, n, t)
        if found < least:
            best, least = t, found
    return best


def rounded(x, s, n):
    return (x.float() / s).round().clamp(-n, n) * s


WRONG = {
    "decode-float": {
        "no sign": no_sign,
        "no subnormals": no_subnormals,
        "subnormal exponent one too small": early_subnormals,
        "bias off by one": big_bias,
        "no hidden one": no_hidden_one,
    },
    "round-half-even": {
        "half up": lambda x: (x + 0.5).floor(),
        "half away from zero": lambda x: torch.where(x >= 0, (x + 0.5).floor(), (x - 0.5).ceil()),
        "half down": lambda x: -((-x + 0.5).floor()),
        "truncates": lambda x: x.to(torch.int64).to(x.dtype),
        "floor": lambda x: x // 1,
        "changes its input": lambda x: x.add_(0.5).floor_(),
    },
    "zero-point": {
        "zero point not an integer": float_zero_point,
        "zero point truncated": cut_zero_point,
        "off by one in the number of steps": fence_posts,
        "range not widened to zero": range_as_it_is,
        "wrong sign": wrong_sign,
        "divides by zero on an empty range": no_empty_range,
    },
    "fake-quantize": {
        "truncates instead of rounding": lambda x, s, z, bits=8: integers_and_back(x, s, z, bits, torch.fix),
        "floors instead of rounding": lambda x, s, z, bits=8: integers_and_back(x, s, z, bits, torch.floor),
        "forgets to saturate": lambda x, s, z, bits=8: (x / s).round() * s,
        "wraps around": overflowing,
        "range off by one": lambda x, s, z, bits=8: integers_and_back(x, s, z, bits, high=2**bits),
        "saturates to a signed range": lambda x, s, z, bits=8: integers_and_back(
            x, s, z, bits, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1
        ),
        "forgets the zero point on the way back": lambda x, s, z, bits=8: (
            s * ((x / s).round() + z).clamp(max=2**bits - 1, min=0)
        ),
        "changes its input": in_place,
    },
    "per-channel": {
        "one scale for all": one_scale,
        "scale from the wrong axis": input_channels,
        "largest value, not largest magnitude": largest_value,
        "off by one in the largest integer": one_too_many,
        "no answer for a channel of zeros": nan_for_zeros,
    },
    "clip-or-round": {
        "takes the largest value": lambda x, bits, c: (
            [t for t in c if t <= max(float(x.abs().max()), c[0])][-1]
            if float(x.abs().max()) in c
            else sorted(c, key=lambda t: (abs(float(x.abs().max()) - t), t))[0]
        ),
        "counts rounding only": lambda x, bits, c: threshold(
            x, bits, c, lambda x, s, n, t: float((rounded(x, s, n) - x)[x.abs() <= t].square().sum())
        ),
        "counts clipping only": lambda x, bits, c: threshold(
            x, bits, c, lambda x, s, n, t: float((rounded(x, s, n) - x)[x.abs() > t].square().sum())
        ),
        "forgets to clip": lambda x, bits, c: threshold(
            x, bits, c, lambda x, s, n, t: float(((x.float() / s).round() * s - x).square().sum())
        ),
        "absolute error": lambda x, bits, c: threshold(
            x, bits, c, lambda x, s, n, t: float((rounded(x, s, n) - x).abs().sum())
        ),
        "off by one in the largest integer": lambda x, bits, c: threshold(
            x, bits, c, lambda x, s, n, t: float((rounded(x, t / (n + 1), n + 1) - x).square().sum())
        ),
    },
}
ELSE = {
    "decode-float": {"a number was asked for": lambda *a: "1.0"},
    "round-half-even": {"it returned nothing": lambda x: None},
    "zero-point": {"2 values were asked for": lambda *a: 0.5},
    "fake-quantize": {
        "its dtype is torch.float64": lambda x, s, z, bits=8: integers_and_back(x, s, z, bits).double(),
        "its shape is": lambda x, s, z, bits=8: integers_and_back(x, s, z, bits).flatten()[:1],
    },
    "per-channel": {"IndexError": lambda w, bits=8: (w, w.abs().amax((1, 2, 3)))},
    "clip-or-round": {"TypeError": lambda x, bits: x},
}
