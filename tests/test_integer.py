from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils import backends, data, integer, models

thorough = settings(max_examples=500)
reals = st.floats(2.0**-32, 2.0**29)


def exact_requantize(acc, m0, shift, zero_point, qmin, qmax):
    """The same with exact rational numbers; Python's round goes half to even."""
    return min(max(round(Fraction(acc * m0, 2**shift)) + zero_point, qmin), qmax)


@thorough
@given(real=reals)
def test_a_multiplier_is_accurate_to_31_bits(real):
    m0, shift = (int(part) for part in integer.quantize_multiplier(real))
    assert abs(Fraction(m0, 2**shift) - Fraction(real)) <= Fraction(real) / 2**31
    assert 2**30 <= m0 < 2**31


def test_a_multiplier_of_a_power_of_two_is_exact_and_one_too_small_for_any_sum_rounds_to_zero():
    m0, shift = integer.quantize_multiplier(torch.tensor([0.25, 1.0, 2.0**20]))
    assert torch.equal(m0.double() / 2.0**shift, torch.tensor([0.25, 1.0, 2.0**20]).double())
    m0, shift = integer.quantize_multiplier(1e-30)
    assert integer.requantize(torch.tensor([2**31 - 1, -(2**31)]), m0, shift, 7, 0, 255).tolist() == [7, 7]


@pytest.mark.parametrize("power", range(20, 64))
def test_small_multipliers_shift_by_62_at_most_and_keep_their_value(power):
    m0, shift = (int(part) for part in integer.quantize_multiplier(0.75 * 2.0**-power))
    assert shift == min(62, 31 + power)
    assert abs(Fraction(m0, 2**shift) - Fraction(3, 4 * 2**power)) < Fraction(1, 2**62)


def test_a_mantissa_that_rounds_up_to_one_keeps_to_31_bits():
    m0, shift = integer.quantize_multiplier(1 - 2**-40)
    assert (int(m0), int(shift)) == (2**30, 30)


@pytest.mark.parametrize("real", [0.0, -1.0, float("nan"), float("inf"), 2.0**30])
def test_a_multiplier_without_integers_is_refused(real):
    with pytest.raises(ValueError, match="positive and at most"):
        integer.quantize_multiplier(real)


@thorough
@given(
    acc=st.integers(-(2**31), 2**31 - 1),
    real=reals,
    zero_point=st.integers(-128, 255),
    ends=st.sampled_from([(0, 255), (-128, 127), (0, 127), (-8, 7)]),
)
def test_requantization_equals_exact_arithmetic(acc, real, zero_point, ends):
    m0, shift = integer.quantize_multiplier(real)
    q = integer.requantize(torch.tensor(acc, dtype=torch.int32), m0, shift, zero_point, *ends)
    assert int(q) == exact_requantize(acc, int(m0), int(shift), zero_point, *ends)


def test_ties_go_to_the_even_neighbour_on_both_sides_of_zero():
    acc = torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7], dtype=torch.int32)
    q = integer.requantize(acc, *integer.quantize_multiplier(0.5), 0, -128, 127)
    assert q.tolist() == [-4, -2, -2, 0, 0, 2, 2, 4] and q.dtype == torch.int8


def test_requantizing_real_numbers_is_refused():
    with pytest.raises(ValueError, match="acc must hold integers, got torch.float32"):
        integer.requantize(torch.ones(2), 2**30, 30, 0, 0, 255)


