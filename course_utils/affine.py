"""The affine map between real numbers and integers: real ≈ scale · (q − zero_point).

Jacob et al. 2018 (arXiv 1712.05877, section 2.1) and Krishnamoorthi 2018 (1806.08342); rounding and saturation follow ONNX
QuantizeLinear: round half to even, then saturate. Zero is always exactly representable.
"""

from dataclasses import dataclass

import torch

BLOCK = 2**17  # numbers of a block that `clip="mse"` works on at a time
CLIPS = ("minmax", "mse")


@dataclass(frozen=True)
class QParams:
    """The parameters of one affine map.

    scale (float32) and zero_point (int32) have the shape `()` for one map per tensor, `(channels,)` with `axis` set for one
    per channel, or `(rows, groups)` with `group_size` set for one per run of `group_size` weights within a row, where the
    rows are the first dimension and all others are flattened. Integers lie in `qmin..qmax`.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    group_size: int | None = None

    @property
    def dtype(self):
        """The smallest torch integer type that holds `qmin..qmax`."""
        for dtype in (torch.int8, torch.uint8, torch.int16):
            if torch.iinfo(dtype).min <= self.qmin and self.qmax <= torch.iinfo(dtype).max:
                return dtype
        return torch.int32


def choose_qparams(x, *, bits=8, symmetric=False, axis=None, group_size=None, signed=None, ragged=False, clip="minmax"):
    """Return the `QParams` whose range just covers `x` (min-max), or the one of least squared error.

    x: float tensor; what comes out has no gradient. bits: 2 to 8. symmetric: zero_point 0 and scale = max|x| / qmax; otherwise
    the range min(x)..max(x), stretched to contain 0. axis: one map per index of that dimension. group_size: one map per group
    within each row (see `QParams`); it must divide the row, or with `ragged` the last group of a row is shorter. signed: integers
    −2^(bits−1)..2^(bits−1)−1 instead of 0..2^bits−1; by default the symmetric maps are signed and the others are not. Symmetric
    and unsigned is for what is never negative, as behind a ReLU: scale = max(x) / qmax, and whatever is below 0 becomes 0.
    clip: `"minmax"`, or `"mse"` for the fraction of that range, the same on both sides, with the least
    Σ (x − fake_quantize(x))²: a few large values are clipped and all the others get a finer step. One fraction per scale,
    the best of 23 between 1 and 0.07; never worse than min-max. Observers choose for activations, this is for weights.

    Raises `ValueError` for an empty tensor, integers, NaN or infinite values, or parameters out of range.
    """
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    scheme = {"bits": bits, "symmetric": symmetric, "signed": signed}
    x = x.detach()
    low, high = extremes(x, axis=axis, group_size=group_size, ragged=ragged)
    if clip == "mse":
        values = _per_scale(x, axis, group_size, ragged).float()
        fractions = _least_error(values.reshape(low.numel(), -1), low.flatten(), high.flatten(), scheme)
        low, high = low * fractions.reshape(low.shape), high * fractions.reshape(high.shape)
    return qparams_from_range(low, high, **scheme, axis=axis, group_size=group_size)


def qparams_from_range(low, high, *, bits=8, symmetric=False, signed=None, axis=None, group_size=None):
    """Return the `QParams` of the range low..high, stretched to contain 0.

    low, high: numbers, or float tensors shaped like the scale in `QParams`. The rest is as in `choose_qparams`.
    Raises `ValueError` when a range is not finite in float32 or upside down, or when parameters do not fit.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number between 2 and 8, got {bits}")
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
    dimensions = 2 if group_size is not None else 0 if axis is None else 1
    if low.shape != high.shape or low.ndim != dimensions:
        raise ValueError(
            f"axis={axis} and group_size={group_size} need low and high of {dimensions} dimensions, "
            f"got shapes {tuple(low.shape)} and {tuple(high.shape)}"
        )
    if not (torch.isfinite(low.float()) & torch.isfinite(high.float()) & (low <= high)).all():
        raise ValueError("a range needs finite float32 ends, the lower one first")
    signed = symmetric if signed is None else signed
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) if signed else high) / qmax
    else:
        scale = (high - low) / (qmax - qmin)
    # A range of nothing but zero, or one so small that float32 has no scale for it, gets a scale that maps it to zero_point.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale).float()
    if symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = (qmin - low / scale).round().clamp(qmin, qmax).int()
    return QParams(scale, zero_point, qmin, qmax, axis, group_size)


def extremes(x, *, axis=None, group_size=None, ragged=False):
    """Return `(low, high)`: the smallest and largest values of a float tensor, float64, shaped like the scale in `QParams`.

    ragged: the last group of a row may be shorter; it is filled up with zeros, which every range contains anyway.
    Raises `ValueError` for an empty tensor, integers, NaN or infinite values, an `axis` or a `group_size` that does not fit.
    """
    _check_float(x)
    if x.numel() == 0:
        raise ValueError(f"cannot choose a range for an empty tensor of shape {tuple(x.shape)}")
    if not torch.isfinite(x.float()).all():
        raise ValueError("the tensor holds NaN or infinite values, which have no place in a finite range")
    values = _per_scale(x, axis, group_size, ragged)
    return values.amin(-1).double(), values.amax(-1).double()


def quantize(x, qparams):
    """Return the integers of `x`: round(x / scale) + zero_point, half to even, saturated at qmin..qmax.

    Same shape as `x`; int8 or uint8 for up to 8 bits. Infinite values saturate. Raises `ValueError` for NaN, which has no
    integer, for a tensor that is not of floats, and for one whose shape does not fit `qparams`.
    """
    _check_float(x)
    if torch.isnan(x).any():
        raise ValueError("the tensor holds NaN, which no integer can stand for")
    scale, zero_point = (spread(p, x, qparams) for p in (qparams.scale, qparams.zero_point))
    return (torch.round(x.float() / scale) + zero_point).clamp(qparams.qmin, qparams.qmax).to(qparams.dtype)


