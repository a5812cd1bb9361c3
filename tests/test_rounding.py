import copy
import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_utils import affine, data, models, simulate, weights
from course_utils.rounding import (
    CappedReLU,
    adaround,
    awq,
    bias_correction,
    cross_layer_equalization,
    equalization,
    gptq,
    random_rounding,
    walk,
)
from course_utils.rounding.adaround import _annealed, _Grid, _learn_rounding
from course_utils.simulate import Policy
from tests.conftest import fingerprint

awq_module = importlib.import_module("course_utils.rounding.awq")
gptq_module = importlib.import_module("course_utils.rounding.gptq")  # the package's function has its name


class Small(nn.Module):
    """All that MobileNetV2 is made of, small enough to be trained here."""

    def __init__(self):
        super().__init__()
        self.stem = self.block(3, 16, kernel_size=3, stride=2, padding=1)
        self.depthwise = self.block(16, 16, kernel_size=3, padding=1, groups=16)
        self.project = self.block(16, 24, kernel_size=1)
        self.grouped = self.block(24, 24, kernel_size=3, padding=1, groups=4)
        self.last = self.block(24, 32, kernel_size=3, stride=2, dilation=2)
        self.head = nn.Linear(32, 10)

    @staticmethod
    def block(*sizes, **options):
        return nn.Sequential(nn.Conv2d(*sizes, bias=False, **options), nn.BatchNorm2d(sizes[1]), nn.ReLU6(inplace=True))

    def forward(self, x):
        x = self.project(self.depthwise(self.stem(x)))
        return self.head(self.last(self.grouped(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def batches():
    return list(data.batches(data.fashion_mnist("calibration", size=28), 64, limit=128))


@pytest.fixture(scope="module")
def small():
    """`Small`, trained for a few seconds."""
    torch.manual_seed(0)
    model = Small().train()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for images, labels in data.batches(data.fashion_mnist("train", size=28), 64, limit=64 * 60):
        adam.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        adam.step()
    model.eval()
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before and not model.training, "a test changed the shared model"


@pytest.fixture(scope="module")
def learned(small, batches):
    return adaround(small, Policy(weights=3), batches)


def outputs(model, images):
    """The output of every layer."""
    found = {}
    for name, layer in weights.layers(model).items():
        layer.register_forward_hook(lambda _, args, output, name=name: found.update({name: output.clone()}))
    with torch.no_grad():
        model(images)
    return found


def everything(batches):
    return torch.cat([images for images, _ in batches])


def means(output):
    return output.transpose(0, 1).flatten(1).mean(1)


# --- Bias correction


@pytest.mark.parametrize("activations", [None, 4])
def test_corrected_layers_have_the_means_of_the_float_network(small, batches, activations):
    quantized = simulate.quantize(small, Policy(weights=3, activations=activations), batches)
    corrected = bias_correction(small, quantized, batches)
    images = everything(batches)
    expected = outputs(weights.fold_batch_norm(small), images)
    before, after = outputs(copy.deepcopy(quantized), images), outputs(corrected, images)
    for name, output in expected.items():
        width = float(output.std())
        assert (means(after[name]) - means(output)).abs().max() < 1e-4 * width, name
        assert (means(before[name]) - means(output)).abs().max() > 1e-3 * width, name


def test_correction_changes_biases_alone(small, batches):
    quantized = simulate.quantize(small, Policy(weights=3, activations=4), batches)
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    after = bias_correction(small, quantized, batches).state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {k for k in before if "bias" in k}
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())


def test_layers_without_a_bias_get_one_when_batch_norms_are_not_folded(small, batches):
    quantized = simulate.quantize(small, Policy(weights=3, fold=False))
    assert quantized.stem[0].bias is None
    corrected = bias_correction(small, quantized, batches)
    images = everything(batches)
    expected, found = outputs(copy.deepcopy(small), images), outputs(corrected, images)
    for name, output in expected.items():
        assert (means(found[name]) - means(output)).abs().max() < 1e-4 * float(output.std()), name


def test_an_unquantized_network_needs_no_correction(small, batches):
    same = bias_correction(small, simulate.quantize(small, Policy(weights=None)), batches)
    with torch.no_grad():
        torch.testing.assert_close(same(batches[0][0]), small(batches[0][0]), rtol=1e-4, atol=1e-4)


def test_correction_needs_images_and_the_same_network(small, resnet18, batches):
    quantized = simulate.quantize(small, Policy(weights=3))
    with pytest.raises(ValueError, match="no images"):
        bias_correction(small, quantized, [])
    with pytest.raises(
        ValueError, match="^the two networks have other layers: give the float32 network that was quantized$"
    ):
        bias_correction(resnet18, quantized, batches)


def test_batch_norms_that_cannot_be_folded_leave_the_others_folded():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).eval()
    for norm in (model[0], model[2]):
        nn.init.uniform_(norm.running_var, 0.2, 3)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(64, 3, 8, 8)
    for fold in (True, False):
        quantized = simulate.quantize(model, Policy(weights=3, fold=fold))
        with torch.no_grad():
            before, after = (
                (m(x) - model(x)).square().mean() for m in (quantized, bias_correction(model, quantized, [x]))
            )
        assert after < before


# --- Cross-layer equalization


def relative_change(model, changed, images):
    with torch.no_grad():
        expected = model(images)
        return float((changed(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("trained", [True, False])
def test_equalization_keeps_the_function(name, trained, request, calibration):
    model = models.load(name) if trained else request.getfixturevalue(name)
    before = fingerprint(model)
    equalized = cross_layer_equalization(model)
    assert relative_change(model, equalized, everything(calibration)) < 1e-4
    assert fingerprint(model) == before and list(weights.layers(equalized)) == list(weights.layers(model))


def test_equalization_keeps_relu6_where_it_clips():
    """Planted weights that drive most channels beyond 6, where ReLU instead of ReLU6 would show."""
    torch.manual_seed(0)
    model = weights.fold_batch_norm(Small().eval())
    with torch.no_grad():
        model.stem[0].weight *= 100 * torch.rand(16, 1, 1, 1)
    images = torch.randn(8, 3, 28, 28)
    equalized = cross_layer_equalization(model)
    assert relative_change(model, equalized, images) < 1e-4
    for name in ("stem", "depthwise"):
        equalized.set_submodule(f"{name}.2", nn.ReLU())
    assert relative_change(model, equalized, images) > 0.01


def ranges(first, second):
    channels = second.weight.unflatten(0, (second.groups, -1)).transpose(1, 2).flatten(0, 1)
    return first.weight.abs().flatten(1).amax(1), channels.abs().flatten(1).amax(1)


def test_the_float_network_keeps_its_mode_and_its_layers(small, batches):
    model = copy.deepcopy(small).train()
    before = fingerprint(model)
    bias_correction(model, simulate.quantize(model, Policy(weights=3, fold=False)), batches)
    assert all(module.training for module in model.modules()) and fingerprint(model) == before


@pytest.mark.parametrize("name", models.NAMES)
def test_both_sides_of_every_pair_end_with_equal_ranges(name):
    folded = weights.fold_batch_norm(models.load(name))
    names = {layer: key for key, layer in weights.layers(folded).items()}
    equalized = weights.layers(cross_layer_equalization(folded))
    pairs = [(names[first], names[second]) for first, second, _ in equalization._pairs(folded)]
    assert len(pairs) == {"resnet18": 8, "mobilenet_v2": 36}[name]
    for first, second in pairs:
        r1, r2 = ranges(equalized[first], equalized[second])
        alive = (r1 > 0) & (r2 > 0)
        assert alive.any()
        torch.testing.assert_close(r1[alive], r2[alive], rtol=5e-3, atol=0)


def test_pairs_end_where_an_output_is_used_twice_or_added(small):
    folded = weights.fold_batch_norm(small)
    names = {layer: name for name, layer in weights.layers(folded).items()}
    found = [(names[a], names[b], activation) for a, b, activation in equalization._pairs(folded)]
    assert found == [("stem.0", "depthwise.0", "stem.2"), ("depthwise.0", "project.0", "depthwise.2")]


def test_convolutions_without_anything_between_are_a_pair():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    assert equalization._pairs(model) == [(model[0], model[1], None), (model[1], model[3], "2")]


class Chain(nn.Module):
    """A few pairs that are none."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.relu6, self.tanh = nn.ReLU6(), nn.Tanh()

    def forward(self, x):
        x = self.relu6(self.first(x))
        x = self.relu6(self.second(x))  # its caps cannot be those of two places
        return self.second(self.third(self.tanh(x)))


def test_what_does_not_scale_or_is_called_twice_is_left_alone():
    model = Chain().eval()
    assert equalization._pairs(model) == []
    assert fingerprint(cross_layer_equalization(model)) == fingerprint(model)


class Twice(nn.Module):
    """A convolution whose output goes two ways at once."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.first(x)
        return x.relu() + x.tanh()


def test_a_convolution_is_no_pair_with_itself():
    assert equalization._pairs(Twice().eval()) == []


def test_channels_without_weights_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    equalized = cross_layer_equalization(model)
    assert all(torch.isfinite(p).all() for p in equalized.parameters())
    assert torch.equal(equalized[0].weight[2], model[0].weight[2])
    assert relative_change(model, equalized, torch.randn(2, 3, 4, 4)) < 1e-5


def test_equalizing_twice_changes_nothing_more(small):
    once = cross_layer_equalization(small)
    assert isinstance(once.stem[2], CappedReLU) and "16 caps from" in repr(once.stem[2])
    assert "CappedReLU(2 caps from 0.5 to 6)" == repr(CappedReLU(torch.tensor([6.0, 0.5])))
    twice = cross_layer_equalization(once)
    torch.testing.assert_close(twice.stem[0].weight, once.stem[0].weight, rtol=1e-3, atol=0)


def test_equalization_repairs_one_scale_per_tensor(small, batches):
    policy = Policy(weights=4, granularity="tensor")
    planted = weights.fold_batch_norm(small)
    with torch.no_grad():  # a channel 50 times as large as the others, which the next layer takes back
        planted.stem[0].weight[3] *= 50
        planted.stem[0].bias[3] *= 50
        planted.depthwise[0].weight[3] /= 50
        planted.stem[2] = CappedReLU(torch.full((16,), 6.0).index_fill(0, torch.tensor([3]), 300.0))
    images = everything(batches)
    with torch.no_grad():
        expected = planted(images)
        torch.testing.assert_close(expected, small(images), rtol=1e-3, atol=1e-3)
        planted.stem[2] = nn.ReLU()
        expected = planted(images)
        errors = [
            float((simulate.quantize(m, policy)(images) - expected).square().mean())
            for m in (planted, cross_layer_equalization(planted))
        ]
    assert errors[1] < 0.5 * errors[0]


# --- AdaRound


def test_adaround_beats_nearest_on_every_layer_and_chance_does_not(small, learned):
    _, report = learned
    assert [r.name for r in report] == list(weights.layers(small))
    assert [r.weights for r in report] == [layer.weight.numel() for layer in weights.layers(small).values()]
    for r in report:
        assert r.adaround < r.nearest, r
        assert r.adaround < r.random, r
        assert 0 < r.moved < 0.5
    assert sum(r.random for r in report) > 1.2 * sum(r.nearest for r in report)


def test_by_chance_as_many_weights_move_as_were_learned(small, batches, monkeypatch):
    counts, moved_at_random = [], _Grid.moved_at_random
    monkeypatch.setattr(
        _Grid, "moved_at_random", lambda grid, count, g: counts.append(count) or moved_at_random(grid, count, g)
    )
    _, report = adaround(small, Policy(weights=3), batches[:1], steps=20)
    assert counts == [round(r.moved * r.weights) for r in report] and all(counts)
    random_rounding(small, Policy(weights=3), report)
    assert counts[: len(report)] == counts[len(report) :]


def test_a_grid_with_a_zero_point_gives_back_its_weights():
    w = torch.linspace(-1, 5, 50).reshape(2, 25)
    qparams = affine.choose_qparams(w, bits=4, axis=0)
    assert qparams.zero_point.any()
    grid = _Grid(w, qparams)
    torch.testing.assert_close(grid.values(grid.nearest), affine.fake_quantize(w, qparams))


def test_weights_go_to_one_of_their_two_neighbours(small, learned):
    quantized, report = learned
    policy = Policy(weights=3)
    folded, nearest = weights.fold_batch_norm(small), weights.layers(simulate.quantize(small, policy))
    for r in report:
        w, found = weights.layers(folded)[r.name].weight.data, weights.layers(quantized)[r.name].weight
        qparams = simulate.weight_qparams(w, policy, 3)
        step = qparams.scale.reshape(-1, *[1] * (w.ndim - 1))
        q = found / step
        torch.testing.assert_close(q, q.round())
        assert q.min() >= -4.001 and q.max() <= 3.001
        clipped = w.clamp(-4 * step, 3 * step)
        assert ((found - clipped).abs() < 1.001 * step).all()
        assert float(((found - nearest[r.name].weight).abs() > 0.5 * step).double().mean()) == pytest.approx(r.moved)


def test_the_outputs_of_the_network_come_closer(small, learned, batches):
    images = data.preprocess(data.fashion_mnist("validation").pixels[:200], 28)
    quantized, report = learned
    nearest = simulate.quantize(small, Policy(weights=3))
    chance = random_rounding(small, Policy(weights=3), report)
    corrected = bias_correction(small, nearest, batches)
    with torch.no_grad():
        expected = small(images)
        errors = [float((m(images) - expected).square().mean()) for m in (quantized, corrected, nearest, chance)]
    assert errors[0] < 0.7 * min(errors[2:]) and errors[1] < errors[2]


def test_the_same_seed_gives_the_same_weights(small, batches):
    policy = Policy(weights=3, activations=4)
    runs = [adaround(small, policy, batches[:1], steps=20, positions=200, seed=seed) for seed in (5, 5, 6)]
    assert fingerprint(runs[0][0]) == fingerprint(runs[1][0]) != fingerprint(runs[2][0])
    assert runs[0][1] == runs[1][1]


def test_the_policy_is_followed(small, batches):
    policy = Policy(
        weights=2, activations=4, granularity=8, clip="mse", symmetric=False, first_last=5, layers={"project.0": None}
    )
    quantized, report = adaround(small, policy, batches[:1], steps=5)
    assert "project.0" not in [r.name for r in report] and len(report) == 5
    folded = weights.fold_batch_norm(small)
    assert torch.equal(quantized.project[0].weight, folded.project[0].weight)
    values = quantized.grouped[0].weight.flatten(1).split(8, 1)
    assert max(len(row.unique()) for group in values for row in group) <= 4
    assert 4 < max(len(row.unique()) for row in quantized.head.weight[:, :8]) <= 8
    assert quantized.stem[0].input_quantizer.qmax == 31 and quantized.grouped[0].input_quantizer.qmax == 15


def test_without_folding_the_convolutions_are_rounded_as_they_are(small, batches):
    quantized, report = adaround(small, Policy(weights=3, fold=False), batches)
    assert isinstance(quantized.stem[1], nn.BatchNorm2d) and quantized.stem[0].bias is None
    assert report and all(r.adaround < r.nearest for r in report)


@pytest.mark.parametrize("shape", [(40, 6), (12, 40)])
def test_a_condensed_problem_has_the_same_minimum(shape):
    """Few rows stand for many: the error is the same but for a constant, so are the gradients."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *shape, generator=generator), torch.randn(2, shape[0], 3, generator=generator)
    x[0, :, 1] = 0.0
    problem = walk.Problem(x, y, shape[0])
    condensed = problem.condensed()
    assert condensed.inputs.shape[1] == min(shape)
    a, b = (torch.randn(6, shape[1], generator=generator).requires_grad_() for _ in range(2))
    differences = [problem.error(w) - condensed.error(w) for w in (a, b)]
    torch.testing.assert_close(differences[0], differences[1], rtol=1e-3, atol=1e-4)
    expected, found = (torch.autograd.grad(p.error(a), a)[0] for p in (problem, condensed))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_error_of_a_problem_is_the_mean_over_all_output_values():
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(2, *shape, generator=generator) for shape in ((50, 6), (50, 3), (3, 6)))
    expected = (x @ w.mT - y).square().mean()
    torch.testing.assert_close(walk.Problem(x, y, 50).error(w.flatten(0, 1)), expected)


def test_rows_of_a_problem_are_drawn_with_their_targets_and_the_generator():
    x = torch.arange(100.0).reshape(2, 50, 1)
    problem = walk.Problem(x, -x, 50)
    first, again, other = (problem.some(20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.inputs.shape == (2, 20, 1) and first.places == 20 and torch.equal(first.targets, -first.inputs)
    assert torch.equal(first.inputs[0] + 50, first.inputs[1]), "the same rows of both groups"
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    assert problem.some(50, None) is problem and walk.Problem(x, -x, 60).some(20, None).places == 60


def test_sampled_places_are_the_layers_own_outputs(small, batches):
    """The matrix product at the places is what the convolution computes there."""
    folded, images = weights.fold_batch_norm(small), everything(batches)[:16]
    seen = {}
    for name, layer in weights.layers(folded).items():
        layer.register_forward_hook(
            lambda layer, args, output, name=name: seen.update({name: (layer, *args, output.clone())})
        )
    with torch.no_grad():
        folded(images)
        for layer, x, output in seen.values():
            places = walk.Places(layer, output, 50, seed=0)
            wanted = places.outputs(output)
            assert len(wanted) >= 16 and wanted.shape[1] == layer.weight.shape[0]
            for problem in walk.problems(layer, places.inputs(x), wanted, places.fit):
                assert float(problem.error(layer.weight)) < 1e-8


def test_judged_on_other_images_than_learned_from():
    places = walk.Places(nn.Conv2d(1, 2, 1), torch.zeros(8, 2, 5, 5), 1000, seed=0)
    images = places.index // 25
    assert set(images[: places.fit].tolist()) == {0, 1, 2, 3, 4, 5} and set(images[places.fit :].tolist()) == {6, 7}
    assert len(places.index) == len(places.index.unique()) == 200


def test_adaround_starts_from_the_weights_as_they_are():
    """Without a step, what is nearer to the upper integer goes up."""
    w = torch.linspace(-0.9, 0.9, 19)[None] + 0.013
    grid = _Grid(w, affine.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -8, 7))
    problem = walk.Problem(torch.eye(19)[None], w.mT[None], 19)
    learned = _learn_rounding(grid, problem, 0, 32, 0.01, 0.01, torch.Generator())
    assert torch.equal(learned, grid.nearest)


def test_what_is_learned_does_not_hang_on_the_unit_of_the_inputs():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 200, 20, generator=generator), torch.randn(6, 20, generator=generator)
    grid = _Grid(w, simulate.weight_qparams(w, Policy(weights=3), 3))
    learned = []
    for unit in (1, 1024):
        problem = walk.Problem(unit * x, unit * x @ w.mT, 1)
        learned.append(_learn_rounding(grid, problem, 50, 32, 0.15, 20.0, torch.Generator().manual_seed(0)))
    assert (learned[0] == learned[1]).double().mean() > 0.98 and not torch.equal(learned[0], grid.nearest)


def test_the_annealing_falls_from_twenty_to_two_after_a_warm_start():
    betas = list(_annealed(100))
    assert betas[:20] == [None] * 20 and betas[20] == 20 and betas[-1] == pytest.approx(2, abs=0.05)
    assert all(a > b for a, b in zip(betas[20:], betas[21:], strict=False))


# --- GPTQ


def solved_directly(w, h, policy, bits):
    """Round one weight of each row after the other, and each time solve for the best of the rest: no Cholesky factors."""
    w, h, qparams = w.double(), h.double(), simulate.weight_qparams(w, policy, bits)
    now = w.clone()
    for j in range(w.shape[1]):
        now[:, j] = affine.fake_quantize(now[:, j].float(), replace(qparams, axis=0))
        done, rest = slice(0, j + 1), slice(j + 1, None)
        if j + 1 < w.shape[1]:
            change = (now - w)[:, done] @ h[done, rest]
            now[:, rest] = w[:, rest] - torch.linalg.solve(h[rest, rest], change.mT).mT
    return now.float()


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_direct_solution_of_each_step(bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)  # correlated inputs
    w = torch.randn(5, 12, generator=generator)
    h = gptq_module.hessian(x[None], damping=0.01)
    rounded, qparams = gptq_module.compensate(w, h, Policy(weights=bits), bits)
    torch.testing.assert_close(rounded, solved_directly(w, h[0], Policy(weights=bits), bits), rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded, affine.fake_quantize(rounded, qparams))
    if bits == 4:  # with 2, weights at the ends of the range cannot make up for much
        errors = [float(((found - w) @ x.T).square().mean()) for found in (rounded, affine.fake_quantize(w, qparams))]
        assert errors[0] < 0.7 * errors[1]


def test_with_inputs_that_know_nothing_of_each_other_gptq_rounds_to_nearest():
    w = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    policies = [Policy(weights=3, granularity=g, symmetric=s) for g in ("channel", 8, "tensor") for s in (True, False)]
    for policy in policies:
        rounded, qparams = gptq_module.compensate(w, torch.eye(40)[None], policy, 3)
        assert torch.equal(rounded, affine.fake_quantize(w, simulate.weight_qparams(w, policy, 3)))
        assert torch.equal(rounded, affine.fake_quantize(w, qparams))


def test_the_diagonal_is_damped_by_a_share_of_its_own_mean():
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 10.0])[:, None, None]
    plain, damped = (gptq_module.hessian(x, damping=damping) for damping in (0.0, 0.5))
    torch.testing.assert_close(plain, x.mT @ x / 50)
    for before, after in zip(plain, damped, strict=True):
        added = 0.5 * before.diagonal().mean() * torch.eye(6)
        torch.testing.assert_close(after - before, added, rtol=1e-3, atol=float(1e-5 * before.max()))
    assert (gptq_module.hessian(torch.zeros(1, 5, 3), damping=0.5).diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8, 50])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_columns_change_nothing(monkeypatch, granularity, symmetric):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 60, generator=generator) @ torch.randn(60, 60, generator=generator)
    w, h = torch.randn(8, 60, generator=generator), gptq_module.hessian(x, damping=0.01)  # two groups of four rows
    policy = Policy(weights=3, granularity=granularity, symmetric=symmetric)
    found = []
    for block in (1, 7, 1000):
        monkeypatch.setattr(gptq_module, "BLOCK", block)
        found.append(gptq_module.compensate(w, h, policy, 3)[0])
    for other in found[1:]:
        assert (found[0] == other).double().mean() > 0.97  # sums in another order may tip a tie
    assert torch.equal(affine.fake_quantize(found[0], gptq_module.compensate(w, h, policy, 3)[1]), found[-1])


@pytest.mark.parametrize("granularity", ["channel", 8])
def test_gptq_beats_rounding_to_nearest_on_every_layer(small, batches, granularity):
    policy = Policy(weights=3, granularity=granularity)
    quantized, report = gptq(small, policy, batches)
    assert [r.name for r in report] == list(weights.layers(small))
    assert all(r.gptq < r.nearest for r in report), report
    images = data.preprocess(data.fashion_mnist("validation").pixels[:200], 28)
    with torch.no_grad():
        expected, *found = (m(images) for m in (small, quantized, simulate.quantize(small, policy)))
    errors = [float((out - expected).square().mean()) for out in found]
    assert errors[0] < 0.7 * errors[1]
    for layer in weights.layers(quantized).values():
        assert torch.equal(affine.fake_quantize(layer.weight, layer.weight_qparams), layer.weight)


def test_gptq_keeps_to_the_policy(small, batches):
    policy = Policy(weights=2, activations=4, first_last=5, layers={"project.0": None})
    quantized, report = gptq(small, policy, batches)
    folded = weights.fold_batch_norm(small)
    assert torch.equal(quantized.project[0].weight, folded.project[0].weight)
    assert "project.0" not in [r.name for r in report]
    assert max(len(row.unique()) for row in quantized.last[0].weight.flatten(1)) <= 4
    assert 4 < max(len(row.unique()) for row in quantized.head.weight) <= 32
    assert quantized.last[0].input_quantizer.qmax == 15 and quantized.stem[0].input_quantizer.qmax == 31


# --- AWQ


class Linears(nn.Module):
    """Two linear layers, the inputs of the first one with channels of very different size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    size = torch.where(torch.rand(64) < 0.1, 20.0, 0.5)
    return Linears().eval(), [torch.randn(300, 64) * size]


def test_awq_takes_care_of_the_inputs_that_are_large(uneven):
    model, batches = uneven
    policy = Policy(weights=3, granularity=32)
    quantized, report = awq(model, policy, batches)
    _, by_chance = awq(model, policy, batches, random=True)
    assert report[0].strength > 0 and report[0].awq < 0.6 * report[0].nearest
    assert by_chance[0].nearest == report[0].nearest and by_chance[0].awq > 1.3 * report[0].awq
    assert all(r.awq <= 1.05 * r.nearest for r in report)
    with torch.no_grad():
        expected, *found = (m(batches[0]) for m in (model, quantized, simulate.quantize(model, policy)))
    errors = [float((out - expected).square().mean()) for out in found]
    assert errors[0] < 0.7 * errors[1]
    layer = quantized.first
    assert torch.equal(affine.fake_quantize(layer.weight, layer.weight_qparams), layer.weight)
    assert torch.equal(layer.input_scale.factors.half().float(), layer.input_scale.factors)


def test_the_seed_deals_out_the_means_of_the_control(uneven):
    model, batches = uneven
    first, again, other = (awq(model, Policy(weights=3), batches, random=True, seed=seed)[1] for seed in (3, 3, 4))
    assert first == again != other


def test_factors_are_around_one_and_no_smaller_than_half_precision_has_them():
    size = torch.tensor([1e-8, 1.0, 1e8])
    assert torch.equal(awq_module._factors(size, 0.5), torch.tensor([1e-4, 1.0, 1e4]).half().float())
    assert awq_module._factors(size, 1.0)[0] == 2.0**-14
    assert awq_module._factors(torch.tensor([4.0, 16.0]), 1.0).tolist() == [0.5, 2.0]


def test_a_copy_of_a_scaled_network_computes_the_same(uneven):
    model, batches = uneven
    quantized, _ = awq(model, Policy(weights=3, activations=8, granularity=32), batches)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(quantized)(batches[0]), quantized(batches[0]))


def test_awq_scales_the_channels_of_convolutions_and_leaves_depthwise_ones_alone(small, batches):
    quantized, report = awq(small, Policy(weights=3), batches)
    by_name = {r.name: r for r in report}
    assert by_name["depthwise.0"].strength == 0 and not hasattr(quantized.depthwise[0], "input_scale")
    assert any(r.strength > 0 for r in report) and all(r.awq < 1.2 * r.nearest for r in report)


@pytest.mark.parametrize("repair", [adaround, gptq, awq])
def test_what_they_cannot_do_is_said(small, batches, repair):
    with pytest.raises(ValueError, match="no images"):
        repair(small, Policy(weights=4), [])
    with pytest.raises(ValueError, match="at least 2 images"):
        repair(small, Policy(weights=4), [batches[0][0][:1]])
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")).eval()
    with pytest.raises(ValueError, match="zero padding in numbers, got Conv2d.*reflect"):
        repair(reflecting, Policy(weights=4), batches)


@pytest.mark.parametrize("repair", [adaround, gptq, awq])
def test_what_simulate_refuses_they_refuse_too(repair):
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="weights of 0 are computed anew.*remove_parametrizations"):
        repair(normed, Policy(weights=2), [torch.randn(8, 8)])


class Recurrent(nn.Module):
    """A layer that is called twice, or so many times, and one that is never called."""

    def __init__(self, times=2):
        super().__init__()
        self.times = times
        self.cell, self.head, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        for _ in range(self.times):
            x = self.cell(x).relu()
        return self.head(x)


@pytest.mark.parametrize("repair", [adaround, gptq, awq])
def test_layers_called_twice_or_never_are_named_and_can_be_left_out(repair):
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(64, 8)
    with pytest.raises(ValueError, match=r"cell is called more than once.*Policy\(layers={'cell': None}\)"):
        repair(model, Policy(weights=3), [x])
    with pytest.raises(ValueError, match=r"came to auxiliary:.*Policy\(layers={'auxiliary': None}\)"):
        repair(model, Policy(weights=3, layers={"cell": None}), [x])
    quantized, report = repair(model, Policy(weights=3, layers={"cell": None, "auxiliary": None}), [x])
    assert [r.name for r in report] == ["head"] and torch.equal(quantized.cell.weight, model.cell.weight)


def test_bias_correction_refuses_layers_called_twice_and_passes_over_those_never_called():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    twice, once = Recurrent(2).eval(), Recurrent(1).eval()
    with pytest.raises(ValueError, match="cell is called more than once"):
        bias_correction(twice, simulate.quantize(twice, Policy(weights=3)), [x])
    corrected = bias_correction(once, simulate.quantize(once, Policy(weights=3)), [x])
    with torch.no_grad():
        torch.testing.assert_close(corrected(x).mean(0), once(x).mean(0))
    assert torch.equal(corrected.auxiliary.bias, once.auxiliary.bias)


class Tied(nn.Module):
    """An embedding, and a head that has the same matrix."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("size", torch.logspace(-1, 1, 16))

    def forward(self, tokens):
        return self.head(self.embedding(tokens) * self.size)


@pytest.mark.parametrize("repair", [adaround, gptq, awq])
def test_tied_weights_are_changed_in_the_layer_alone(repair):
    torch.manual_seed(0)
    model = Tied().eval()
    quantized, report = repair(model, Policy(weights=3), [torch.randint(32, (16, 20))])
    assert torch.equal(quantized.embedding.weight, model.embedding.weight)
    assert levels_of(quantized.head) <= 8 and quantized.head.weight.requires_grad
    if repair is adaround:
        chance = random_rounding(model, Policy(weights=3), report)
        assert torch.equal(chance.embedding.weight, model.embedding.weight) and levels_of(chance.head) <= 8


def levels_of(layer):
    return max(len(row.unique()) for row in layer.weight)


def test_the_control_says_its_grid_too(small, learned):
    """So that `int4.save_packed` stores what is there, instead of rounding it again."""
    chance = random_rounding(small, Policy(weights=3), learned[1])
    for layer in weights.layers(chance).values():
        assert torch.equal(affine.fake_quantize(layer.weight.detach(), layer.weight_qparams), layer.weight)
