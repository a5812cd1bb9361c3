import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils import affine
from course_utils.observers import MSE, Entropy, MinMax, MovingAverage, Percentile, _Histogram

thorough = settings(max_examples=500)
EVERY = [MinMax, MovingAverage, Percentile, MSE, Entropy]
PER_CHANNEL = [MinMax, MovingAverage]
batches = st.lists(
    st.tuples(
        st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e4, 3e38]), st.lists(st.floats(-1, 1, width=32), min_size=1)
    ).map(lambda drawn: drawn[0] * torch.tensor(drawn[1])),
    min_size=1,
    max_size=4,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(kind, n=20_000):
    """Activations as networks have them."""
    x = normal(n)
    if kind == "laplace":
        return torch.empty(n).exponential_(generator=torch.Generator().manual_seed(1)) * x.sign()
    if kind == "uniform":
        return torch.rand(n, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if kind == "outliers":
        x[: n // 500] = torch.linspace(20, 40, n // 500)
    return {"relu": x.relu(), "silu": torch.nn.functional.silu(3 * x)}.get(kind, x)


def ends(qparams):
    """The smallest and the largest number that the integers stand for."""
    q = torch.tensor([qparams.qmin, qparams.qmax])
    return affine.dequantize(q, qparams).tolist()


def squared_error(x, qparams):
    return float((x.double() - affine.fake_quantize(x, qparams).double()).square().sum())


def observed(observer, x, parts=1):
    for part in x.chunk(parts):
        assert observer.observe(part) is observer
    return observer


# --- What all observers share


@pytest.mark.parametrize("kind", EVERY)
def test_before_the_first_batch_there_is_no_range(kind):
    with pytest.raises(RuntimeError, match=r"observe\(x\)"):
        kind().qparams()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.empty(0), "empty"),
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("-inf")]), "infinite"),
        (torch.tensor([1e300], dtype=torch.float64), "infinite"),  # in float32
        (torch.tensor([1, 2]), r"float tensor.*int64.*x\.float\(\)"),
    ],
)
def test_what_has_no_range_is_refused_and_not_counted(kind, x, said):
    observer = kind().observe(torch.tensor([-1.0, 2.0]))
    before = observer.qparams()
    with pytest.raises(ValueError, match=said):
        observer.observe(x)
    assert observer.qparams() == before


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("bits", [1, 9, 4.0, "8", None])
def test_widths_that_do_not_exist_are_refused(kind, bits):
    with pytest.raises(ValueError, match="bits"):
        kind().observe(torch.ones(2)).qparams(bits=bits)


@pytest.mark.parametrize("kind", PER_CHANNEL)
def test_channels_must_be_there_and_stay_as_many(kind):
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        kind(axis=2).observe(torch.ones(3, 4))
    observer = kind(axis=1).observe(torch.ones(3, 4))
    with pytest.raises(ValueError, match="axis 1 had 4 channels in earlier batches, now 5"):
        observer.observe(torch.ones(3, 5))


@pytest.mark.parametrize("percentile", [50, 100.1, -1, float("nan")])
def test_percentiles_that_make_no_range_are_refused(percentile):
    with pytest.raises(ValueError, match="percentile must be above 50"):
        Percentile(percentile)


def test_an_average_that_keeps_nothing_is_the_last_batch():
    observer = MovingAverage(1).observe(torch.tensor([-9.0, 9.0])).observe(torch.tensor([-1.0, 2.0]))
    assert observer.qparams() == MinMax().observe(torch.tensor([-1.0, 2.0])).qparams()


