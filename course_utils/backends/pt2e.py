"""INT8 by torchao's PT2E flow: torch.export, X86InductorQuantizer, and oneDNN kernels in the place of what it quantized.

The successor of torch.ao's flow, and the same kernels as engine `"onednn"`, but an addition and a last linear layer take the
unrounded sums of a convolution. A model is made for one size of images and any number of them.

Engine `"pt2e"` puts the kernels into the graph, which Python then runs. `"pt2e-inductor"` lets torch.compile do it, which also
makes one program of what is between them, and needs a C++ compiler. Their results differ in single roundings at most.
"""

import contextlib
import copy
import functools
import importlib.metadata
import operator
from unittest import mock

import torch
from torch import nn
from torch._export.utils import _is_cia_op
from torch._inductor.constant_folding import constant_fold
from torch._inductor.fx_passes.freezing_patterns import freezing_passes

from .. import affine, cpu
from ..integer import Step
from . import PREPARED, WEIGHT_RANGES, Engine, inductor, program


def _quietly():
    """Keep away what libraries have to say that a learner can do nothing about, and the copies of the network they keep."""
    return program.making("torch.utils._pytree", "torchao")


with _quietly():
    from torchao.quantization.pt2e import (
        FakeQuantize,
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        PerChannelMinMaxObserver,
        qat_utils,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    # Importing it also registers the patterns that `freezing_passes` replaces by oneDNN kernels.
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
CONVOLUTION, LINEAR, BATCH_NORM = aten.conv2d.default, aten.linear.default, aten.batch_norm.default
# `(input, p, train)` all of them: nn.Dropout, Dropout1d to 3d (feature_dropout), AlphaDropout and FeatureAlphaDropout
DROPOUTS = [
    getattr(aten, f"{kind}{place}").default
    for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for place in ("", "_")
]
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
RANGES = "activations"  # the tensors in a file that hold all scales and zero points of activations


def engines():
    """Return the two engines of this family, with the reason for each that does not run here."""
    return [Engine("pt2e", *_runs()), Engine("pt2e-inductor", *_runs(compiled=True))]


def _runs(compiled=False):
    if not cpu.is_x86():
        return False, "its quantizer is made for x86 processors"
    if not torch.backends.mkldnn.is_available():
        return False, "this build of torch has no oneDNN"
    if compiled and (why := inductor.needs_compiler()):
        return False, why
    return True, f"torchao {importlib.metadata.version('torchao')}"


class Lowered(nn.Module):
    """A quantized model: one graph that says what it computes, in integers and scales, and one of oneDNN kernels that does.

    images: float32 `(n, channels, height, width)`, of the size it was made for; n may vary. Returns float32 logits.
    Raises `ValueError` for images of another size.
    """

    def __init__(self, described, image_shape, engine):
        super().__init__()
        self.meta = {}
        self.image_shape, self.engine = tuple(image_shape), engine
        if engine == "pt2e":
            lowered = _lower(described, _example(self.image_shape))
        else:
            lowered = inductor.Compiled(described, self.image_shape, engine=engine)
        # In a list, because exported graphs refuse the train() and eval() that would reach them as submodules.
        self.graphs = [described, lowered]
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"this model was quantized for images of shape {self.image_shape}, got {tuple(images.shape[1:])}: "
                f"engine {self.engine!r} fixes their size, so quantize again with images of this one"
            )
        return self.graphs[1](images)


def quantize_static(model, calibration, recipe):
    first, batches = program.first_and_all(calibration)
    with _quietly(), torch.no_grad():
        prepared = _prepare(model, first.shape[1:], recipe)
        for images in batches:
            prepared(images)
        return Lowered(_convert(prepared), first.shape[1:], recipe["engine"])


