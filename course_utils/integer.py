"""Inference on integers alone: 8-bit tensors, int32 accumulators, and a fixed-point multiplier instead of a division.

Jacob et al. 2018 (arXiv 1712.05877, sections 2.2 to 2.4). With real = scale · (q − zero_point) for inputs, weights and
outputs, a layer's sum is an integer, Σ (q_in − zero_point) · q_weight + bias, in steps of scale_in · scale_weight. Only one
real number is left, M = scale_in · scale_weight / scale_out, and `quantize_multiplier` makes it two integers beforehand.
Everything rounds half to even, as the kernels do.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from . import affine

INT32 = torch.iinfo(torch.int32)
INT16 = torch.iinfo(torch.int16)


def quantize_multiplier(real):
    """Return `(m0, shift)`, int64 tensors shaped like `real`, with real ≈ m0 / 2**shift and 2**30 <= m0 < 2**31.

    real: positive float or tensor of them (one per channel), at most 2**29. The relative error is at most 2**−31,
    down to 2**−32; anything smaller takes every int32 to 0, and does so here.
    Raises `ValueError` for numbers that are not positive, not finite or too large.
    """
    real = torch.as_tensor(real, dtype=torch.float64)
    if not ((real > 0) & (real <= 2**29)).all():
        raise ValueError(f"a multiplier must be positive and at most 2**29, got {real.min():g} to {real.max():g}")
    mantissa, exponent = torch.frexp(real)  # real = mantissa · 2**exponent, 0.5 <= mantissa < 1
    m0, shift = (mantissa * 2**31).round().long(), 31 - exponent.long()
    overflow = m0 == 2**31  # a mantissa just below 1 rounds up to it
    m0, shift = torch.where(overflow, 2**30, m0), torch.where(overflow, shift - 1, shift)
    # int64 can be shifted by 62 at most: what is smaller still loses bits of m0 that could not matter.
    return torch.where(shift > 62, m0 >> (shift - 62).clamp(0, 62), m0), shift.clamp(max=62)


def requantize(acc, m0, shift, zero_point, qmin, qmax):
    """Return round(acc · m0 / 2**shift) + zero_point, saturated at qmin..qmax: a multiplication, a shift, an addition.

    acc: int32 accumulators; m0, shift: from `quantize_multiplier`, in a shape that broadcasts against `acc`. Returns int8 or
    uint8 (a wider type if the range asks for it) in the shape of `acc`. Rounds half to even.
    Raises `ValueError` for accumulators that are not integers.
    """
    _need_integers(acc=acc)
    product = acc.long() * m0  # fits: |acc| < 2**31 and m0 < 2**31
    return _saturate(_shift_right(product, shift) + zero_point, qmin, qmax)


def quantize_bias(bias, scale):
    """Return the int32 bias in steps of `scale` = scale_in · scale_weight, float of shape `()` or `(channels,)`.

    Raises `ValueError` when a bias is so large against its scale that int32 cannot hold it.
    """
    q = (bias.double() / torch.as_tensor(scale).double()).round()
    if not (q.abs() <= INT32.max // 2).all():
        raise ValueError(
            f"a bias of {q.abs().max():.3g} steps leaves no room in an int32 accumulator: this channel's weights are almost "
            "all zero, so choose a larger scale for them"
        )
    return q.int()


def conv2d(
    q,
    weight,
    bias,
    *,
    zero_point,
    m0,
    shift,
    out_zero_point,
    qmin=0,
    qmax=255,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
):
    """Return the integer 2-d convolution of `q` `(n, channels, height, width)` with `weight`, requantized.

    q: 8-bit integers whose zero is `zero_point`. weight: 8-bit integers `(out, channels / groups, kh, kw)` whose zero is 0.
    bias: int32 `(out,)` from `quantize_bias`, or None. m0, shift: of scale_in · scale_weight / scale_out, shape `()` or
    `(out,)`. Output integers: zero at `out_zero_point`, `qmin..qmax`; a ReLU is qmin = out_zero_point and costs nothing.
    Padding is real zeros, that is `zero_point`s. Raises `ValueError` for tensors that are not integers.
    """
    acc = conv2d_accumulate(
        q, weight, bias, zero_point, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    m0, shift = (torch.as_tensor(part).reshape(-1, 1, 1) for part in (m0, shift))
    return requantize(acc, m0, shift, out_zero_point, qmin, qmax)


def conv2d_accumulate(q, weight, bias=None, zero_point=0, *, stride=1, padding=0, dilation=1, groups=1):
    """Return the int32 accumulators of `conv2d`, before any requantization."""
    _need_integers(q=q, weight=weight, bias=bias)
    centred = q.int() - zero_point  # now the zeros that padding adds mean zero
    bias = None if bias is None else bias.int()
    dilated = _pair(dilation) != (1, 1)
    if not dilated and (groups > 1 or centred.shape[2:].numel() > 64):
        return F.conv2d(centred, weight.int(), bias, stride, padding, dilation, groups)
    # torch's integer convolution knows no dilation, and goes image by image, which is slow on small ones: here all patches
    # are one matrix, and the convolution of each group one product.
    patches, height, width = _patches(centred, weight.shape[2:], stride, padding, dilation)
    parts = zip(patches.flatten(0, 1).chunk(groups, 1), weight.int().flatten(1).chunk(groups), strict=True)
    acc = torch.cat([part @ kernels.T for part, kernels in parts], 1)
    acc = acc if bias is None else acc + bias
    return acc.unflatten(0, (len(q), height, width)).permute(0, 3, 1, 2)


def linear(q, weight, bias, *, zero_point, m0, shift, out_zero_point, qmin=0, qmax=255):
    """Return the integer linear layer: `q` `(n, in)` times `weight` `(out, in)`; arguments as in `conv2d`."""
    acc = linear_accumulate(q, weight, bias, zero_point)
    return requantize(acc, m0, shift, out_zero_point, qmin, qmax)


def linear_accumulate(q, weight, bias=None, zero_point=0):
    """Return the int32 accumulators of `linear`, before any requantization."""
    _need_integers(q=q, weight=weight, bias=bias)
    acc = (q.int() - zero_point) @ weight.int().T
    return acc if bias is None else acc + bias.int()


def add(a, b, *, zero_points, multipliers, out_zero_point, qmin=0, qmax=255):
    """Return the sum of two integer tensors with scales of their own, as a residual connection needs it.

    zero_points: those of `a` and `b`. multipliers: the two integers of `add_multipliers(scale_a, scale_b, scale_out)` and
    their common shift. Both products are added before the one rounding. Raises `ValueError` unless both are integers.
    """
    _need_integers(a=a, b=b)
    (zero_a, zero_b), (m_a, m_b, shift) = zero_points, multipliers
    total = (a.long() - zero_a) * m_a + (b.long() - zero_b) * m_b
    return _saturate(_shift_right(total, shift) + out_zero_point, qmin, qmax)


def add_multipliers(scale_a, scale_b, scale_out):
    """Return `(m_a, m_b, shift)`: scale_a / scale_out and scale_b / scale_out as integers over the same 2**shift."""
    reals = torch.stack([torch.as_tensor(s).double() / torch.as_tensor(scale_out).double() for s in (scale_a, scale_b)])
    _, shift = quantize_multiplier(reals.max())
    m_a, m_b = (reals * 2.0**shift).round().long()
    return m_a, m_b, shift


def max_pool2d(q, kernel_size, stride=None, padding=0):
    """Return the maximum of each window of `q` `(n, channels, height, width)`: order is all it needs, so scales stay."""
    _need_integers(q=q)
    stride = kernel_size if stride is None else stride
    (kh, kw), (sh, sw), (ph, pw) = (_pair(v) for v in (kernel_size, stride, padding))
    padded = F.pad(q, (pw, pw, ph, ph), value=torch.iinfo(q.dtype).min)
    rows = torch.stack([padded[:, :, i:][:, :, : padded.shape[2] - kh + 1 : sh] for i in range(kh)]).amax(0)
    return torch.stack([rows[..., j:][..., : padded.shape[3] - kw + 1 : sw] for j in range(kw)]).amax(0)


def global_avg_pool2d(q, *, zero_point, qmin=0, qmax=255):
    """Return the mean of each channel of `q` `(n, channels, height, width)` as `(n, channels, 1, 1)`, scale unchanged."""
    _need_integers(q=q)
    total = (q.int() - zero_point).sum((2, 3), keepdim=True, dtype=torch.int32)
    count = q.shape[2] * q.shape[3]
    shift = 30 + (count - 1).bit_length()
    m0 = ((1 << shift) + count // 2) // count  # 1 / count as `quantize_multiplier` has it, but known only now
    return requantize(total, m0, shift, zero_point, qmin, qmax)


# A whole model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operation of a quantized model, as `backends` describes it.

    op: `quantize`, `conv2d`, `linear`, `add`, `max_pool2d`, `global_avg_pool2d`, `clamp`, `flatten`, `same` or `dequantize`.
    inputs: names of earlier steps. output: the `QParams` of the result. options: what the operation needs besides.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    output: affine.QParams | None = None
    options: dict = field(default_factory=dict)


class IntegerModel:
    """A quantized model run step by step with the functions of this file; callable, images → logits.

    quantized_model: what `backends.quantize_static`, `convert_qat` or `load` return. Images are quantized once at the
    entrance and the logits turned into float32 at the exit; between the two there are integers only.

    pair_saturation: compute each sum as CPUs without VNNI do. Their instruction vpmaddubsw adds two neighbouring products
    into 16 bits, saturated, before the rest is summed in 32.

    Raises `ValueError` for a model of another kind, or one with an operation that has no integer counterpart here.
    """

    def __init__(self, quantized_model, *, pair_saturation=False):
        describe = getattr(quantized_model, "meta", {}).get("course_steps")
        if describe is None:
            raise ValueError(
                f"this {type(quantized_model).__name__} is not a statically quantized model: "
                "pass what backends.quantize_static, convert_qat or load returns"
            )
        self.pair_saturation = pair_saturation
        self.steps = describe(quantized_model)
        outputs, self._run = {}, {}
        for step in self.steps:
            inputs = [outputs[name] for name in step.inputs if name in outputs]
            self._run[step.name] = self._compile(step, *inputs)
            outputs[step.name] = step.output
        last_use = {name: step.name for step in self.steps for name in step.inputs}
        self._unneeded = {step.name: [n for n in step.inputs if last_use[n] == step.name] for step in self.steps}

    def __call__(self, images):
        """Return float32 logits `(n, classes)` of float images `(n, channels, height, width)`."""
        values = {"": images}
        for step in self.steps:
            values[step.name] = self.run(step, *(values[name] for name in step.inputs or ("",)))
            for name in self._unneeded[step.name]:
                del values[name]
        return values[self.steps[-1].name]

    def run(self, step, *inputs):
        """Return what one step makes of its integer inputs."""
        return self._run[step.name](*inputs)

    def _compile(self, step, *inputs):
        """Turn the real numbers of a step into integers, once, and return it as a function of integer tensors."""
        out, options = step.output, step.options
        if step.op == "quantize":
            return lambda images: affine.quantize(images, out)
        if step.op == "dequantize":
            return lambda q: affine.dequantize(q, inputs[0])
        if step.op == "same":
            return lambda q: q
        if step.op == "flatten":
            return lambda q: q.flatten(options["start_dim"])
        if step.op == "max_pool2d":
            return lambda q: max_pool2d(q, **options)
        if step.op == "global_avg_pool2d":
            zero_point = int(inputs[0].zero_point)
            return lambda q: global_avg_pool2d(q, zero_point=zero_point, qmin=out.qmin, qmax=out.qmax)
        if step.op == "clamp":
            low, high = (
                limit if real is None else int(affine.quantize(torch.tensor(float(real)), out))
                for real, limit in ((options["low"], out.qmin), (options["high"], out.qmax))
            )
            return lambda q: q.clamp(low, high)
        qmin = int(out.zero_point) if options.get("relu") else out.qmin  # a ReLU is a clamp at the integer that means 0
        ends = {"out_zero_point": int(out.zero_point), "qmin": qmin, "qmax": out.qmax}
        if step.op == "add":
            a, b = inputs
            ends["zero_points"] = int(a.zero_point), int(b.zero_point)
            ends["multipliers"] = add_multipliers(a.scale, b.scale, out.scale)
            return lambda p, q: add(p, q, **ends)
        if step.op in ("conv2d", "linear"):
            return self._compile_sum(step.op, inputs[0], out, ends, **options)
        raise ValueError(f"step {step.name}: {step.op} has no integer counterpart here")

    def _compile_sum(self, op, source, out, ends, *, weight, weight_scale, bias, relu=False, **geometry):
        scale = source.scale.double() * weight_scale.double()
        weight, weight_scale, scale = _room_for_bias(weight, weight_scale, bias, scale)
        bias = None if bias is None else quantize_bias(bias, scale)
        m0, shift = quantize_multiplier(scale / out.scale.double())
        zero_point = int(source.zero_point)
        if self.pair_saturation:
            lost = PairSaturation(weight, **geometry)
            shape = (-1, 1, 1) if op == "conv2d" else (-1,)
            sums = conv2d_accumulate if op == "conv2d" else linear_accumulate

            def saturating(q):
                acc = sums(q, weight, bias, zero_point, **geometry) - lost(q, zero_point)
                return requantize(
                    acc, m0.reshape(shape), shift.reshape(shape), ends["out_zero_point"], ends["qmin"], ends["qmax"]
                )

            return saturating
        operation = conv2d if op == "conv2d" else linear
        fixed = {"zero_point": zero_point, "m0": m0, "shift": shift} | ends | geometry
        return lambda q: operation(q, weight, bias, **fixed)


class PairSaturation:
    """What the 16-bit pair sums of vpmaddubsw lose: exact sum − saturated sum, for one layer's weights.

    Pairs are neighbouring input channels at the same place of the kernel, as in channels-last kernels. Inputs are unsigned
    bytes with their zero point left in (0..255), weights int8: two products reach 2 · 255 · 127 = 64,770, twice what 16 bits
    hold; with 7-bit weights (`reduce_range`) they stay at 2 · 255 · 63 = 32,130 and nothing can be lost.
    """

    def __init__(self, weight, *, stride=1, padding=0, dilation=1, groups=1):
        self.geometry = stride, padding, dilation
        self.linear = weight.ndim == 2
        weight = weight.int().reshape(*weight.shape, *(1, 1) * self.linear)
        out, channels, *self.kernel = weight.shape
        if channels % 2:
            weight = F.pad(weight, (0, 0, 0, 0, 0, 1))  # the last channel is paired with nothing
        pairs = weight.unflatten(1, (-1, 2))
        reach = 255 * torch.maximum(pairs.clamp(min=0).sum(2), -pairs.clamp(max=0).sum(2))
        # Most pairs of weights are too small to overflow whatever comes in: only the others are looked at.
        self.out, pair, i, j = (reach > INT16.max).nonzero(as_tuple=True)
        self.weights = pairs[self.out, pair, :, i, j]
        first = self.out // (out // groups) * channels + 2 * pair
        taps = self.kernel[0] * self.kernel[1]
        self.first = first * taps + i * self.kernel[1] + j  # where the pair's inputs are in a patch
        self.second = torch.where(2 * pair + 1 < channels, self.first + taps, self.first)  # padding: its weight is 0
        self.channels = out

    def __call__(self, q, zero_point):
        """Return the loss, int32, in the shape of the layer's accumulators."""
        q = q.int()[:, :, None, None] if self.linear else q.int()
        patches, height, width = _patches(q, self.kernel, *self.geometry, fill=zero_point)
        patches = patches.flatten(0, 1)
        lost = torch.zeros(len(patches), self.channels, dtype=torch.int32)
        for some in torch.arange(len(self.out)).split(max(1, 2**21 // max(1, len(patches)))):  # a few MB at a time
            exact = (
                patches[:, self.first[some]] * self.weights[some, 0]
                + patches[:, self.second[some]] * self.weights[some, 1]
            )
            lost.index_add_(1, self.out[some], exact - exact.clamp(INT16.min, INT16.max))
        return lost if self.linear else lost.unflatten(0, (len(q), height, width)).permute(0, 3, 1, 2)


def _room_for_bias(weight, weight_scale, bias, scale):
    """Coarsen the scale of channels whose weights are so small that their bias would not fit; return weight and scales."""
    if bias is None:
        return weight, weight_scale, scale
    factor = (bias.double().abs() / scale / (INT32.max // 4)).clamp(min=1)
    if (factor == 1).all():
        return weight, weight_scale, scale
    coarser = (weight.double() / factor.reshape(-1, *(1,) * (weight.ndim - 1))).round().to(weight.dtype)
    return coarser, weight_scale * factor, scale * factor


def _patches(q, kernel, stride, padding, dilation, fill=0):
    """Return what each output of a convolution sees, `(n, height · width, channels · kh · kw)`, with height and width."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (_pair(v) for v in (kernel, stride, padding, dilation))
    padded = F.pad(q, (pw, pw, ph, ph), value=fill)
    windows = padded.unfold(2, dh * (kh - 1) + 1, sh).unfold(3, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    height, width = windows.shape[2:4]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), height, width


def _shift_right(product, shift):
    """Return product / 2**shift, rounded half to even, for int64 `product` and 1 <= shift <= 62."""
    # Just under one half goes on top, and one more where the result would be odd, so that ties go to the even side.
    odd = (product >> shift) & 1
    return (product + odd + ((1 << (shift - 1)) - 1)) >> shift


def _saturate(q, qmin, qmax):
    kind = affine.QParams(None, None, qmin, qmax).dtype
    return q.clamp(qmin, qmax).to(kind)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _need_integers(**tensors):
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must hold integers, got {tensor.dtype}: quantize it first (affine.quantize)")
