"""Networks as ONNX: float ones, and those that round, with each rounding written as QuantizeLinear and DequantizeLinear.

A pair of the two (Q/DQ) says where a tensor is an integer, with which scale and zero point, and leaves to the runtime which
kernels to take: this is how a network quantized elsewhere comes to ONNX Runtime, OpenVINO or TensorRT ("explicit
quantization"). Weights are stored as INT8, also those of fewer bits, followed by DequantizeLinear alone.

The pairs stand where the course's simulation rounds: before each layer. What a layer adds up stays float32 until the next
one, additions of residual blocks too. OpenVINO and TensorRT then run every layer on integers; ONNX Runtime those whose result
is rounded directly, or after a ReLU, and the others in float32.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call

from .. import affine, weights

OPSET = 18
NOTHING = '<ir_version: 10, opset_import: ["": {opset}]> nothing (float[1] x) => (float[1] y) {{ y = Relu(x) }}'
RANGES = (0, 255), (-128, 127)


class _Explicit(nn.Module):
    """A layer of a simulated network, which writes its roundings as operations of ONNX. It can be exported, and not run."""

    def __init__(self, layer, opset):
        super().__init__()
        self.opset = opset
        weight, qparams = layer.weight.detach(), getattr(layer, "weight_qparams", None)
        self.rounds_weight, self.rounds_input = qparams is not None, hasattr(layer, "input_quantizer")
        # The `InputScale` of rounding.awq, which acts before all rounding.
        self.divide = getattr(layer, "input_scale", None)
        if self.rounds_weight:
            weight, zero_point = affine.quantize(weight, qparams), qparams.zero_point.to(qparams.dtype)
            self.register_buffer("weight_scale", qparams.scale)
            self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        if self.rounds_input:
            qparams = layer.input_quantizer.qparams()
            self.register_buffer("input_scale", qparams.scale.reshape(()))
            self.register_buffer("input_zero_point", qparams.zero_point.reshape(()).to(qparams.dtype))
        plain = copy.deepcopy(layer)
        plain._forward_pre_hooks.clear()
        self.plain = (plain,)  # in a tuple, because its float weights are no part of the network any more

    def forward(self, x):
        if self.divide is not None:
            x = self.divide(x)
        if self.rounds_input:
            pair = self.input_scale, self.input_zero_point
            q = self._write("QuantizeLinear", x, *pair, dtype=self.input_zero_point.dtype)
            x = self._write("DequantizeLinear", q, *pair)
        weight = self.weight
        if self.rounds_weight:
            axis = {"axis": 0} if self.weight_scale.ndim else {}
            weight = self._write("DequantizeLinear", weight, self.weight_scale, self.weight_zero_point, **axis)
        state = {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias}
        return functional_call(self.plain[0], state, (x,))

    def _write(self, operation, x, scale, zero_point, dtype=torch.float32, **attributes):
        return torch.onnx.ops.symbolic(
            operation, (x, scale, zero_point), attributes, dtype=dtype, shape=x.shape, version=self.opset
        )


def to_onnx(model, image_shape, *, opset=OPSET):
    """Return `model` as the bytes of an ONNX file: input `images` `(batch, *image_shape)`, output `logits`, both float32.

    model: a module in evaluation mode that torch.export can trace; of `simulate.quantize` or `qat.convert`, the integers of
    weights are exactly the network's (`affine.quantize` of its weights), scales and zero points too. Inputs that `rounding.awq`
    scales are divided first, in float32.

    Raises `ValueError` for activations of other than 8 bits, weights with a zero point or in groups, which the runtimes have
    no kernels for, and for a network that is still in training; `RuntimeError` without onnx and onnxscript.
    """
    try:
        import onnx
        import onnxscript.optimizer
    except ImportError as error:
        raise RuntimeError(
            f"to write ONNX takes the packages onnx and onnxscript ({error}): pip install 'squeeze-and-speed-up[onnxruntime]', "
            "or make setup ENGINES=1"
        ) from None
    exported = torch.onnx.export(
        explicit(model, opset).eval(),
        (torch.zeros(2, *image_shape),),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    proto = exported.model_proto
    _forget_source(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    # The optimizer remembers the last network that it saw, weights and all: let that be one of a single node.
    onnxscript.optimizer.optimize(onnx.parser.parse_model(NOTHING.format(opset=opset)))
    return proto.SerializeToString()


def explicit(model, opset=OPSET):
    """Return a copy of a network whose layers write their roundings as ONNX operations; layers that do not round stay."""
    if any(nn.utils.parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError("this network is still in training: turn it into its final form with qat.convert first")
    model = copy.deepcopy(model)
    for name, layer in weights.layers(model).items():
        if hasattr(layer, "weight_qparams") or hasattr(layer, "input_quantizer"):
            _check_bits(name, layer)
            model.set_submodule(name, _Explicit(layer, opset))
    return model


def symmetric(network):
    """Return a copy of a simulated network whose activations are signed and have no zero point, as TensorRT wants them.

    Each range grows to ±max(|low|, |high|), with the integers −128..127: after a ReLU half of them are never used.
    """
    from .. import simulate

    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(getattr(module, "input_quantizer", None), simulate.FakeQuantize):
            qparams = module.input_quantizer.qparams()
            low, high = (float(qparams.scale) * (end - int(qparams.zero_point)) for end in (qparams.qmin, qparams.qmax))
            module.input_quantizer = simulate.FakeQuantize(affine.qparams_from_range(low, high, bits=8, symmetric=True))
    return network


def _check_bits(name, layer):
    found = getattr(layer, "weight_qparams", None)
    if found is not None:
        if found.dtype != torch.int8 or found.zero_point.any():
            raise ValueError(
                f"{name} has weights with integers {found.qmin}..{found.qmax} and zero points up to "
                f"{int(found.zero_point.abs().max())}: only symmetric weights can be exported, so leave Policy(symmetric=True)"
            )
        if found.group_size is not None:
            raise ValueError(
                f"{name} has a scale for each {found.group_size} weights, for which the runtimes have no 8-bit kernels: use "
                "granularity 'channel' or 'tensor'"
            )
    if hasattr(layer, "input_quantizer"):
        found = layer.input_quantizer
        if (found.qmin, found.qmax) not in RANGES:
            raise ValueError(
                f"{name} rounds its input to integers {found.qmin}..{found.qmax}: only 8 bits can be exported, so use "
                "Policy(activations=8)"
            )


def _forget_source(graph):
    """Remove what the exporter notes of where each node came from: source lines, with the folders of this machine."""
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info, graph):
        del part.metadata_props[:]
        part.doc_string = ""
