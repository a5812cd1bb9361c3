"""Networks as ONNX: the course's integers, read and run by other people's programs."""

import warnings

import pytest
import torch
from torch import nn

from course_utils import affine, backends, data, models, qat, rounding, simulate, weights
from course_utils.backends import export
from course_utils.simulate import Policy
from tests.conftest import fingerprint
from tests.engines import FOLDERS, need, relative_error
from tests.test_backends_pt2e import Block

onnx = pytest.importorskip("onnx", reason="onnx is not installed (make setup ENGINES=1)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (make setup ENGINES=1)")
W8A8 = Policy(weights=8, activations=8)


def outputs(model, images):
    with torch.no_grad():
        return model(images)


def constants(path):
    """Return the tensors of an ONNX file as a dict of name → torch tensor."""
    found = onnx.load(path).graph.initializer
    return {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in found}


def reference(path, images):
    """Return the logits by the ONNX project's own evaluator, which follows the specification and nothing else."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    # The evaluator has DequantizeLinear from opset 19 on, where all operations of these files mean what they did before.
    model.opset_import[0].version = max(model.opset_import[0].version, 19)
    return torch.from_numpy(ReferenceEvaluator(model).run(None, {"images": images.contiguous().numpy()})[0])


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def quantized(block, calibration):
    return simulate.quantize(block, W8A8, calibration)


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "block.onnx"
    assert backends.export_onnx(quantized, path, image_shape=(3, 32, 32)) == path.stat().st_size
    return path


def test_a_float_network_computes_the_same(block, images, tmp_path):
    backends.export_onnx(block, tmp_path / "float.onnx", image_shape=(3, 32, 32))
    assert relative_error(reference(tmp_path / "float.onnx", images), outputs(block, images)) < 1e-5


def test_a_simulated_network_computes_the_same(quantized, exported, images):
    # Values just between two steps may go to the other one (see simulate.FakeQuantize), hence not to the last bit.
    assert relative_error(reference(exported, images), outputs(quantized, images)) < 0.01


def test_the_number_of_images_is_free_and_their_size_is_not(exported):
    graph = onnx.load(exported).graph
    shape = graph.input[0].type.tensor_type.shape.dim
    assert graph.input[0].name == "images" and graph.output[0].name == "logits"
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 32, 32]


def test_weights_are_the_networks_own_integers_with_a_scale_a_channel(quantized, exported):
    found = constants(exported)
    for name, layer in weights.layers(quantized).items():
        assert found[f"{name}.weight"].dtype == torch.int8
        assert torch.equal(found[f"{name}.weight"], affine.quantize(layer.weight.detach(), layer.weight_qparams))
        assert torch.equal(found[f"{name}.weight_scale"], layer.weight_qparams.scale)
        assert found[f"{name}.weight_scale"].shape == (len(layer.weight),)
    assert not [n for n, tensor in found.items() if tensor.is_floating_point() and tensor.ndim > 1]


def test_activations_are_unsigned_with_the_networks_own_zero_points(quantized, exported):
    found = constants(exported)
    pairs = [n for n in onnx.load(exported).graph.node if n.op_type == "QuantizeLinear"]
    zero_points = {int(found[n.input[2]]) for n in pairs}
    assert {found[n.input[2]].dtype for n in pairs} == {torch.uint8}
    quantizers = [layer.input_quantizer for layer in weights.layers(quantized).values()]
    assert zero_points == {int(q.zero_point) for q in quantizers}
    assert {float(found[n.input[1]]) for n in pairs} == {float(q.scale) for q in quantizers}


def test_a_file_names_no_folder_and_nobody_sees_a_warning(quantized, tmp_path, capfd):
    before = fingerprint(quantized)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.export_onnx(quantized, tmp_path / "model.onnx", image_shape=(3, 32, 32))
    assert capfd.readouterr() == ("", "") and fingerprint(quantized) == before
    content = tmp_path.joinpath("model.onnx").read_bytes()
    assert not [word for word in (*FOLDERS, b"engines.py") if word in content]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "the weights are in the file itself"


def test_a_newer_opset_can_be_asked_for(quantized, images, tmp_path):
    backends.export_onnx(quantized, tmp_path / "model.onnx", image_shape=(3, 32, 32), opset=21)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 21
    assert relative_error(reference(tmp_path / "model.onnx", images), outputs(quantized, images)) < 0.01


@pytest.mark.parametrize(
    "policy",
    [
        Policy(weights=8, activations=8, granularity="tensor"),
        Policy(weights=4, activations=8, layers={"last": 7}),
        Policy(weights=8),
        Policy(weights=8, activations=8, layers={"last": None}),
        Policy(weights=8, activations=8, fold=False),
    ],
    ids=str,
)
def test_other_policies_can_be_exported(block, calibration, images, tmp_path, policy):
    network = simulate.quantize(block, policy, calibration)
    backends.export_onnx(network, tmp_path / "model.onnx", image_shape=(3, 32, 32))
    assert relative_error(reference(tmp_path / "model.onnx", images), outputs(network, images)) < 0.01
    stored = constants(tmp_path / "model.onnx")
    assert sum(tensor.dtype == torch.int8 and tensor.ndim > 1 for tensor in stored.values()) == (
        3 if None in policy.layers.values() else 4
    )


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (Policy(weights=8, activations=4), r"stem.0 rounds its input to integers 0..15.*activations=8"),
        (
            Policy(weights=8, symmetric=False),
            "stem.0 has weights with integers.*zero points up to.*only symmetric weights",
        ),
        (Policy(weights=8, granularity=8), "a scale for each 8 weights.*granularity 'channel'"),
    ],
    ids=str,
)
def test_what_the_runtimes_have_no_kernels_for_is_refused(block, calibration, tmp_path, policy, complaint):
    with pytest.raises(ValueError, match=complaint):
        backends.export_onnx(simulate.quantize(block, policy, calibration), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_trained_network_is_exported_once_it_is_converted(block, calibration, images, tmp_path):
    prepared = qat.prepare(block, W8A8, calibration)
    prepared(images).square().mean().backward()
    with torch.no_grad():
        for p in prepared.parameters():
            if p.grad is not None and p.ndim > 1:
                p -= 0.01 * p.grad
    with pytest.raises(ValueError, match="still in training.*qat.convert"):
        backends.export_onnx(prepared, tmp_path / "model.onnx")
    network = qat.convert(prepared)
    backends.export_onnx(network, tmp_path / "model.onnx", image_shape=(3, 32, 32))
    stored = constants(tmp_path / "model.onnx")
    for name, layer in weights.layers(network).items():
        assert torch.equal(stored[f"{name}.weight"], affine.quantize(layer.weight.detach(), layer.weight_qparams))
    assert relative_error(reference(tmp_path / "model.onnx", images), outputs(network, images)) < 0.01


def test_a_model_of_an_engine_is_not_exported(block, calibration, tmp_path):
    with pytest.raises(ValueError, match="was made for engine '.*pass the float network"):
        backends.export_onnx(backends.quantize_static(block, calibration), tmp_path / "model.onnx")


def test_without_onnxscript_it_says_what_to_install(block, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"onnx and onnxscript.*squeeze-and-speed-up\[onnxruntime\]"):
        backends.export_onnx(block, tmp_path / "model.onnx")


# Run by others --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    """ResNet18 of the course, simulated with bits that fit this machine's runtimes, 500 test images and its predictions."""
    calibration = data.batches(data.fashion_mnist("calibration"), 50, limit=200)
    policy = Policy(weights=7 if backends.needs_headroom("openvino") else 8, activations=8)
    network = simulate.quantize(models.load("resnet18"), policy, calibration)
    images = [x for x, _ in data.batches(data.fashion_mnist("test"), 100, limit=500)]
    return network, images, torch.cat([outputs(network, x) for x in images])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_runtime_predicts_what_the_simulation_does(resnet, engine, tmp_path):
    need(engine)
    network, images, expected = resnet
    deployed = backends.deploy(network, engine=engine, precision="int8")
    found = torch.cat([deployed(x) for x in images])
    assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.995
    assert relative_error(found, expected) < 0.02
    assert backends.save(deployed, tmp_path / "model") == pytest.approx(11.3e6, rel=0.03)
    assert torch.equal(backends.load(tmp_path / "model")(images[0]), deployed(images[0]))