geometries = st.fixed_dictionaries(
    {
        "stride": st.sampled_from([1, 2, (2, 1)]),
        "padding": st.sampled_from([0, 1, (0, 2)]),
        "dilation": st.sampled_from([1, 2]),
        "groups": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=60)
@given(geometry=geometries, side=st.sampled_from([7, 11]), zero_point=st.integers(0, 255), seed=st.integers(0, 99))
def test_a_convolution_is_the_sum_of_its_products(geometry, side, zero_point, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (2, 4, side, side), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (6, 4 // geometry["groups"], 3, 3), generator=generator).to(torch.int8)
    bias = torch.randint(-(2**20), 2**20, (6,), generator=generator).int()
    found = integer.conv2d_accumulate(q, w, bias, zero_point, **geometry)
    exact = F.conv2d(q.double() - zero_point, w.double(), bias.double(), **geometry)  # below 2**53, so exact too
    assert found.dtype == torch.int32 and torch.equal(found.double(), exact)


def test_by_default_a_convolution_goes_step_by_step_over_all_channels_without_padding_and_gaps():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (2, 3, 8, 8), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (5, 3, 3, 3), generator=generator).to(torch.int8)
    numbers = {"zero_point": 7, "m0": 2**30, "shift": 42, "out_zero_point": 3}
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    expected = integer.conv2d_accumulate(q, w, None, 7, **plain)
    assert expected.shape == (2, 5, 6, 6) and torch.equal(integer.conv2d_accumulate(q, w, zero_point=7), expected)
    assert torch.equal(integer.conv2d(q, w, None, **numbers), integer.conv2d(q, w, None, **numbers, **plain))


@pytest.mark.parametrize("which", ["q", "weight", "bias"])
def test_sums_of_real_numbers_are_refused(which):
    image = {"q": torch.ones(1, 1, 3, 3).byte(), "weight": torch.ones(1, 1, 3, 3).char(), "bias": torch.ones(1).int()}
    row = {"q": torch.ones(1, 3).byte(), "weight": torch.ones(2, 3).char(), "bias": torch.ones(2).int()}
    for accumulate, numbers in ((integer.conv2d_accumulate, image), (integer.linear_accumulate, row)):
        accumulate(**numbers, zero_point=0)
        with pytest.raises(ValueError, match=f"^{which} must hold integers, got torch.float32: quantize it first"):
            accumulate(**numbers | {which: numbers[which].float()}, zero_point=0)


@pytest.mark.parametrize("geometry", [{}, {"dilation": 2}, {"groups": 2}, {"stride": 2, "padding": 1}])
@pytest.mark.parametrize("side", [7, 11])
def test_a_batch_without_images_has_accumulators_of_none(geometry, side):
    q = torch.zeros(0, 4, side, side, dtype=torch.uint8)
    w = torch.full((6, 4 // geometry.get("groups", 1), 3, 3), 127, dtype=torch.int8)
    acc = integer.conv2d_accumulate(q, w, zero_point=3, **geometry)
    expected = F.conv2d(q.float(), w.float(), **geometry).shape
    assert acc.dtype == torch.int32 and acc.shape == expected
    assert integer.PairSaturation(w, **geometry)(q, 3).shape == expected


def test_padding_adds_real_zeros():
    q = torch.full((1, 1, 2, 2), 5, dtype=torch.uint8)
    w = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    assert (integer.conv2d_accumulate(q, w, zero_point=5, padding=1) == 0).all()


def layer(op, q, weight, bias, real, **kwargs):
    m0, shift = integer.quantize_multiplier(real)
    return op(q, weight, bias, zero_point=3, m0=m0, shift=shift, out_zero_point=10, **kwargs)


@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_requantizes_every_channel_with_its_own_multiplier(relu):
    torch.manual_seed(0)
    q, w = torch.randint(0, 256, (3, 5)).to(torch.uint8), torch.randint(-128, 128, (4, 5)).to(torch.int8)
    bias, real = torch.randint(-999, 999, (4,)).int(), torch.tensor([1e-3, 2e-3, 1.0, 1e-5])
    ends = {"qmin": 10 if relu else 0, "qmax": 255}
    found = layer(integer.linear, q, w, bias, real, **ends)
    m0, shift = integer.quantize_multiplier(real)
    for n in range(3):
        for o in range(4):
            acc = sum((int(a) - 3) * int(b) for a, b in zip(q[n], w[o], strict=True)) + int(bias[o])
            assert int(found[n, o]) == exact_requantize(acc, int(m0[o]), int(shift[o]), 10, *ends.values())
    as_pixels = layer(integer.conv2d, q[:, :, None, None], w[:, :, None, None], bias, real, **ends)
    assert torch.equal(as_pixels.flatten(1), found)


def test_layers_refuse_real_numbers():
    q, w = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="weight must hold integers.*quantize it first"):
        layer(integer.linear, q, w, None, 0.1)
    with pytest.raises(ValueError, match="a must hold integers"):
        integer.add(w, q, zero_points=(0, 0), multipliers=(1, 1, 1), out_zero_point=0)


@thorough
@given(
    a=st.integers(0, 255),
    b=st.integers(0, 255),
    zeros=st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)),
    scales=st.tuples(*[st.floats(1e-4, 10)] * 3),
)
def test_an_addition_with_two_scales_rounds_once(a, b, zeros, scales):
    multipliers = integer.add_multipliers(*scales)
    q = integer.add(
        torch.tensor([a], dtype=torch.uint8),
        torch.tensor([b], dtype=torch.uint8),
        zero_points=zeros[:2],
        multipliers=multipliers,
        out_zero_point=zeros[2],
    )
    one, two, out = (Fraction(scale) for scale in scales)
    real = (one * (a - zeros[0]) + two * (b - zeros[1])) / out + zeros[2]
    # Half a step from the rounding, and two multipliers of 31 bits.
    tolerance = Fraction(1, 2) + 255 * (one + two) / out / 2**29
    assert abs(min(max(real, 0), 255) - int(q)) <= tolerance


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, None, 0), ((3, 1), (1, 2), (1, 0))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_max_pooling_as_torch_does_it(kernel, stride, padding, dtype):
    torch.manual_seed(0)
    limits = torch.iinfo(dtype)
    q = torch.randint(limits.min, limits.max + 1, (2, 3, 9, 8)).to(dtype)
    expected = F.max_pool2d(q.float(), kernel, stride, padding)
    assert torch.equal(integer.max_pool2d(q, kernel, stride, padding).float(), expected)


