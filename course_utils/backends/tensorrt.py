"""TensorRT on an NVIDIA GPU: float networks, and networks with Q/DQ pairs ("explicit quantization").

Written by the documentation of TensorRT 10 and 11. The course is made on machines without a GPU, so building and running an
engine has never been tried there; what its tests cover is the ONNX file that goes in, and what is refused.

TensorRT knows symmetric INT8 only, signed and with zero point 0, for weights and activations (its guide, "Working with
Quantized Types"). `export.symmetric` turns a simulated network with unsigned activations into one that it takes. Networks are
strongly typed: each tensor has the type that the file says, and only what stands between Q and DQ is computed in integers.
"""

import importlib.util

import torch

from . import Engine, export, program

SELF_CONTAINED = True
FILE = "onnx"
MOST_IMAGES = 64  # of one call of an engine; more are run in parts
flatten = program.flatten


def engines():
    """Return the one engine of this family, and what is missing for it."""
    missing = [] if torch.cuda.is_available() else ["no NVIDIA GPU that torch can use"]
    if importlib.util.find_spec("tensorrt") is None:
        missing.append(
            "tensorrt is not installed (on a machine with an NVIDIA GPU: pip install 'squeeze-and-speed-up[tensorrt]')"
        )
    if missing:
        return [Engine("tensorrt", False, "; ".join(missing))]
    import tensorrt as trt

    return [Engine("tensorrt", True, f"tensorrt {trt.__version__}, {torch.cuda.get_device_name()}")]


def quantize_static(model, calibration, recipe):
    """As `backends.quantize_static`: the course's own simulation, made symmetric, is what TensorRT gets."""
    network = simulate_symmetric(model, calibration, recipe)
    return _open(export.to_onnx(network, network.image_shape), network.image_shape)


def simulate_symmetric(model, calibration, recipe):
    """Return the simulated network that `quantize_static` exports, with the size of calibration images as `image_shape`.

    Raises `ValueError` for options that TensorRT has no counterpart for.
    """
    from .. import simulate

    if recipe["observer"] != "minmax" or recipe["reduce_range"]:
        raise ValueError(
            "engine 'tensorrt' takes observer='minmax' on all 8 bits: other ranges are chosen by simulate.Policy(observer=...) "
            "and deployed, and headroom is for CPUs"
        )
    first, batches = program.first_and_all(calibration)
    policy = simulate.Policy(8, 8, granularity="channel" if recipe["per_channel"] else "tensor")
    network = export.symmetric(simulate.quantize(model, policy, batches))
    network.image_shape = tuple(first.shape[1:])
    return network


def deploy(model, precision, image_shape):
    if precision == "int8":
        check_symmetric(model)
    return _open(export.to_onnx(model, image_shape), image_shape)


def rebuild(model, recipe, tensors, rest):
    return _open(program.unflatten(tensors)[FILE], rest["image_shape"])


def check_symmetric(network):
    """Raise `ValueError` where a simulated network rounds activations in a way that TensorRT cannot express."""
    for name, module in network.named_modules():
        found = getattr(module, "input_quantizer", None)
        if found is not None and (found.qmin, found.zero_point.count_nonzero()) != (-128, 0):
            raise ValueError(
                f"{name} rounds its input to integers {found.qmin}..{found.qmax} with zero point {int(found.zero_point)}, and "
                "TensorRT takes -128..127 with zero point 0 only: course_utils.backends.export.symmetric(network) returns a "
                "network that does"
            )


def build(content, image_shape):
    """Return the plan, as bytes, that TensorRT makes of an ONNX file's bytes for up to `MOST_IMAGES` images of `image_shape`.

    Raises `RuntimeError` with TensorRT's own reasons when it cannot.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # Needed in TensorRT 10, without effect in 11, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read this network: {reasons}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then float32 is not what is compared with
    profile = builder.create_optimization_profile()
    smallest, fastest, largest = ((n, *image_shape) for n in (1, 1, MOST_IMAGES))
    profile.set_shape("images", smallest, fastest, largest)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT could not build an engine from this network; its log has the reason")
    return bytes(memoryview(plan))


def _open(content, image_shape):
    """Return a callable network. Its file is the ONNX, for a plan is good for one GPU and one version of TensorRT only."""
    import tensorrt as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(build(content, image_shape))
    context = engine.create_execution_context()

    def run_part(images):
        images = images.cuda()
        context.set_input_shape("images", tuple(images.shape))
        logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("logits", logits.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run these images; its log has the reason")
        stream.synchronize()
        return logits.cpu()

    def run(images):
        assert runtime is not None  # the engine needs it as long as it lives
        return torch.cat([run_part(part) for part in images.split(MOST_IMAGES)])

    return program.Program("tensorrt", run, {FILE: content}, image_shape)
