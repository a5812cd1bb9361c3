import copy

import pytest
import torch
from torch import nn

from course_utils import affine, backends, data, models, qat, simulate, training, weights
from course_utils.simulate import Policy

W4A8 = Policy(weights=4, activations=8)


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
    )
    norm = model[1]
    nn.init.uniform_(norm.weight, -1, 2)  # a batch norm may flip a channel
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    return model.eval()


@pytest.fixture(scope="module")
def some():
    return data.fashion_mnist("train", size=28).subset(slice(2000))


@pytest.fixture(scope="module")
def calibration():
    return data.batches(data.fashion_mnist("calibration", size=28), 50, limit=100)


@pytest.fixture(scope="module")
def x(calibration):
    return next(iter(calibration))[0]


# The two ways through the rounding


def numbers(signed=True, count=1000):
    x = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return x if signed else x + 0.7


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_forward_passes_are_the_affine_map(bits, symmetric):
    x = numbers(symmetric)
    p = affine.choose_qparams(x / 2, bits=bits, symmetric=symmetric)  # half the range, so that something is clipped
    expected = affine.fake_quantize(x, p)
    arguments = p.scale, p.zero_point.float(), p.qmin, p.qmax
    assert torch.equal(qat.StraightThrough.apply(x, *arguments, True), expected)
    torch.testing.assert_close(qat.LearnedStep.apply(x, *arguments, 1.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [True, False])
def test_the_straight_through_gradient_is_the_identity_and_the_mask_stops_what_is_clipped(mask):
    x = numbers().requires_grad_()
    scale, gradient = torch.tensor(0.2), numbers(False)
    qat.StraightThrough.apply(x, scale, torch.tensor(0), -4, 3, mask).backward(gradient)
    q = torch.round(x.detach() / scale)
    inside = (q >= -4) & (q <= 3)
    assert 0 < inside.sum() < len(x)
    assert torch.equal(x.grad, gradient * inside if mask else gradient)


def test_without_the_straight_through_estimator_nothing_learns():
    w = torch.full((5,), 0.3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0)
    for rounding, moves in ((lambda v: torch.round(v * 4) / 4, False), (_by_hand, True)):
        before = w.detach().clone()
        optimizer.zero_grad()
        (rounding(w) - 2).square().sum().backward()
        optimizer.step()
        assert bool((w != before).all()) == moves


def _by_hand(w):
    return qat.StraightThrough.apply(w, torch.tensor(0.25), torch.tensor(0), -128, 127, True)


def _surrogate(x, scale, zero_point, qmin, qmax):
    """The same function out of torch's own operations, with the rounding taken out of the derivative."""
    ratio = (x / scale).clamp(qmin - zero_point, qmax - zero_point)
    return (ratio + (ratio.round() - ratio).detach()) * scale


@pytest.mark.parametrize("zero_point", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(), (20, 1)])
def test_the_gradients_of_the_learned_step_are_those_that_autograd_derives(zero_point, shape):
    gradient = numbers(False).reshape(20, 50)
    found = []
    for function in (lambda *a: qat.LearnedStep.apply(*a, 0.25), _surrogate):
        x = numbers().reshape(20, 50).requires_grad_()
        scale = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.1).requires_grad_()
        function(x, scale, torch.tensor(zero_point), -4, 3).backward(gradient)
        found.append((x.grad, scale.grad))
    (x_ours, scale_ours), (x_theirs, scale_theirs) = found
    torch.testing.assert_close(x_ours, x_theirs)
    torch.testing.assert_close(scale_ours, 0.25 * scale_theirs, rtol=1e-4, atol=1e-4)