def test_the_mean_of_a_channel_rounds_half_to_even_around_its_zero():
    q = torch.tensor([[[[10, 11], [10, 11]], [[11, 12], [11, 12]], [[10, 10], [10, 11]]]], dtype=torch.uint8)
    assert integer.global_avg_pool2d(q, zero_point=10).flatten().tolist() == [10, 12, 10]


@pytest.mark.parametrize("height, width", [(2, 3), (1, 10), (2, 19), (7, 7), (8, 8)])
def test_a_mean_is_the_sum_times_the_multiplier_of_one_by_the_count(height, width):
    """Also halfway between two integers, where the last bit of the multiplier decides."""
    count = height * width
    ones = torch.arange(count + 1)[:, None] > torch.arange(count)  # none, one, two, … all of them
    q = ones.reshape(1, count + 1, height, width).to(torch.uint8)
    expected = integer.requantize(ones.sum(1).int(), *integer.quantize_multiplier(1 / count), 0, 0, 255)
    assert torch.equal(integer.global_avg_pool2d(q, zero_point=0).flatten().int(), expected.int())


def test_a_bias_counts_in_steps_of_both_scales_and_must_fit():
    assert integer.quantize_bias(torch.tensor([0.5, -1.0]), torch.tensor([0.1, 0.25])).tolist() == [5, -4]
    with pytest.raises(
        ValueError, match="no room in an int32 accumulator: .* almost all zero, so choose a larger scale for them$"
    ):
        integer.quantize_bias(torch.tensor([1.0]), torch.tensor([1e-12]))


# Whole models ----------------------------------------------------------------------------------------------------------


def compare_layers(quantized, images):
    """Feed each step what the library's own step was fed; return {name: (op, largest difference, share that is equal)}."""
    ours, library, found = integer.IntegerModel(quantized), backends.integers(quantized, images), {}
    for step in ours.steps[:-1]:
        inputs = [library[name] for name in step.inputs] or [images]
        difference = (ours.run(step, *inputs).int() - library[step.name].int()).abs()
        found[step.name] = step.op, int(difference.max()), float((difference == 0).double().mean())
    assert ours.steps[-1].op == "dequantize"
    return found


@pytest.fixture(scope="module")
def trained():
    return models.load("resnet18").eval()


@pytest.fixture(scope="module", params=[True, False], ids=["per channel", "per tensor"])
def int8(request, trained):
    calibration = data.batches(data.fashion_mnist("calibration"), 64, limit=128)
    return backends.quantize_static(trained, calibration, per_channel=request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["per channel", "per tensor"])
def full_range(request, trained):
    """All 8 bits of weights, whatever the engine here needs: `IntegerModel` then tells what would overflow."""
    calibration = data.batches(data.fashion_mnist("calibration"), 64, limit=128)
    return backends.quantize_static(trained, calibration, per_channel=request.param, reduce_range=False)


