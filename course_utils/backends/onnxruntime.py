"""ONNX Runtime on the CPU: float networks, its own static INT8, and networks that come with their Q/DQ pairs.

Static quantization as its page "Quantize ONNX models" has it: first `quant_pre_process`, then Q/DQ pairs, and of the types
unsigned 8-bit activations with signed 8-bit weights: on a processor with VNNI those have the fastest kernels by far, whereas
the page's first choice is signed for both. One session takes any number of images; it uses as many threads as torch did when
the model was made or loaded.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

from . import Engine, export, program

SELF_CONTAINED = True
FILE = "onnx"
flatten = program.flatten


def engines():
    """Return the one engine of this family."""
    return [Engine("onnxruntime", True, f"onnxruntime {onnxruntime.__version__}")]


def quantize_static(model, calibration, recipe):
    """As `backends.quantize_static`. Ranges of activations: smallest and largest value seen. Headroom is taken from weights."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if recipe["observer"] != "minmax":
        raise ValueError(
            "engine 'onnxruntime' has no range of least squared error: its others are by percentile or entropy, which is "
            "something else. Use observer='minmax'"
        )
    first, batches = program.first_and_all(calibration)
    image_shape = tuple(first.shape[1:])
    with tempfile.TemporaryDirectory() as folder, program.making("root"):
        plain, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantized"))
        plain.write_bytes(export.to_onnx(model, image_shape))
        quant_pre_process(plain, prepared)
        quantize_static(
            prepared,
            quantized,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=recipe["per_channel"],
            reduce_range=recipe["reduce_range"],
            calibrate_method=CalibrationMethod.MinMax,
        )
        return _open(quantized.read_bytes(), image_shape)


def deploy(model, precision, image_shape):
    return _open(export.to_onnx(model, image_shape), image_shape)


def rebuild(model, recipe, tensors, rest):
    return _open(program.unflatten(tensors)[FILE], rest["image_shape"])


def int4_linear(q, scale, group_size):
    """Return a callable x float32 `(rows, in)` → float32 `(rows, out)`: a linear layer with INT4 weights, MatMulNBits.

    q: integers 0..15 `(out, in)`, of which 8 stands for zero. scale: float32 `(out, in / group_size)`. The inputs are rounded
    to 8 bits on the way (its accuracy level 4), so that the products are integer ones.
    """
    from onnx import TensorProto, helper

    out, length = q.shape
    codes = q.to(torch.uint8).unflatten(1, (-1, group_size))
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    constants = [("packed", TensorProto.UINT8, packed), ("scale", TensorProto.FLOAT, scale.float())]
    sizes = {"K": length, "N": out, "bits": 4, "block_size": group_size, "accuracy_level": 4}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "packed", "scale"], ["y"], domain="com.microsoft", **sizes)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [helper.make_tensor(n, kind, t.shape, t.contiguous().numpy().tobytes(), raw=True) for n, kind, t in constants],
    )
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    session = _session(helper.make_model(graph, opset_imports=operators, ir_version=10).SerializeToString())
    return lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def _open(content, image_shape):
    session = _session(content)

    def run(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return program.Program("onnxruntime", run, {FILE: content}, image_shape)


def _session(content):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    # Its threads would go on waiting in a loop after a call, in the way of whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class _Reader:
    """Calibration batches, one at a time, as ONNX Runtime asks for them."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        images = next(self.batches, None)
        return None if images is None else {"images": images.detach().contiguous().numpy()}
