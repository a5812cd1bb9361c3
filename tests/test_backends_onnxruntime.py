"""Engine onnxruntime: what every engine has to keep, and which kernels its static quantization ends in."""

from collections import Counter

import pytest

from course_utils import backends, cpu
from tests.engines import Contract


class TestOnnxRuntime(Contract):
    engine = package = "onnxruntime"

    def test_every_layer_became_an_integer_kernel(self, int8, tmp_path):
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(int8.content["onnx"], options, providers=["CPUExecutionProvider"])
        kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert kernels["QLinearConv"] == 3 and kernels["QLinearAdd"] == kernels["QGemm"] == 1
        assert not kernels.keys() & {"Conv", "FusedConv", "Gemm", "Add", "BatchNormalization"}

    def test_activations_are_unsigned_and_weights_signed(self, int8):
        import onnx

        network = onnx.load_from_string(int8.content["onnx"])
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in network.graph.initializer}
        activations = [constants[n.input[2]] for n in network.graph.node if n.op_type == "QuantizeLinear"]
        assert activations and {a.dtype.name for a in activations} == {"uint8"}
        weights = [c for c in constants.values() if c.ndim > 1]
        assert len(weights) == 4 and {w.dtype.name for w in weights} == {"int8"}

    def test_headroom_is_a_bit_of_the_weights(self, block, calibration):
        import onnx

        largest = []
        for reduce_range in (False, True):
            int8 = backends.quantize_static(block, calibration, engine="onnxruntime", reduce_range=reduce_range)
            constants = onnx.load_from_string(int8.content["onnx"]).graph.initializer
            weights = [onnx.numpy_helper.to_array(i) for i in constants if i.data_type == onnx.TensorProto.INT8]
            largest.append(max(int(abs(w.astype(int)).max()) for w in weights if w.ndim > 1))
        assert largest[0] in (127, 128) and largest[1] in (63, 64)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("x86", "vnni", "expected"), [(True, True, False), (True, False, True), (False, False, False)])
def test_headroom_is_needed_on_x86_without_vnni_only(monkeypatch, engine, x86, vnni, expected):
    monkeypatch.setattr(cpu, "is_x86", lambda: x86)
    monkeypatch.setattr(cpu, "has_vnni", lambda: vnni)
    assert backends.needs_headroom(engine) is expected
    assert not backends.needs_headroom("executorch") and not backends.needs_headroom("tensorrt")
