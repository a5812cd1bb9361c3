"""Wrong answers to the exercises of notebook 03."""

import math

import torch


class Backward(torch.autograd.Function):
    """A value, and for its input whatever gradient `backward` makes of what comes back."""

    @staticmethod
    def forward(ctx, x, value, backward):
        ctx.answer = backward
        return value.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.answer(gradient), None, None


def shrinks(x, scale):
    integers = x / scale
    integers = x + (integers.round() - x).detach()
    return scale * integers


def with_mask(x, scale, zero_point, qmin, qmax, mask):
    q = (x / scale).round() + zero_point
    value = scale * (torch.clip(q, qmin, qmax) - zero_point)
    return Backward.apply(x, value, lambda g: torch.where(mask(q), g, 0.0))


def saturate_last(x, scale, zero_point, qmin, qmax):
    q = (x / scale).round().clamp(qmin - zero_point, qmax - zero_point)
    return q * scale


def mask_before_rounding(x, scale, zero_point, qmin, qmax):
    clipped = (x / scale + zero_point).clamp(qmin, qmax)
    return (clipped + (clipped.round() - clipped).detach() - zero_point) * scale


def gone_when_clipped(x, scale, zero_point, qmin, qmax):
    q = (x / scale).round() + zero_point
    fake = x + ((q - zero_point) * scale - x).detach()
    return fake.masked_fill((q < qmin) | (q > qmax), 0.0)


def mask_as_gradient(x, scale, zero_point, qmin, qmax):
    q = (x / scale).round() + zero_point
    value = (q.clamp(qmin, qmax) - zero_point) * scale
    return Backward.apply(x, value, lambda g: ((q <= qmax) * (q >= qmin)).float())


def by_channel(batch):
    return batch.movedim(1, 0).reshape(batch.shape[1], -1)


def averages(batches, mean=lambda rows: rows.mean(1), var=lambda rows: rows.var(1)):
    found = [(mean(by_channel(batch)), var(by_channel(batch))) for batch in batches]
    return tuple(sum(each) / len(found) for each in zip(*found, strict=True))


def as_torch_starts(batches):
    running_mean, running_var = 0.0, 1.0
    for batch in batches:
        running_mean = 0.9 * running_mean + 0.1 * by_channel(batch).mean(1)
        running_var = 0.9 * running_var + 0.1 * by_channel(batch).var(1)
    return running_mean, running_var


def sizes_count(batches):
    total = sum(batch.numel() for batch in batches)
    mean = sum(by_channel(batch).mean(1) * (batch.numel() / total) for batch in batches)
    return mean, sum(by_channel(batch).var(1) * (batch.numel() / total) for batch in batches)


def overwrites(batches):
    for batch in batches:
        mean, var = by_channel(batch).mean(1), by_channel(batch).var(1)
    return mean, var


def pooled_images(batches):
    small = [batch.reshape(*batch.shape[:2], -1).mean(-1) for batch in batches]
    return torch.stack([b.mean(0) for b in small]).mean(0), torch.stack([b.var(0) for b in small]).mean(0)


def around(mean, variance, z):
    half = z * math.sqrt(variance)
    return float(mean), float(mean) - half, float(mean) + half


def wins(control, qat, labels):
    return (qat == labels).double().sub((control == labels).double())


def backwards(control, qat, labels, z):
    d = wins(qat, control, labels)
    return around(d.mean(), d.mean(0).var() / d.shape[1] + d.mean(1).var() / d.shape[0], z)


def two_arms(control, qat, labels, z):
    variance, (seeds, images) = 0.0, qat.shape
    for arm in (control, qat):
        right = (arm == labels).double()
        variance += right.mean(dim=0).var() / images + right.mean(dim=1).var() / seeds
    return around(wins(control, qat, labels).mean(), variance, z)


def other_variance(variance):
    def answer(control, qat, labels, z):
        d = wins(control, qat, labels)
        return around(d.mean(), variance(d), z)

    return answer


def by_hand(x, scale, qmin, qmax, factor, slope=None, for_x=lambda g: g):
    """Return the value, with the gradient of the scale that a `slope` makes (by default LSQ's)."""
    with torch.no_grad():
        ratio = x / scale
        inside = (ratio > qmin) & (ratio < qmax)
        q = ratio.clip(qmin, qmax).round()
        value = q * scale
        slope = q - ratio * inside if slope is None else slope(q, ratio, inside)
    nothing = Backward.apply(x, value * 0, lambda g: for_x(g * inside))
    return nothing + Backward.apply(scale, value, lambda g: factor * (g * slope).sum())


def lsq(x, qmax):
    return 1 / math.sqrt(x.numel() * qmax)


