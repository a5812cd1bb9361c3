"""Cross-layer equalization: neighbouring layers share their ranges, and a scale for a whole tensor fits."""

from collections import Counter

import torch
from torch import nn

from .. import weights


class CappedReLU(nn.Module):
    """min(max(x, 0), cap) of images `(n, channels, height, width)` with one cap per channel."""

    def __init__(self, caps):
        super().__init__()
        self.register_buffer("caps", caps[:, None, None])

    def forward(self, x):
        return torch.minimum(x.relu(), self.caps)

    def extra_repr(self):
        return f"{len(self.caps)} caps from {float(self.caps.min()):.3g} to {float(self.caps.max()):.3g}"


def cross_layer_equalization(model, *, sweeps=100):
    """Return a copy of `model` (evaluation mode, batch norms folded) whose neighbouring layers have weights of even width.

    Nagel et al. 2019 (DFQ, arXiv 1906.04721, section 4.1): from a convolution through ReLU, or nothing, to the next one,
    channel i can leave the first divided by s_i, weights and bias, if the second multiplies it by s_i. With
    s_i = √(r1_i / r2_i), where r1_i and r2_i are the largest weights of the channel on both sides, both end at √(r1_i · r2_i):
    a scale for the whole tensor then fits all channels. Goes over all pairs until nothing moves, at most `sweeps` times.

    The float32 function stays the same, and no data is needed. ReLU6 is the one that would not scale: Nagel et al. replace it
    by ReLU, here it becomes a `CappedReLU` at 6 / s_i. Layers whose output is added to another, as at the end of a residual
    block, are left alone: all of them would have to agree on s.
    """
    model = weights.fold_batch_norm(model)
    pairs = _pairs(model)
    total = [torch.ones(first.out_channels) for first, _, _ in pairs]
    for _ in range(sweeps):
        scales = [_equalize(first, second) for first, second, _ in pairs]
        total = [t * s for t, s in zip(total, scales, strict=True)]
        if all((s.log().abs() < 1e-3).all() for s in scales):
            break
    for (_, _, activation), s in zip(pairs, total, strict=True):
        if activation and isinstance(model.get_submodule(activation), nn.ReLU6):
            model.set_submodule(activation, CappedReLU(6 / s))
    return model


@torch.no_grad()
def _equalize(first, second):
    """Scale two convolutions in place; return the s `(channels between,)`."""
    channels = second.weight.unflatten(0, (second.groups, -1)).transpose(1, 2).flatten(0, 1)  # between, ...
    r1, r2 = first.weight.abs().flatten(1).amax(1), channels.abs().flatten(1).amax(1)
    s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
    first.weight /= s[:, None, None, None]
    if first.bias is not None:
        first.bias /= s
    second.weight *= s.reshape(second.groups, -1).repeat_interleave(len(second.weight) // second.groups, 0)[
        ..., None, None
    ]
    return s


def _pairs(model):
    """Return `(first, second, name of the activation between or None)` of all convolutions that follow one another."""
    graph = torch.fx.Tracer().trace(model)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def module(node, kinds):
        found = model.get_submodule(node.target) if node.op == "call_module" else None
        return found if type(found) in kinds else None

    pairs = []
    for node in graph.nodes:
        chain, activation = [node], None
        while len(chain[-1].users) == 1:
            after = next(iter(chain[-1].users))
            chain.append(after)
            if module(after, (nn.Identity,)):  # what a folded batch norm left behind
                continue
            # One ReLU can serve many places; a ReLU6 gets the caps of its place.
            reusable = module(after, (nn.ReLU,)) or (module(after, (nn.ReLU6,)) and calls[after.target] == 1)
            if activation or not reusable:
                break
            activation = after.target
        first, second = (module(end, (nn.Conv2d,)) for end in (chain[0], chain[-1]))
        if len(chain) > 1 and first and second and calls[node.target] == calls[chain[-1].target] == 1:
            pairs.append((first, second, activation))
    return pairs
