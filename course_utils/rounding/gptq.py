"""GPTQ: round the weights of a layer one input after another, and let those still to come make up for each error."""

from dataclasses import dataclass

import torch

from .. import affine, simulate, weights
from .walk import Places, all_images, go_through, problems

BLOCK = 128  # columns after which the corrections reach the rest of the matrix


@dataclass(frozen=True)
class Compensation:
    """What `gptq` did to one layer: mean squared error of its output with weights rounded to `nearest`, and by `gptq`.

    Measured on the inputs that the quantized network has, from other images or sequences than the rounding was made with.
    """

    name: str
    weights: int
    nearest: float
    gptq: float


def gptq(model, policy, batches, *, positions=4096, damping=0.01, seed=0):
    """Return `(quantized, report)`: `model` with weights rounded so that the errors of a row cancel in the layer's output.

    Frantar et al. 2023 (arXiv 2210.17323), after the optimal brain surgeon (Hassibi and Stork 1992). With the inputs X of a
    layer, the squared change of its output is Δw·H·Δwᵀ for each row of weights, H = XᵀX: when one weight of it is rounded, the
    best answer of those not rounded yet is known in closed form (`compensate`). No step of an optimizer is taken. Inputs are
    those of the network as it is quantized so far.

    policy: bits, granularity and ranges of the weights; scales per group are chosen when the group is reached, from weights
    that have been corrected by then. If it quantizes activations, that is done afterwards, on the same batches. batches:
    inputs, or `(inputs, labels)`, whose labels are not used; every fourth image or sequence is kept to measure on. positions:
    places in a layer's output, drawn at random, whose inputs make H. damping: share of the mean of H's diagonal that is added
    to it, so that it can be inverted. report: a list of `Compensation`, one a layer.

    Raises `ValueError` with fewer than 2 images, for convolutions other than `Conv2d` with zero padding in numbers, for layers
    that are called more than once or never, and as `simulate.quantize` does.
    """
    images = all_images(batches, held_out=True)
    quantized = simulate.prepare(model, policy)
    bits = {name: b for name, (b, _) in policy.bits(quantized).items() if b is not None}
    report = []

    def visit(name, layer, x):
        output = layer.forward(x)
        places = Places(layer, output, positions, seed)
        fit, held = problems(layer, places.inputs(x), places.outputs(output), places.fit)
        del output
        w = layer.weight.detach()
        nearest = affine.fake_quantize(w, simulate.weight_qparams(w, policy, bits[name]))
        rounded, qparams = compensate(w, hessian(fit.inputs, damping), policy, bits[name])
        report.append(Compensation(name, w.numel(), float(held.error(nearest)), float(held.error(rounded))))
        weights.set_weight(layer, rounded)
        layer.weight_qparams = qparams

    go_through(quantized, images, before=visit, names=bits)
    if policy.activations is not None:
        quantized = simulate.quantize_activations(quantized, policy, [images])
    return quantized, report


def hessian(inputs, damping):
    """Return H `(groups, k, k)` of inputs `(groups, rows, k)`: the mean of xᵀx, with a damped diagonal."""
    h = (inputs.mT @ inputs).div_(inputs.shape[1])
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal += damping * diagonal.mean(1, keepdim=True).clamp(min=1e-12)  # a view: this changes h
    return h


def compensate(w, h, policy, bits):
    """Return `(rounded, qparams)` of the weights `w` `(rows, ...)` of one layer, given H `(groups, k, k)` of its inputs.

    With U the upper Cholesky factor of H⁻¹, row j of U over U_jj says how much each weight after j has to change per unit of
    error made at j (equations 2 and 3, and the reformulation of section 3.3).
    """
    rest = w.reshape(len(h), -1, h.shape[1]).mT.contiguous()  # groups of the convolution, columns, rows
    u = torch.linalg.cholesky(h)
    del h  # of a convolution it takes up to 85 MB, and so does each of the next
    u = torch.cholesky_inverse(u)
    u = torch.linalg.cholesky(u, upper=True)
    size = policy.granularity if isinstance(policy.granularity, int) else None
    chosen = [] if size else [simulate.weight_qparams(w, policy, bits)]
    block = size * max(1, BLOCK // size) if size else BLOCK
    for start in range(0, rest.shape[1], block):
        end = min(start + block, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for j in range(start, end):
            if size and j % size == 0:
                group = rest[:, j : min(j + size, end)].mT.flatten(0, 1)
                chosen.append(simulate.weight_qparams(group, policy, bits))
            rounded = _to_grid(rest[:, j], chosen[-1])
            errors[:, j - start] = (rest[:, j] - rounded) / u[:, j, j, None]
            rest[:, j:end] -= u[:, j, j:end, None] * errors[:, j - start, None]
            rest[:, j] = rounded
        rest[:, end:] -= u[:, start:end, end:].mT @ errors
    qparams = chosen[0]
    if size:
        scale, zero_point = (torch.cat([getattr(c, key) for c in chosen], 1) for key in ("scale", "zero_point"))
        qparams = affine.QParams(scale, zero_point, qparams.qmin, qparams.qmax, None, size)
    return rest.mT.reshape(w.shape), qparams


def _to_grid(column, qparams):
    """Return a column of weights `(groups, rows)` rounded to nearest: `affine.fake_quantize`, without its checks."""
    scale, zero_point = qparams.scale, qparams.zero_point
    if scale.numel() > 1:
        scale, zero_point = scale.view(column.shape), zero_point.view(column.shape)
    q = (column / scale).round_().add_(zero_point).clamp_(qparams.qmin, qparams.qmax)
    return q.sub_(zero_point).mul_(scale)