@pytest.fixture(scope="module")
def photos():
    return next(iter(data.batches(data.fashion_mnist("validation"), 60)))[0]


def test_every_layer_of_resnet18_is_within_one_of_the_kernel_and_nearly_all_integers_equal_it(int8, photos):
    layers = compare_layers(int8, photos)
    assert sum(op in ("conv2d", "linear") for op, _, _ in layers.values()) == 21
    # A bias is counted in steps of the sum. 7-bit weights make those twice as wide, and so what its rounding may change; and a
    # few of the 600 logits are a larger share than a few of the millions of integers before them.
    most_differ = 0.006 if backends.recipe_of(int8)["reduce_range"] else 0.002
    for name, (op, largest, equal) in layers.items():
        assert largest <= 1 and equal >= 1 - most_differ, (name, op, largest, equal)
        rounds = op in ("conv2d", "linear", "add")  # the kernel's multipliers are float32: near a tie the two may part
        assert rounds or equal == 1, f"{name}: {op} should have nothing to disagree about"


def test_resnet18_on_integers_predicts_what_the_kernels_predict(int8, photos):
    with torch.no_grad():
        assert torch.equal(integer.IntegerModel(int8)(photos).argmax(1), int8(photos).argmax(1))


def test_every_layer_of_mobilenet_v2_is_within_one_of_the_kernel(photos):
    calibration = data.batches(data.fashion_mnist("calibration"), 64, limit=128)
    int8 = backends.quantize_static(models.load("mobilenet_v2").eval(), calibration)
    layers = compare_layers(int8, photos)
    assert sum(op == "conv2d" for op, _, _ in layers.values()) == 52
    for name, (op, largest, equal) in layers.items():
        assert largest <= 1 and equal >= 0.99, (name, op, largest, equal)


class NoReals(TorchDispatchMode):
    """Collects the operations that make tensors of real numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.found.append(str(function))
        return result


def test_between_the_entrance_and_the_logits_no_real_number_is_computed(int8, photos):
    model = integer.IntegerModel(int8)
    first, *middle, last = model.steps
    assert (first.op, last.op) == ("quantize", "dequantize")
    values = {first.name: model.run(first, photos[:4])}
    with NoReals() as reals_made:
        for step in middle:
            values[step.name] = model.run(step, *(values[name] for name in step.inputs))
            assert not values[step.name].is_floating_point()
    assert not [name for name in reals_made.found if name != "aten.lift_fresh.default"], reals_made.found
    assert torch.equal(model.run(last, values[last.inputs[0]]), model(photos[:4]))


def test_a_saved_and_loaded_model_runs_on_integers_too(int8, photos, tmp_path):
    backends.save(int8, tmp_path / "model.safetensors")
    again = integer.IntegerModel(backends.load(tmp_path / "model.safetensors"))
    assert torch.equal(again(photos[:8]), integer.IntegerModel(int8)(photos[:8]))


def test_a_model_trained_quantization_aware_runs_on_integers_too(resnet18, calibration, images):
    prepared = backends.prepare_qat(resnet18)
    for batch, _ in calibration:
        prepared(batch)
    for name, (op, largest, equal) in compare_layers(backends.convert_qat(prepared.eval()), images).items():
        assert largest <= 1 and equal >= 0.99, (name, op, largest, equal)


class Awkward(nn.Module):
    """A channel with hardly any weight but a bias, a hardtanh that has no counterpart."""

    def __init__(self, clip=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.end = nn.Hardsigmoid() if clip else nn.ReLU()

    def forward(self, x):
        return self.end(self.conv(x))


def test_a_channel_with_a_bias_and_hardly_any_weight_still_comes_out_right(calibration, images):
    torch.manual_seed(0)
    model = Awkward().eval()
    with torch.no_grad():
        model.conv.weight[1] = 1e-12
        model.conv.bias[1] = 1.0
    quantized = backends.quantize_static(model, calibration)
    assert all(largest <= 1 for _, largest, _ in compare_layers(quantized, images).values())


def test_models_that_do_not_run_on_integers_are_refused_by_name(resnet18, calibration):
    for model in (resnet18, backends.quantize_dynamic(resnet18)):
        with pytest.raises(ValueError, match="not a statically quantized model: pass what backends.quantize_static"):
            integer.IntegerModel(model)
    quantized = backends.quantize_static(Awkward(clip=True).eval(), calibration)
    with pytest.raises(ValueError, match="(?i)hardsigmoid has no integer counterpart"):
        integer.IntegerModel(quantized)
    with pytest.raises(ValueError, match="only statically quantized"):
        backends.integers(backends.quantize_dynamic(resnet18), torch.zeros(1, 3, 32, 32))


# Saturation ------------------------------------------------------------------------------------------------------------


def saturated_sum(inputs, weights):
    """Σ over pairs, each pair's sum limited to 16 bits, in plain Python."""
    total = 0
    for k in range(0, len(inputs), 2):
        pair = sum(a * b for a, b in zip(inputs[k : k + 2], weights[k : k + 2], strict=True))
        total += min(max(pair, -(2**15)), 2**15 - 1)
    return total


