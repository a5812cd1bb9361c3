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

    With H = R·Rᵀ, R upper triangular, Δw·H·Δwᵀ is the squared length of Δw·R, and number j of Δw·R depends on weights up to j
    only. So each weight in turn goes where number j is smallest, given what the errors before it left there. That is where
    GPTQ moves it too (Chen et al. 2025, arXiv 2507.18553), and takes no inverse of H.
    """
    size = policy.granularity if isinstance(policy.granularity, int) else None
    chosen = [] if size else [simulate.weight_qparams(w, policy, bits)]
    r = h.flip(1, 2)
    del h  # of a convolution it takes up to 85 MB, and so does each of the next
    r = torch.linalg.cholesky(r)
    r = r.flip(1, 2)
    w, shape = w.reshape(len(r), -1, r.shape[1]).mT.contiguous(), w.shape  # groups of the convolution, columns, rows
    rounded, errors = torch.empty_like(w), torch.empty_like(w)
    grid = None if size else _grid(chosen[0], len(w))
    block = size * max(1, BLOCK // size) if size else BLOCK
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        left = r[:, :start, start:end].mT @ errors[:, :start]  # numbers of Δw·R so far
        for j in range(start, end):
            if size and j % size == 0:
                group = slice(j, min(j + size, end))
                here = left[:, j - start : group.stop - start]
                moved = torch.linalg.solve_triangular(r[:, group, group].mT, here, upper=False)
                chosen.append(simulate.weight_qparams((w[:, group] + moved).mT.flatten(0, 1), policy, bits))
                grid = _grid(chosen[-1], len(w))
            rounded[:, j] = _to_grid(w[:, j] + left[:, j - start] / r[:, j, j, None], *grid)
            errors[:, j] = w[:, j] - rounded[:, j]
            left[:, j - start + 1 :] += r[:, j, j + 1 : end, None] * errors[:, j, None]
    qparams = chosen[0]
    if size:
        scale, zero_point = (torch.cat([getattr(c, key) for c in chosen], 1) for key in ("scale", "zero_point"))
        qparams = affine.QParams(scale, zero_point, qparams.qmin, qparams.qmax, None, size)
    return rounded.mT.reshape(shape), qparams


def _grid(qparams, groups):
    """Return the scale of a column of weights `(groups, rows)`, and the fewest and the most steps of it that a weight may be."""
    scale, zero_point = (p.view(groups, -1) if p.numel() > 1 else p for p in (qparams.scale, qparams.zero_point))
    return scale, (qparams.qmin - zero_point).float(), (qparams.qmax - zero_point).float()


def _to_grid(column, scale, fewest, most):
    """Return a column of weights rounded to nearest: `affine.fake_quantize`, without its checks."""
    return (column / scale).round_().clamp_(fewest, most).mul_(scale)