def test_the_learned_step_agrees_with_torchs_own_kernel():
    x = numbers()
    # Up to half a step beyond the range torch counts a value as inside, because it rounds to the end; the paper does not.
    x = x[((x / 0.21 < -4.5) | (x / 0.21 > -4)) & ((x / 0.21 < 3) | (x / 0.21 > 3.5))]
    gradient = numbers(False, len(x))
    found = []
    for kernel in (False, True):
        x_, scale = x.clone().requires_grad_(), torch.tensor([0.21], requires_grad=True)
        if kernel:
            zero = torch.zeros(1, requires_grad=True)
            y = torch._fake_quantize_learnable_per_tensor_affine(x_, scale, zero, -4, 3, 0.5)
        else:
            y = qat.LearnedStep.apply(x_, scale, torch.zeros(1), -4, 3, 0.5)
        y.backward(gradient)
        found.append((y.detach(), x_.grad, scale.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_learned_scale_finds_the_best_one():
    x = numbers(count=5000)
    quantizer = qat.LearnedScale(affine.choose_qparams(x, bits=3, symmetric=True), gradient_scale=1.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    best = affine.choose_qparams(x, bits=3, symmetric=True, clip="mse").scale
    assert float(quantizer.qparams().scale) == pytest.approx(float(best), rel=0.1)


def test_a_scale_that_the_optimizer_carried_below_zero_does_no_harm():
    quantizer = qat.LearnedScale(affine.choose_qparams(torch.ones(4), bits=4, symmetric=True))
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    assert quantizer(torch.ones(2, 2)).isfinite().all() and quantizer.qparams().scale > 0


def test_an_observed_scale_follows_what_it_sees_while_training_and_only_then():
    quantizer = qat.ObservedScale(affine.choose_qparams(torch.tensor([0.0, 1.0])), 8, symmetric=False, averaging=0.5)
    quantizer.eval()(torch.tensor([0.0, 3.0]))
    assert float(quantizer.qparams().scale) == pytest.approx(1 / 255)
    quantizer.train()(torch.tensor([0.0, 3.0]))
    assert float(quantizer.scale) == pytest.approx(2 / 255)
    quantizer.disable_observer()
    quantizer(torch.tensor([0.0, 9.0]))
    assert float(quantizer.scale) == pytest.approx(2 / 255)


# Whole networks


@pytest.mark.parametrize("scales", qat.SCALES)
@pytest.mark.parametrize(
    "policy",
    [
        W4A8,
        Policy(weights=2, activations=4, granularity="tensor", clip="mse", first_last=8),
        Policy(weights=3, granularity=16),
        Policy(weights=None, activations=8),
        Policy(weights=4, symmetric=False, fold=False),
        Policy(weights=4, layers={"3": None}),
    ],
    ids=str,
)
def test_it_starts_as_post_training_quantization_and_converts_to_what_it_was(policy, scales, calibration, x):
    model = tiny()
    start = simulate.quantize(model, policy, calibration)
    prepared = qat.prepare(model, policy, calibration, scales=scales)
    assert prepared.training and prepared.policy == policy
    with torch.no_grad():
        before = start(x)
        torch.testing.assert_close(prepared.eval()(x), before, rtol=1e-3, atol=2e-2 * float(before.abs().max()))
        converted = qat.convert(prepared)
        torch.testing.assert_close(converted(x), before, rtol=1e-3, atol=2e-2 * float(before.abs().max()))
    assert not converted.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in converted.modules()) != policy.fold
    assert type(converted[0]) is nn.Conv2d and not hasattr(converted[0], "parametrizations")


def test_conversion_leaves_the_prepared_network_able_to_train(some, calibration, x):
    prepared = qat.prepare(tiny(), W4A8, calibration)
    qat.convert(prepared)
    copy.deepcopy(prepared)(x)
    training.finetune(prepared, some, steps=1)


def test_a_trained_network_converts_to_few_values_and_predicts_the_same(some, calibration, x):
    prepared = qat.prepare(tiny(), Policy(weights=3, activations=8), calibration)
    training.finetune(prepared, some, steps=20, lr=0.02)
    converted = qat.convert(prepared)
    for layer in weights.layers(converted).values():
        assert max(len(row.unique()) for row in layer.weight.flatten(1)) <= 8
    with torch.no_grad():
        agree = (prepared.eval()(x).argmax(1) == converted(x).argmax(1)).float().mean()
    assert agree >= 0.98


@pytest.mark.parametrize("scales", qat.SCALES)
def test_training_with_rounding_repairs_what_rounding_broke(scales, some, calibration):
    model = tiny()
    training.finetune(model, some, steps=150, lr=0.05)
    model.eval()
    policy = Policy(weights=2, activations=8)
    test = data.batches(data.fashion_mnist("validation", size=28), 100, limit=500)

    def right(network):
        return sum(int((network(images).argmax(1) == labels).sum()) for images, labels in test)

    with torch.no_grad():
        full, before = right(model), right(simulate.quantize(model, policy, calibration))
    prepared = qat.prepare(model, policy, calibration, scales=scales)
    training.finetune(prepared, some, steps=100, lr=0.02)
    with torch.no_grad():
        after = right(qat.convert(prepared))
    assert before < full - 40 and after > before + 0.5 * (full - before)


def test_scales_learn_and_observed_ones_stand_still_when_frozen(some, calibration):
    learned, observed = (qat.prepare(tiny(), W4A8, calibration, scales=scales) for scales in ("learned", "observed"))
    for prepared, parameters in ((learned, True), (observed, False)):
        quantizer = prepared[6].input_quantizer
        assert isinstance(quantizer.scale, nn.Parameter) == parameters
        seen = []
        training.finetune(
            prepared,
            some,
            steps=6,
            lr=0.05,
            freeze_at=0.5,
            on_step=lambda step, m, seen=seen, quantizer=quantizer: seen.append(
                (quantizer.scale.item(), m[1].running_mean.clone())
            ),
        )
        assert seen[0][0] != seen[1][0]
        assert (seen[3][0] != seen[5][0]) == parameters
        assert torch.equal(seen[3][1], seen[5][1]) and not torch.equal(seen[0][1], seen[1][1])


def test_mixed_scales_are_learned_but_for_weights_of_8_bits(calibration):
    prepared = qat.prepare(tiny(), Policy(weights=4, activations=8, first_last=8), calibration)
    kinds = {name: type(layer.parametrizations.weight[0].quantizer) for name, layer in weights.layers(prepared).items()}
    assert kinds == {"0": qat.ObservedScale, "3": qat.LearnedScale, "6": qat.ObservedScale}
    assert all(type(layer.input_quantizer) is qat.LearnedScale for layer in weights.layers(prepared).values())


def test_weights_are_rounded_as_they_will_be_when_the_batch_norm_is_folded():
    model, policy = tiny(), Policy(weights=3, granularity="tensor")
    prepared = qat.prepare(model, policy)
    w, qparams = qat.to_round(prepared)["0"]
    torch.testing.assert_close(w, weights.fold_batch_norm(model)[0].weight.detach())
    assert torch.equal(qat.convert(prepared)[0].weight, affine.fake_quantize(w, qparams))


def test_a_batch_norm_that_deletes_a_channel_is_no_division_by_zero(x):
    model = tiny()
    with torch.no_grad():
        model[1].weight[3] = 0.0
    prepared = qat.prepare(model, Policy(weights=4))
    assert prepared.eval()(x).isfinite().all() and qat.convert(prepared)(x).isfinite().all()


@pytest.mark.parametrize("scales", ["learned", "observed"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_channel_that_a_batch_norm_deletes_stays_deleted(granularity, scales, x):
    model, policy = tiny(), Policy(weights=4, granularity=granularity)
    with torch.no_grad():
        model[1].weight[3] = 0.0
        model[0].weight[3] *= 100  # which must not widen the range of the others
    prepared = qat.prepare(model, policy, scales=scales).eval()
    converted = qat.convert(prepared)
    assert not converted[0].weight[3].any() and converted[0].weight.any()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(converted(x), simulate.quantize(model, policy)(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norms_that_lack_something_are_no_obstacle(options, x):
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8, **options)).eval()
    prepared = qat.prepare(model, Policy(weights=4)).eval()
    with torch.no_grad():
        expected = simulate.quantize(model, Policy(weights=4))(x)
        torch.testing.assert_close(prepared(x), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(qat.convert(prepared)(x), expected, rtol=1e-2, atol=1e-2)


class Auxiliary(nn.Module):
    """A head that is never called, beside one that is."""

    def __init__(self):
        super().__init__()
        self.head, self.auxiliary = nn.Linear(28, 4), nn.Linear(28, 4)

    def forward(self, x):
        return self.head(x)


def test_layers_that_are_never_called_can_be_left_out(calibration):
    model = Auxiliary().eval()
    with pytest.raises(ValueError, match=r"came to auxiliary: .*layers={'auxiliary': None}"):
        qat.prepare(model, W4A8, calibration)
    prepared = qat.prepare(model, Policy(4, 8, layers={"auxiliary": None}), calibration)
    assert not hasattr(prepared.auxiliary, "input_quantizer") and hasattr(prepared.head, "input_quantizer")
    assert qat.convert(prepared).head.weight_qparams.qmax == 7


def test_scales_that_fp16_cannot_hold_are_refused_at_the_end():
    prepared = qat.prepare(tiny(), Policy(weights=4), scales="learned")
    with torch.no_grad():
        prepared[6].parametrizations.weight[0].quantizer.scale.fill_(1e6)
    with pytest.raises(ValueError, match=r"scale of 1e.06 cannot be stored in FP16"):
        qat.convert(prepared)


def test_the_gradient_scale_can_be_switched_off(some, x):
    gradients = []
    for scale in (None, 1.0):
        prepared = qat.prepare(tiny(), Policy(weights=4, granularity="tensor"), gradient_scale=scale)
        prepared(x).square().sum().backward()
        gradients.append(prepared[6].parametrizations.weight[0].quantizer.scale.grad)
    assert float(gradients[1] / gradients[0]) == pytest.approx((5120 * 7) ** 0.5, rel=1e-3)


def test_every_layer_of_the_courses_networks_is_found():
    for name, count in (("resnet18", 21), ("mobilenet_v2", 53)):
        prepared = qat.prepare(models.load(name), Policy(weights=4))
        assert len(qat.to_round(prepared)) == count
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
        assert norms == count - 1


@pytest.mark.parametrize(
    "model, policy, calibrated, message",
    [
        (nn.Sequential(nn.ReLU()), Policy(weights=4), False, "no convolution or linear layer"),
        (tiny(), Policy(weights=4, layers={"head": 8}), False, "is called head"),
        (nn.Sequential(nn.ReLU()), Policy(weights=4, first_last=8), False, "no convolution or linear layer"),
        (tiny().bfloat16(), Policy(weights=4), False, r"call model.float\(\) first"),
        (
            qat.prepare(tiny(), Policy(weights=4)),
            Policy(weights=2),
            False,
            "weights of 0 are computed .* or qat.convert",
        ),
        (tiny(), W4A8, False, "calibration"),
    ],
)
def test_bad_input_is_refused_with_a_reason(model, policy, calibrated, message):
    with pytest.raises(ValueError, match=message):
        qat.prepare(model, policy)


def test_unknown_scales_and_foreign_networks_are_refused():
    with pytest.raises(ValueError, match="mixed, learned, observed"):
        qat.prepare(tiny(), Policy(weights=4), scales="guessed")
    with pytest.raises(ValueError, match="qat.prepare"):
        qat.convert(tiny())


def test_the_librarys_networks_freeze_too():
    prepared = backends.prepare_qat(tiny())
    qat.freeze(prepared)
    assert not any(m.training for m in prepared.modules() if isinstance(m, nn.BatchNorm2d))
