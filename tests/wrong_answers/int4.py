"""Wrong answers to the exercises of notebook 05."""

import math

import torch


def pair_up(codes, low_first=True):
    """Return the bytes of Python integers 0 .. 15, of which there is an even number."""
    pairs = zip(codes[::2], codes[1::2], strict=True)
    return torch.tensor([a + 16 * b if low_first else 16 * a + b for a, b in pairs], dtype=torch.uint8)


def filled(q):
    numbers = q.reshape(-1).tolist()
    return numbers + [0] * (len(numbers) % 2)


def still_signed(q):
    q = q.reshape(-1)
    if len(q) % 2:
        q = torch.cat([q, q.new_zeros(1)])
    return (q[::2] & 0x0F) | ((q[1::2] & 0x0F) * 16).to(torch.int8)


def spilling(q):
    numbers = filled(q)
    pairs = [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
    return torch.tensor([(a | b << 4) % 256 for a, b in pairs], dtype=torch.uint8)


def with_offset(q):
    numbers = [n + 8 for n in q.reshape(-1).tolist()]
    return pair_up(numbers + [0] * (len(numbers) % 2))


def two_halves(q):
    codes = [n % 16 for n in filled(q)]
    half = len(codes) // 2
    return pair_up([code for both in zip(codes[:half], codes[half:], strict=True) for code in both])


def even_only(q):
    codes = [n % 16 for n in q.reshape(-1).tolist()]
    return pair_up(codes[: len(codes) - len(codes) % 2])


def take_apart(packed, shape, meaning, order=("low", "high")):
    """Return the integers that `meaning` makes of codes 0 .. 15, taken byte by byte."""
    codes = []
    for byte in packed.tolist():
        parts = {"low": byte % 16, "high": byte // 16}
        codes += [meaning(parts[part]) for part in order]
    count = math.prod(shape)
    return torch.tensor(codes[:count], dtype=torch.int8).reshape(shape)


def signed(code):
    return code if code < 8 else code - 16


def low_then_high(packed, shape):
    codes = [byte % 16 for byte in packed.tolist()] + [byte // 16 for byte in packed.tolist()]
    return torch.tensor([signed(code) for code in codes][: math.prod(shape)], dtype=torch.int8).reshape(shape)


def all_of_them(packed, shape):
    codes = [signed(code) for byte in packed.tolist() for code in (byte % 16, byte // 16)]
    return torch.tensor(codes, dtype=torch.int8).view(*shape)


def summed(shape, bits, weights, scales, zeros):
    """Return the size from three numbers of bytes."""
    n_bytes = weights + scales + zeros
    return n_bytes, n_bytes * 8 / math.prod(shape)


def counts(shape, bits, group_size):
    """Return bytes of the weights, number of groups."""
    return math.ceil(math.prod(shape) * bits / 8), shape[0] * math.ceil(math.prod(shape[1:]) / group_size)


def bare(shape, bits, group_size, zero_points):
    return summed(shape, bits, counts(shape, bits, group_size)[0], 0, 0)


def wide_scales(shape, bits, group_size, zero_points):
    weights, groups = counts(shape, bits, group_size)
    return summed(shape, bits, weights, groups * 32 // 8, math.ceil(groups * bits / 8) if zero_points else 0)


def always_symmetric(shape, bits, group_size, zero_points):
    weights, groups = counts(shape, bits, group_size)
    return summed(shape, bits, weights, groups * 2, 0)


def whole_zero_points(shape, bits, group_size, zero_points):
    weights, groups = counts(shape, bits, group_size)
    return summed(shape, bits, weights, groups * 2, groups * int(zero_points))


def one_long_row(shape, bits, group_size, zero_points):
    weights, _ = counts(shape, bits, group_size)
    groups = math.ceil(math.prod(shape) / group_size)
    return summed(shape, bits, weights, groups * 2, math.ceil(groups * bits / 8) if zero_points else 0)


def full_groups(shape, bits, group_size, zero_points):
    groups = shape[0] * (math.prod(shape[1:]) // group_size)
    zeros = math.ceil(groups * bits / 8) if zero_points else 0
    return summed(shape, bits, counts(shape, bits, group_size)[0], groups * 2, zeros)


def cut_bytes(shape, bits, group_size, zero_points):
    groups = counts(shape, bits, group_size)[1]
    zeros = int(groups * bits / 8) if zero_points else 0
    return summed(shape, bits, int(math.prod(shape) * bits / 8), groups * 2, zeros)


def padded_rows(shape, bits, group_size, zero_points):
    groups = counts(shape, bits, group_size)[1]
    weights = sum(math.ceil(math.prod(shape[1:]) * bits / 8) for _ in range(shape[0]))
    return summed(shape, bits, weights, groups * 2, math.ceil(groups * bits / 8) if zero_points else 0)


def row_by_row(w, bits, group_size, extent=lambda group, row: group.abs().max(), steps=0, stored=True, to_int="round"):
    """Return (q, scale), one group after another."""
    most = 2 ** (bits - 1) - 1
    q, scales = torch.zeros(w.shape, dtype=torch.int8), []
    for i, row in enumerate(w):
        scales.append([])
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            exact = extent(group, row) / (most + steps)
            scale = exact.to(torch.float16)
            if scale == 0:
                exact = scale = torch.tensor(1.0, dtype=torch.float16)
            ratio = group / (scale if stored else exact).float()
            integers = torch.round(ratio) if to_int == "round" else ratio
            q[i, start : start + group_size] = integers.clamp(-most - 1, most).to(torch.int8)
            scales[-1].append(scale)
    return q, torch.tensor(scales, dtype=torch.float16)


def no_leftovers(w, bits, group_size):
    most = 2 ** (bits - 1) - 1
    groups = w.unflatten(1, (w.shape[1] // group_size or 1, group_size))
    scale = (groups.abs().amax(-1) / most).half()
    scale[scale == 0] = 1
    return (groups / scale.float().unsqueeze(-1)).round().clamp(-most - 1, most).flatten(1).to(torch.int8), scale


def vertical(w, bits, group_size):
    q, scale = row_by_row(w.transpose(0, 1), bits, group_size)
    return q.transpose(0, 1), scale.transpose(0, 1)


def rows_to_grid(w, bits, scale=None):
    """Return the rows of w on their grids."""
    most, rows = 2 ** (bits - 1) - 1, []
    for i, row in enumerate(w):
        step = row.abs().max() / most if scale is None else scale[i]
        rows.append(torch.round(row / step) * step if step > 0 else row)
    return torch.stack(rows)


def channels(x, least=1e-8):
    return torch.stack([column.abs().mean().clamp(min=least) for column in x.unbind(1)])


def there_and_back(w, factors, bits):
    return rows_to_grid(w * factors[None, :], bits) / factors[None, :]


def left_scaled(w, x, strength, bits):
    return rows_to_grid(w * channels(x) ** strength, bits)


def old_scales(w, x, strength, bits):
    factors = channels(x) ** strength
    steps = [row.abs().max() / (2 ** (bits - 1) - 1) for row in w]
    return rows_to_grid(w * factors, bits, steps) / factors


def in_order(w, h, scale, spread, limit=(-8, 7)):
    """GPTQ with `spread(j, k)` in place of U[j, k] / U[j, j]; row by row."""
    done = []
    for row, step in zip(w.tolist(), scale.tolist(), strict=True):
        row = torch.tensor(row)
        for j in range(len(row)):
            new = torch.round(row[j] / step).clamp(*limit) * step
            error = row[j] - new
            row[j] = new
            for k in range(j + 1, len(row)):
                row[k] = row[k] - error * spread(j, k)
        done.append(row)
    return torch.stack(done)


def upper(h):
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h))).T


def in_the_callers_tensor(w, h, scale):
    u = upper(h)
    for j in range(w.shape[1]):
        before = w[:, j].clone()
        w[:, j] = (before / scale).round().clamp(-8, 7) * scale
        w[:, j + 1 :] -= torch.outer((before - w[:, j]) / u[j, j], u[j, j + 1 :])
    return w


def lower_triangle(w, h, scale):
    l = torch.linalg.cholesky(torch.linalg.inv(h))  # noqa: E741
    return in_order(w, h, scale, lambda j, k: l[j, k] / l[j, j])


def whole_inverse(w, h, scale):
    inverse = torch.linalg.inv(h)
    return in_order(w, h, scale, lambda j, k: inverse[j, k] / inverse[j, j])


def factor_of_h(w, h, scale):
    u = torch.linalg.cholesky(h).T
    return in_order(w, h, scale, lambda j, k: u[j, k] / u[j, j])


def piling_up(w, h, scale):
    u = upper(h)
    return in_order(w, h, scale, lambda j, k: -u[j, k] / u[j, j])


def undivided(w, h, scale):
    u = upper(h)
    return in_order(w, h, scale, lambda j, k: u[j, k])


def neighbour(w, h, scale):
    u = upper(h)
    return in_order(w, h, scale, lambda j, k: u[j, k] / u[j, j] if k == j + 1 else 0.0)


def unlimited(w, h, scale):
    u = upper(h)
    return in_order(w, h, scale, lambda j, k: u[j, k] / u[j, j], limit=(-math.inf, math.inf))


WRONG = {
    "pack-nibbles": {
        "signed bytes": still_signed,
        "sign bits spill over": spilling,
        "stores q + 8": with_offset,
        "high nibble first": lambda q: pair_up([n % 16 for n in filled(q)], low_first=False),
        "halves instead of neighbours": two_halves,
        "drops an odd one": even_only,
    },
    "unpack-nibbles": {
        "no sign extension": lambda p, shape: take_apart(p, shape, lambda code: code),
        "8 taken for positive": lambda p, shape: take_apart(p, shape, lambda code: code - 16 if code > 8 else code),
        "subtracts 8 from all": lambda p, shape: take_apart(p, shape, lambda code: code - 8),
        "sign and magnitude": lambda p, shape: take_apart(p, shape, lambda c: (-1) ** (c // 8) * (c % 8)),
        "high nibble first": lambda p, shape: take_apart(p, shape, signed, order=("high", "low")),
        "halves instead of neighbours": low_then_high,
        "keeps the padding": all_of_them,
    },
    "honest-size": {
        "no scales": bare,
        "scales in FP32": wide_scales,
        "no zero points": always_symmetric,
        "a byte for each zero point": whole_zero_points,
        "groups run over the ends of rows": one_long_row,
        "shorter groups not counted": full_groups,
        "rounds down to bytes": cut_bytes,
        "each row starts a new byte": padded_rows,
    },
    "groups": {
        "whole groups only": no_leftovers,
        "one scale per row": lambda w, b, g: row_by_row(w, b, g, extent=lambda group, row: row.abs().max()),
        "groups down the columns": vertical,
        "rounds with a scale that nobody stores": lambda w, b, g: row_by_row(w, b, g, stored=False),
        "largest value, not largest magnitude": lambda w, b, g: row_by_row(
            w, b, g, extent=lambda group, row: torch.nn.functional.pad(group, (0, g - len(group))).max()
        ),
        "off by one in the largest integer": lambda w, b, g: row_by_row(w, b, g, steps=1),
        "truncates instead of rounding": lambda w, b, g: row_by_row(w, b, g, to_int="cast"),
    },
    "awq-scaling": {
        "no scaling": lambda w, x, strength, bits: rows_to_grid(w, bits),
        "not scaled back": left_scaled,
        "the wrong way round": lambda w, x, strength, bits: there_and_back(w, 1 / channels(x) ** strength, bits),
        "scales from the weights before": old_scales,
        "mean without magnitude": lambda w, x, strength, bits: there_and_back(
            w, torch.tensor([max(abs(float(c.mean())), 1e-8) for c in x.T]) ** strength, bits
        ),
        "largest input instead of the mean": lambda w, x, strength, bits: there_and_back(
            w, torch.maximum(x.max(0).values, -x.min(0).values).clamp(min=1e-8) ** strength, bits
        ),
        "factors from the weights": lambda w, x, strength, bits: there_and_back(w, channels(w) ** strength, bits),
        "no answer for a silent channel": lambda w, x, strength, bits: there_and_back(
            w, channels(x, least=0.0) ** strength, bits
        ),
    },
    "gptq": {
        "changes its input": in_the_callers_tensor,
        "rounds to nearest": lower_triangle,
        "the inverse instead of its factor": whole_inverse,
        "factor of H, not of its inverse": factor_of_h,
        "wrong sign": piling_up,
        "not divided by the diagonal": undivided,
        "corrects the next column only": neighbour,
        "forgets to saturate": unlimited,
    },
}
ELSE = {
    "pack-nibbles": {
        "its dtype is torch.int64": lambda q: pair_up([n % 16 for n in filled(q)]).long(),
        "case 6 of 9": lambda q: pair_up([n % 16 for n in filled(q.T if q.dim() == 2 else q)]),
    },
    "unpack-nibbles": {"its shape is": lambda p, shape: take_apart(p, shape, signed).flatten()},
    "honest-size": {"2 values were asked for": lambda *a: 4.5},
    "groups": {"value 2 of 2: its dtype is": lambda w, b, g: (row_by_row(w, b, g)[0], row_by_row(w, b, g)[1].float())},
    "awq-scaling": {"RuntimeError": lambda w, x, strength, bits: w * x.abs().mean(1)},
    "gptq": {"it returned nothing": lambda w, h, scale: None},
}