@pytest.mark.parametrize("channels", [4, 5])
def test_pair_saturation_equals_plain_python(channels):
    torch.manual_seed(0)
    q = torch.randint(150, 256, (3, channels)).to(torch.uint8)
    w = torch.randint(60, 128, (4, channels)).to(torch.int8) * torch.tensor([[1], [-1], [1], [-1]], dtype=torch.int8)
    exact = integer.linear_accumulate(q, w)
    lost = integer.PairSaturation(w)(q, 0)
    for n in range(3):
        for o in range(4):
            assert int(exact[n, o] - lost[n, o]) == saturated_sum(q[n].tolist(), w[o].tolist())
    assert lost.any()


@settings(max_examples=30)
@given(geometry=geometries, zero_point=st.integers(0, 255), seed=st.integers(0, 99))
def test_pair_saturation_of_a_convolution_loses_tap_by_tap(geometry, zero_point, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (2, 4, 7, 7), generator=generator)
    w = torch.randint(-128, 128, (6, 4 // geometry["groups"], 3, 3), generator=generator)
    padding = integer._pair(geometry["padding"])
    padded = F.pad(q, (padding[1], padding[1], padding[0], padding[0]), value=zero_point)
    rest = geometry | {"padding": 0}
    expected = 0
    for i in range(3):
        for j in range(3):
            for pair in range(w.shape[1] // 2):
                one = torch.zeros_like(w)  # only the two weights of this pair
                one[:, 2 * pair : 2 * pair + 2, i, j] = w[:, 2 * pair : 2 * pair + 2, i, j]
                exact = F.conv2d(padded, one, **rest)
                expected = expected + exact - exact.clamp(-(2**15), 2**15 - 1)
    assert torch.equal(integer.PairSaturation(w, **geometry)(q, zero_point).long(), expected)


def test_seven_bits_leave_nothing_to_lose():
    worst = torch.full((8, 64), 127, dtype=torch.int8)
    assert not integer.PairSaturation(worst)(torch.full((2, 64), 127, dtype=torch.uint8), 0).any()
    assert integer.PairSaturation(worst)(torch.full((2, 64), 255, dtype=torch.uint8), 0).all()


def test_a_saturating_model_differs_from_the_exact_one_only_where_pairs_overflow(full_range, photos):
    exact, saturating = integer.IntegerModel(full_range), integer.IntegerModel(full_range, pair_saturation=True)
    values = {"": photos[:10]}
    differing = 0
    for step in exact.steps:
        inputs = [values[name] for name in step.inputs or ("",)]
        values[step.name] = exact.run(step, *inputs)
        if step.op in ("conv2d", "linear"):
            differing += int((saturating.run(step, *inputs) != values[step.name]).sum())
    assert differing > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 49, 63, 64, 65])
def test_the_mean_divides_by_the_count_as_a_multiplier(count, monkeypatch):
    used = []
    monkeypatch.setattr(integer, "requantize", lambda total, m0, shift, *rest: used.append((m0, shift)) or total)
    integer.global_avg_pool2d(torch.ones(1, 1, 1, count, dtype=torch.uint8), zero_point=0)
    assert used == [tuple(map(int, integer.quantize_multiplier(1 / count)))]
