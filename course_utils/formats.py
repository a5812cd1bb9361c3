"""Number formats from scratch: which numbers a handful of bits can stand for, and how a real number finds its code.

`Float` follows IEEE 754-2019 and what OCP made of it for 8 and 4 bits, `Integer` is two's complement, `Codebook` is a plain
list of values, and `Blocks` lets a run of small numbers share a scale. All arithmetic is on float64, which holds every number
of every format here exactly, so that each value is rounded once. No conversion is left to torch's own types.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

PIECE = 2**18  # numbers rounded at once: the steps between take many times their memory


class Fields(NamedTuple):
    """The parts of a code from the highest bit down: their widths in bits, or their bits as strings of 0 and 1.

    An integer has a sign bit and the rest, a codebook only the rest (the place in its list): their exponent is empty.
    """

    sign: int | str
    exponent: int | str
    mantissa: int | str


class Format:
    """What all formats share: a `name`, a `spec` (the standard or paper), `fields`, and `encode` and `decode`."""

    @property
    def bits(self):
        """The bits of one code."""
        return sum(self.fields)

    def round(self, x, **options):
        """Return `x` as the format holds it: `decode(encode(x))`, float32, same shape; `options` are those of `encode`."""
        x = _as_doubles(x)
        pieces = x.flatten().split(PIECE)
        return torch.cat([self.decode(self.encode(piece, **options)) for piece in pieces]).view(x.shape)

    def grid(self):
        """Return all finite values, sorted and each once: float32 `(values,)`, with one zero.

        Raises `ValueError` for more than 16 bits: of the formats here only FP32 has no grid.
        """
        if self.bits > 16:
            raise ValueError(
                f"{self.name} has {2**self.bits} codes, too many for a grid: take a format of up to 16 bits"
            )
        values = self.decode(torch.arange(2**self.bits))
        return (values[values.isfinite()] + 0.0).unique()  # -0 + 0 is 0

    def bits_of(self, x):
        """Return the `Fields` of the code of one number `x`, as strings: those of FP16's 1.0 are ('0', '01111', '0000000000').

        Raises `ValueError` for more than one number, and where `encode` does.
        """
        code = self.encode(x)
        if code.numel() != 1:
            raise ValueError(f"expected one number, got a tensor of shape {tuple(code.shape)}")
        digits = f"{int(code):0{self.bits}b}"
        sign, exponent, _ = self.fields
        return Fields(digits[:sign], digits[sign : sign + exponent], digits[sign + exponent :])


@dataclass(frozen=True)
class Float(Format):
    """A floating-point format: one sign bit, then the exponent, then the mantissa.

    With e and m the exponent and mantissa fields as whole numbers, a code stands for ±(1 + m/2^mantissa_bits) · 2^(e − bias),
    or, when e is 0, for the subnormal ±(m/2^mantissa_bits) · 2^(1 − bias). With `infinities`, the largest e means infinity
    (m = 0) or NaN, as IEEE says. With `nans` alone, only the code of all ones is NaN. `saturates` says what becomes of
    numbers beyond the largest, unless `encode` is told otherwise.
    """

    name: str
    spec: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinities: bool = True
    nans: bool = True
    saturates: bool = False

    @property
    def fields(self):
        """The widths of the `Fields`."""
        return Fields(1, self.exponent_bits, self.mantissa_bits)

    @property
    def largest(self):
        """The largest finite value."""
        return float(self.decode(self._largest_code))

    @property
    def smallest_normal(self):
        """The smallest positive value with the full precision of the format."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self):
        """The smallest positive value, and the spacing of all numbers below `smallest_normal`."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def encode(self, x, *, saturate=None):
        """Return the codes of the numbers nearest to `x`, half to even: int64, same shape, 0..2^bits−1.

        x: float tensor of any type and shape, or Python floats. The sign of zero is kept. NaN becomes one code: positive,
        with the highest mantissa bit set, or all ones where that is the only NaN. A number that rounds to more than the
        largest, infinity included, becomes the largest with `saturate=True`, and with `saturate=False` infinity, or NaN
        where there is no infinity. The default is the format's own, `saturates`: IEEE's overflow to infinity for FP32,
        FP16, BF16 and FP8_E5M2; the largest for FP4_E2M1, and for FP8_E4M3, as torch 2.14 does (before, it gave NaN).

        Raises `ValueError` for integers, and for NaN or `saturate=False` where the format has no code for the result.
        """
        x = _as_doubles(x)
        saturate = self.saturates if saturate is None else saturate
        if not (saturate or self.nans):
            raise ValueError(f"{self.name} has neither infinity nor NaN, so it always saturates: leave saturate alone")
        if not self.nans:
            _refuse_nan(x, self.name)

        # Twice the largest overflows as surely as infinity does, and the arithmetic below can do without infinity and NaN.
        magnitude = x.abs().nan_to_num().clamp(max=2 * self.largest)
        # The numbers from 2^exponent to 2^(exponent + 1) are one step apart; those below the smallest normal use its step.
        exponent = _exponent(magnitude.clamp(min=self.smallest_normal))
        steps = torch.round(magnitude / _power_of_two(exponent - self.mantissa_bits)).long()
        # The leading 1 of a normal number adds the 1 that its exponent field is short of, and a mantissa rounded up to the
        # next power of two carries into the exponent: codes of one sign are in the order of their values.
        code = ((exponent - (1 - self.bias)) << self.mantissa_bits) + steps
        # The code after the largest number is infinity, or NaN where there is none.
        code = code.clamp(max=self._largest_code if saturate else self._largest_code + 1)
        code += torch.signbit(x).long() << (self.bits - 1)
        return torch.where(x.isnan(), self._nan_code, code)

    def decode(self, codes):
        """Return the values of `codes`: float32, same shape.

        codes: integers. Raises `ValueError` for floats, and for integers outside 0..2^bits−1.
        """
        codes = _as_codes(codes, self)
        sign = 1.0 - 2.0 * (codes >> (self.bits - 1))
        code = codes & (2 ** (self.bits - 1) - 1)
        exponent, mantissa = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        steps = mantissa + ((exponent > 0).long() << self.mantissa_bits)  # with the leading 1 that is not stored
        magnitude = steps * _power_of_two(exponent.clamp(min=1) - self.bias - self.mantissa_bits)
        beyond = torch.where((mantissa == 0) & self.infinities, torch.inf, torch.nan)
        return (sign * torch.where(code > self._largest_code, beyond, magnitude)).float()

    def spacing(self, x):
        """Return the distance to the next larger magnitude at |x|, one unit in the last place: float32, same shape.

        That is 2^(floor(log2|x|) − mantissa_bits), and `smallest_subnormal` below the smallest normal. At the largest number
        and beyond, infinity included, it is the distance just below; of NaN it is NaN. Raises `ValueError` for integers.
        """
        x = _as_doubles(x)
        magnitude = x.abs().nan_to_num().clamp(self.smallest_normal, self.largest)
        return _power_of_two(_exponent(magnitude) - self.mantissa_bits).where(~x.isnan(), x).float()

    @property
    def _largest_code(self):
        all_ones = 2 ** (self.bits - 1) - 1
        return all_ones - (2**self.mantissa_bits if self.infinities else 1 if self.nans else 0)

    @property
    def _nan_code(self):
        all_ones = 2 ** (self.bits - 1) - 1
        return all_ones - (2 ** (self.mantissa_bits - 1) - 1 if self.infinities else 0)


@dataclass(frozen=True)
class Integer(Format):
    """The whole numbers −2^(n−1)..2^(n−1)−1 as n bits in two's complement, without a scale (see `affine` for the scale)."""

    name: str
    spec: str
    width: int
    smallest_normal = smallest_subnormal = None  # every number has the same precision

    @property
    def fields(self):
        """The widths of the `Fields`."""
        return Fields(1, 0, self.width - 1)

    @property
    def largest(self):
        """The largest value; the range goes one further down."""
        return 2.0 ** (self.width - 1) - 1

    def encode(self, x):
        """Return the codes of `x`, rounded half to even and saturated: int64, same shape, 0..2^bits−1.

        x: float tensor of any type and shape, or Python floats. Raises `ValueError` for NaN and for integers.
        """
        x = _as_doubles(x)
        _refuse_nan(x, self.name)
        return x.round().clamp(-self.largest - 1, self.largest).long() & (2**self.width - 1)

    def decode(self, codes):
        """Return the values of `codes`: float32, same shape.

        codes: integers. Raises `ValueError` for floats, and for integers outside 0..2^bits−1.
        """
        codes = _as_codes(codes, self)
        return (codes - ((codes >> (self.width - 1)) << self.width)).float()

    def spacing(self, x):
        """Return 1 for every number, within the range and outside: float32, same shape; of NaN it is NaN.

        Raises `ValueError` for integers.
        """
        x = _as_doubles(x)
        return torch.ones_like(x).where(~x.isnan(), x).float()