class Trainable(nn.Module):
    """An exported network in training, with fake-quantizers and observers in it: float32 images → logits.

    Exported graphs refuse `train()` and `eval()`, for in them batch norm and dropout are functions that carry their mode as
    an argument. Here the two set that argument. `disable_observer()` freezes ranges, and batch norms in evaluation mode.
    """

    def __init__(self, graph, image_shape):
        super().__init__()
        self.graph, self.image_shape, self.meta, self.frozen = graph, tuple(image_shape), {}, False

    def forward(self, images):
        return self.graph(images)

    def train(self, mode=True):
        self.training = mode
        _set_mode(self.graph, batch_norm=mode and not self.frozen, dropout=mode)
        return self

    def disable_observer(self):
        """Let ranges and batch-norm statistics stand still from now on."""
        self.frozen = True
        self.train(self.training)
        for module in self.graph.modules():
            if isinstance(module, FakeQuantize):
                module.disable_observer()


def prepare_qat(model, recipe, image_shape):
    with _quietly():
        return Trainable(_prepare(model, image_shape, recipe), image_shape)


def convert_qat(model, recipe):
    with _quietly(), torch.no_grad():
        trained = copy.deepcopy(model).eval()
        return Lowered(_convert(trained.graph), trained.image_shape, recipe["engine"])


def flatten(model):
    """Return the tensors that the graph uses, under the names of its layers, and the size of images it takes."""
    graph = model.graphs[0]
    tensors = {name: _attribute(graph, target).detach() for target, name in _names(graph).items()}
    tensors = {name: tensor.int() if tensor.dtype == torch.int64 else tensor for name, tensor in tensors.items()}
    scales, zero_points = zip(*(node.args[1:3] for node in _ranges(graph)), strict=True)
    tensors[f"{RANGES}.scales"] = torch.tensor(scales, dtype=torch.float64)
    tensors[f"{RANGES}.zero_points"] = torch.tensor(zero_points, dtype=torch.int32)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"image_shape": list(model.image_shape)}


def rebuild(model, recipe, tensors, rest):
    """Return the stored model: the same graph made anew from the float module, then filled with the stored integers."""
    with _quietly(), torch.no_grad():
        # Trained or not, the graph is the same, and this way to it is the short one.
        prepared = _prepare(model, rest["image_shape"], recipe | {"kind": "static", "observer": "minmax"})
        prepared(_example(rest["image_shape"]))  # any range will do
        graph = _convert(prepared)
        names, ranges = _names(graph), _ranges(graph)
        strange = {*names.values(), f"{RANGES}.scales", f"{RANGES}.zero_points"} ^ tensors.keys()
        wrong = [n for t, n in names.items() if n in tensors and _attribute(graph, t).shape != tensors[n].shape]
        if strange or wrong or len(ranges) != len(tensors[f"{RANGES}.scales"]):
            differing = ", ".join((sorted([*strange, *wrong]) or [RANGES])[:3])
            raise ValueError(
                f"the stored weights do not fit this {type(model).__name__}; they differ in {differing}, ..."
            )
        for target, name in names.items():
            _attribute(graph, target).copy_(tensors[name])
        pairs = zip(tensors[f"{RANGES}.scales"].tolist(), tensors[f"{RANGES}.zero_points"].tolist(), strict=True)
        for node, pair in zip(ranges, pairs, strict=True):
            node.args = (node.args[0], *pair, *node.args[3:])
        graph.recompile()
        return Lowered(graph, rest["image_shape"], recipe["engine"])


def _prepare(model, image_shape, recipe):
    """Return the exported model with observers in it, or, to train it, with fake-quantizers.

    Raises `ValueError` for a network to train that draws random numbers outside of dropout.
    """
    training = recipe["kind"] in ("qat", PREPARED)
    quantizer = X86InductorQuantizer().set_global(_config(recipe, training))
    exported = _export(copy.deepcopy(model).train(training), _example(image_shape)).module()
    if training:
        _check_random(exported)
    with _only_convolutions_that_are_there():
        return (prepare_qat_pt2e if training else prepare_pt2e)(exported, quantizer)


