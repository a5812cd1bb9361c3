"""AdaRound: learn for each weight whether it goes up or down."""

import math
from dataclasses import dataclass

import torch

from .. import affine, simulate, weights
from .walk import Places, all_images, go_through, problems


@dataclass(frozen=True)
class Rounding:
    """What `adaround` did to one layer of so many `weights`; `moved` is the share that did not go to the nearest value.

    nearest, adaround, random: mean squared error of the layer's output with weights rounded to nearest, as learned, and with
    as many weights moved as learned, but which ones left to chance. Measured on the inputs that the quantized network has,
    and on images from which the rounding was not learned.
    """

    name: str
    weights: int
    moved: float
    nearest: float
    adaround: float
    random: float


def adaround(model, policy, batches, *, steps=200, positions=2048, batch_size=256, lr=0.15, strength=20.0, seed=0):
    """Return `(quantized, report)`: `model` with each weight rounded up or down so that layers put out what they should.

    Nagel et al. 2020 (arXiv 2004.10568): a layer's weights are scale · (⌊w / scale⌋ + h(v)), with one v per weight and the
    rectified sigmoid h between 0 and 1 (equation 23). Adam lessens the squared change of the layer's output (equation 25
    without the activation), plus Σ 1 − |2h − 1|^β (equation 24), which drives each h to 0 or 1 as β falls; then h is rounded.
    Inputs are those of the quantized network, targets those of the float32 one. report: a list of `Rounding`, one a layer.

    policy: gives the scales. If it quantizes activations, that is done afterwards, on the same batches. batches: images, or
    `(images, labels)`, whose labels are not used; every fourth image is kept to measure on. positions: places in a layer's
    output, drawn at random, to learn from. steps, lr: of Adam, per layer. batch_size: places in one step, for layers with
    more weights per channel than places. strength: of the second term against the first. seed: of everything random.

    Raises `ValueError` with fewer than 2 images, for convolutions other than `Conv2d` with zero padding in numbers, for layers
    that are called more than once or never, and as `simulate.quantize` does.
    """
    images = all_images(batches, held_out=True)
    # Still float32: the second pass rounds each layer as the images get there.
    quantized = simulate.prepare(model, policy)
    bits = {name: b for name, (b, _) in policy.bits(quantized).items() if b is not None}
    targets, report = {}, []

    def remember(name, layer, output):
        places = Places(layer, output, positions, seed)
        targets[name] = places, places.outputs(output)

    def learn(name, layer, x):
        places, wanted = targets.pop(name)
        layer.weight_qparams = simulate.weight_qparams(layer.weight.detach(), policy, bits[name])
        grid = _Grid(layer.weight.detach(), layer.weight_qparams)
        fit, held = problems(layer, places.inputs(x), wanted, places.fit)
        generator = torch.Generator().manual_seed(seed)
        q = _learn_rounding(grid, fit, steps, batch_size, lr, strength, generator)
        chance = grid.moved_at_random(int((q != grid.nearest).sum()), generator)
        errors = [float(held.error(grid.values(each))) for each in (grid.nearest, q, chance)]
        report.append(Rounding(name, q.numel(), float((q != grid.nearest).double().mean()), *errors))
        weights.set_weight(layer, grid.values(q))

    go_through(quantized, images, after=remember, names=bits)
    go_through(quantized, images, before=learn, names=bits)
    if policy.activations is not None:
        quantized = simulate.quantize_activations(quantized, policy, [images])
    return quantized, report


def random_rounding(model, policy, report, *, seed=0):
    """Return `model` with weights rounded to nearest, but in each layer as many moved at random as `adaround` did move.

    The control for AdaRound: if it wins by knowing which weights to move, this one loses. report: from `adaround` with the
    same `model` and `policy`. Activations stay float32.
    """
    model = simulate.prepare(model, policy)
    bits, layers = policy.bits(model), weights.layers(model)
    generator = torch.Generator().manual_seed(seed)
    for rounding in report:
        layer = layers[rounding.name]
        w = layer.weight.detach()
        layer.weight_qparams = simulate.weight_qparams(w, policy, bits[rounding.name][0])
        grid = _Grid(w, layer.weight_qparams)
        moved = grid.moved_at_random(round(rounding.moved * rounding.weights), generator)
        weights.set_weight(layer, grid.values(moved))
    return model


class _Grid:
    """The integers that the weights of a layer can be rounded to: `nearest`, and the two neighbours `down` and `up`.

    All float32 and shaped like the weights. Beyond the ends of the range both neighbours are the last integer.
    """

    def __init__(self, w, qparams):
        self.scale, self.zero_point = (affine.spread(p, w, qparams) for p in (qparams.scale, qparams.zero_point))
        below = torch.floor(w / self.scale)
        self.fraction = w / self.scale - below
        self.down, self.up = ((q + self.zero_point).clamp(qparams.qmin, qparams.qmax) for q in (below, below + 1))
        self.nearest = affine.quantize(w, qparams).float()

    def values(self, q):
        """Return the weights that the integers `q` stand for."""
        return (q - self.zero_point) * self.scale

    def moved_at_random(self, count, generator):
        """Return `nearest` with `count` weights moved to the other neighbour."""
        other = torch.where(self.nearest == self.down, self.up, self.down)
        movable = (other != self.nearest).flatten().nonzero().squeeze(1)
        chosen = movable[torch.randperm(len(movable), generator=generator)[:count]]
        q = self.nearest.clone()
        q.view(-1)[chosen] = other.flatten()[chosen]
        return q


def _learn_rounding(grid, problem, steps, batch_size, lr, strength, generator):
    """Return the integers of least output error that Adam finds between `grid.down` and `grid.up`."""
    down, step = grid.values(grid.down), grid.values(grid.up) - grid.values(grid.down)
    nearest = float(problem.error(grid.values(grid.nearest)))
    problem = problem.condensed()
    with torch.enable_grad():
        v = torch.logit((grid.fraction + 0.1) / 1.2).requires_grad_()
        adam = torch.optim.Adam([v], lr=lr, fused=True)
        for beta in _annealed(steps):
            h = _rectified_sigmoid(v)
            # In units of the error of rounding to nearest, so that one strength suits all layers.
            loss = problem.some(batch_size, generator).error(torch.addcmul(down, h, step)) / max(nearest, 1e-30)
            if beta is not None:
                loss = loss + strength * (1 - (2 * h - 1).abs().pow(beta)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return torch.where(_rectified_sigmoid(v.detach()) >= 0.5, grid.up, grid.down)


def _rectified_sigmoid(v):
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


def _annealed(steps):
    """Yield β of each step: None, that is without the term, for a fifth of them, then from 20 down to 2 along a half cosine."""
    for step in range(steps):
        progress = (step / steps - 0.2) / 0.8
        yield None if progress < 0 else 2 + 9 * (1 + math.cos(math.pi * progress))
