import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from course_utils import affine, files, int4, models, qat, rounding, simulate, weights
from course_utils.rounding.awq import InputScale, scale_input
from tests.conftest import fingerprint

quick = settings(max_examples=80)


@st.composite
def integers(draw):
    """Bits, signedness and integers that just fit, in a shape of 0 to 3 dimensions."""
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    n = torch.Size(shape).numel()
    numbers = draw(st.lists(st.sampled_from([low, high]) | st.integers(low, high), min_size=n, max_size=n))
    return bits, signed, torch.tensor(numbers, dtype=torch.int16).reshape(shape)


@quick
@given(case=integers())
def test_what_is_packed_comes_back_from_exactly_the_bytes_it_needs(case):
    bits, signed, q = case
    packed = int4.pack(q, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-q.numel() * bits // 8),)
    found = int4.unpack(packed, q.shape, bits, signed=signed)
    assert found.dtype == (torch.int8 if signed else torch.uint8)
    assert found.shape == q.shape and torch.equal(found.to(torch.int16), q)


@quick
@given(case=integers())
def test_the_first_integer_takes_the_lowest_bits_of_the_first_byte(case):
    bits, _, q = case
    as_one_number = sum((int(value) % 2**bits) << (bits * i) for i, value in enumerate(q.flatten()))
    assert bytes(int4.pack(q, bits).tolist()) == as_one_number.to_bytes(-(-q.numel() * bits // 8), "little")


def test_two_four_bit_integers_share_a_byte():
    assert int4.pack(torch.tensor([1, -2, 7])).tolist() == [0xE1, 0x07]
    assert int4.unpack(torch.tensor([0xE1, 0x07], dtype=torch.uint8), (3,)).tolist() == [1, -2, 7]


def test_packing_does_not_hold_on_to_larger_memory():
    packed = int4.pack(torch.zeros(3, dtype=torch.int8), 4)
    assert packed.untyped_storage().nbytes() == 2


def test_strides_do_not_matter():
    q = torch.arange(-8, 8).reshape(4, 4).T
    assert torch.equal(int4.unpack(int4.pack(q), (4, 4)), q.to(torch.int8))


@pytest.mark.parametrize(
    ("numbers", "bits"), [([8, -1], 4), ([-9], 4), ([16], 4), ([2], 1), ([-1, 1], 1), ([256], 8), ([-1, 128], 8)]
)
def test_a_value_that_does_not_fit_is_refused(numbers, bits):
    with pytest.raises(ValueError, match=f"do not fit in {bits} bits"):
        int4.pack(torch.tensor(numbers), bits)


def test_floats_and_impossible_widths_are_refused():
    with pytest.raises(ValueError, match="integers, got torch.float32"):
        int4.pack(torch.zeros(3))
    for bits in (0, 9):
        with pytest.raises(ValueError, match="between 1 and 8"):
            int4.pack(torch.zeros(3, dtype=torch.int8), bits)
        with pytest.raises(ValueError, match="between 1 and 8"):
            int4.unpack(torch.zeros(3, dtype=torch.uint8), (3,), bits)


@pytest.mark.parametrize(("n", "dtype"), [(1, torch.uint8), (3, torch.uint8), (2, torch.float32), (2, torch.int8)])
def test_the_wrong_number_of_bytes_is_refused(n, dtype):
    with pytest.raises(ValueError, match="3 integers of 4 bits need 2 bytes"):
        int4.unpack(torch.zeros(n, dtype=dtype), (3,), 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groupwise_scales_can_be_stored_in_half_precision(symmetric):
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)) * 1e-3
    w[0] = 1e-9
    q, qparams = int4.quantize_groupwise(w, bits=4, group_size=4, symmetric=symmetric, ragged=True)
    assert torch.equal(qparams.scale.half().float(), qparams.scale) and (qparams.scale > 0).all()
    assert qparams.scale.shape == (6, 4)
    error = (affine.dequantize(q, qparams) - w).abs().reshape(6, -1)
    step = qparams.scale.repeat_interleave(4, 1)[:, :15]
    assert (error <= 0.51 * step + 15 * step * 2**-10).all()


def test_groups_that_do_not_divide_a_row_are_refused():
    with pytest.raises(
        ValueError, match=r"group_size 4 does not divide a row of 6 numbers: take one of \[1, 2, 3, 6\]"
    ):
        int4.quantize_groupwise(torch.ones(2, 3, 2), group_size=4)


def test_a_scale_that_half_precision_cannot_hold_is_refused():
    w = torch.ones(2, 8)
    w[1, 3] = 1e6
    with pytest.raises(ValueError, match="FP16"):
        int4.quantize_groupwise(w, group_size=4)


def test_bits_per_weight_count_scales_and_zero_points():
    assert int4.bits_per_weight(4, 32) == 4.5
    assert int4.bits_per_weight(4, 32, symmetric=False) == 4.625


def twin(model, bits, group_size, symmetric):
    """What a packed file should stand for, computed without packing anything."""
    found = weights.fold_batch_norm(model)
    found.load_state_dict({k: v.half().float() for k, v in found.state_dict().items() if v.is_floating_point()})
    for name, layer in weights.layers(weights.fold_batch_norm(model)).items():
        q, qparams = int4.quantize_groupwise(
            layer.weight.data, bits=bits, group_size=group_size, symmetric=symmetric, ragged=True
        )
        found.get_submodule(name).weight.data = affine.dequantize(q, qparams)
    return found


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "symmetric"),
    [
        ("resnet18", 4, 32, True),
        ("resnet18", 3, 64, False),
        ("mobilenet_v2", 2, 25, True),
        ("mobilenet_v2", 8, 7, False),
    ],
)
def test_a_packed_file_is_as_large_as_computed_and_loads_as_the_same_model(
    tmp_path, request, images, name, bits, group_size, symmetric
):
    model, path = request.getfixturevalue(name), tmp_path / "model.safetensors"
    before = fingerprint(model)
    written = int4.save_packed(model, path, bits=bits, group_size=group_size, symmetric=symmetric)
    assert written == path.stat().st_size and fingerprint(model) == before

    folded = weights.fold_batch_norm(model)
    expected = 0
    for layer in weights.layers(folded).values():
        rows, row_length = len(layer.weight), layer.weight[0].numel()
        groups = rows * -(-row_length // group_size)
        expected += -(-rows * row_length * bits // 8) + 2 * groups + (0 if symmetric else -(-groups * bits // 8))
        expected += 2 * len(layer.bias)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert written == 8 + header + expected

    loaded = int4.load_packed(path)
    assert not loaded.training
    assert models.architecture(loaded) == models.architecture(model)
    reference = twin(model, bits, group_size, symmetric)
    with torch.no_grad():
        assert torch.equal(loaded(images), reference(images))


def test_four_bits_in_groups_of_thirty_two_are_four_and_a_half_bits_a_weight(tmp_path, resnet18):
    n = sum(p.numel() for p in resnet18.parameters())
    written = int4.save_packed(resnet18, tmp_path / "model")
    assert written / (4 * n) == pytest.approx(int4.bits_per_weight(4, 32) / 32, rel=0.01)


def test_a_model_that_no_file_can_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="course_utils.models"):
        int4.save_packed(torch.nn.Linear(4, 4), tmp_path / "model")
    assert not list(tmp_path.glob("model*"))


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="other was not written by this save_packed"):
        int4.load_packed(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="other is truncated or not a safetensors file"):
        int4.load_packed(path)
    with pytest.raises(FileNotFoundError):
        int4.load_packed(tmp_path / "absent")


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("kind", ["nearest", "AdaRound", "trained", "mixed"])
def test_a_network_that_is_quantized_already_is_stored_as_it_is(tmp_path, mobilenet_v2, images, kind, activations):
    policy = simulate.Policy(weights=3, activations=activations, clip="mse")
    calibration = [images]
    if kind == "nearest":
        quantized = simulate.quantize(mobilenet_v2, policy, calibration)
    elif kind == "AdaRound":
        quantized, _ = rounding.adaround(mobilenet_v2, policy, calibration, steps=2, positions=32)
    elif kind == "trained":
        quantized = qat.convert(qat.prepare(mobilenet_v2, replace(policy, granularity="tensor"), calibration))
    else:
        layers = {"features.0.0": None, "classifier.1": 6}
        quantized = simulate.quantize(mobilenet_v2, replace(policy, layers=layers, symmetric=False), calibration)
    path = tmp_path / "model"
    written = int4.save_packed(quantized, path)
    assert written < 0.5 * int4.save_packed(mobilenet_v2, tmp_path / "eight", bits=8)
    loaded = int4.load_packed(path)
    for name, layer in weights.layers(quantized).items():
        if hasattr(layer, "weight_qparams"):
            again = weights.layers(loaded)[name]
            assert torch.equal(again.weight, layer.weight), name
            assert (again.weight_qparams.qmin, again.weight_qparams.qmax) == (
                layer.weight_qparams.qmin,
                layer.weight_qparams.qmax,
            )
    with torch.no_grad():
        before, after = quantized(images), loaded(images)
    # Biases became FP16, which can carry an activation over to its neighbour.
    assert (before - after).square().mean() < 1e-3 * before.square().mean()


