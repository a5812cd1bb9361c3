import copy
import json

import pytest
import torch
from torch import nn

from course_utils import affine, int4, models, simulate, weights
from course_utils.simulate import Policy
from tests.conftest import fingerprint


def levels(tensor):
    return len(tensor.unique())


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(), "W8 per-channel min-max, activations float32, symmetric weights, batch norm folded"),
        (
            Policy(weights=4, activations=8, observer="mse", first_last=8),
            "W4 per-channel min-max, A8 MSE, first+last 8 bits, symmetric weights, batch norm folded",
        ),
        (
            Policy(weights=2, granularity=32, clip="mse", symmetric=False, fold=False),
            "W2 groups of 32 MSE, activations float32, asymmetric weights, batch norm not folded",
        ),
        (Policy(weights=None, activations=4), "weights float32, A4 min-max, batch norm folded"),
        (
            Policy(weights=None, granularity="tensor", layers={"fc": 4}),
            "weights float32 per-tensor min-max, activations float32, fc W4, symmetric weights, batch norm folded",
        ),
        (
            Policy(weights=4, layers={"a": 2, "b": 3, "c": 2, "d": None, "e": 2, "f": 2}),
            "W4 per-channel min-max, activations float32, 4 layers W2, b W3, d float32, symmetric weights, "
            "batch norm folded",
        ),
    ],
)
def test_a_policy_says_all_of_itself(policy, said):
    assert str(policy) == said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": 1}, "weights must be .* 2 to 8, or None.* got 1"),
        ({"weights": 4.0}, "weights must be .* got 4.0"),
        ({"activations": 9}, "activations must be .* got 9"),
        ({"first_last": 16}, "first_last must be .* got 16"),
        ({"layers": {"fc": 0}}, r"layers\['fc'\] must be .* got 0"),
        ({"granularity": "row"}, '"tensor", "channel" or a group size.* got \'row\''),
        ({"granularity": 0}, "group size of at least 1, got 0"),
        ({"granularity": True}, "group size of at least 1, got True"),
        ({"clip": "kl"}, "clip must be one of minmax, mse, got 'kl'"),
        ({"observer": "max"}, "observer must be one of minmax, mse, percentile, entropy, got 'max'"),
    ],
)
def test_a_policy_refuses_what_it_does_not_know(values, said):
    with pytest.raises(ValueError, match=said):
        Policy(**values)


def test_policies_can_be_compared_and_be_keys():
    assert Policy(weights=4) == Policy(weights=4, layers={}) != Policy(weights=4, layers={"fc": 8})
    assert {Policy(weights=4): 1}[Policy(weights=4)] == 1


def test_bits_of_each_layer(resnet18):
    bits = Policy(weights=4, activations=4, first_last=8, layers={"fc": None, "layer1.0.conv1": 2}).bits(resnet18)
    assert list(bits) == list(weights.layers(resnet18))
    assert bits.pop("conv1") == (8, 8) and bits.pop("fc") == (None, 8) and bits.pop("layer1.0.conv1") == (2, 4)
    assert set(bits.values()) == {(4, 4)}
    weight_only = Policy(weights=3, first_last=8).bits(resnet18)
    assert weight_only["conv1"] == weight_only["fc"] == (8, None)
    with pytest.raises(ValueError, match="called conv9; there are: conv1, "):
        Policy(layers={"conv9": 4}).bits(resnet18)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
@pytest.mark.parametrize("clip", affine.CLIPS)
def test_weights_are_those_of_fake_quantize_weights_but_for_scales_in_fp16(mobilenet_v2, granularity, clip):
    before = fingerprint(mobilenet_v2)
    policy = Policy(weights=4, granularity=granularity, clip=clip)
    found = weights.layers(simulate.quantize(mobilenet_v2, policy))
    folded = weights.fold_batch_norm(mobilenet_v2)
    options = {"group_size": granularity} if granularity == 32 else {"axis": 0 if granularity == "channel" else None}
    expected = weights.layers(weights.fake_quantize_weights(folded, bits=4, clip=clip, **options))
    differ = 0
    for name, layer in found.items():
        w = weights.layers(folded)[name].weight.data
        qparams = simulate.weight_qparams(w, policy, 4)
        assert torch.equal(qparams.scale, qparams.scale.half().float())
        off = (layer.weight - expected[name].weight).abs() / affine.spread(qparams.scale, w, qparams)
        assert (off < 1.01).all()
        differ += int((off > 0.01).sum())
    assert differ < 2e-3 * sum(layer.weight.numel() for layer in found.values())  # near the middle of two steps
    assert fingerprint(mobilenet_v2) == before


