"""The affine map between real numbers and integers: real ≈ scale · (q − zero_point).

Jacob et al. 2018 (arXiv 1712.05877, section 2.1) and Krishnamoorthi 2018 (1806.08342); rounding and saturation follow ONNX
QuantizeLinear: round half to even, then saturate. Zero is always exactly representable.
"""

from dataclasses import dataclass

import torch


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


def choose_qparams(x, *, bits=8, symmetric=False, axis=None, group_size=None, signed=None):
    """Return the `QParams` whose range just covers `x` (min-max).

    x: float tensor. bits: 2 to 8. symmetric: zero_point 0 and scale = max|x| / qmax; otherwise the range min(x)..max(x),
    stretched to contain 0. axis: one map per index of that dimension. group_size: one map per group within each row
    (see `QParams`; the last group of a row may be shorter). signed: integers −2^(bits−1)..2^(bits−1)−1 instead of
    0..2^bits−1; by default the symmetric maps are signed and the others are not.

    Raises `ValueError` for an empty tensor, integers, NaN or infinite values, or parameters out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be between 2 and 8, got {bits}")
    if not x.is_floating_point():
        raise ValueError(f"expected a float tensor, got {x.dtype}: convert it with x.float()")
    if x.numel() == 0:
        raise ValueError(f"cannot choose a range for an empty tensor of shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("the tensor holds NaN or infinite values, which have no place in a finite range")
    signed = symmetric if signed is None else signed
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    low, high = (extreme.double().clamp(**zero) for extreme, zero in _extremes(x, axis, group_size))
    if symmetric:
        scale = (torch.maximum(-low, high) if signed else high) / qmax
    else:
        scale = (high - low) / (qmax - qmin)
    # A tensor of zeros, or one so small that float32 has no scale for it, gets a scale that maps it to zero_point.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale).float()
    if symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = (qmin - low / scale).round().clamp(qmin, qmax).int()
    return QParams(scale, zero_point, qmin, qmax, axis, group_size)


def quantize(x, qparams):
    """Return the integers of `x`: round(x / scale) + zero_point, half to even, saturated at qmin..qmax.

    Same shape as `x`; int8 or uint8 for up to 8 bits. NaN has no integer: raises `ValueError`.
    """
    if torch.isnan(x).any():
        raise ValueError("the tensor holds NaN, which no integer can stand for")
    scale, zero_point = (_spread(p, x, qparams) for p in (qparams.scale, qparams.zero_point))
    return (torch.round(x.float() / scale) + zero_point).clamp(qparams.qmin, qparams.qmax).to(qparams.dtype)


def dequantize(q, qparams):
    """Return the real numbers that the integers `q` stand for: float32, same shape."""
    scale, zero_point = (_spread(p, q, qparams) for p in (qparams.scale, qparams.zero_point))
    return (q.int() - zero_point) * scale


def fake_quantize(x, qparams):
    """Return `x` rounded to the nearest representable values: `dequantize(quantize(x))`, float32."""
    return dequantize(quantize(x, qparams), qparams)


def sqnr(reference, approximation):
    """Return the signal-to-quantization-noise ratio in dB: 10·log10(Σ reference² / Σ (reference − approximation)²)."""
    signal = reference.double().square().sum()
    noise = (reference.double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise))


def _extremes(x, axis, group_size):
    """Return ((minima, clamp to <= 0), (maxima, clamp to >= 0)), each minimum shaped like the scale."""
    if group_size is not None:
        if axis not in (None, 0):
            raise ValueError(f"groups run within the rows of dimension 0, got axis={axis}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        rows = x.reshape(len(x), -1)
        groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size)).unflatten(1, (-1, group_size))
        low, high = groups.amin(2), groups.amax(2)  # the padding is 0, which every range contains anyway
    elif axis is not None:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis {axis} is out of range for a tensor of {x.ndim} dimensions")
        channels = x.movedim(axis, 0).reshape(x.shape[axis], -1)
        low, high = channels.amin(1), channels.amax(1)
    else:
        low, high = x.amin(), x.amax()
    return (low, {"max": 0}), (high, {"min": 0})


def _spread(parameter, x, qparams):
    """Return a scale or zero point in a shape that broadcasts against `x`."""
    if qparams.group_size is not None:
        row_length = x[0].numel()
        return parameter.repeat_interleave(qparams.group_size, 1)[:, :row_length].reshape(x.shape)
    if qparams.axis is not None:
        shape = [1] * x.ndim
        shape[qparams.axis] = -1
        return parameter.reshape(shape)
    return parameter
