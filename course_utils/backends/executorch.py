"""ExecuTorch on the CPU: the runtime for phones and small devices, here with XNNPACK's kernels, float32 and INT8.

INT8 by torchao's PT2E flow with `XNNPACKQuantizer`: signed symmetric weights, signed asymmetric activations. The .pte file is
the whole program, made for one image: several are run one after the other, as a phone would. It uses as many threads as torch
had when the last model was made or loaded, for all models of the process share them.
"""

import copy
import importlib.metadata
from dataclasses import replace

import torch

from . import WEIGHT_RANGES, Engine, program

# Importing it also imports torchao, which has something to say, and the processor's library prints what it did not find.
with program.mute(), program.quietly("torch.utils._pytree", "torchao"):
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

SELF_CONTAINED = True
FILE = "pte"
SMALLEST_SCALE = 2**-12  # XNNPACKQuantizer's own
CHATTY = ("torch.utils._pytree", "torchao", "executorch", "root")
flatten = program.flatten


def engines():
    """Return the one engine of this family."""
    version = importlib.metadata.version("executorch")
    if "XnnpackBackend" not in Runtime.get().backend_registry.registered_backend_names:
        return [Engine("executorch", False, f"executorch {version} comes without XNNPACK here")]
    return [Engine("executorch", True, f"executorch {version}, XNNPACK")]


def quantize_static(model, calibration, recipe):
    """As `backends.quantize_static`; headroom, which these kernels do not need, is 7 bits of the weights here too."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    first, batches = program.first_and_all(calibration)
    image_shape = tuple(first.shape[1:])
    with program.mute(), program.making(*CHATTY), torch.no_grad():
        quantizer = XNNPACKQuantizer().set_global(_config(recipe))
        exported = _export(copy.deepcopy(model).eval(), torch.zeros(2, *image_shape), any_number=True)
        prepared = prepare_pt2e(exported.module(), quantizer)
        for images in batches:
            prepared(images)
        content = _lower(convert_pt2e(prepared), image_shape)
    return _open(content, image_shape)


def deploy(model, precision, image_shape):
    with program.mute(), program.making(*CHATTY), torch.no_grad():
        content = _lower(copy.deepcopy(model).eval(), image_shape)
    return _open(content, image_shape)


def rebuild(model, recipe, tensors, rest):
    return _open(program.unflatten(tensors)[FILE], rest["image_shape"])


def _export(model, example, any_number=False):
    dynamic = ({0: torch.export.Dim.DYNAMIC},) if any_number else None
    # strict: without it a module that is called twice, as the ReLU of torchvision's blocks, confuses the quantizer.
    return torch.export.export(model, (example,), strict=True, dynamic_shapes=dynamic)


def _config(recipe):
    """Return XNNPACKQuantizer's configuration, with the observer asked for, and with headroom or without."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver

    _, most = WEIGHT_RANGES[recipe["reduce_range"]]
    config = get_symmetric_quantization_config(recipe["per_channel"], weight_qmin=-most, weight_qmax=most)
    observer = {"minmax": MinMaxObserver, "histogram": HistogramObserver}[recipe["observer"]]
    activations = replace(config.input_activation, observer_or_fake_quant_ctr=observer.with_args(eps=SMALLEST_SCALE))
    return replace(config, input_activation=activations, output_activation=activations)


def _lower(model, image_shape):
    """Return the bytes of a .pte file: one image, and XNNPACK for all that it has kernels for."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = _export(model, torch.zeros(1, *image_shape))
    return to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def _open(content, image_shape):
    with program.mute():
        if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
            portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
        method = Runtime.get().load_program(content).load_method("forward")
        method.execute([torch.zeros(1, *image_shape)])  # the first call prints what it does not find

    def run(images):
        # Copied, because the next image is computed in the same memory.
        return torch.cat([method.execute([image[None]])[0].clone() for image in images])

    return program.Program("executorch", run, {FILE: content}, image_shape)
