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


def _open(content, image_shape):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    # Its threads would go on waiting in a loop after a call, in the way of whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return program.Program("onnxruntime", run, {FILE: content}, image_shape)


class _Reader:
    """Calibration batches, one at a time, as ONNX Runtime asks for them."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        images = next(self.batches, None)
        return None if images is None else {"images": images.detach().contiguous().numpy()}
