import copy

import pytest
import torch
from torch import nn

from course_utils import models, weights
from tests.conftest import fingerprint


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", models.NAMES)
def test_folding_removes_every_batch_norm_and_keeps_the_outputs(name, request, images):
    model = request.getfixturevalue(name)
    before = fingerprint(model)
    folded = weights.fold_batch_norm(model)
    assert batch_norms(model) and not batch_norms(folded)
    with torch.no_grad():
        expected, found = model(images), folded(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert fingerprint(model) == before


def test_folding_twice_changes_nothing_more(resnet18):
    once = weights.fold_batch_norm(resnet18)
    assert fingerprint(weights.fold_batch_norm(once)) == fingerprint(once)


def test_folding_gives_a_copy_in_evaluation_mode_and_leaves_the_training_mode_of_the_original():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    assert not weights.fold_batch_norm(model).training
    assert model.training and model[2].training


class Branching(nn.Module):
    """A convolution whose output is used twice: once with batch norm, once without."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.running_var.fill_(4.0)

    def forward(self, x):
        x = self.convolution(x)
        return self.norm(x) + x


class Reused(Branching):
    """One convolution called twice, with a batch norm behind one call only."""

    def forward(self, x):
        return self.norm(self.convolution(x)) + self.convolution(-x)


@pytest.mark.parametrize("kind", [Branching, Reused])
def test_a_convolution_that_is_used_elsewhere_too_keeps_its_batch_norm(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 4, 4)
    folded = weights.fold_batch_norm(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert batch_norms(folded) == ["norm"]


def test_a_batch_norm_without_a_convolution_before_it_stays():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    assert batch_norms(weights.fold_batch_norm(model)) == ["0", "2"]


class ByKeyword(Branching):
    """A batch norm that gets its input by keyword."""

    def forward(self, x):
        return self.norm(input=self.convolution(x))


def test_a_batch_norm_called_by_keyword_is_folded_too():
    torch.manual_seed(0)
    model, x = ByKeyword().eval(), torch.randn(2, 3, 4, 4)
    folded = weights.fold_batch_norm(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert not batch_norms(folded)


def test_a_batch_norm_without_running_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert batch_norms(weights.fold_batch_norm(model)) == ["1"]


class Choosing(Branching):
    """A forward that decides by what it sees."""

    def forward(self, x):
        return self.norm(self.convolution(x)) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"cannot trace Choosing \(.*control flow.*Policy\(fold=False\)"):
        weights.fold_batch_norm(Choosing())


def computed(norm):
    """A network whose convolution has a weight that `norm` computes in every forward pass."""
    return nn.Sequential(norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_no_parameter_are_refused(norm):
    model = computed(norm)
    for function in (weights.fold_batch_norm, lambda m: weights.fake_quantize_weights(m, bits=4)):
        with pytest.raises(ValueError, match=r"weights of 0 are computed anew.*remove_parametrizations.*qat\.convert"):
            function(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert len(weights.fake_quantize_weights(weights.fold_batch_norm(model), bits=2)[0].weight[0].unique()) <= 4


def test_weights_other_than_float32_are_refused_unless_they_are_kept():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    with pytest.raises(ValueError, match=r"weights of 0 are torch.bfloat16, expected float32: call model.float\(\)"):
        weights.fake_quantize_weights(model, bits=4)
    with pytest.raises(ValueError, match="weights of the model are torch.float64"):
        weights.fake_quantize_weights(nn.Linear(2, 2).double(), bits=4)
    assert weights.fake_quantize_weights(model, bits=4, keep=("0",))[0].weight.dtype == torch.bfloat16


def test_tied_weights_are_rounded_in_the_layer_alone():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    model[1].weight = model[0].weight
    rounded = weights.fake_quantize_weights(model, bits=2)
    assert torch.equal(rounded[0].weight, model[0].weight)
    assert len(rounded[1].weight[0].unique()) <= 4 and model[1].weight is model[0].weight


def test_layers_are_the_convolutions_and_linear_layers_in_order(resnet18):
    found = list(weights.layers(resnet18))
    assert len(found) == 21 and found[0] == "conv1" and found[-1] == "fc"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_channel_has_at_most_two_to_the_bits_values(resnet18, bits, symmetric):
    rounded = weights.fake_quantize_weights(resnet18, bits=bits, symmetric=symmetric)
    for name in ("conv1", "layer2.0.downsample.0", "fc"):
        channels = weights.layers(rounded)[name].weight.flatten(1)
        counts = {len(channel.unique()) for channel in channels}
        assert max(counts) <= 2**bits and (bits > 4 or max(counts) >= 2**bits - 1)


def test_one_scale_a_tensor_gives_the_whole_layer_few_values(resnet18):
    rounded = weights.fake_quantize_weights(resnet18, bits=4, axis=None)
    assert len(rounded.layer1[0].conv1.weight.unique()) <= 16
    assert len(weights.fake_quantize_weights(resnet18, bits=4).layer1[0].conv1.weight.unique()) > 16


def test_groups_have_their_own_scale_and_less_error(resnet18):
    weight = resnet18.fc.weight
    rounded = weights.fake_quantize_weights(resnet18, bits=3, group_size=32).fc.weight
    assert all(len(group.unique()) <= 8 for group in rounded.reshape(-1, 32))
    by_row = weights.fake_quantize_weights(resnet18, bits=3).fc.weight
    assert (rounded - weight).square().sum() < (by_row - weight).square().sum()


def test_only_weights_of_layers_that_are_not_kept_change(resnet18):
    rounded = weights.fake_quantize_weights(resnet18, bits=2, keep=("conv1", "fc"))
    expected = {f"{name}.weight" for name in weights.layers(resnet18)} - {"conv1.weight", "fc.weight"}
    original = resnet18.state_dict()
    assert {key for key, v in rounded.state_dict().items() if not torch.equal(v, original[key])} == expected


def test_keep_must_name_layers(resnet18):
    with pytest.raises(ValueError, match="called bn1, conv9;.*conv1"):
        weights.fake_quantize_weights(resnet18, bits=4, keep=("conv1", "conv9", "bn1"))


def test_the_original_can_still_be_trained():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    rounded = weights.fake_quantize_weights(model, bits=2)
    rounded(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is None and torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("granularity", [{"axis": None}, {"axis": 0}, {"group_size": 32}])
def test_clipping_by_error_rounds_every_layer_closer(resnet18, granularity):
    plain = weights.layers(weights.fake_quantize_weights(resnet18, bits=3, **granularity))
    clipped = weights.layers(weights.fake_quantize_weights(resnet18, bits=3, **granularity, clip="mse"))
    for name, layer in weights.layers(resnet18).items():
        errors = [(rounded[name].weight - layer.weight).detach().square().sum() for rounded in (plain, clipped)]
        assert errors[1] <= errors[0], name
    assert errors[1] < 0.9 * errors[0]