@pytest.mark.parametrize("fold", [True, False])
def test_a_network_with_quantized_activations_alone_keeps_its_weights(tmp_path, resnet18, images, fold):
    policy = simulate.Policy(weights=None, activations=8, fold=fold)
    quantized = simulate.quantize(resnet18, policy, [images])
    int4.save_packed(quantized, tmp_path / "model")
    loaded = int4.load_packed(tmp_path / "model")
    for name, layer in weights.layers(quantized).items():
        assert torch.equal(weights.layers(loaded)[name].weight, layer.weight.half().float()), name
        assert vars(weights.layers(loaded)[name].input_quantizer.qparams()) == vars(layer.input_quantizer.qparams())


def replaced_head(resnet18, images):
    model = copy.deepcopy(resnet18)
    model.fc = torch.nn.Linear(512, 7)
    return model


def equalized(mobilenet_v2, images):
    return simulate.quantize(rounding.cross_layer_equalization(mobilenet_v2), simulate.Policy(granularity="tensor"))


def corrected(resnet18, images):
    return rounding.bias_correction(resnet18, simulate.quantize(resnet18, simulate.Policy(fold=False)), [images])


def prepared(resnet18, images):
    return qat.prepare(resnet18, simulate.Policy(weights=4, activations=8), [images])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "resnet18",
            replaced_head,
            r"fc.weight is \(7, 512\), expected \(10, 512\); fc.bias is \(7,\), expected \(10,\)\): .* num_classes",
        ),
        ("mobilenet_v2", equalized, r"features.0.2.caps is \(32, 1, 1\), expected none; .* and 3\d more.* ReLU6"),
        ("resnet18", corrected, r"conv1.bias is \(64,\), expected none; .* fold batch norms before bias_correction"),
        ("resnet18", prepared, "conv1.parametrizations.weight.original .* qat.convert"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_it_is_written(tmp_path, request, images, name, change, said):
    model = change(request.getfixturevalue(name), images)
    (tmp_path / "model").write_text("what was there")
    with pytest.raises(ValueError, match=said):
        int4.save_packed(model, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "what was there" and len(list(tmp_path.glob("*model*"))) == 1


def test_the_layout_of_weights_in_memory_does_not_matter(tmp_path, resnet18, images):
    model = copy.deepcopy(resnet18).to(memory_format=torch.channels_last)
    policy = simulate.Policy(weights=4, layers={"conv1": None})
    for network in (model, resnet18):
        int4.save_packed(simulate.quantize(network, policy), tmp_path / "model")
        loaded = int4.load_packed(tmp_path / "model")
        with torch.no_grad():
            assert loaded(images).shape == (len(images), 10)
    assert loaded.conv1.weight.is_contiguous() and torch.equal(loaded.fc.bias, resnet18.fc.bias.half().float())


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, mobilenet_v2, share):
    path = tmp_path / "model"
    written = int4.save_packed(mobilenet_v2, path)
    path.write_bytes(path.read_bytes()[: int(share * written)])
    with pytest.raises(ValueError, match="model is truncated or not a safetensors file.*save_packed"):
        int4.load_packed(path)


def test_a_file_with_a_changed_byte_is_refused(tmp_path, mobilenet_v2):
    path = tmp_path / "model"
    int4.save_packed(mobilenet_v2, path)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model is damaged: its contents differ from the checksum.*save_packed"):
        int4.load_packed(path)


def test_a_file_of_before_there_were_checksums_is_read(tmp_path, mobilenet_v2, images, monkeypatch):
    path = tmp_path / "model"
    int4.save_packed(mobilenet_v2, path)
    facts, tensors = files.load_tensors(path, remedy="")
    assert facts.pop("sha256")
    save_file(tensors, path, metadata={"course": json.dumps(facts | {"format": int4.EARLIER[0]})})
    with torch.no_grad():
        assert int4.load_packed(path)(images).shape == (len(images), 10)
    save_file(tensors, path, metadata={"course": json.dumps(facts)})
    with pytest.raises(ValueError, match="model is damaged"):
        int4.load_packed(path)  # who takes the checksum away has to take it from the format too


def test_the_layout_in_the_file_can_be_read_without_the_course(tmp_path, mobilenet_v2):
    path = tmp_path / "model"
    int4.save_packed(mobilenet_v2, path, bits=3, group_size=16, symmetric=False)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    layout = json.loads(header["__metadata__"]["course"])
    expected = {"shape": [10, 1280], "bits": 3, "axis": None, "group_size": 16, "symmetric": False}
    assert layout["layers"]["classifier.1"] == expected
    assert layout["architecture"] == {"name": "mobilenet_v2", "num_classes": 10}


def rewrite(path, change):
    """Let `change(layout, tensors)` change a packed file, which gets the checksum that belongs to it."""
    layout, tensors = files.load_tensors(path, remedy="")
    del layout["sha256"]
    change(layout, tensors)
    files.save_tensors(path, tensors, layout)


@pytest.fixture
def scaled(resnet18):
    """A network whose first and last layer divide their inputs, as after `rounding.awq`."""
    quantized = simulate.quantize(resnet18, simulate.Policy(4))
    factors = {"conv1": (torch.tensor([0.5, 1.0, 2.0]), -3), "fc": (torch.linspace(0.5, 2, 512).half().float(), -1)}
    for name, (values, dim) in factors.items():
        scale_input(weights.layers(quantized)[name], InputScale(values, dim))
    return quantized


def test_the_factors_of_inputs_are_stored_and_act_again(tmp_path, scaled, images):
    int4.save_packed(scaled, tmp_path / "scaled")
    loaded = int4.load_packed(tmp_path / "scaled")
    for name in ("conv1", "fc"):
        found, expected = (weights.layers(model)[name].input_scale for model in (loaded, scaled))
        assert found.dim == expected.dim and torch.equal(found.factors, expected.factors)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), scaled(images), rtol=0.01, atol=0.01)
        assert not torch.allclose(loaded(2 * images), loaded(images))
    zero_point = loaded.fc.weight_qparams.zero_point
    assert zero_point.dtype == torch.int32 and not zero_point.any()