@pytest.mark.parametrize("averaging", [0, 1.1, float("nan")])
def test_averages_that_forget_all_or_nothing_are_refused(averaging):
    with pytest.raises(ValueError, match="averaging must be above 0"):
        MovingAverage(averaging)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("number", [5.0, -5.0, 0.0, 1e-40, 3.4e38, -3.4e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_comes_back(kind, number, symmetric):
    x = torch.full((7,), number)
    found = affine.fake_quantize(x, observed(kind(), x, 3).qparams(symmetric=symmetric))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1.5e-36)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_at_their_values(kind, dtype):
    x = normal(200).to(dtype)
    assert kind().observe(x).qparams() == kind().observe(x.float()).qparams()


@pytest.mark.parametrize("kind", EVERY)
def test_strides_and_gradients_do_not_matter(kind):
    x = normal(6, 8).t().requires_grad_()
    found = kind().observe(x).qparams()
    assert found == kind().observe(x.detach().contiguous()).qparams()
    assert not found.scale.requires_grad


@pytest.mark.parametrize("kind", PER_CHANNEL)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_channel_is_observed_on_its_own(kind, axis, symmetric):
    x = normal(3, 3, 3, 400).movedim(-1, 0)[..., :3] * torch.tensor([1.0, 30.0, 0.0])
    observer = kind(axis=axis)
    for part in (x, 2 * x):
        observer.observe(part)
    found = observer.qparams(bits=4, symmetric=symmetric)
    for channel in range(x.shape[axis]):
        alone = kind().observe(x.select(axis, channel)).observe(2 * x.select(axis, channel))
        alone = alone.qparams(bits=4, symmetric=symmetric)
        assert (found.scale[channel], found.zero_point[channel]) == (alone.scale, alone.zero_point)
    affine.fake_quantize(x, found)


@thorough
@given(batches=batches, bits=st.integers(2, 8), symmetric=st.booleans(), signed=st.sampled_from([None, True, False]))
@pytest.mark.parametrize("kind", EVERY)
def test_zero_is_exact_and_the_range_is_that_of_min_max_or_narrower(kind, batches, bits, symmetric, signed):
    observer, widest = kind(), MinMax()
    for x in batches:
        observer.observe(x)
        widest.observe(x)
    found = observer.qparams(bits=bits, symmetric=symmetric, signed=signed)
    full = widest.qparams(bits=bits, symmetric=symmetric, signed=signed)
    assert (found.qmin, found.qmax) == (full.qmin, full.qmax)
    assert affine.fake_quantize(torch.zeros(1), found) == 0
    assert found.scale <= full.scale * (1 + 1e-6) or found.scale == 1  # 1 is for ranges too small for float32
    assert torch.isfinite(affine.fake_quantize(torch.cat(batches), found)).all()


# --- Min-max and its moving average


@thorough
@given(batches=batches, order=st.randoms(use_true_random=False))
def test_min_max_is_that_of_all_batches_in_any_order(batches, order):
    shuffled = order.sample(batches, len(batches))
    found = MinMax()
    for x in shuffled:
        found.observe(x)
    assert found.qparams() == affine.choose_qparams(torch.cat(batches))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", [MinMax, MovingAverage])
def test_torch_finds_the_same_range(kind, axis, symmetric):
    ao = pytest.importorskip("torch.ao.quantization")
    name = (
        ("MovingAverage" if kind is MovingAverage else "") + ("" if axis is None else "PerChannel") + "MinMaxObserver"
    )
    qscheme = f"per_{'tensor' if axis is None else 'channel'}_{'symmetric' if symmetric else 'affine'}"
    arguments = {} if axis is None else {"ch_axis": axis}
    theirs = getattr(ao, name)(
        dtype=torch.qint8 if symmetric else torch.quint8, qscheme=getattr(torch, qscheme), **arguments
    )
    ours = kind(axis=axis)
    for seed in range(20):
        x = normal(5, 7, 4, seed=seed) * (1 + seed % 3) + 0.3
        theirs(x)
        ours.observe(x)
    for end, theirs_end in ((ours._low, theirs.min_val), (ours._high, theirs.max_val)):  # torch averages in float32
        torch.testing.assert_close(end.float(), theirs_end, rtol=1e-6, atol=0)
    scale, zero_point = theirs.calculate_qparams()
    found = ours.qparams(symmetric=symmetric)
    # Symmetric: torch spreads max|x| over 127.5 steps a side, the course over 127.
    torch.testing.assert_close(
        found.scale.reshape(-1) * (127 / 127.5 if symmetric else 1), scale.reshape(-1), rtol=1e-6, atol=0
    )
    assert torch.equal(found.zero_point.reshape(-1), zero_point.reshape(-1).int())


def test_a_moving_average_forgets():
    observer = MovingAverage(0.5).observe(torch.tensor([-8.0, 8.0]))
    for _ in range(2):
        observer.observe(torch.tensor([-0.0, 4.0]))
    assert ends(observer.qparams())[1] == pytest.approx(5, abs=0.03)


# --- The histogram


@thorough
@given(batches=batches, order=st.randoms(use_true_random=False))
def test_a_histogram_that_grew_is_that_of_all_values_at_once(batches, order):
    grown, whole = _Histogram(), _Histogram()
    for x in order.sample(batches, len(batches)):
        grown.add(x)
    x = torch.cat(batches)
    whole.add(x)
    assert grown.exponent == whole.exponent
    assert torch.equal(grown.counts, whole.counts) and grown.zeros == whole.zeros
    assert grown.counts.sum() + grown.zeros == len(x)
    assert (grown.counts >= 0).all() and grown.zeros == (x == 0).sum()
    if (x != 0).any():
        assert float(grown.width) <= 4 * float(x.abs().max()) / grown.bins
        edges = (np.arange(grown.bins + 1) - grown.half) * float(grown.width)
        expected = np.histogram(x[x != 0].double().numpy(), edges)[0]
        assert np.array_equal(grown.counts.numpy(), expected)


def test_the_memory_of_a_histogram_is_bounded():
    observer = MSE()
    for k in range(40):
        observer.observe(normal(50, 3, seed=k) * 2.0 ** (k - 20))
    histogram = observer._histogram
    assert histogram.counts.shape == (_Histogram.bins,) and histogram.counts.nbytes == 64 * 1024
    assert histogram.counts.sum() + histogram.zeros == 6000


@pytest.mark.parametrize("kind", [Percentile, MSE, Entropy])
def test_the_order_of_the_batches_does_not_matter(kind):
    x = values("outliers")
    found = [observed(kind(), part, 7).qparams(bits=4) for part in (x, x.flip(0), x.sort().values)]
    assert found[0] == found[1] == found[2]


# --- Percentile


@pytest.mark.parametrize("percentile", [50.5, 90, 99, 99.9, 100])
@pytest.mark.parametrize("kind", ["gauss", "relu", "silu", "outliers"])
def test_a_percentile_is_that_of_the_magnitudes_to_one_bin(kind, percentile):
    x = values(kind)
    low, high = Percentile(percentile).observe(x)._range({})
    width = float(x.abs().max()) / 2048
    exact = float(x.abs().sort().values[math.ceil(round(len(x) * percentile / 100, 6)) - 1])
    assert max(-float(low), float(high)) == pytest.approx(exact, abs=width)
    assert ((x >= low) & (x <= high)).double().mean() >= percentile / 100 - 1e-9
    if percentile < 99.5:  # where neighbours are closer than a bin, torch's interpolation between them is no matter
        assert max(-float(low), float(high)) == pytest.approx(float(x.abs().quantile(percentile / 100)), abs=width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_hundred_percent_are_min_max(symmetric):
    for kind in ("gauss", "relu", "outliers"):
        x = values(kind)
        assert Percentile(100).observe(x).qparams(symmetric=symmetric) == MinMax().observe(x).qparams(
            symmetric=symmetric
        )


def test_a_share_that_zeros_fill_alone_still_leaves_a_range():
    x = torch.zeros(1000)
    x[0] = 4
    assert 0 < ends(Percentile(99).observe(x).qparams())[1] <= 4 / 1024


# --- Squared error


def least_error(x, bits, symmetric):
    """The least squared error over a fine grid of ranges, computed from the values themselves."""
    low, high = min(float(x.min()), 0), float(x.max())
    peak = max(-low, high)
    ranges = [(max(low, -peak * f), min(high, peak * f)) for f in np.linspace(1, 0.005, 400)]
    scheme = {"bits": bits, "symmetric": symmetric}
    return min(squared_error(x, affine.qparams_from_range(*ends, **scheme)) for ends in ranges)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "relu", "silu", "uniform", "outliers"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_squared_error_is_near_the_least(kind, symmetric, bits):
    x = values(kind)
    error = squared_error(x, observed(MSE(), x, 3).qparams(bits=bits, symmetric=symmetric))
    assert error <= 1.02 * least_error(x, bits, symmetric)
    assert error <= 1.001 * squared_error(x, MinMax().observe(x).qparams(bits=bits, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["gauss", "relu", "outliers"])
def test_the_error_told_by_the_histogram_is_that_of_the_values(kind, symmetric):
    x = values(kind)
    observer = MSE().observe(x)
    thresholds = float(x.abs().max()) * torch.tensor([1, 0.7, 0.2], dtype=torch.float64)
    told = observer._errors(thresholds, {"bits": 6, "symmetric": symmetric, "signed": None})
    for threshold, error in zip(thresholds, told, strict=True):
        ends = observer._cut(threshold)
        found = squared_error(x, affine.qparams_from_range(*ends, bits=6, symmetric=symmetric))
        assert float(error) == pytest.approx(found, rel=0.01)


def test_fewer_bits_clip_more():
    observer = MSE().observe(values("laplace"))
    widths = [ends(observer.qparams(bits=bits, symmetric=True))[1] for bits in (8, 6, 4, 3)]
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] / 2


# --- Entropy


def test_the_smallest_threshold_that_is_tried_gives_each_bin_a_level_of_its_own():
    counts = [
        1000,
        10,
        900,
        20,
        800,
        30,
        700,
        40,
    ]  # in the first bins, of 1/4096 each; signed 4 bits have as many levels
    x = torch.cat([torch.full((n,), (bin + 0.5) / 4096) for bin, n in enumerate(counts)] + [torch.tensor([0.999])])
    _, high = Entropy().observe(x)._range({"bits": 4, "symmetric": True, "signed": None})
    assert float(high) == len(counts) / 4096


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_clips_outliers(symmetric):
    low, high = ends(Entropy().observe(values("outliers")).qparams(bits=4, symmetric=symmetric))
    assert 1 < high < 6


def test_entropy_counts_the_levels_of_the_wider_side():
    x = torch.cat([values("outliers").abs(), torch.tensor([-0.1])])
    right, left = (Entropy().observe(sign * x).qparams(bits=4) for sign in (1, -1))
    (low, high), (mirrored_low, mirrored_high) = ends(right), ends(left)
    assert high > 1 > -low and (mirrored_low, mirrored_high) == pytest.approx((-high, -low), rel=0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_keeps_what_is_spread_evenly(symmetric, bits):
    low, high = ends(Entropy().observe(values("uniform", 100_000)).qparams(bits=bits, symmetric=symmetric))
    assert high > 0.98 - (0.07 if bits == 4 else 0) and low < -0.98 + (0.07 if bits == 4 else 0)


def test_a_spike_of_zeros_does_not_move_the_range():
    x = values("relu")
    spiked = torch.cat([x, torch.zeros(10 * len(x))])
    assert Entropy().observe(x).qparams() == Entropy().observe(spiked).qparams()
    assert Entropy().observe(x).qparams() == Entropy().observe(x[x > 0]).qparams()


def reference_threshold(x, levels, bins):
    """The calibration of the TensorRT slides, loop by loop, over every threshold that does not end in an empty bin."""
    bound = 2.0 ** np.ceil(np.log2(np.abs(x).max()))
    histogram = np.histogram(np.abs(x[x != 0]), bins, (0, bound))[0].astype(float)
    best = np.inf, None
    for i in range(levels, bins + 1):
        if histogram[i - 1] == 0:
            continue
        p = histogram[:i].copy()
        p[-1] += histogram[i:].sum()
        q = np.zeros(i)
        level = np.arange(i) * levels // i
        for k in range(levels):
            inside = (level == k) & (histogram[:i] > 0)
            if inside.any():
                q[inside] = histogram[:i][inside].mean()
        p, q = p / p.sum(), q / q.sum()
        divergence = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
        best = min(best, (divergence, i * bound / bins))
    return best


@pytest.mark.parametrize("kind", ["gauss", "relu", "outliers"])
def test_entropy_is_that_of_a_plain_loop(kind, monkeypatch):
    monkeypatch.setattr(_Histogram, "bins", 1024)
    x = values(kind)
    divergence, threshold = reference_threshold(x.double().numpy(), levels=8, bins=512)
    low, high = Entropy().observe(x)._range({"bits": 4, "symmetric": True, "signed": None})
    assert max(-float(low), float(high)) == pytest.approx(min(threshold, float(x.abs().max())))