def test_groups_are_those_of_the_packed_file(resnet18, tmp_path):
    int4.save_packed(resnet18, tmp_path / "model", bits=3)
    stored = int4.load_packed(tmp_path / "model").state_dict()
    quantized = simulate.quantize(resnet18, Policy(weights=3, granularity=32)).state_dict()
    for name in weights.layers(resnet18):
        assert torch.equal(quantized[f"{name}.weight"], stored[f"{name}.weight"])


def test_each_layer_has_the_bits_of_the_policy(resnet18):
    policy = Policy(weights=2, granularity="tensor", first_last=4, layers={"layer1.0.conv1": 3, "layer2.0.conv1": None})
    found = {n: layer.weight for n, layer in weights.layers(simulate.quantize(resnet18, policy)).items()}
    assert levels(found["conv1"]) <= 16 and levels(found["fc"]) <= 16 and levels(found["layer1.0.conv1"]) <= 8
    folded = weights.fold_batch_norm(resnet18)
    assert torch.equal(found["layer2.0.conv1"], folded.layer2[0].conv1.weight)
    assert levels(found["layer4.1.conv2"]) <= 4


def test_nothing_quantized_is_the_network_itself(resnet18, images):
    same = simulate.quantize(resnet18, Policy(weights=None))
    unfolded = simulate.quantize(resnet18, Policy(weights=None, fold=False))
    with torch.no_grad():
        torch.testing.assert_close(same(images), resnet18(images), rtol=1e-4, atol=1e-4)
        assert torch.equal(unfolded(images), resnet18(images))
    assert any(isinstance(m, nn.BatchNorm2d) for m in unfolded.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in same.modules())


@pytest.mark.parametrize("observer", simulate.OBSERVERS)
def test_what_goes_into_a_layer_has_few_values(resnet18, calibration, images, observer):
    policy = Policy(weights=None, activations=3, observer=observer, first_last=5)
    quantized = simulate.quantize(resnet18, policy, calibration)
    assert list(weights.layers(quantized)) == list(weights.layers(resnet18))
    seen = {}
    for name, layer in weights.layers(quantized).items():  # hooks run in order: after the quantizer's own
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: levels(args[0])}))
    quantized(images)
    assert 8 < seen.pop("conv1") <= 32 and 8 < seen.pop("fc") <= 32
    assert 4 <= max(seen.values()) <= 8


def test_more_bits_come_closer_to_the_network(resnet18, calibration, images):
    networks = [simulate.quantize(resnet18, Policy(8, bits), calibration) for bits in (3, 5, 8)]
    with torch.no_grad():
        errors = [float((network(images) - resnet18(images)).square().mean()) for network in networks]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_ranges_come_from_images_with_or_without_labels(resnet18, calibration):
    policy = Policy(activations=8)
    with_labels = simulate.quantize(resnet18, policy, calibration)
    without = simulate.quantize(resnet18, policy, iter([batch for batch, _ in calibration]))
    assert fingerprint(with_labels) == fingerprint(without)
    fewer = simulate.quantize(resnet18, policy, calibration[:1])
    assert fingerprint(with_labels) != fingerprint(fewer)


@pytest.mark.parametrize("calibration", [None, [], iter(())])
def test_activations_need_images(resnet18, calibration):
    with pytest.raises(ValueError, match="calibration set is empty: W8 per-channel min-max, A8 .* real images"):
        simulate.quantize(resnet18, Policy(activations=8), calibration)


def test_a_quantized_network_can_be_copied_saved_and_loaded(resnet18, calibration, images):
    quantized = simulate.quantize(resnet18, Policy(4, 4), calibration)
    duplicate = copy.deepcopy(quantized)
    assert torch.equal(duplicate(images), quantized(images))
    duplicate.conv1.input_quantizer.scale.mul_(3)
    assert not torch.equal(duplicate(images), quantized(images))
    duplicate.load_state_dict(quantized.state_dict())
    assert torch.equal(duplicate(images), quantized(images))