def _check_random(graph):
    """Raise `ValueError` for what an exported network draws at random and `_set_mode` cannot turn off."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in DROPOUTS:
            raise ValueError(
                f"this network draws random numbers in training by {node.target} ({node.name}), as StochasticDepth of torchvision "
                "does, and its exported graph would go on with that in evaluation and in INT8: set the probability to 0 (p = 0.0), "
                "put nn.Identity in its place, or train with course_utils.qat's fake-quantizers"
            )


@contextlib.contextmanager
def _only_convolutions_that_are_there():
    """Keep torchao from looking for batch norms after kinds of convolutions that a network does not have.

    It exports two dozen small networks for each kind that it knows, which takes longer than all the rest. Should its functions
    have other names one day, it takes that time again.
    """

    def if_there(look):
        @functools.wraps(look)
        def only_then(graph, convolution, *args, **kwargs):
            there = any(convolution.__name__ in str(node.target) for node in graph.graph.nodes)
            return look(graph, convolution, *args, **kwargs) if there else graph

        return only_then

    with contextlib.ExitStack() as patches:
        for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
            if look := getattr(qat_utils, name, None):
                patches.enter_context(mock.patch.object(qat_utils, name, if_there(look)))
        yield


def _set_mode(graph, *, batch_norm, dropout):
    """Say whether the batch norms of an exported graph shall train, and its dropouts drop."""
    # operation → which argument says it, and what it shall say
    modes = {BATCH_NORM: (5, batch_norm), **dict.fromkeys(DROPOUTS, (2, dropout))}
    for node in graph.graph.nodes:
        if node.target in modes:
            argument, mode = modes[node.target]
            node.args = (*node.args[:argument], mode, *node.args[argument + 1 :])
    graph.recompile()


def _convert(prepared):
    """Return the graph in integers and scales, without the float weights it came from."""
    _set_mode(prepared, batch_norm=False, dropout=False)
    with _only_convolutions_that_are_there():
        graph = convert_pt2e(prepared)
    for node in graph.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE) and node.args[5] == torch.uint8:
            # Headroom narrows the scale only: kernels that round to 8 bits saturate at 255, and so shall all others.
            node.args = (*node.args[:4], 255, torch.uint8)
    graph.recompile()
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for target in [name for name, _ in graph.named_parameters()] + [name for name, _ in graph.named_buffers()]:
        if target not in used:
            owner, _, name = target.rpartition(".")
            delattr(graph.get_submodule(owner), name)
    return graph


def _lower(described, example):
    """Return the graph with oneDNN kernels in the place of dequantize, convolution, activation, quantize.

    torchao's own `lower_pt2e_quantized_to_x86` is these passes for a fixed number of images.
    """
    # The kernels' patterns are written in simpler operations than the model: composite ones are taken apart, no others.
    table = {op: f for op, f in torch.export.default_decompositions().items() if _is_cia_op(op)}
    table[aten.hardtanh.default] = lambda x, low=-1, high=1: aten.clamp_max(aten.clamp_min(x, low), high)
    table[aten.t.default] = lambda x: aten.permute(x, [1, 0])
    lowered = _export(described, example, strict=False).run_decompositions(table).module()
    freezing_passes(lowered, (example,))
    constant_fold(lowered)
    return lowered


def _export(model, example, strict=True):
    # strict: without it a module that is called twice, as the ReLU of torchvision's blocks, confuses the quantizer; graphs
    # call none, and without it take half the time.
    return torch.export.export(model, (example,), strict=strict, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def _example(image_shape):
    images = torch.zeros(2, *image_shape)  # of 2, because 1 would be taken for a constant
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


class _SharesOneScale:
    """For an observer per channel: the range of the whole tensor, given to each; the kernels want one scale a channel."""

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return scale.max().expand_as(scale).contiguous(), zero_point


class _OneScale(_SharesOneScale, PerChannelMinMaxObserver):
    pass


class _OneScaleTrained(_SharesOneScale, MovingAveragePerChannelMinMaxObserver):
    pass


def _config(recipe, training):
    """Return how torchao shall quantize: 8-bit asymmetric activations, symmetric weights of 8 bits or 7, as in torch_ao."""
    low, high = WEIGHT_RANGES[recipe["reduce_range"]]
    if training:
        activation = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
        weight = FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver if recipe["per_channel"] else _OneScaleTrained,
            averaging_constant=1.0,  # the range of a weight is known at each step, there is nothing to average
        )
    else:
        activation = {"minmax": MinMaxObserver, "histogram": HistogramObserver}[recipe["observer"]]
        weight = PerChannelMinMaxObserver if recipe["per_channel"] else _OneScale
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=activation,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=weight,
    )
    return QuantizationConfig(activations, activations, weights, None, is_qat=training)


def _names(graph):
    """Return the graph's tensors as a dict of attribute → name in a file: that of the layer where there is one."""
    names = {node.target: node.target for node in graph.graph.nodes if node.op == "get_attr"}
    taken = set()
    for node in graph.graph.nodes:
        if node.target not in (CONVOLUTION, LINEAR):
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        layer = stack[-1][0] if stack and stack[-1][0] not in taken else node.name
        taken.add(layer)
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        parts = {"bias": bias}
        if weight.target == decomposed.dequantize_per_channel.default:
            parts |= zip(("weight", "weight.scales", "weight.zero_points"), weight.args[:3], strict=True)
        names |= {part.target: f"{layer}.{key}" for key, part in parts.items() if part is not None}
    return names