@pytest.mark.parametrize("name, dim, n", [("conv1", -1, 3), ("conv1", -3, 4), ("fc", -3, 512), ("fc", -1, 511)])
def test_factors_that_do_not_fit_their_layer_are_refused(tmp_path, scaled, name, dim, n):
    int4.save_packed(scaled, tmp_path / "scaled")

    def change(layout, tensors):
        layout["scaled"][name], tensors[f"{name}.input_scale.factors"] = dim, torch.ones(n).half()

    rewrite(tmp_path / "scaled", change)
    with pytest.raises(ValueError, match=f"the factors of the inputs of {name} do not fit it"):
        int4.load_packed(tmp_path / "scaled")


@pytest.mark.parametrize("last, more", [(4, ""), (5, " and 1 more")])
def test_of_many_differences_three_are_named(last, more):
    def network(width, last):
        return torch.nn.Sequential(
            torch.nn.Linear(2, width), torch.nn.Linear(width, 4, bias=False), torch.nn.Linear(4, last, bias=False)
        )

    named = r"\(0.weight is .*; 0.bias is .*; 1.weight is \(4, 3\), expected \(4, 2\)"
    with pytest.raises(ValueError, match=rf"{named}{more}\): build it"):
        int4._check_architecture(network(3, last), network(2, 4))


def test_a_loaded_network_does_not_hang_on_its_file(tmp_path, resnet18, images):
    quantized = simulate.quantize(resnet18, simulate.Policy(4, 8, fold=False), [images])
    size = int4.save_packed(quantized, tmp_path / "model")
    loaded = int4.load_packed(tmp_path / "model")
    before = fingerprint(loaded)
    with open(tmp_path / "model", "r+b") as file:
        file.write(b"x" * size)
    assert fingerprint(loaded) == before


@pytest.mark.parametrize("ends", [[-129, 127], [0, 256], [5, 5], [0, True], [0.0, 255]])
def test_inputs_that_are_not_rounded_to_bytes_are_refused(tmp_path, resnet18, images, ends):
    int4.save_packed(simulate.quantize(resnet18, simulate.Policy(4, 8), [images]), tmp_path / "model")
    rewrite(tmp_path / "model", lambda layout, tensors: layout["inputs"].update(conv1=ends))
    with pytest.raises(ValueError, match="conv1 rounds its input to integers"):
        int4.load_packed(tmp_path / "model")