def test_fake_quantize_is_that_of_affine_and_lets_gradients_through_within_the_range():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    qparams = affine.choose_qparams(x[:50], bits=4)
    quantizer = simulate.FakeQuantize(qparams)
    x.requires_grad_()
    found = quantizer(x)
    torch.testing.assert_close(found, affine.fake_quantize(x, qparams))
    found.sum().backward()
    low, high = affine.dequantize(torch.tensor([qparams.qmin, qparams.qmax]), qparams)
    inside = (x > low) & (x < high)
    assert inside.any() and not inside.all()
    assert (x.grad[inside] == 1).all() and (x.grad[(x < low - qparams.scale) | (x > high + qparams.scale)] == 0).all()
    assert "zero_point=" in repr(quantizer) and "0..15" in repr(quantizer)
    other = simulate.FakeQuantize(affine.choose_qparams(x.detach(), bits=8, symmetric=True))
    assert "zero_point=0" in repr(other) and "-128..127" in repr(other)
    assert quantizer.qparams() == qparams and other.qparams().qmax == 127


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, 32, False), (2, 100, False)])
def test_the_size_is_that_of_the_packed_file_to_the_byte(name, bits, group, symmetric, request, tmp_path):
    model = request.getfixturevalue(name)
    int4.save_packed(model, tmp_path / "model", bits=bits, group_size=group, symmetric=symmetric)
    data_bytes = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in header(tmp_path / "model").values())
    found = simulate.size(model, Policy(weights=bits, granularity=group, symmetric=symmetric))
    assert found.total == data_bytes
    assert (found.zero_points == 0) == symmetric


def header(path):
    content = path.read_bytes()
    tensors = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors.pop("__metadata__")
    return tensors


def test_the_size_of_a_small_network_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 10))
    n = {"0": 5 * 27, "3": 200}
    rest = 2 * (5 + 10)
    assert simulate.size(model, Policy(weights=None)) == simulate.Size(0, 0, 0, 2 * sum(n.values()) + rest)
    assert simulate.size(model, Policy(weights=3)) == simulate.Size(51 + 75, 2 * 15, 0, rest)
    assert simulate.size(model, Policy(weights=3, granularity="tensor")) == simulate.Size(51 + 75, 2 * 2, 0, rest)
    by_group = simulate.size(model, Policy(weights=3, granularity=8, symmetric=False))
    assert by_group == simulate.Size(51 + 75, 2 * (5 * 4 + 10 * 3), 8 + 12, rest)  # 20 and 30 zero points of 3 bits
    mixed = simulate.size(model, Policy(weights=3, layers={"0": 8, "3": None}))
    assert mixed == simulate.Size(135, 2 * 5, 0, rest + 2 * 200) and mixed.total == 135 + 10 + rest + 400
    unfolded = simulate.size(model, Policy(weights=3, fold=False))
    assert unfolded.rest == rest + 2 * 4 * 5 + 8  # four tensors of the batch norm, and its 64-bit counter


def test_the_scales_counted_are_the_scales_used(resnet18):
    for granularity in ("tensor", "channel", 32):
        policy = Policy(granularity=granularity)
        for layer in weights.layers(resnet18).values():
            used = simulate.weight_qparams(layer.weight.data, policy, 8).scale.numel()
            assert simulate.weight_scales(layer.weight, policy) == used


def test_activations_are_quantized_once(resnet18, calibration):
    quantized = simulate.quantize(resnet18, Policy(4, 4), calibration)
    with pytest.raises(ValueError, match="quantized already: start from the one without"):
        simulate.quantize_activations(quantized, Policy(4, 4), calibration)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_calibration_goes_on_where_it_was(resnet18, images, observer):
    policy = Policy(8, 8, observer=observer)
    rounded = simulate.quantize_weights(simulate.prepare(resnet18, policy), policy)
    ranges = simulate.Calibration(rounded, policy)
    with pytest.raises(ValueError, match="the calibration set is empty: W8 .* needs real images"):
        ranges.quantized()
    parts = images[:6].split([2, 4])
    for seen in (1, 2):
        ranges.observe([parts[seen - 1]])
        expected = simulate.quantize_activations(rounded, policy, parts[:seen])
        for name, layer in weights.layers(ranges.quantized()).items():
            assert layer.input_quantizer.qparams() == weights.layers(expected)[name].input_quantizer.qparams(), name
    assert ranges.images == 6
    assert not any(layer._forward_pre_hooks for layer in weights.layers(rounded).values()), (
        "the given model is untouched"
    )


