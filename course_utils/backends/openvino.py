"""OpenVINO on the CPU: float networks, INT8 by NNCF, and networks that come with their Q/DQ pairs.

NNCF's post-training quantization is set up as the course's other engines are: signed symmetric weights, unsigned asymmetric
activations (`preset` MIXED), ranges from the smallest and largest value seen. On top of that it corrects the mean error of
every layer's output through its bias (fast bias correction, as `rounding.bias_correction` explains), which is its default
and stays on: its INT8 is not comparable with plain rounding. Headroom it takes from the weights (`overflow_fix`), in all
layers or none; its own default is the first layer only.

A model is made for one size of images and any number of them. It uses as many threads as torch did when the model was made or
loaded, one stream, and the precision that was asked for: by itself OpenVINO would compute in bfloat16 where a CPU has it.
"""

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from unittest import mock

import openvino
import torch

from . import REMEDIES, Engine, export, program

SELF_CONTAINED = True
PRECISION = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}  # of what is not integers
flatten = program.flatten


def engines():
    """Return the one engine of this family."""
    return [Engine("openvino", True, f"openvino {openvino.__version__.partition('-')[0]}")]


def quantize_static(model, calibration, recipe):
    """As `backends.quantize_static`; `"histogram"` is NNCF's search for the range of least squared error."""
    first, batches = program.first_and_all(calibration)
    image_shape = tuple(first.shape[1:])
    network = _convert(model, image_shape)
    with _untracked(), program.making("nncf", "torch.utils.cpp_extension"), contextlib.redirect_stdout(None):
        nncf = _nncf()
        from nncf.quantization import advanced_parameters as advanced
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        images = [batch.detach().contiguous().numpy() for batch in batches]
        ranges = {"minmax": RangeEstimatorParametersSet.MINMAX, "histogram": RangeEstimatorParametersSet.HISTOGRAM}
        # In a notebook NNCF's progress bars would be widgets, displayed past the standard output.
        with mock.patch("rich.console._is_jupyter", lambda: False, create=True):
            quantized = nncf.quantize(
                network,
                nncf.Dataset(images),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                advanced_parameters=advanced.AdvancedQuantizationParameters(
                    overflow_fix=advanced.OverflowFix.ENABLE
                    if recipe["reduce_range"]
                    else advanced.OverflowFix.DISABLE,
                    activations_range_estimator_params=ranges[recipe["observer"]],
                    weights_quantization_params=advanced.QuantizationParameters(per_channel=recipe["per_channel"]),
                ),
            )
    return _open(_content(quantized), image_shape, "int8")


def deploy(model, precision, image_shape):
    if precision == "int8":
        network = openvino.Core().read_model(export.to_onnx(model, image_shape))
    else:
        network = _convert(model, image_shape)
    return _open(_content(network), image_shape, precision)


def rebuild(model, recipe, tensors, rest):
    return _open(program.unflatten(tensors), rest["image_shape"], recipe.get("precision", "int8"))


def _convert(model, image_shape):
    """Return a float network as OpenVINO's, for any number of images."""
    example = (torch.zeros(2, *image_shape),)
    with _untracked(), program.making(), torch.no_grad():
        exported = torch.export.export(
            copy.deepcopy(model).eval(), example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        network = openvino.convert_model(exported)
    network.reshape([-1, *image_shape])
    return network


def _content(network):
    """Return the two files of OpenVINO's IR: the network as XML, and its weights, float32 where they are not integers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        openvino.save_model(network, path, compress_to_fp16=False)
        return {"xml": path.read_bytes(), "bin": path.with_suffix(".bin").read_bytes()}


def _open(content, image_shape, precision):
    weights = openvino.Tensor(
        torch.frombuffer(bytearray(content["bin"]), dtype=torch.uint8).numpy(), shared_memory=False
    )
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(content["xml"], weights),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": PRECISION[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        },
    )

    def run(images):
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return program.Program("openvino", run, content, image_shape)


def _nncf():
    try:
        import nncf
    except ImportError as error:
        raise RuntimeError(f"engine 'openvino' quantizes with NNCF ({error}): {REMEDIES['openvino']}") from None
    return nncf


@contextlib.contextmanager
def _untracked():
    """Keep OpenVINO and NNCF from reporting the use of their converters to their makers: automated runs are not counted."""
    before = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    os.environ |= {"CI": "true", "NNCF_CI": "1"}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
