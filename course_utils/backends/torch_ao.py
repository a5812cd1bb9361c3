"""INT8 by torch.ao.quantization (FX graph mode): the kernels that ship inside torch.

The stack is deprecated in favour of torchao's PT2E, but it is what plain torch can run without a compiler. It is used in
this file only.
"""

import contextlib
import copy

import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.ao.quantization import (
    QConfig,
    fake_quantize,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    observer,
)
from torch.ao.quantization import quantize_dynamic as torch_quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from .. import affine
from ..integer import Step
from . import FAMILIES, PREPARED, WEIGHT_RANGES, Engine, program


def engines():
    """Return the torch.ao engines, with the reason for each that does not run here."""
    supported = torch.backends.quantized.supported_engines
    return [
        Engine(name, name in supported, "part of this torch" if name in supported else "not in this build of torch")
        for name in FAMILIES["torch_ao"]
    ]


def quantize_dynamic(model):
    """Return the model and its recipe."""
    recipe = {"kind": "dynamic", "engine": _dynamic_engine(), "per_channel": False, "observer": None}
    recipe["reduce_range"] = True  # not ours to choose: torch's dynamic layers always leave one bit of headroom
    return _dynamic(model, recipe), recipe


def quantize_static(model, calibration, recipe):
    first, batches = program.first_and_all(calibration)
    with _quietly(recipe["engine"]):
        prepared = prepare_fx(copy.deepcopy(model).eval(), _qconfigs(recipe), (first,))
        with torch.no_grad():
            for images in batches:
                prepared(images)
        return convert_fx(prepared)


def prepare_qat(model, recipe, image_shape):
    with _quietly(recipe["engine"]):
        return prepare_qat_fx(copy.deepcopy(model).train(), _qconfigs(recipe), (torch.zeros(1, *image_shape),))


def convert_qat(model, recipe):
    with _quietly(recipe["engine"]):
        return convert_fx(copy.deepcopy(model).eval())


def rebuild(model, recipe, tensors, rest):
    """Return the stored model: the same graph made anew from the float module, then filled with the stored integers."""
    example = (torch.zeros(1, 3, 64, 64),)
    with _quietly(recipe["engine"]):
        if recipe["kind"] == "dynamic":
            converted = _dynamic(model, recipe)
        elif recipe["kind"] == "qat":
            converted = convert_fx(prepare_qat_fx(copy.deepcopy(model).train(), _qconfigs(recipe), example).eval())
        else:
            converted = convert_fx(prepare_fx(copy.deepcopy(model).eval(), _qconfigs(recipe), example))
        # Kernels read as many scales as there should be, so all shapes have to be right before they get them.
        for expected, found in zip(_forms(*flatten(converted)), _forms(tensors, rest), strict=True):
            if strange := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
                raise ValueError(
                    f"the stored weights do not fit this {type(model).__name__}; they differ in {', '.join(strange[:3])}, ..."
                )
        state = converted.state_dict()  # filled in place: it carries the layout versions that loading asks for
        state.update({key: _restore(key, what, tensors) for key, what in rest.items()})
        try:
            converted.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the stored weights do not fit this {type(model).__name__}: {error}") from None
    return converted


def _qconfigs(recipe):
    """Return how torch shall quantize: 8-bit asymmetric activations, symmetric weights of 8 bits, or of 7 as headroom."""
    low, high = WEIGHT_RANGES[recipe["reduce_range"]]
    scheme = torch.per_channel_symmetric if recipe["per_channel"] else torch.per_tensor_symmetric
    weight_range = {"dtype": torch.qint8, "qscheme": scheme, "quant_min": low, "quant_max": high}
    if recipe["kind"] in ("qat", PREPARED):
        default = get_default_qat_qconfig_mapping
        qconfig = QConfig(
            activation=fake_quantize.FakeQuantize.with_args(
                observer=observer.MovingAverageMinMaxObserver,
                dtype=torch.quint8,
                quant_min=0,
                quant_max=255,
            ),
            weight=fake_quantize.FakeQuantize.with_args(
                observer=observer.MovingAveragePerChannelMinMaxObserver
                if recipe["per_channel"]
                else observer.MovingAverageMinMaxObserver,
                averaging_constant=1.0,  # the range of a weight is known at each step, there is nothing to average
                **weight_range,
            ),
        )
    else:
        default = get_default_qconfig_mapping
        activation = {"minmax": observer.MinMaxObserver, "histogram": observer.HistogramObserver}[recipe["observer"]]
        weight = observer.PerChannelMinMaxObserver if recipe["per_channel"] else observer.MinMaxObserver
        qconfig = QConfig(activation.with_args(dtype=torch.quint8), weight.with_args(**weight_range))
    # torch's own exceptions stay: operations with a fixed output range, or that only move values around.
    return default(recipe["engine"]).set_global(qconfig)


def _dynamic_engine():
    supported = torch.backends.quantized.supported_engines
    return next(name for name in ("x86", "fbgemm", "qnnpack", "onednn") if name in supported)


def _dynamic(model, recipe):
    with _quietly(recipe["engine"]):
        return torch_quantize_dynamic(copy.deepcopy(model).eval(), {nn.Linear}, dtype=torch.qint8)


def steps(model):
    """Return a converted model as a list of `integer.Step`s: what it computes, without torch's classes.

    Raises `ValueError` for an operation that `course_utils.integer` has no counterpart for.
    """
    modules, done, found = dict(model.named_modules()), {}, []

    def value(argument):
        return getattr(model, argument.target) if isinstance(argument, torch.fx.Node) else argument

    for node in model.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        module = modules.get(node.target) if node.op == "call_module" else None
        arguments = (*node.args, *node.kwargs.values())
        inputs = tuple(argument.name for argument in arguments if getattr(argument, "name", None) in done)
        before = done[inputs[0]] if inputs else None
        op, output, options = _describe(node, module, before, value)
        found.append(Step(node.name, op, inputs, output, options))
        done[node.name] = output
    return found