@dataclass(frozen=True)
class Codebook(Format):
    """A list of 2^n rising values, each a float32 number; a code is a place in the list."""

    name: str
    spec: str
    values: tuple[float, ...]
    smallest_normal = smallest_subnormal = None  # the values follow no formula

    @property
    def fields(self):
        """The widths of the `Fields`."""
        return Fields(0, 0, (len(self.values) - 1).bit_length())

    @property
    def largest(self):
        """The largest value."""
        return self.values[-1]

    def encode(self, x):
        """Return the places of the values nearest to `x`, the lower one when two are equally near: int64, same shape.

        x: float tensor of any type and shape, or Python floats. Numbers outside the list get its first or last value.
        Raises `ValueError` for NaN and for integers.
        """
        x = _as_doubles(x)
        _refuse_nan(x, self.name)
        values = self._table()
        return torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)

    def decode(self, codes):
        """Return the values of `codes`: float32, same shape.

        codes: integers. Raises `ValueError` for floats, and for integers outside 0..2^bits−1.
        """
        return self._table()[_as_codes(codes, self)].float()

    def spacing(self, x):
        """Return the distance between the two values that `x` lies between: float32, same shape.

        At a value of the list it is the distance to the next larger one; at the last value and outside the list it is that
        of the outermost two. Of NaN it is NaN. Raises `ValueError` for integers.
        """
        x = _as_doubles(x)
        values = self._table()
        below = torch.bucketize(x.contiguous(), values, right=True) - 1
        return values.diff()[below.clamp(0, len(values) - 2)].where(~x.isnan(), x).float()

    def _table(self):
        return torch.tensor(self.values, dtype=torch.float64)