@pytest.mark.parametrize("activations", [8, None])
def test_inputs_that_awq_scales_are_divided_in_the_runtime_too(block, calibration, images, activations):
    need("onnxruntime")
    uneven = torch.tensor([8.0, 1.0, 0.1]).reshape(3, 1, 1)
    network, report = rounding.awq(block, Policy(4, activations), [x * uneven for x, _ in calibration])
    assert any(scaling.strength > 0 for scaling in report)
    deployed = backends.deploy(network, engine="onnxruntime", precision="int8", image_shape=(3, 32, 32))
    assert relative_error(deployed(images * uneven), outputs(network, images * uneven)) < 0.01


# For TensorRT, which knows signed integers without a zero point only ----------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 3])
def test_a_symmetric_network_has_the_same_ranges_without_zero_points(block, calibration, images, tmp_path, spread):
    quantized = simulate.quantize(block, W8A8, [spread * x for x, _ in calibration])
    signed = export.symmetric(quantized)
    for before, after in zip(*(weights.layers(m).values() for m in (quantized, signed)), strict=True):
        before, after = before.input_quantizer, after.input_quantizer
        ends = [float(before.scale) * (end - int(before.zero_point)) for end in (0, 255)]
        assert (after.qmin, after.qmax, int(after.zero_point)) == (-128, 127, 0)
        assert 127 * float(after.scale) == pytest.approx(max(map(abs, ends)))
    images = spread * images
    assert relative_error(outputs(signed, images), outputs(quantized, images)) < 0.05
    backends.export_onnx(signed, tmp_path / "signed.onnx", image_shape=(3, 32, 32))
    assert relative_error(reference(tmp_path / "signed.onnx", images), outputs(signed, images)) < 0.01
    stored = constants(tmp_path / "signed.onnx").values()
    assert not [t for t in stored if t.dtype == torch.uint8]
    assert not [t for t in stored if t.dtype == torch.int8 and t.ndim < 2 and t.any()]


def test_layers_that_do_not_round_stay_as_they_are(block):
    plain = export.explicit(block)
    assert [type(m) for m in plain.modules()] == [type(m) for m in block.modules()]
    assert not any(isinstance(m, export._Explicit) for m in plain.modules()) and isinstance(plain, nn.Module)
