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
    opened = []
    monkeypatch.setattr(tensorrt, "_open", lambda content, shape: opened.append((content, shape)))
    network = export.symmetric(simulate.quantize(block, Policy(8, 8), calibration))
    tensorrt.deploy(network, "int8", (3, 32, 32))
    assert opened == [(export.to_onnx(network, (3, 32, 32)), (3, 32, 32))]


def test_a_network_that_tensorrt_cannot_read_is_refused_with_its_reasons(monkeypatch):
    fake = MagicMock()
    fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    parser = fake.OnnxParser.return_value
    parser.parse.return_value, parser.num_errors = False, 1
    parser.get_error.return_value = "zero point must be zero"
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    with pytest.raises(RuntimeError, match="cannot read this network: zero point must be zero"):
        tensorrt.build(b"", (3, 32, 32))
    fake.Builder.return_value.create_network.assert_called_with(1 << 1)
