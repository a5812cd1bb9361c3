"""The weights of whole networks: which layers have them, batch norm folded into them, copies with fewer bits."""

import copy
from collections import Counter

import torch
from torch import nn

from . import affine

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def layers(model):
    """Return the convolution and linear layers of `model` as an ordered dict of name → module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def batch_norms(model):
    """Return name of convolution → name of the `BatchNorm2d` that can be folded into it.

    A convolution whose output is used elsewhere too, or that is called twice, is not among them. A network without batch
    norms need not be one that `torch.fx` can trace.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return {}
    nodes = torch.fx.Tracer().trace(model).nodes
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    found = {}
    for node in nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(node.target), nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or calls[before.target] > 1 or calls[node.target] > 1:
            continue
        if isinstance(model.get_submodule(before.target), nn.Conv2d):
            found[before.target] = node.target
    return found


def fold_batch_norm(model):
    """Return a copy of `model` (evaluation mode) whose batch norms are folded into the convolutions before them.

    With γ, β, μ, σ² of the batch norm: weight · γ/√(σ²+ε) and (bias − μ) · γ/√(σ²+ε) + β, per output channel
    (Krishnamoorthi 2018, section 3.2.2). The outputs stay the same up to rounding; a folded batch norm becomes `Identity`.
    A convolution whose output is used elsewhere too, or that is called twice, keeps its batch norm.
    """
    model = copy.deepcopy(model).eval()
    for convolution, norm in batch_norms(model).items():
        folded = nn.utils.fuse_conv_bn_eval(model.get_submodule(convolution), model.get_submodule(norm))
        model.set_submodule(convolution, folded)
        model.set_submodule(norm, nn.Identity())
    return model


def fake_quantize_weights(model, *, bits, axis=0, group_size=None, symmetric=True, keep=(), clip="minmax"):
    """Return a copy of `model` whose convolution and linear weights are rounded to `bits` bits (biases stay float32).

    axis=0: one scale per output channel; axis=None: one per tensor; group_size: one per so many weights of a row, of which
    the last group may be shorter. keep: names of layers left in float32. clip: `"minmax"` or `"mse"`, as in
    `affine.choose_qparams`.
    The copy computes in float32: it shows the accuracy of few bits, not their speed.
    Raises `ValueError` when `keep` names a layer that the model does not have.
    """
    model = copy.deepcopy(model)
    found = layers(model)
    unknown = set(keep) - set(found)
    if unknown:
        raise ValueError(
            f"no convolution or linear layer is called {', '.join(sorted(unknown))}; there are: {', '.join(found)}"
        )
    for name, layer in found.items():
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
            layer.weight.data = affine.fake_quantize(w, qparams)
    return model