@dataclass(frozen=True)
class PowersOfTwo(Format):
    """The scales of MX, E8M0: nothing but an exponent, code − 127; no sign, no zero, and code 255 is NaN."""

    name: str
    spec: str
    fields = Fields(0, 8, 0)
    largest, smallest_normal, smallest_subnormal = 2.0**127, 2.0**-127, None

    def encode(self, x):
        """Return the codes of the largest powers of two not above `x`, saturated: int64, same shape, 0..255.

        x: float tensor of any type and shape, or Python floats, not negative. Rounding is down, as MX asks of a scale.
        Zero becomes the smallest power, NaN becomes 255. Raises `ValueError` for negative numbers and for integers.
        """
        x = _as_doubles(x)
        if (x < 0).any():
            raise ValueError(f"{self.name} has no sign, got {float(x[x < 0][0])}: encode the magnitude, x.abs()")
        exponent = _exponent(x.nan_to_num().clamp(self.smallest_normal, self.largest))
        return torch.where(x.isnan(), 255, exponent + 127)

    def decode(self, codes):
        """Return the values of `codes`: float32, same shape.

        codes: integers. Raises `ValueError` for floats, and for integers outside 0..255.
        """
        codes = _as_codes(codes, self)
        return _power_of_two(codes - 127).where(codes < 255, torch.nan).float()

    def spacing(self, x):
        """Return the distance from the power of two not above `x` to the next: float32, same shape.

        Below the smallest and beyond the largest power it is that power itself; of NaN it is NaN. Raises `ValueError` as
        `encode` does.
        """
        return self.round(x)  # from one power of two to the next it is as far as from zero


@dataclass(frozen=True)
class Blocks:
    """Runs of `block_size` numbers in the format `element`, each run with one scale in the format `scale`.

    Blocks run within the rows of a tensor: the rows are its first dimension and all others are flattened; the last block of
    a row may be shorter. The scale maps the largest magnitude of a block to `top`. With `per_tensor`, all block scales are
    multiples of one float32 number, chosen so that the largest of them is the largest that their format holds.
    """

    name: str
    spec: str
    element: Format
    block_size: int
    scale: Format
    top: float
    per_tensor: bool = False

    @property
    def bits_per_weight(self):
        """The bits of one number and its share of the block's scale (the one number per tensor adds next to nothing)."""
        return self.element.bits + self.scale.bits / self.block_size

    def total_bits(self, shape):
        """Return the bits of a tensor of `shape`, every scale counted, with those of shorter blocks and of the tensor."""
        rows, length = shape[0], torch.Size(shape[1:]).numel()
        blocks = rows * -(-length // self.block_size)
        return rows * length * self.element.bits + blocks * self.scale.bits + 32 * self.per_tensor

    def tensor_scale(self, x):
        """Return the scale of the whole tensor: float32 `()`, and 1 without `per_tensor`. Raises as `fake_quantize`."""
        absmax = self._split(x).abs().max()
        if not self.per_tensor:
            return torch.tensor(1.0)
        # Never below the normal numbers: there a scale would lose its precision, or become zero.
        return FP32.round(absmax / (self.top * self.scale.largest)).clamp(min=FP32.smallest_normal)

    def scales(self, x):
        """Return the scales of the blocks as stored, in units of `tensor_scale`: float32 `(rows, blocks of a row)`.

        Raises as `fake_quantize`.
        """
        absmax = self._split(x).abs().amax(-1)
        return self.scale.round(absmax / self.tensor_scale(x).double() / self.top)

    def fake_quantize(self, x):
        """Return `x` as the format holds it: float32, same shape.

        x: float tensor of at least one dimension. A block whose scale is too small for its format becomes zeros.
        Raises `ValueError` for an empty tensor, integers, and NaN or infinite values (those beyond float32 included).
        """
        blocks = self._split(x)
        scale = (self.scales(x).double() * self.tensor_scale(x).double()).unsqueeze(-1)
        # The product has at most 48 bits, so float64 holds it exactly. Above the largest float32 there is only infinity.
        values = self.element.round(blocks / scale.where(scale > 0, 1.0)).double() * scale
        values = values.clamp(-FP32.largest, FP32.largest).float()
        return values.flatten(1)[:, : x.shape[1:].numel()].reshape(x.shape)

    def _split(self, x):
        """Return `x` as float64 `(rows, blocks, block_size)`; zeros fill the last block, they change no largest magnitude."""
        doubles = _as_doubles(x)
        if doubles.ndim == 0 or doubles.numel() == 0:
            raise ValueError(f"blocks need at least one row of numbers, got a tensor of shape {tuple(doubles.shape)}")
        if not doubles.float().isfinite().all():
            raise ValueError("the tensor holds NaN or infinite values, which leave no scale for their block")
        rows = doubles.reshape(len(doubles), -1)
        return torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.block_size)).unflatten(1, (-1, self.block_size))