class LanguageModel(nn.Module):
    """An embedding, and a head that has the same matrix."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_tied_weights_are_rounded_in_the_layer_alone():
    model = LanguageModel().eval()
    quantized = simulate.quantize(model, Policy(2))
    assert torch.equal(quantized.embedding.weight, model.embedding.weight)
    assert torch.equal(
        quantized.head.weight, affine.fake_quantize(model.head.weight.detach(), quantized.head.weight_qparams)
    )
    assert (
        quantized.head.weight.requires_grad
        and not simulate.quantize(model.requires_grad_(False), Policy(2)).head.weight.requires_grad
    )


def test_the_size_counts_each_tensor_once_whatever_its_names():
    assert simulate.size(nn.Linear(8, 8, bias=False), Policy(8)) == simulate.Size(64, 16, 0, 0)
    tied = LanguageModel()
    assert simulate.size(tied, Policy(None)) == simulate.Size(0, 0, 0, 2 * 128)
    assert simulate.size(tied, Policy(8)) == simulate.Size(128, 2 * 16, 0, 2 * 128)  # the embedding stays as it is
    layer = nn.Linear(8, 8)
    assert simulate.size(nn.Sequential(layer, nn.ReLU(), layer), Policy(4)) == simulate.Size(32, 16, 0, 16)
    assert simulate.size(nn.Sequential(layer, nn.ReLU(), layer), Policy(None)) == simulate.Size(0, 0, 0, 144)


class Auxiliary(nn.Module):
    """A head that only training calls, and attention, which takes the weights of its last layer only."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.auxiliary = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_layers_that_are_never_called_are_named_and_can_be_left_out():
    model, x = Auxiliary().eval(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"came to attention.out_proj, auxiliary: .*layers={'attention.out_proj': None"
    ):
        simulate.quantize(model, Policy(8, 8), [x])
    with pytest.raises(ValueError, match=r"came to auxiliary: .*layers={'auxiliary': None}"):
        simulate.quantize(model, Policy(8, 8, layers={"attention.out_proj": None}), [x])
    left_out = {"attention.out_proj": None, "auxiliary": None}
    quantized = simulate.quantize(model, Policy(8, 8, layers=left_out), [x])
    assert [name for name, m in quantized.named_modules() if hasattr(m, "input_quantizer")] == ["head"]
    assert quantized(x).isfinite().all()
    assert simulate.quantize(model, Policy(2)).auxiliary.weight_qparams.qmax == 1  # weights need no inputs


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_no_parameter_are_refused(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="weights of 0 are computed anew.*remove_parametrizations"):
        simulate.quantize(model, Policy(2))
    quantized = simulate.quantize(model, Policy(2, layers={"0": None}))
    assert levels(quantized[1].weight[0]) <= 4


def test_weights_other_than_float32_are_refused():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    with pytest.raises(ValueError, match=r"weights of 0 are torch.bfloat16, expected float32: call model.float\(\)"):
        simulate.prepare(model, Policy(8))
    assert simulate.quantize(model, Policy(None))[0].weight.dtype == torch.bfloat16


def test_a_network_without_layers_has_no_first_and_last():
    assert Policy(4, first_last=8).bits(nn.Sequential(nn.ReLU())) == {}


@pytest.mark.parametrize("granularity", ["tensor", "channel", 2])
def test_scales_that_fp16_cannot_hold_are_refused(granularity):
    policy = Policy(granularity=granularity)
    assert simulate.weight_qparams(torch.full((2, 4), 65504.0 * 7), policy, 4).scale.max() == 65504
    with pytest.raises(ValueError, match="scale of 1.43e.07 cannot be stored in FP16: the weights are too large"):
        simulate.weight_qparams(torch.full((2, 4), 1e8), policy, 4)


def test_the_size_is_counted_without_another_copy_of_the_numbers(resnet18):
    shapes = simulate._shapes(resnet18)
    assert all(tensor.is_meta for tensor in (*shapes.parameters(), *shapes.buffers()))
    assert not resnet18.conv1.weight.is_meta
    assert shapes.state_dict().keys() == resnet18.state_dict().keys()


def test_a_tensor_with_two_names_stays_one_in_the_copy_of_shapes():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    shapes = simulate._shapes(tied)
    assert shapes[0].weight is shapes[1].weight and isinstance(shapes[0].weight, nn.Parameter)
