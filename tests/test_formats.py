import math
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils import formats
from course_utils.formats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP8_E5M2, FP16, FP32, INT4, INT8, MXFP4, NF4, NVFP4

quick = settings(max_examples=500)
FLOATS = [FP32, FP16, BF16, FP8_E4M3, FP8_E5M2, FP4_E2M1]
SMALL = [f for f in FLOATS if f.bits <= 16]
INTEGERS = [INT8, INT4]
EVERY = [*FLOATS, *INTEGERS, NF4]
BLOCKS = [MXFP4, NVFP4, formats.NF4_BLOCKS]
TORCH = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16}
TORCH |= {FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}
VIEW = {32: torch.int32, 16: torch.int16, 8: torch.uint8}
NAN, INF = math.nan, math.inf
# Since 2026 torch saturates E4M3, before it gave NaN: the two results that OCP allows.
TORCH_SATURATES = {FP8_E4M3: bool(torch.tensor(1e6).to(torch.float8_e4m3fn).float() == 448)}

E2M1_TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP MX v1.0, table 5
NF4_TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]

named = pytest.mark.parametrize
each = {"ids": lambda form: form.name}


def torch_codes(x, form):
    """The codes that torch's own conversion gives."""
    return x.to(TORCH[form]).view(VIEW[form.bits]).long() & (2**form.bits - 1)


def torch_values(codes, form):
    """The values that torch's own type gives to codes."""
    signed = codes - ((codes >> (form.bits - 1)) << form.bits) if form.bits > 8 else codes
    return signed.to(VIEW[form.bits]).view(TORCH[form]).float()


def same(found, expected):
    """Equal bit for bit, with signed zeros, and NaN where NaN is."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32)
    )


def random_float32(n, seed=0):
    """Random bit patterns: every magnitude, both signs, now and then infinity and NaN."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def random_float64(n, low, high, seed=0):
    """Random doubles of both signs with exponents from `low` to `high`."""
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.rand(n, dtype=torch.float64, generator=generator) + 1
    sign = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
    power = np.exp2(torch.randint(low, high, (n,), generator=generator).numpy().astype(float))
    return sign * fraction * torch.from_numpy(power)


def ties(form):
    """The midpoints of all neighbours, float64, with the one above the largest value, both signs."""
    grid = form.grid().double()
    grid = torch.cat([grid, grid[-1:] + form.spacing(form.largest)])
    middle = (grid[1:] + grid[:-1]) / 2
    return torch.cat([middle, -middle])


def nearest(x, form):
    """Codes of `x` found in the table of all values instead of by arithmetic; for numbers in range."""
    table = form.decode(torch.arange(form._largest_code + 1)).double()
    magnitude = x.double().abs()
    above = torch.bucketize(magnitude, table).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return code + (x.signbit().long() << (form.bits - 1))


# Codes and values


@named("form", TORCH, **each)
def test_every_code_stands_for_what_torch_says(form):
    codes = (
        torch.arange(2**form.bits) if form.bits <= 16 else random_float32(300_000).view(torch.int32).long() & 0xFFFFFFFF
    )
    assert same(form.decode(codes), torch_values(codes, form))


@named("form", SMALL, **each)
def test_every_finite_code_comes_back(form):
    codes = torch.arange(2**form.bits)
    values = form.decode(codes)
    assert torch.equal(form.encode(values)[~values.isnan()], codes[~values.isnan()])  # infinities as well
    assert values.isnan().any() == form.nans and values.isinf().any() == form.infinities


def test_float32_codes_come_back():
    x = random_float32(300_000)
    codes = FP32.encode(x)
    assert same(FP32.decode(codes), x)
    assert torch.equal(codes[~x.isnan()], torch_codes(x, FP32)[~x.isnan()])
    for number in (1.0, -0.1, 3.4e38, 1e-45, 0.0, -0.0, INF, -INF):
        expected = struct.unpack("<I", struct.pack("<f", number))[0]
        assert FP32.encode(number) == expected


@named("form", [FP16, BF16, FP8_E4M3, FP8_E5M2], **each)
def test_encoding_agrees_with_torch(form):
    middle = ties(form).float()
    assert torch.equal(middle.double(), ties(form)), "float32 holds the midpoints"
    x = torch.cat(
        [
            random_float32(300_000),
            random_float64(100_000, -30, 20).float(),
            middle,
            torch.nextafter(middle, torch.tensor(INF)),
            torch.nextafter(middle, torch.tensor(-INF)),
            torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38]),
        ]
    )
    codes, expected = form.encode(x, saturate=TORCH_SATURATES.get(form)), torch_codes(x, form)
    assert same(form.decode(codes), torch_values(expected, form))
    number = ~torch_values(expected, form).isnan()
    assert torch.equal(codes[number], expected[number])
    for narrow in (x.half(), x.bfloat16()):
        found = form.encode(narrow, saturate=TORCH_SATURATES.get(form))
        assert same(form.decode(found), narrow.float().to(TORCH[form]).float())


