"""Engine tensorrt without a GPU: what it says, what it refuses, and what it would be given. Nothing here runs TensorRT."""

import sys
from unittest.mock import MagicMock

import pytest
import torch

from course_utils import backends, simulate
from course_utils.backends import export, tensorrt
from course_utils.simulate import Policy
from tests.test_backends_pt2e import Block


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


def recipe(**options):
    return {"per_channel": True, "observer": "minmax", "reduce_range": False} | options


def test_without_a_gpu_or_the_package_it_was_not_run_here(block, calibration, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    (found,) = backends.engines("tensorrt")
    assert not found.runs
    assert found.why.startswith("no NVIDIA GPU that torch can use; tensorrt is not installed")
    assert "squeeze-and-speed-up[tensorrt]" in found.why
    for make in (
        lambda: backends.quantize_static(block, calibration, engine="tensorrt"),
        lambda: backends.deploy(block, engine="tensorrt"),
    ):
        with pytest.raises(RuntimeError, match="'tensorrt' does not run here: no NVIDIA GPU"):
            make()


def test_with_a_gpu_only_the_package_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    assert "GPU that torch" not in tensorrt.engines()[0].why


def test_it_is_given_signed_integers_without_zero_points(block, calibration, images):
    network = tensorrt.simulate_symmetric(block, [x for x, _ in calibration], recipe())
    tensorrt.check_symmetric(network)
    assert network.image_shape == (3, 32, 32)
    with torch.no_grad():
        expected, found = block(images), network(images)
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_ranges_it_has_no_counterpart_for_are_refused(block, calibration):
    for options in ({"observer": "histogram"}, {"reduce_range": True}):
        with pytest.raises(ValueError, match="takes observer='minmax' on all 8 bits"):
            tensorrt.simulate_symmetric(block, [x for x, _ in calibration], recipe(**options))


def test_unsigned_activations_are_refused_with_what_to_do(block, calibration, monkeypatch):
    opened = []
    monkeypatch.setattr(tensorrt, "_open", lambda content, shape: opened.append(content))
    network = simulate.quantize(block, Policy(8, 8), calibration)
    with pytest.raises(ValueError, match=r"stem.0 rounds its input to integers 0..255.*export.symmetric\(network\)"):
        tensorrt.deploy(network, "int8", (3, 32, 32))
    assert not opened


def test_what_is_built_is_the_exported_file(block, calibration, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (make setup ENGINES=1)")
    monkeypatch.setattr(tensorrt, "_open", lambda content, shape: (content, shape))
    network = export.symmetric(simulate.quantize(block, Policy(8, 8), calibration))
    for precision, given in (("int8", network), ("fp32", block)):
        assert tensorrt.deploy(given, precision, (3, 32, 32)) == (export.to_onnx(given, (3, 32, 32)), (3, 32, 32))
    expected = export.to_onnx(network, (3, 32, 32)), (3, 32, 32)
    batches = [x for x, _ in calibration]
    assert tensorrt.quantize_static(block, batches, recipe()) == expected
    assert tensorrt.quantize_static(block, batches, recipe(per_channel=False)) != expected


def test_what_is_loaded_is_built_from_the_bytes_of_its_file(monkeypatch):
    monkeypatch.setattr(tensorrt, "_open", lambda content, shape: (content, shape))
    for content, shape in ((b"one", [3, 32, 32]), (b"two", [3, 64, 64])):
        tensors = {tensorrt.FILE: torch.tensor(list(content), dtype=torch.uint8)}
        assert tensorrt.rebuild(None, {}, tensors, {"image_shape": shape}) == (content, shape)


@pytest.fixture
def fake(monkeypatch):
    """A TensorRT that does nothing and remembers what it was asked."""
    fake = MagicMock()
    fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


def test_a_plan_is_for_one_image_to_the_most_and_for_true_float32(fake):
    builder = fake.Builder.return_value
    for plan, side in ((b"a plan", 32), (b"another", 64)):
        builder.build_serialized_network.return_value = plan
        assert tensorrt.build(b"onnx", (3, side, side)) == plan
        fake.OnnxParser.return_value.parse.assert_called_with(b"onnx")
        sizes = [(n, 3, side, side) for n in (1, 1, tensorrt.MOST_IMAGES)]
        builder.create_optimization_profile.return_value.set_shape.assert_called_with("images", *sizes)
        builder.create_builder_config.return_value.clear_flag.assert_called_with(fake.BuilderFlag.TF32)
    builder.build_serialized_network.return_value = None
    with pytest.raises(RuntimeError, match="could not build an engine"):
        tensorrt.build(b"onnx", (3, 32, 32))


def test_a_network_that_tensorrt_cannot_read_is_refused_with_its_reasons(fake):
    parser = fake.OnnxParser.return_value
    parser.parse.return_value, parser.num_errors = False, 1
    parser.get_error.return_value = "zero point must be zero"
    with pytest.raises(RuntimeError, match="cannot read this network: zero point must be zero"):
        tensorrt.build(b"", (3, 32, 32))
    fake.Builder.return_value.create_network.assert_called_with(1 << 1)
