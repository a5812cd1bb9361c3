"""The weights of whole networks: which layers have them, batch norm folded into them, copies with fewer bits."""

import copy
from collections import Counter

import torch
from torch import nn

from . import affine

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def layers(model):
    """Return the convolution and linear layers of `model` as an ordered dict of name → module, in order of registration.

    They are the `Conv1d`, `Conv2d` and `Linear` in it; one registered under several names has the first. Not among them, and
    so never quantized: `Conv3d`, transposed convolutions, embeddings, recurrent layers, and the `in_proj_weight` of
    `MultiheadAttention`, whose `out_proj` is one of them.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def check_weights(model, names):
    """Raise `ValueError` unless the weights of the layers `names` are float32 parameters, which rounded ones can replace."""
    found = layers(model)
    for name in names:
        _check_parameter(name, found[name])
        if (dtype := found[name].weight.dtype) != torch.float32:
            raise ValueError(f"the weights of {_called(name)} are {dtype}, expected float32: call model.float() first")


def set_weight(layer, w):
    """Give `layer` the weights `w` as a parameter of its own; one that it shared with others (tied weights) stays as it is."""
    layer.weight = nn.Parameter(w, requires_grad=layer.weight.requires_grad)


def batch_norms(model):
    """Return name of convolution → name of the `BatchNorm2d` that can be folded into it.

    A convolution whose output is used elsewhere too, or that is called twice, is not among them, nor is one whose batch norm
    has no running statistics. A network without batch norms need not be one that `torch.fx` can trace; for others that are
    not, `ValueError` is raised.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return {}
    try:
        nodes = torch.fx.Tracer().trace(model).nodes
    except Exception as error:  # the network's own code runs, and may do anything
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({error}), so nothing is known of which batch norm follows which "
            "convolution: leave them as they are, with Policy(fold=False)"
        ) from error
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    found = {}
    for node in nodes:
        norm = model.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
            continue
        before = node.all_input_nodes[0]
        if before.op != "call_module" or len(before.users) > 1 or calls[before.target] > 1 or calls[node.target] > 1:
            continue
        if isinstance(model.get_submodule(before.target), nn.Conv2d):
            found[before.target] = node.target
    return found


def fold_batch_norm(model):
    """Return a copy of `model` (evaluation mode) whose batch norms are folded into the convolutions before them.

    With γ, β, μ, σ² of the batch norm: weight · γ/√(σ²+ε) and (bias − μ) · γ/√(σ²+ε) + β, per output channel
    (Krishnamoorthi 2018, section 3.2.2). The outputs stay the same up to rounding; a folded batch norm becomes `Identity`.
    A convolution whose output is used elsewhere too, or that is called twice, keeps its batch norm. Raises `ValueError` for a
    network with batch norms that `torch.fx` cannot trace, and for a convolution whose weight is no parameter
    (`check_weights`).
    """
    model = copy.deepcopy(model).eval()
    for convolution, norm in batch_norms(model).items():
        _check_parameter(convolution, model.get_submodule(convolution))
        folded = nn.utils.fuse_conv_bn_eval(model.get_submodule(convolution), model.get_submodule(norm))
        model.set_submodule(convolution, folded)
        model.set_submodule(norm, nn.Identity())
    return model


def fake_quantize_weights(model, *, bits, axis=0, group_size=None, symmetric=True, keep=(), clip="minmax"):
    """Return a copy of `model` whose convolution and linear weights are rounded to `bits` bits (biases stay float32).

    axis=0: one scale per output channel; axis=None: one per tensor; group_size: one per so many weights of a row, of which
    the last group may be shorter. keep: names of layers left in float32. clip: `"minmax"` or `"mse"`, as in
    `affine.choose_qparams`.
    The copy computes in float32: it shows the accuracy of few bits, not their speed. A matrix that a layer shares, as with an
    embedding, is rounded in the layer alone. Raises `ValueError` when `keep` names a layer that the model does not have, and
    for weights that are no parameter or not float32 (`check_weights`).
    """
    found = layers(model)
    unknown = set(keep) - set(found)
    if unknown:
        raise ValueError(
            f"no convolution or linear layer is called {', '.join(sorted(unknown))}; there are: {', '.join(found)}"
        )
    check_weights(model, [name for name in found if name not in keep])
    model = copy.deepcopy(model)
    for name, layer in layers(model).items():
        if name not in keep:
            w = layer.weight.data
            qparams = affine.choose_qparams(
                w,
                bits=bits,
                symmetric=symmetric,
                axis=None if group_size else axis,
                group_size=group_size,
                ragged=True,
                clip=clip,
            )
            set_weight(layer, affine.fake_quantize(w, qparams))
    return model


def _check_parameter(name, layer):
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ValueError(
            f"the weights of {_called(name)} are computed anew in every forward pass (by weight_norm, spectral_norm, pruning or "
            "qat.prepare), so they cannot be replaced: make them a parameter first, with "
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"), or qat.convert for what qat.prepare returned'
        )


def _called(name):
    return name or "the model"  # a layer that is the whole model has no name