def test_doubles_become_float32_as_torch_makes_them():
    neighbours = random_float32(200_000).double()
    neighbours = neighbours[neighbours.isfinite()]
    middle = neighbours + FP32.spacing(neighbours).double() / 2 * neighbours.sign()
    x = torch.cat(
        [
            random_float64(300_000, -160, 135),
            middle,
            torch.nextafter(middle, torch.tensor(INF, dtype=torch.float64)),
            torch.nextafter(middle, torch.tensor(-INF, dtype=torch.float64)),
            torch.tensor([1e308, -1e308, 5e-324, -5e-324, INF, NAN, 0.0, -0.0], dtype=torch.float64),
        ]
    )
    assert same(FP32.round(x), x.float())


@named("form", SMALL, **each)
def test_doubles_are_rounded_once(form):
    middle = ties(form)
    x = torch.cat([middle * (1 + k * 2.0**-52) for k in (-1, 0, 1)])
    x = torch.cat([x, random_float64(100_000, -30, 20), random_float64(100_000, -140, 130)])
    x = x[x.abs() <= form.largest]
    assert torch.equal(form.encode(x), nearest(x, form))
    if form is FP16:
        assert np.array_equal(form.round(x).numpy(), x.numpy().astype(np.float16).astype(np.float32))


def test_a_double_does_not_pass_through_float32():
    x = torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64)  # float32 would put it on the tie 1 + 2^-11
    assert FP16.round(x) == 1 + 2**-10 and FP16.round(x.float()) == 1
    assert FP16.round(float(x)) == 1 + 2**-10  # a Python float is a double


@named("form", FLOATS, **each)
def test_signed_zero_stays(form):
    for tiny in (0.0, 5e-324, form.smallest_subnormal / 2):
        assert form.encode(tiny) == 0
        assert form.encode(-tiny) == 2 ** (form.bits - 1)
        assert form.round(-tiny).signbit()


def test_the_codes_of_nan():
    codes = {FP32: 0x7FC00000, FP16: 0x7E00, BF16: 0x7FC0, FP8_E4M3: 0x7F, FP8_E5M2: 0x7E}
    for form, expected in codes.items():
        assert form.encode(torch.tensor([NAN, -NAN])).tolist() == [expected, expected]
        assert form.round(NAN).isnan()


@named("form", [FP4_E2M1, INT8, INT4, NF4], **each)
def test_formats_without_nan_refuse_it(form):
    with pytest.raises(ValueError, match="NaN.*nan_to_num"):
        form.encode(torch.tensor([1.0, NAN]))


def test_what_is_beyond_the_largest():
    x = torch.tensor([464.0, 464.1, -1e9, INF, -INF])
    assert FP8_E4M3.round(x).tolist() == [448, 448, -448, 448, -448]
    assert FP8_E4M3.round(x, saturate=True).tolist() == [448, 448, -448, 448, -448]
    assert FP8_E4M3.encode(x, saturate=False).tolist() == [0x7E, 0x7F, 0xFF, 0x7F, 0xFF]
    x = torch.tensor([61439.0, 61440.0, -1e9, INF])
    assert FP8_E5M2.round(x).tolist() == [57344, INF, -INF, INF]
    assert FP8_E5M2.round(x, saturate=True).tolist() == [57344, 57344, -57344, 57344]
    assert FP16.round([65519.0, 65520.0, -INF]).tolist() == [65504, INF, -INF]
    assert FP16.round([65519.0, 65520.0, -INF], saturate=True).tolist() == [65504, 65504, -65504]
    assert FP4_E2M1.round([7.0, -1e300, INF], saturate=True).tolist() == [6, -6, 6]
    with pytest.raises(ValueError, match="always saturates"):
        FP4_E2M1.encode(1.0, saturate=False)


# The four-bit floats, the integers, the codebook