def rounds_plainly(x, s, qmin, qmax):
    return by_hand(x, s, qmin, qmax, lsq(x, qmax), slope=lambda q, ratio, inside: q, for_x=torch.zeros_like)


WRONG = {
    "straight-through": {
        "cut off from its input": lambda x, s: torch.round(x.detach() / s) * s,
        "plain rounding": lambda x, s: (x / s).round().mul(s),
        "gradient with the wrong sign": lambda x, s: Backward.apply(x, (x / s).round() * s, torch.neg),
        "error added instead of taken away": lambda x, s: Backward.apply(x, 2 * x - (x / s).round() * s, lambda g: g),
        "gradient times the scale": shrinks,
        "stays an integer": lambda x, s: Backward.apply(x, (x / s).round(), lambda g: g / s),
        "truncates instead of rounding": lambda x, s: Backward.apply(x, (x / s).long().float() * s, lambda g: g),
    },
    "clip-gradient": {
        "plain rounding": saturate_last,
        "no mask": lambda x, s, z, low, high: with_mask(x, s, z, low, high, torch.isfinite),
        "mask of the unrounded number": mask_before_rounding,
        "ends left out": lambda x, s, z, low, high: with_mask(x, s, z, low, high, lambda q: (low < q) & (q < high)),
        "mask without the zero point": lambda x, s, z, low, high: with_mask(
            x, s, z, low, high, lambda q: (q - z >= low) & (q - z <= high)
        ),
        "zero instead of saturated": gone_when_clipped,
        "ignores what comes back": mask_as_gradient,
    },
    "batch-norm-statistics": {
        "last batch only": overwrites,
        "moving average from the start values": as_torch_starts,
        "all images in one batch": lambda batches: (
            torch.cat([by_channel(b) for b in batches], 1).mean(1),
            torch.cat([by_channel(b) for b in batches], 1).var(1),
        ),
        "large batches count more": sizes_count,
        "biased variance": lambda batches: averages(
            batches, var=lambda rows: (rows - rows.mean(1, keepdim=True)).square().mean(1)
        ),
        "standard deviation": lambda batches: (averages(batches)[0], averages(batches)[1] ** 0.5),
        "positions averaged first": pooled_images,
    },
    "qat-control": {
        "control minus QAT": backwards,
        "arms taken apart": two_arms,
        "every prediction independent": other_variance(lambda d: d.flatten().var() / d.numel()),
        "images only": other_variance(lambda d: d.mean(0).std() ** 2 / d.shape[1]),
        "seeds only": other_variance(lambda d: d.mean(1).std() ** 2 / d.shape[0]),
        "spread instead of uncertainty": other_variance(lambda d: d.mean(0).std() ** 2 + d.mean(1).std() ** 2),
        "biased variance": other_variance(
            lambda d: sum((m - m.mean()).square().mean() / len(m) for m in (d.mean(0), d.mean(1)))
        ),
    },
    "learned-step": {
        "plain rounding": rounds_plainly,
        "no gradient scale": lambda x, s, low, high: by_hand(x, s, low, high, 1),
        "gradient scale without qmax": lambda x, s, low, high: by_hand(x, s, low, high, 1 / math.sqrt(x.numel())),
        "gradient scale without the root": lambda x, s, low, high: by_hand(x, s, low, high, 1 / x.numel() / high),
        "gradient scale on x too": lambda x, s, low, high: by_hand(
            x, s, low, high, lsq(x, high), for_x=lambda g: g * lsq(x, high)
        ),
        "division taken as a constant": lambda x, s, low, high: by_hand(
            x, s, low, high, lsq(x, high), slope=lambda q, ratio, inside: q
        ),
        "nothing from clipped values": lambda x, s, low, high: by_hand(
            x, s, low, high, lsq(x, high), slope=lambda q, ratio, inside: inside * (q - ratio)
        ),
    },
}
ELSE = {
    "straight-through": {
        "it returned nothing": lambda x, s: None,
        "RuntimeError": lambda x, s: x.div_(s).round_().mul_(s),
        "argument 1 was changed in place": lambda x, s: (x + ((x / s).round() * s - x).detach(), x.data.zero_())[0],
    },
    "clip-gradient": {"its shape is": lambda x, s, z, low, high: with_mask(x, s, z, low, high, torch.isnan).sum()},
    "batch-norm-statistics": {"2 values were asked for": lambda batches: averages(batches)[0]},
    "qat-control": {"it is nan": lambda *a: (math.nan,) * 3},
    "learned-step": {"under 'scale.grad'": lambda x, s, low, high: by_hand(x, s, low, high, -lsq(x, high))},
}