def _as_doubles(x):
    """Return `x` as a float64 tensor without gradient; exact, for there is no wider type among the inputs."""
    found = torch.as_tensor(x)
    if not found.is_floating_point():
        raise ValueError(f"expected floats, got {found.dtype}: convert a tensor with x.float(), or write 1.0 for 1")
    # Python floats are doubles already: straight to float64, not through torch's default type.
    return torch.as_tensor(x, dtype=torch.float64).detach()


def _as_codes(codes, form):
    """Return `codes` as int64, checked."""
    codes = torch.as_tensor(codes)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(
            f"expected integer codes of {form.name}, got {codes.dtype}: encode(x) makes codes from numbers"
        )
    codes = codes.long()
    wrong = codes[(codes < 0) | (codes >= 2**form.bits)]
    if wrong.numel():
        raise ValueError(f"a code of {form.name} lies in 0..{2**form.bits - 1}, got {int(wrong[0])}")
    return codes


def _refuse_nan(x, name):
    if x.isnan().any():
        raise ValueError(
            f"the numbers hold NaN, for which {name} has no code: replace it first, as x.nan_to_num() does"
        )


def _exponent(x):
    """Return floor(log2(x)) of positive finite doubles, exactly: a logarithm could be rounded up to the next whole number."""
    return torch.frexp(x).exponent.long() - 1  # frexp's fraction lies in 0.5..1


def _power_of_two(exponent):
    """Return 2^exponent as float64 for −1022..1023, exactly: such a double is its exponent field and nothing else."""
    return ((exponent + 1023) << 52).view(torch.float64)


FP32 = Float("FP32", "IEEE 754-2019 binary32", 8, 23, bias=127)
FP16 = Float("FP16", "IEEE 754-2019 binary16", 5, 10, bias=15)
BF16 = Float("BF16", "bfloat16: Google Brain; Intel BFLOAT16 hardware numerics definition, 2018", 8, 7, bias=127)
FP8_E4M3 = Float(
    "FP8_E4M3", "OCP 8-bit Floating Point (OFP8) rev. 1.0, E4M3", 4, 3, bias=7, infinities=False, saturates=True
)
FP8_E5M2 = Float("FP8_E5M2", "OCP 8-bit Floating Point (OFP8) rev. 1.0, E5M2", 5, 2, bias=15)
FP4_E2M1 = Float(
    "FP4_E2M1", "OCP Microscaling (MX) v1.0, FP4 E2M1", 2, 1, bias=1, infinities=False, nans=False, saturates=True
)
INT8 = Integer("INT8", "two's complement", 8)
INT4 = Integer("INT4", "two's complement", 4)
# Quantiles of the normal distribution, scaled to −1..1: negative ones 7, zero, positive ones 8.
NF4 = Codebook(
    "NF4",
    "QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
E8M0 = PowersOfTwo("E8M0", "OCP Microscaling (MX) v1.0, E8M0")

# MX rounds the scale down to a power of two, so it maps the largest magnitude to 4, the largest power of two in E2M1: what
# then lies between 6 and 8 saturates.
MXFP4 = Blocks("MXFP4", "OCP Microscaling (MX) v1.0, section 6.3", FP4_E2M1, 32, E8M0, top=4.0)
NVFP4 = Blocks("NVFP4", "NVIDIA 2025 (arXiv 2509.25149)", FP4_E2M1, 16, FP8_E4M3, top=6.0, per_tensor=True)
# QLoRA's own memory is less: it quantizes these scales once more ("double quantization"), which is left out here.
NF4_BLOCKS = Blocks("NF4_BLOCKS", "QLoRA (Dettmers et al. 2023, arXiv 2305.14314)", NF4, 64, FP32, top=1.0)