def test_e2m1_is_the_table_of_its_standard():
    table = torch.tensor([*E2M1_TABLE, *(-float(v) for v in E2M1_TABLE)])
    assert same(FP4_E2M1.decode(torch.arange(16)), table)
    assert FP4_E2M1.grid().tolist() == sorted({*E2M1_TABLE, *(-float(v) for v in E2M1_TABLE)})
    ties_to_even = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4}
    assert {x: FP4_E2M1.round(x).item() for x in ties_to_even} == ties_to_even


def test_e2m1_agrees_with_ml_dtypes():
    x = torch.cat([random_float32(200_000), random_float64(200_000, -5, 5).float(), ties(FP4_E2M1).float()])
    x = x[~x.isnan()]
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert same(FP4_E2M1.round(x), torch.from_numpy(expected.astype(np.float32)))
    assert np.array_equal(FP4_E2M1.encode(x).numpy(), expected.view(np.uint8) & 15)


@named("form", INTEGERS, **each)
def test_integers_are_twos_complement(form):
    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    numbers = range(low, high + 1)
    assert form.encode([float(n) for n in numbers]).tolist() == [n % 2**form.bits for n in numbers]
    assert form.decode([n % 2**form.bits for n in numbers]).tolist() == list(numbers)
    assert form.grid().tolist() == list(numbers)
    x = [n / 8 for n in range(8 * low - 40, 8 * high + 40)] + [INF, -INF]
    expected = [min(max(round(max(min(v, 1e9), -1e9)), low), high) for v in x]  # Python rounds half to even, too
    assert form.round(x).tolist() == expected


def test_nf4_is_the_list_of_its_paper():
    assert torch.equal(NF4.decode(torch.arange(16)), torch.tensor(NF4_TABLE))
    assert NF4.grid().tolist() == NF4_TABLE, "float32 holds the values"
    assert NF4.encode(torch.tensor(NF4_TABLE)).tolist() == list(range(16))
    middle = [(a + b) / 2 for a, b in zip(NF4_TABLE[:-1], NF4_TABLE[1:], strict=True)]
    assert NF4.encode(middle).tolist() == list(range(15)), "a tie goes to the lower value"
    assert NF4.encode([math.nextafter(v, INF) for v in middle]).tolist() == list(range(1, 16))
    assert NF4.round([-INF, -2.0, 2.0, INF]).tolist() == [-1, -1, 1, 1]
    x = random_float64(2000, -4, 1)
    expected = [min(NF4_TABLE, key=lambda v: abs(v - number)) for number in x.tolist()]
    assert NF4.round(x).tolist() == expected
    halves = formats.Codebook("HALVES", "three values", (-1.0, 0.5, 2.0))
    assert (tuple(NF4.fields), tuple(halves.fields)) == ((0, 0, 4), (0, 0, 2)), "a code is a place in the list"
    assert (NF4.largest, halves.largest) == (1, 2)


# What a format says of itself


def test_ranges_are_those_of_torch():
    for form, dtype in TORCH.items():
        info = torch.finfo(dtype)
        assert (form.largest, form.smallest_normal) == (info.max, info.smallest_normal), form.name
        assert form.bits == info.bits and 2.0**-form.mantissa_bits == info.eps
    assert (FP8_E4M3.largest, FP8_E5M2.largest) == (448, 57344)
    assert (FP4_E2M1.largest, FP4_E2M1.smallest_normal, FP4_E2M1.smallest_subnormal) == (6, 1, 0.5)
    assert (INT8.largest, INT4.largest, NF4.largest) == (127, 7, 1)
    for form in (*INTEGERS, NF4):
        assert form.smallest_normal is None and form.smallest_subnormal is None


@named("form", FLOATS, **each)
def test_the_smallest_number_is_the_first_code(form):
    assert form.decode(1) == form.smallest_subnormal == form.spacing(0.0) > 0
    assert form.decode(2**form.mantissa_bits) == form.smallest_normal


@named("form", EVERY, **each)
def test_every_format_has_a_name_a_source_and_fields(form):
    assert getattr(formats, form.name) is form
    assert form.spec and sum(form.fields) == form.bits


@named("form", [f for f in EVERY if f is not FP32], **each)
def test_a_grid_holds_each_value_once(form):
    grid = form.grid()
    assert grid.dtype == torch.float32 and (grid.diff() > 0).all() and grid.isfinite().all()
    assert not grid[grid == 0].signbit().any()
    values = form.decode(torch.arange(2**form.bits))
    assert set(grid.tolist()) == set(values[values.isfinite()].tolist())


def test_float32_has_no_grid():
    with pytest.raises(ValueError, match="4294967296 codes"):
        FP32.grid()