def dequantize(q, qparams):
    """Return the real numbers that the integers `q` stand for: float32, same shape.

    Where scale · (q − zero_point) is beyond the largest float32, as it can be half a step outside a huge range, the result
    is that largest number. Raises `ValueError` when `q` is not of integers, or its shape does not fit `qparams`.
    """
    if q.is_floating_point() or q.is_complex():
        raise ValueError(f"expected integers, got {q.dtype}: quantize first")
    scale, zero_point = (spread(p, q, qparams) for p in (qparams.scale, qparams.zero_point))
    largest = torch.finfo(torch.float32).max
    return ((q.int() - zero_point) * scale).clamp(-largest, largest)


def fake_quantize(x, qparams):
    """Return `x` rounded to the nearest representable values: `dequantize(quantize(x))`, float32."""
    return dequantize(quantize(x, qparams), qparams)


def spread(parameter, x, qparams):
    """Return a scale or zero point of `qparams` in a shape that broadcasts against `x`.

    Raises `ValueError` when the shape of `x` does not fit.
    """
    axis, size = qparams.axis, qparams.group_size
    if size is not None:
        row_length = x.shape[1:].numel()
        _check_fit(x.ndim > 0 and parameter.shape == (len(x), -(-row_length // size)), parameter, x, qparams)
        return parameter.repeat_interleave(size, 1)[:, :row_length].reshape(x.shape)
    if axis is not None:
        _check_fit(axis in range(-x.ndim, x.ndim) and parameter.shape == (x.shape[axis],), parameter, x, qparams)
        shape = [1] * x.ndim
        shape[axis] = -1
        return parameter.reshape(shape)
    _check_fit(parameter.numel() == 1, parameter, x, qparams)
    return parameter.reshape(())


def sqnr(reference, approximation):
    """Return the signal-to-quantization-noise ratio in dB: 10·log10(Σ reference² / Σ (reference − approximation)²)."""
    signal = reference.double().square().sum()
    noise = (reference.double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise))


def _per_scale(x, axis, group_size, ragged):
    """Return `x` shaped as the scale in `QParams` with one more dimension: the values that share a scale."""
    if group_size is not None:
        if axis not in (None, 0):
            raise ValueError(f"groups run within the rows of dimension 0, got axis={axis}")
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be a whole number of at least 1, got {group_size}")
        if x.ndim == 0:
            raise ValueError("groups run within rows, and a tensor without dimensions has none")
        rows = x.reshape(len(x), -1)
        short = -rows.shape[1] % group_size
        if short and not ragged:
            divisors = [d for d in range(1, rows.shape[1] + 1) if rows.shape[1] % d == 0]
            raise ValueError(
                f"group_size {group_size} does not divide a row of {rows.shape[1]} numbers: "
                f"take one of {divisors}, or ragged=True for a shorter last group"
            )
        return torch.nn.functional.pad(rows, (0, short)).unflatten(1, (-1, group_size))
    if axis is not None:
        if axis not in range(-x.ndim, x.ndim):
            raise ValueError(f"axis {axis} is out of range for a tensor of {x.ndim} dimensions")
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return x.reshape(-1)


def _least_error(values, low, high, scheme):
    """Return, for each row of `values` `(scales, n)`, the fraction of low..high of least squared error: float64."""
    best = torch.ones_like(low)
    # Coarse steps down to 0.07, then finer ones around the best: the error has one wide valley with ripples in it.
    for steps in (range(17), (0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75)):
        fractions = (best * torch.tensor([[0.85**step] for step in steps], dtype=best.dtype)).clamp(max=1)
        # Of a small tensor many at once, or it is the calls that take the time; of a large one each alone fills the cache.
        parts = fractions.split(max(1, 8 * BLOCK // values.numel()))
        errors = torch.cat([_squared_error(values, low * part, high * part, scheme) for part in parts])
        best = fractions.gather(0, errors.argmin(0, keepdim=True))[0]
    return best


def _squared_error(values, low, high, scheme):
    """Return Σ (x − fake_quantize(x))² of each row of `values` `(scales, n)` for ranges low..high `(k, scales)`: float64."""
    p = qparams_from_range(low.flatten(), high.flatten(), **scheme, axis=0)
    scale, zero_point = (t.reshape(*low.shape, 1) for t in (p.scale, p.zero_point))
    # Blocks that stay in the processor's cache: the search goes through all values many times.
    rows, errors = max(1, BLOCK // (values.shape[1] * len(low))), []
    for x, step, shift in zip(values.split(rows), scale.split(rows, 1), zero_point.split(rows, 1), strict=True):
        u = x / step
        ends = (p.qmin, p.qmax) if scheme["symmetric"] else ((p.qmin - shift).float(), (p.qmax - shift).float())
        q = u.round().clamp_(*ends)
        errors.append((u.sub_(q)).square_().sum(2))  # in steps, whose square could be too small or large for float32
    return torch.cat(errors, 1).double() * scale[..., 0].double().square()


def _check_float(x):
    if not x.is_floating_point():
        raise ValueError(f"expected a float tensor, got {x.dtype}: convert it with x.float()")


def _check_fit(fits, parameter, x, qparams):
    if not fits:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} does not fit parameters of shape {tuple(parameter.shape)} with "
            f"axis={qparams.axis} and group_size={qparams.group_size}: give one parameter per tensor, per index of the axis, "
            "or per group of each row"
        )