def integers(model, images, engine):
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and result.is_quantized:
                found[node.name] = result.int_repr()
            return result

    with torch.no_grad(), _quietly(engine):
        Recorder(model).run(images)
    return found


def _describe(node, module, before, value):
    """Return `(op, output QParams, options)` of one node."""
    called = module if module is not None else node.target
    kind = type(called).__name__ if module is not None else getattr(called, "__name__", str(called))
    if kind == "quantize_per_tensor":
        return "quantize", _quint8(value(node.args[1]), value(node.args[2])), {}
    if isinstance(module, (nnq.Conv2d, nnq.Linear)):
        weight, bias = module.weight(), module.bias()
        per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        options = {
            "weight": weight.int_repr(),
            "weight_scale": weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale()),
            "bias": None if bias is None else bias.detach(),
            "relu": isinstance(module, (nniq.ConvReLU2d, nniq.LinearReLU)),
        }
        if isinstance(module, nnq.Linear):
            return "linear", _quint8(module.scale, module.zero_point), options
        if module.padding_mode != "zeros":
            raise ValueError(f"{node.target}: only padding with zeros has an integer counterpart here")
        options |= {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
        return "conv2d", _quint8(module.scale, module.zero_point), options
    if kind in ("add", "add_relu") and len(node.args) == 4:
        return "add", _quint8(value(node.args[2]), value(node.args[3])), {"relu": kind == "add_relu"}
    if isinstance(module, nn.MaxPool2d) and module.dilation in (1, (1, 1)) and not module.ceil_mode:
        return "max_pool2d", before, {key: getattr(module, key) for key in ("kernel_size", "stride", "padding")}
    output_size = module.output_size if isinstance(module, nn.AdaptiveAvgPool2d) else None
    if kind == "adaptive_avg_pool2d":
        output_size = program.argument(node, 1, "output_size")
    if output_size in (1, (1, 1), [1, 1]):
        return "global_avg_pool2d", before, {}
    if kind in ("ReLU", "relu"):
        return "clamp", before, {"low": 0.0, "high": None}
    if kind == "ReLU6":
        return "clamp", before, {"low": 0.0, "high": 6.0}
    if kind == "flatten":
        return "flatten", before, {"start_dim": program.start_dim(node)}
    if kind in ("Dropout", "Identity"):
        return "same", before, {}
    if kind == "dequantize":
        return "dequantize", None, {}
    raise ValueError(f"{node.name}: {kind} has no integer counterpart in course_utils.integer")


def _quint8(scale, zero_point):
    return affine.QParams(
        torch.as_tensor(scale, dtype=torch.float32), torch.as_tensor(zero_point, dtype=torch.int32), 0, 255
    )


@contextlib.contextmanager
def _quietly(engine):
    """Select `engine` for a while, without the deprecation and 'observer has not run' warnings that lessons speak about."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with program.making():
            yield
    finally:
        torch.backends.quantized.engine = before


def flatten(model):
    """Split the state of a quantized model into plain tensors and a JSON-ready description of what they were.

    A quantized tensor `k` becomes `k` (int8 or uint8), `k.scales` and `k.zero_points`; a tuple (the packed parameters of a
    linear layer) becomes its members.
    """
    tensors, rest = {}, {}
    for key, value in model.state_dict().items():
        rest[key] = _flatten(key, value, tensors)
    return tensors, rest


def _flatten(key, value, tensors):
    if value is None:
        return {"kind": "none"}
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"kind": "tuple", "items": [_flatten(f"{key}.{i}", item, tensors) for i, item in enumerate(value)]}
    if not value.is_quantized:
        tensors[key] = value.detach().contiguous()
        return {"kind": "tensor"}
    tensors[key] = value.int_repr().contiguous()
    per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scales = value.q_per_channel_scales() if per_channel else torch.tensor(value.q_scale(), dtype=torch.float64)
    zero_points = value.q_per_channel_zero_points() if per_channel else torch.tensor(value.q_zero_point())
    tensors[f"{key}.scales"] = scales.float() if torch.equal(scales.float().double(), scales.double()) else scales
    tensors[f"{key}.zero_points"] = zero_points.to(torch.int32)
    return {"kind": "quantized", "axis": value.q_per_channel_axis() if per_channel else None}


def _forms(tensors, rest):
    """Return what has to be the same in two files of the same network: the rest, and shapes and types of all tensors."""
    any_float = {torch.float64: torch.float32}  # scales are of either
    return rest, {key: (tuple(t.shape), any_float.get(t.dtype, t.dtype)) for key, t in tensors.items()}


def _restore(key, what, tensors):
    kind = what["kind"]
    if kind == "none":
        return None
    if kind == "dtype":
        return getattr(torch, what["value"])
    if kind == "tuple":
        return tuple(_restore(f"{key}.{i}", item, tensors) for i, item in enumerate(what["items"]))
    if kind == "tensor":
        return tensors[key]
    scales, zero_points = tensors[f"{key}.scales"].double(), tensors[f"{key}.zero_points"].long()
    if what["axis"] is None:
        return torch._make_per_tensor_quantized_tensor(tensors[key], float(scales), int(zero_points))
    return torch._make_per_channel_quantized_tensor(tensors[key], scales, zero_points, what["axis"])