def test_spacing_of_float32_is_the_next_number():
    x = random_float32(200_000)
    x = x[x.isfinite()].abs()
    x = x[x < FP32.largest]
    assert torch.equal(FP32.spacing(-x), torch.nextafter(x, torch.tensor(INF)) - x)


@named("form", [f for f in EVERY if f is not FP32], **each)
def test_spacing_is_the_distance_of_neighbours(form):
    grid = form.grid()
    if form in FLOATS:
        grid = grid[grid >= 0]
    steps = grid.diff()
    assert torch.equal(form.spacing(grid[:-1]), steps)
    assert torch.equal(form.spacing((grid[1:].double() + grid[:-1].double()) / 2), steps)
    beyond = torch.tensor([form.largest, 2 * form.largest, INF])
    assert (form.spacing(beyond) == steps[-1]).all()
    assert (form.spacing(-beyond) == (steps[-1] if form in FLOATS else steps[0])).all()
    assert form.spacing(NAN).isnan() and form.spacing(torch.ones(2, 3).half()).shape == (2, 3)


def test_bits_for_a_picture():
    assert FP16.bits_of(1.0) == ("0", "01111", "0000000000")
    assert FP32.bits_of(-0.15625) == ("1", "01111100", "01000000000000000000000")
    assert FP8_E4M3.bits_of(torch.tensor([[448.0]])) == ("0", "1111", "110")
    assert FP4_E2M1.bits_of(-0.5) == ("1", "00", "1")
    assert INT8.bits_of(-1.0) == ("1", "", "1111111")
    assert NF4.bits_of(0.0) == ("", "", "0111")
    assert FP16.bits_of(1.0).exponent == "01111" and FP16.fields.exponent == 5
    with pytest.raises(ValueError, match="one number"):
        FP16.bits_of([1.0, 2.0])


# Inputs good and bad


@named("form", EVERY, **each)
def test_any_shape_and_any_float(form):
    x = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(2, 3, 4)
    codes = form.encode(x)
    assert codes.shape == x.shape and codes.dtype == torch.int64
    assert form.decode(codes).shape == x.shape and form.decode(codes).dtype == torch.float32
    assert torch.equal(form.encode(x.permute(2, 0, 1)), codes.permute(2, 0, 1))
    assert torch.equal(form.encode(x[:, ::2]), codes[:, ::2])
    assert torch.equal(form.encode(x.tolist()), codes) and torch.equal(form.encode(x.numpy()), codes)
    assert form.encode(torch.empty(0, 3)).shape == (0, 3) and form.decode(form.encode([])).shape == (0,)
    assert form.encode(x.requires_grad_()).requires_grad is False
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        narrow = x.detach().to(dtype)
        assert torch.equal(form.encode(narrow), form.encode(narrow.double()))
    assert torch.equal(form.decode(codes.to(torch.int32 if form is not FP32 else torch.int64)), form.round(x))


@named("form", [*EVERY, E8M0], **each)
def test_only_floats_are_encoded(form):
    for x in (torch.tensor([1, 2]), torch.tensor(True), 1, [1, 2], torch.tensor(1j)):
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            form.encode(x)
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            form.spacing(x)


@named("form", [*EVERY, E8M0], **each)
def test_only_codes_are_decoded(form):
    for codes in (1.0, True, torch.tensor([1.0]), torch.tensor(1j)):
        with pytest.raises(ValueError, match=f"integer codes of {form.name}"):
            form.decode(codes)
    for wrong in (-1, 2**form.bits):
        with pytest.raises(ValueError, match=rf"0\.\.{2**form.bits - 1}, got {wrong}"):
            form.decode(torch.tensor([0, wrong]))


# Blocks


def scale_by_hand(absmax, form, tensor_scale):
    if form is MXFP4:
        return 2.0 ** max(math.floor(math.log2(absmax)) - 2, -127) if absmax else 2.0**-127
    if form is NVFP4:
        return torch.tensor(absmax / 6 / tensor_scale).clamp(max=448).to(torch.float8_e4m3fn).double().item()
    return absmax