def _ranges(graph):
    """Return the nodes that hold the scale and zero point of activations, in the order of the graph."""
    return [node for node in graph.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE)]


def _attribute(graph, target):
    return operator.attrgetter(target)(graph)


def steps(model):
    """Return a model as a list of `integer.Step`s. Those without an output pass on unrounded numbers.

    Raises `ValueError` for an operation that a step cannot describe.
    """
    graph, found, names = model.graphs[0], [], {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            names[node] = ""
        if node.op != "call_function":
            continue
        inputs = tuple(names[a] for a in node.args if isinstance(a, torch.fx.Node) and a in names)
        if node.target in (DEQUANTIZE, decomposed.dequantize_per_channel.default):
            if inputs:  # the same numbers; those of a weight, which have no name, belong to its layer
                names[node] = inputs[0]
            continue
        op, output, options = _describe(node, graph)
        found.append(Step(node.name, op, inputs, output, options))
        names[node] = node.name
    return found


def _describe(node, graph):
    """Return `(op, output QParams, options)` of one node."""
    kind, args = node.target, node.args
    if kind == QUANTIZE:
        scale, zero_point = torch.tensor(args[1]), torch.tensor(args[2], dtype=torch.int32)
        return "quantize", affine.QParams(scale, zero_point, *args[3:5]), {}
    if kind in (CONVOLUTION, LINEAR):
        weight, scale = args[1].args[:2]
        bias = args[2] if len(args) > 2 else None
        options = {
            "weight": _attribute(graph, weight.target),
            "weight_scale": _attribute(graph, scale.target),
            "bias": None if bias is None else _attribute(graph, bias.target).detach(),
        }
        if kind == LINEAR:
            return "linear", None, options
        geometry = zip(
            ("stride", "padding", "dilation", "groups"), (*args[3:], *(1, 0, 1, 1)[len(args[3:]) :]), strict=True
        )
        return "conv2d", None, options | {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in geometry}
    if kind in (aten.add.Tensor, aten.add_.Tensor) and isinstance(args[1], torch.fx.Node) and not node.kwargs:
        return "add", None, {}
    if kind in (aten.relu.default, aten.relu_.default):
        return "clamp", None, {"low": 0.0, "high": None}
    if kind in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = (*args[1:], *(-1.0, 1.0)[len(args[1:]) :])
        return "clamp", None, {"low": low, "high": high}
    if kind == aten.max_pool2d.default and len(args) < 5:
        return "max_pool2d", None, dict(zip(("kernel_size", "stride", "padding"), map(tuple, args[1:]), strict=False))
    if kind == aten.adaptive_avg_pool2d.default and list(program.argument(node, 1, "output_size")) == [1, 1]:
        return "global_avg_pool2d", None, {}
    if kind == aten.flatten.using_ints:
        return "flatten", None, {"start_dim": program.start_dim(node)}
    if kind in DROPOUTS:
        return "same", None, {}
    raise ValueError(f"{node.name}: {kind} has no counterpart among the steps of course_utils.integer")
