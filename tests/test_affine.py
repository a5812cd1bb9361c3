import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils import affine

quick = settings(max_examples=500)
schemes = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 8),
        "symmetric": st.booleans(),
        "signed": st.sampled_from([None, True]),  # symmetric and unsigned cannot hold negative numbers, see below
    }
) | st.fixed_dictionaries({"bits": st.integers(2, 8), "symmetric": st.just(False), "signed": st.just(False)})
granularities = st.sampled_from(
    [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}, {"group_size": 1}, {"group_size": 4, "ragged": True}]
)


@st.composite
def tensors(draw):
    """Float tensors `(rows, columns)` with magnitudes from denormal to huge, and now and then exact zeros."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    numbers = st.floats(-1, 1, width=32)
    rows = draw(st.lists(st.lists(numbers, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]))
    return torch.tensor(rows) * draw(st.sampled_from([1.0, 1e-40, 1e-30, 1e-3, 1e4, 1e38]))


def spread(parameter, x, qparams):
    """The scale of every element, computed with loops instead of the library's broadcasting."""
    found = torch.empty_like(x, dtype=parameter.dtype)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            if qparams.group_size:
                found[i, j] = parameter[i, j // qparams.group_size]
            elif qparams.axis is not None:
                found[i, j] = parameter[(i, j)[qparams.axis]]
            else:
                found[i, j] = parameter
    return found


@quick
@given(x=tensors(), scheme=schemes, granularity=granularities)
def test_zero_is_exact_and_no_value_in_range_moves_by_more_than_half_a_step(x, scheme, granularity):
    qparams = affine.choose_qparams(x, **scheme, **granularity)
    step = spread(qparams.scale, x, qparams).double()
    q = affine.quantize(x, qparams)
    assert q.min() >= qparams.qmin and q.max() <= qparams.qmax
    assert torch.equal(affine.fake_quantize(torch.zeros_like(x), qparams), torch.zeros_like(x))
    error = (affine.dequantize(q, qparams).double() - x.double()).abs()
    rounding = 1e-6 * x.double().abs()  # of float32, in the scale and in the product
    assert (error <= step / 2 * (1 + 1e-4) + rounding).all()


@quick
@given(x=tensors(), scheme=schemes, granularity=granularities)
def test_rounding_twice_changes_nothing_more(x, scheme, granularity):
    qparams = affine.choose_qparams(x, **scheme, **granularity)
    once = affine.fake_quantize(x, qparams)
    assert torch.equal(affine.fake_quantize(once, qparams), once)
    assert torch.equal(affine.quantize(once, qparams), affine.quantize(x, qparams))


@quick
@given(x=tensors(), scheme=schemes)
def test_larger_numbers_never_get_smaller_integers(x, scheme):
    qparams = affine.choose_qparams(x, **scheme)
    rising = torch.cat([x.flatten(), 3 * x.flatten()]).sort().values
    assert (affine.quantize(rising, qparams).int().diff() >= 0).all()


@quick
@given(x=tensors(), scheme=schemes, granularity=granularities)
def test_numbers_out_of_range_saturate(x, scheme, granularity):
    qparams = affine.choose_qparams(x, **scheme, **granularity)
    assert (affine.quantize(torch.full_like(x, float("inf")), qparams) == qparams.qmax).all()
    assert (affine.quantize(torch.full_like(x, float("-inf")), qparams) == qparams.qmin).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_integers_are_those_of_the_bits(bits):
    x = torch.linspace(-1, 2, 1000)
    signed = affine.choose_qparams(x, bits=bits, symmetric=True)
    unsigned = affine.choose_qparams(x, bits=bits)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert signed.zero_point == 0 and float(signed.scale) == pytest.approx(2 / signed.qmax)
    assert float(unsigned.scale) == pytest.approx(3 / unsigned.qmax)
    assert len(affine.quantize(x, unsigned).unique()) == 2**bits
    shifted = affine.choose_qparams(x, bits=bits, signed=True)
    assert torch.equal(affine.quantize(x, shifted).int(), affine.quantize(x, unsigned).int() - 2 ** (bits - 1))


def test_eight_bits_fit_a_byte():
    x = torch.randn(5)
    assert affine.quantize(x, affine.choose_qparams(x, symmetric=True)).dtype == torch.int8
    assert affine.quantize(x, affine.choose_qparams(x)).dtype == torch.uint8


def test_a_symmetric_unsigned_map_keeps_the_positive_half():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    qparams = affine.choose_qparams(x, symmetric=True, signed=False, bits=2)
    assert affine.quantize(x, qparams).tolist() == [0, 0, 1, 3]
    assert not affine.fake_quantize(-x.abs(), affine.choose_qparams(-x.abs(), symmetric=True, signed=False)).any()


def test_halves_are_rounded_to_even():
    qparams = affine.QParams(torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), -128, 127)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert (affine.quantize(x, qparams) - 3).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("number", [5.0, -5.0, 0.0, 1e-45, -1e-40, 1e-38, 1e38, -3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_tensor_comes_back(number, symmetric):
    x = torch.full((3,), number)
    found = affine.fake_quantize(x, affine.choose_qparams(x, symmetric=symmetric))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1.5e-36)  # below that float32 has no normal scale


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_huge_numbers_do_not_overflow(bits, symmetric):
    x = torch.tensor([1e38, -1e38, 0.0])
    found = affine.fake_quantize(x, affine.choose_qparams(x, bits=bits, symmetric=symmetric))
    assert torch.isfinite(found).all()


def test_one_tensor_or_one_element_is_enough():
    for x in (torch.tensor(3.0), torch.tensor([3.0])):
        assert affine.fake_quantize(x, affine.choose_qparams(x)).item() == pytest.approx(3)


@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": 2}, {"group_size": 12}])
def test_strides_do_not_matter(granularity):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    qparams = affine.choose_qparams(x, **granularity)
    assert torch.equal(affine.quantize(x, qparams), affine.quantize(x.contiguous(), qparams))
    assert torch.equal(qparams.scale, affine.choose_qparams(x.contiguous(), **granularity).scale)


def test_the_arguments_are_left_alone():
    x = torch.randn(3, 4)
    before = x.clone()
    rounded = affine.fake_quantize(x, affine.choose_qparams(x, group_size=2))
    assert torch.equal(x, before) and not torch.equal(rounded, before)


@pytest.mark.parametrize("clip", affine.CLIPS)
def test_the_parameters_of_a_layers_weight_have_no_gradient(clip):
    layer = torch.nn.Linear(8, 4)
    assert not affine.choose_qparams(layer.weight, symmetric=True, axis=0, clip=clip).scale.requires_grad


def test_groups_run_within_the_flattened_rows():
    x = torch.tensor([[[1.0, 2.0], [3.0, 40.0]], [[5.0, 60.0], [7.0, 8.0]]])
    qparams = affine.choose_qparams(x, symmetric=True, group_size=3, ragged=True)
    assert qparams.scale.shape == (2, 2)
    torch.testing.assert_close(qparams.scale * 127, torch.tensor([[3.0, 40.0], [60.0, 8.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_at_their_values(dtype):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    qparams = affine.choose_qparams(x)
    assert qparams.scale.dtype == torch.float32
    assert torch.equal(affine.quantize(x, qparams), affine.quantize(x.float(), affine.choose_qparams(x.float())))


@pytest.mark.parametrize(
    ("x", "arguments", "said"),
    [
        (torch.empty(0), {}, "empty"),
        (torch.empty(2, 0), {"axis": 0}, "empty"),
        (torch.tensor([1.0, float("nan")]), {}, "NaN"),
        (torch.tensor([1.0, float("inf")]), {}, "infinite"),
        (torch.tensor([1, 2]), {}, "float tensor.*int64"),
        (torch.ones(2), {"bits": 1}, "bits"),
        (torch.ones(2), {"bits": 9}, "bits"),
        (torch.ones(2), {"axis": 1}, "axis 1"),
        (torch.ones(2, 2), {"axis": 1, "group_size": 2}, "axis=1"),
        (torch.ones(2, 2), {"group_size": 0}, "group_size"),
        (torch.ones(2, 3, 2), {"group_size": 4}, r"group_size 4 does not divide a row of 6 .*one of \[1, 2, 3, 6\]"),
    ],
)
def test_what_has_no_range_is_refused(x, arguments, said):
    with pytest.raises(ValueError, match=said):
        affine.choose_qparams(x, **arguments)


def test_nan_has_no_integer():
    with pytest.raises(ValueError, match="NaN"):
        affine.quantize(torch.tensor([float("nan")]), affine.choose_qparams(torch.ones(1)))


def onnx_quantize_linear(x, scale, zero_point, qmin, qmax):
    """QuantizeLinear as the ONNX operator's text has it: saturate(round_half_to_even(x / y_scale) + y_zero_point)."""
    quotient = x.numpy() / scale.numpy()
    assert quotient.dtype == np.float32
    return torch.from_numpy(np.clip(np.rint(quotient) + zero_point.numpy(), qmin, qmax).astype(np.int32))


def onnx_dequantize_linear(q, scale, zero_point):
    """DequantizeLinear as the ONNX operator's text has it: (x - x_zero_point) * x_scale."""
    return torch.from_numpy((q.numpy() - zero_point.numpy()).astype(np.float32) * scale.numpy())


@quick
@given(x=tensors(), scheme=schemes)
def test_the_integers_and_what_they_stand_for_are_those_of_onnx(x, scheme):
    qparams = affine.choose_qparams(x, **scheme)
    x = torch.cat([x.flatten(), 2 * x.flatten()])
    q = onnx_quantize_linear(x, qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax)
    assert torch.equal(affine.quantize(x, qparams).int(), q)
    assert torch.equal(affine.dequantize(q, qparams), onnx_dequantize_linear(q, qparams.scale, qparams.zero_point))


def agrees_except_at_ties(ours, torchs, x, scale):
    """torch multiplies by the reciprocal of the scale, so at a tie its integer may be the neighbour."""
    quotient = x.double() / scale.double()
    near_tie = ((quotient - quotient.floor()) - 0.5).abs() < 1e-4
    difference = (ours.int() - torchs.int()).abs()
    return bool((difference[~near_tie] == 0).all() and (difference <= 1).all() and (~near_tie).double().mean() > 0.99)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_gets_the_same_integers_per_tensor(symmetric):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    qparams = affine.choose_qparams(x, symmetric=symmetric)
    x = 1.2 * x  # some of it saturates
    dtype = torch.qint8 if symmetric else torch.quint8
    theirs = torch.quantize_per_tensor(x, float(qparams.scale), int(qparams.zero_point), dtype)
    ours = affine.quantize(x, qparams)
    assert ours.dtype == theirs.int_repr().dtype
    assert agrees_except_at_ties(ours, theirs.int_repr(), x, qparams.scale)
    torch.testing.assert_close(affine.dequantize(theirs.int_repr(), qparams), theirs.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("axis", [0, 1])
def test_torch_gets_the_same_integers_per_channel(axis):
    x = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    qparams = affine.choose_qparams(x, symmetric=True, axis=axis)
    theirs = torch.quantize_per_channel(x, qparams.scale, qparams.zero_point, axis, torch.qint8)
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    assert agrees_except_at_ties(affine.quantize(x, qparams), theirs.int_repr(), x, qparams.scale.reshape(shape))


@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_chooses_the_same_range(symmetric):
    MinMaxObserver = pytest.importorskip("torch.ao.quantization").MinMaxObserver
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) + 0.3
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    theirs = MinMaxObserver(dtype=torch.qint8 if symmetric else torch.quint8, qscheme=qscheme)
    theirs(x)
    scale, zero_point = theirs.calculate_qparams()
    ours = affine.choose_qparams(x, symmetric=symmetric)
    # Symmetric: torch spreads max|x| over 127.5 steps a side, the course over 127.
    torch.testing.assert_close(ours.scale * (127 / 127.5 if symmetric else 1), scale.squeeze(), rtol=1e-6, atol=0)
    assert int(ours.zero_point) == int(zero_point)


def test_sqnr_is_the_ratio_of_powers_in_decibels():
    x = torch.tensor([10.0, 0.0])
    assert affine.sqnr(x, torch.tensor([10.0, 1.0])) == pytest.approx(20)
    assert affine.sqnr(x, x) == float("inf")


def test_each_bit_is_worth_six_decibels():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    levels = [affine.sqnr(x, affine.fake_quantize(x, affine.choose_qparams(x, bits=bits))) for bits in range(3, 9)]
    assert torch.tensor(levels).diff().tolist() == pytest.approx([6.02] * 5, abs=0.8)


# --- Clipping by least squared error


def squared_errors(x, qparams):
    """The squared error of all elements that share a scale, in the shape of the scale, with loops as in `spread`."""
    scales = torch.arange(float(qparams.scale.numel())).reshape(qparams.scale.shape)
    owner = spread(scales, x, qparams).long().flatten()
    error = (x.double() - affine.fake_quantize(x, qparams).double()).square().flatten()
    return torch.zeros(scales.numel(), dtype=torch.float64).index_add(0, owner, error)


@quick
@given(x=tensors(), scheme=schemes, granularity=granularities)
def test_clipping_by_error_is_never_worse_than_min_max_for_any_scale(x, scheme, granularity):
    wide = affine.choose_qparams(x, **scheme, **granularity)
    clipped = affine.choose_qparams(x, **scheme, **granularity, clip="mse")
    assert clipped.scale.shape == wide.scale.shape and clipped.scale.dtype == torch.float32
    assert (clipped.scale.double() <= wide.scale.double() * (1 + 1e-6)).all() or (wide.scale == 1).any()
    rounding = 1e-10 * x.double().square().sum()  # of float32, in products like those of the search
    assert (squared_errors(x, clipped) <= squared_errors(x, wide) * (1 + 1e-4) + rounding).all()
    zero = torch.zeros_like(x)
    assert torch.equal(affine.fake_quantize(zero, clipped), zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "slack"), [(2, 1.03), (3, 1.03), (4, 1.03), (8, 1.06)])
def test_the_fraction_found_is_nearly_the_best_of_all(bits, slack, symmetric):
    """At 8 bits the best fraction is often just below 1, where the next one tried is 0.96: 0.2 dB are left there."""
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].pow(3)  # a long tail
    x[2, 0] = 50.0
    low, high = affine.extremes(x, axis=0)

    def errors(qparams):
        return (x.double() - affine.fake_quantize(x, qparams).double()).square().sum(1)

    every = [
        errors(affine.qparams_from_range(low * f, high * f, bits=bits, symmetric=symmetric, axis=0))
        for f in torch.linspace(0.02, 1, 400, dtype=torch.float64)
    ]
    found = errors(affine.choose_qparams(x, bits=bits, symmetric=symmetric, axis=0, clip="mse"))
    assert (found <= slack * torch.stack(every).amin(0)).all()


def test_clipping_gains_most_where_bits_are_few():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    gains = []
    for bits in (2, 4, 8):
        wide, clipped = (affine.choose_qparams(x, bits=bits, symmetric=True, clip=clip) for clip in affine.CLIPS)
        gains.append(affine.sqnr(x, affine.fake_quantize(x, clipped)) - affine.sqnr(x, affine.fake_quantize(x, wide)))
    assert gains[0] > gains[1] > gains[2] >= 0 and gains[0] > 5


@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": 2}, {"group_size": 12}])
def test_clipping_gives_each_scale_what_it_would_get_alone(granularity):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    scheme = {"bits": 3, "symmetric": True, "clip": "mse"}
    found = affine.choose_qparams(x, **scheme, **granularity).scale
    if "group_size" in granularity:
        parts = x.reshape(8, 2, 12).flatten(0, 1)
    elif "axis" in granularity:
        parts = x.movedim(granularity["axis"], 0)
    else:
        parts = [x]
    assert torch.equal(found.flatten(), torch.stack([affine.choose_qparams(part, **scheme).scale for part in parts]))


def test_an_unknown_clipping_is_refused():
    with pytest.raises(ValueError, match="minmax, mse, got 'kl'"):
        affine.choose_qparams(torch.ones(2), clip="kl")


def test_a_map_for_a_whole_tensor_has_one_scale():
    two = affine.QParams(torch.ones(2), torch.zeros(2, dtype=torch.int32), -8, 7)
    with pytest.raises(ValueError, match="a tensor of shape .3,. does not fit parameters of shape .2,. with axis=None"):
        affine.quantize(torch.ones(3), two)


def test_what_is_not_finite_is_said_in_a_sentence():
    with pytest.raises(ValueError) as error:
        affine.extremes(torch.tensor([1.0, float("inf")]))
    assert str(error.value) == "the tensor holds NaN or infinite values, which have no place in a finite range"


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_without_width_has_scale_one(symmetric):
    qparams = affine.qparams_from_range(torch.zeros(3), torch.zeros(3), bits=4, symmetric=symmetric, axis=0)
    assert qparams.scale.tolist() == [1, 1, 1]
    assert qparams.zero_point.dtype == torch.int32 and qparams.scale.dtype == torch.float32


def test_by_default_a_range_is_asymmetric_and_unsigned():
    qparams = affine.qparams_from_range(-1.0, 2.0)
    assert (qparams.qmin, qparams.qmax, int(qparams.zero_point)) == (0, 255, 85)
    assert float(qparams.scale) == pytest.approx(3 / 255)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0), (0.0, 1e39)])
def test_a_range_without_two_ends_is_refused(ends):
    with pytest.raises(ValueError, match="^a range needs finite float32 ends, the lower one first$"):
        affine.qparams_from_range(*ends)


def test_a_number_has_no_groups():
    with pytest.raises(ValueError, match="^groups run within rows, and a tensor without dimensions has none$"):
        affine.choose_qparams(torch.tensor(1.0), group_size=2)
