"""Engine openvino: what every engine has to keep, which kernels run, and that nothing is reported to anybody."""

import os

import pytest
import torch

from course_utils import backends
from tests.engines import Contract, hide, relative_error


def kernels(program, precision):
    """Return how often each kind of layer runs in each type: `(layer, type)` → count."""
    import openvino

    core = openvino.Core()
    weights = openvino.Tensor(torch.frombuffer(bytearray(program.content["bin"]), dtype=torch.uint8).numpy())
    network = core.read_model(program.content["xml"], weights)
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found = {}
    for node in compiled.get_runtime_model().get_ops():
        layer, kernel = (str(node.get_rt_info()[key].value) for key in ("layerType", "primitiveType"))
        kind = layer, kernel.rpartition("_")[2]
        found[kind] = found.get(kind, 0) + 1
    return found


class TestOpenVINO(Contract):
    engine = package = "openvino"
    observers = ("minmax", "histogram")

    def test_every_layer_became_an_integer_kernel(self, int8, fp32):
        found = kernels(int8, "f32")
        assert found["Convolution", "I8"] == 3 and found["FullyConnected", "I8"] == 1
        assert not {("Convolution", "f32"), ("FullyConnected", "f32")} & found.keys()
        assert kernels(fp32, "f32")["Convolution", "f32"] == 3

    def test_bfloat16_is_chosen_only_when_asked_for(self, block, fp32, expected, images):
        bf16 = backends.deploy(block, engine="openvino", precision="bf16", image_shape=(3, 32, 32))
        assert relative_error(fp32(images), expected) < 1e-5
        assert relative_error(bf16(images), expected) < 0.03

    def test_the_float_file_is_float32(self, block, fp32):
        assert len(fp32.content["bin"]) > sum(4 * p.numel() for p in block.parameters() if p.ndim > 1)

    def test_the_environment_is_as_it_was(self, block, calibration, monkeypatch):
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setenv("NNCF_CI", "mine")
        before = dict(os.environ)
        backends.quantize_static(block, calibration, engine="openvino")
        assert dict(os.environ) == before

    def test_without_nncf_only_quantization_is_missing(self, block, calibration, images, monkeypatch):
        hide(monkeypatch, "openvino", "nncf")
        with pytest.raises(RuntimeError, match=r"quantizes with NNCF.*squeeze-and-speed-up\[openvino\]"):
            backends.quantize_static(block, calibration, engine="openvino")
        backends.deploy(block, engine="openvino", image_shape=(3, 32, 32))(images)