def by_hand(x, form):
    """Fake quantization of `(rows, columns)`, number by number and by comparing with all values."""
    values = NF4_TABLE if form is formats.NF4_BLOCKS else [*E2M1_TABLE, *(-float(v) for v in E2M1_TABLE)]
    evens = {0, 1, 2, 4}  # mantissa bit 0
    tensor_scale = 1.0
    if form is NVFP4:
        tensor_scale = max(float(np.float32(x.abs().max().item() / (6 * 448))), 2.0**-126)
    found = torch.zeros_like(x)
    for i, row in enumerate(x.tolist()):
        for start in range(0, len(row), form.block_size):
            block = row[start : start + form.block_size]
            scale = scale_by_hand(max(map(abs, block)), form, tensor_scale)
            for j, number in enumerate(block):
                scaled = number / (scale * tensor_scale) if scale else 0.0
                best = min(values, key=lambda v: (abs(v - scaled), abs(v) not in evens))
                found[i, start + j] = best * (scale * tensor_scale)
    return found


@named("form", BLOCKS, **each)
@named("columns", [1, 16, 31, 32, 64, 100])
@named("size", [1.0, 1e-3, 1e4, 1e37, 1e-38, 1e-44])
def test_blocks_agree_with_a_loop(form, columns, size):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)) * size
    x[1] *= 1e-3
    x[2, : columns // 2] = 0.0
    found = form.fake_quantize(x)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert torch.equal(found, by_hand(x, form))


@named("form", BLOCKS, **each)
def test_blocks_run_within_the_flattened_rows(form):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(form.fake_quantize(x), form.fake_quantize(x.reshape(4, 75)).reshape(x.shape))
    assert torch.equal(
        form.fake_quantize(x.permute(1, 2, 3, 0)), form.fake_quantize(x.permute(1, 2, 3, 0).contiguous())
    )
    assert form.scales(x).shape == (4, -(-75 // form.block_size))
    assert torch.equal(form.fake_quantize(x[:, 0, 0, 0]), by_hand(x[:, :1, 0, 0], form)[:, 0])  # each row one number


def test_scales_are_what_their_format_holds():
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    scales = MXFP4.scales(x)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5)), "powers of two"
    ratio = x.reshape(8, -1, 32).abs().amax(-1) / scales
    assert (ratio >= 4).all() and (ratio < 8).all()
    assert MXFP4.scales(torch.tensor([[4.0], [7.9], [8.0], [0.0]])).flatten().tolist() == [1, 1, 2, 2.0**-127]
    assert MXFP4.fake_quantize(torch.tensor([[7.9, 1.2]])).tolist() == [[6.0, 1.0]], "between 6 and 8 it saturates"
    assert MXFP4.tensor_scale(x) == 1
    assert torch.equal(NVFP4.scales(x), NVFP4.scales(x).to(torch.float8_e4m3fn).float())
    assert NVFP4.scales(x).max() == 448
    assert NVFP4.tensor_scale(x).item() == pytest.approx(x.abs().max().item() / 2688, rel=1e-6)
    assert torch.equal(formats.NF4_BLOCKS.scales(x), x.reshape(8, -1, 64).abs().amax(-1))


def test_honest_bits():
    assert [form.bits_per_weight for form in BLOCKS] == [4.25, 4.5, 4.5]
    assert MXFP4.total_bits((2, 64)) == 2 * (64 * 4 + 2 * 8)
    assert MXFP4.total_bits((2, 3, 11)) == 2 * (33 * 4 + 2 * 8)  # a short block pays for a whole scale
    assert NVFP4.total_bits(torch.Size([10, 16])) == 10 * (16 * 4 + 8) + 32


@named("form", BLOCKS, **each)
def test_zeros_stay_zeros(form):
    assert torch.equal(form.fake_quantize(torch.zeros(2, 70)), torch.zeros(2, 70))
    x = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 1e30)], dim=1)
    found = form.fake_quantize(x)
    assert (found[:, :64] == 0).all() and found[:, 64:].allclose(x[:, 64:], rtol=0.2)


@named("form", BLOCKS, **each)
@named("number", [FP32.largest, -FP32.largest, 1e-45, 1.0])
def test_extreme_blocks_stay_finite(form, number):
    found = form.fake_quantize(torch.full((1, 40), number))
    assert found.isfinite().all() and (found == found[0, 0]).all()
    if abs(number) >= 1:
        torch.testing.assert_close(found, torch.full_like(found, number), rtol=0.26, atol=0)


