import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from course_utils import measure, sensitivity, simulate, weights
from course_utils.sensitivity import Sensitivity
from course_utils.simulate import Policy
from tests.conftest import fingerprint

BATCHES = [
    (torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(20) % 10) for i in range(2)
]


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    model[1].running_var.fill_(0.1)
    model[5].weight.data *= 10
    return model.eval()


def layer(name, n, divergence):
    nothing = measure.compare_predictions(*[torch.zeros(1, dtype=torch.long)] * 3)
    return Sensitivity(name, n, 20.0, divergence, nothing)


def test_each_row_is_the_network_with_that_one_layer_rounded(small):
    before = fingerprint(small)
    found = sensitivity.scan(small, Policy(weights=3), BATCHES)
    assert fingerprint(small) == before
    assert [(row.name, row.n) for row in found] == [("0", 8 * 3 * 9), ("5", 80)]
    folded = weights.fold_batch_norm(small)
    for row, other in zip(found, ("5", "0"), strict=True):
        rounded = simulate.quantize(small, Policy(weights=3, layers={other: None}))
        assert row.comparison == measure.compare(folded, rounded, BATCHES)
        with torch.no_grad():
            p, q = (torch.cat([model(x) for x, _ in BATCHES]).log_softmax(1) for model in (folded, rounded))
        assert row.divergence == pytest.approx(
            float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")), 1e-4
        )


def test_more_bits_hurt_less_and_finer_scales_too(small):
    few, many, shared, own = (
        sensitivity.scan(small, policy, BATCHES)
        for policy in (Policy(2), Policy(6), Policy(4, granularity="tensor"), Policy(4, granularity=8))
    )
    for worse, better in ((few, many), (shared, own)):
        assert all(a.sqnr < b.sqnr and a.divergence > b.divergence for a, b in zip(worse, better, strict=True))


def test_a_scan_without_images_is_refused(small):
    with pytest.raises(ValueError, match="no images"):
        sensitivity.scan(small, Policy(4), [])


layers = st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 10)), min_size=1, max_size=12)


@given(layers, st.floats(2, 8))
def test_a_budget_is_kept_and_not_left_unspent(drawn, average):
    found = [layer(str(i), n, d) for i, (n, d) in enumerate(drawn)]
    bits = sensitivity.spend(found, average)
    total = sum(row.n for row in found)
    spent = sum(row.n * bits[row.name] for row in found)
    assert set(bits.values()) <= set(range(2, 9))
    assert spent <= average * total + 1e-6
    assert all(bits[row.name] == 8 or spent + row.n > average * total - 1e-6 for row in found)


def test_the_bits_are_those_of_the_least_damage():
    found = [layer("tough", 1000, 0.01), layer("tender", 1000, 1.0), layer("small", 10, 0.01)]
    # By hand: 4040 bits to spend. Per weight the next bit is worth 1e-3, 2.5e-4, 6e-5, 1.6e-5 to "tender" and to "small",
    # 1e-5 to "tough": four each go to the first two, 4000 + 40, and nothing is left.
    assert sensitivity.spend(found, 4.01) == {"tough": 2, "tender": 6, "small": 6}


def test_equal_layers_get_equal_bits():
    assert set(sensitivity.spend([layer(str(i), 100, 0.5) for i in range(5)], 4).values()) == {4}


def test_budgets_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="every layer takes at least 3"):
        sensitivity.spend([layer("a", 1, 1.0)], 2.5, fewest=3)
    with pytest.raises(ValueError, match="fewest <= most"):
        sensitivity.spend([layer("a", 1, 1.0)], 4, fewest=5, most=3)