@named("form", BLOCKS, **each)
def test_bad_blocks(form):
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match="NaN or infinite"):
            form.fake_quantize(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        form.fake_quantize(torch.tensor([1e300], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x\.float\(\)"):
        form.fake_quantize(torch.ones(2, 2, dtype=torch.int32))
    for bad in (torch.tensor(1.0), torch.empty(0, 4), torch.empty(4, 0)):
        with pytest.raises(ValueError, match="at least one row"):
            form.fake_quantize(bad)


def test_e8m0_rounds_down_to_powers_of_two():
    assert E8M0.encode([1.0, 1.99, 2.0, 0.0, 1e-300, 1e300, INF, NAN]).tolist() == [127, 127, 128, 0, 0, 254, 254, 255]
    codes = torch.arange(255)
    assert torch.equal(E8M0.encode(E8M0.decode(codes)), codes) and E8M0.decode(255).isnan()
    assert E8M0.decode([0, 127, 254]).tolist() == [2.0**-127, 1.0, 2.0**127]
    assert torch.equal(E8M0.decode(codes), codes.to(torch.uint8).view(torch.float8_e8m0fnu).float())
    assert E8M0.grid().tolist() == [2.0**k for k in range(-127, 128)]
    assert (
        E8M0.spacing([3.0, 0.1]).tolist() == [2.0, 0.0625]
        and E8M0.spacing(8.5) == 8
        and E8M0.bits_of(1.0) == ("", "01111111", "")
    )
    with pytest.raises(ValueError, match="no sign"):
        E8M0.encode([1.0, -2.0])


# Laws


numbers = (
    st.floats(allow_nan=False)
    | st.floats(-8, 8)
    | st.floats(-500, 500, width=16)
    | st.floats(width=32, allow_nan=False)
)
lists = st.lists(numbers, min_size=1, max_size=20).map(lambda x: torch.tensor(x, dtype=torch.float64))


@quick
@given(x=lists, form=st.sampled_from(EVERY))
def test_rounding_twice_changes_nothing_more(x, form):
    once = form.round(x)
    assert torch.equal(form.round(once).view(torch.int32), once.view(torch.int32))


@quick
@given(x=lists, form=st.sampled_from(EVERY))
def test_larger_numbers_never_become_smaller(x, form):
    rounded = form.round(x.sort().values)
    assert (rounded[1:] >= rounded[:-1]).all()


@quick
@given(x=lists, form=st.sampled_from(FLOATS))
def test_signs_do_not_matter_to_floats(x, form):
    assert torch.equal(form.round(-x).view(torch.int32), (-form.round(x)).view(torch.int32))


@quick
@given(x=lists, form=st.sampled_from(EVERY))
def test_no_number_in_range_moves_by_more_than_half_a_step(x, form):
    lowest = {INT8: -128, INT4: -8}.get(form, -form.largest)
    x = x.clamp(lowest, form.largest)
    assert ((form.round(x).double() - x).abs() <= form.spacing(x).double() / 2).all()


@quick
@given(x=lists, form=st.sampled_from(BLOCKS))
def test_blocks_move_no_number_by_more_than_their_scale(x, form):
    x = x.clamp(-1e30, 1e30).float()
    x = torch.where(x.abs() < 1e-30, 0.0, x)
    scale = (form.scales(x) * form.tensor_scale(x))[:, 0]
    # MXFP4 cuts off what lies between 6 and 8 scales; half the widest step is 1 scale in NVFP4, and 0.152 in NF4.
    worst = {"MXFP4": 2.0, "NVFP4": 1.0, "NF4_BLOCKS": 0.152}[form.name] * scale
    if form is NVFP4:  # a scale among the subnormals of E4M3 is up to half a step of theirs too small
        worst = worst.clamp(min=6 * FP8_E4M3.smallest_subnormal / 2 * form.tensor_scale(x).item())
    assert ((form.fake_quantize(x) - x).abs() <= worst * (1 + 1e-6)).all()


def test_rounding_in_pieces_is_rounding_at_once(monkeypatch):
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(formats, "PIECE", 7)
    for form in (formats.FP8_E4M3, formats.INT4, formats.NF4):
        assert torch.equal(form.round(x), form.decode(form.encode(x)))
        assert form.round(0.3).shape == () and form.round(x[:0]).shape == (0, 9)


@pytest.mark.parametrize("form", [formats.INT8, formats.FP4_E2M1], ids=str)
def test_a_format_without_nan_says_so_by_its_name(form):
    with pytest.raises(ValueError, match=f"the numbers hold NaN, for which {form.name} has no code"):
        form.encode(torch.tensor([1.0, NAN]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", BLOCKS, ids=str)
def test_nothing_becomes_infinite_by_being_rounded(form, sign):
    tops = sign * FP32.largest * (1 - torch.arange(200, dtype=torch.float64) * 2**-21)
    for top in tops.float():
        assert form.fake_quantize(top.expand(1, 64)).isfinite().all()
