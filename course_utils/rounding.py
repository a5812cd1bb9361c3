"""Repairs for few bits that need no training of the network and no labels: equalize, round better, correct the bias.

    equalized = cross_layer_equalization(model)
    quantized, report = adaround(equalized, policy, calibration)
    quantized = bias_correction(equalized, quantized, calibration)

Bias correction and AdaRound go through the network once, with all calibration images together, and change each layer when
the images arrive there: what comes in has then gone through the earlier layers as they are quantized and repaired already.
Memory is the price: 256 images of 64 × 64 pixels take 100 MB in the widest layer of MobileNetV2.
"""

import copy
import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import affine, simulate, weights

# Bias correction ---------------------------------------------------------------------------------------------------------


def bias_correction(model, quantized, batches):
    """Return a copy of `quantized` whose layers put out the same means, channel by channel, as those of `model`.

    Rounded weights are off by some Δw, and Δw · mean(input) is the same for every image: it shifts the output as no noise
    does, and a bias can take it back. The empirical form of Nagel et al. 2019 (DFQ, arXiv 1906.04721, section 4.2) and
    Finkelstein et al. 2019 (1906.03193): layer after layer, the mean over images and positions of float output − quantized
    output is added to the bias.

    model: the float32 network that was quantized. quantized: from `simulate.quantize` or `adaround`. batches: images, or
    `(images, labels)`, whose labels are not used. Raises `ValueError` without an image, and when the layers of the two differ.
    """
    images = _all_images(batches)
    model, quantized = _same_folding(model, quantized), copy.deepcopy(quantized).eval()
    if list(weights.layers(model)) != list(weights.layers(quantized)):
        raise ValueError("the two networks have other layers: give the float32 network that was quantized")
    means = {}

    def remember(name, layer, output):
        means[name] = _channel_means(layer, output)

    def correct(name, layer, output):
        off = means[name] - _channel_means(layer, output)
        layer.bias = nn.Parameter(off if layer.bias is None else layer.bias + off)
        return output + (off if isinstance(layer, nn.Linear) else off.reshape(-1, *[1] * (output.ndim - 2)))

    _go_through(model, images, after=remember)
    del model  # a copy that is not needed while the quantized one runs
    _go_through(quantized, images, after=correct)
    return quantized


def _channel_means(layer, output):
    return output.flatten(0, -2).mean(0) if isinstance(layer, nn.Linear) else output.flatten(2).mean((0, 2))


def _same_folding(model, quantized):
    folded = not any(isinstance(module, nn.BatchNorm2d) for module in quantized.modules())
    return weights.fold_batch_norm(model) if folded else copy.deepcopy(model).eval()


# Cross-layer equalization ------------------------------------------------------------------------------------------------


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


# AdaRound ----------------------------------------------------------------------------------------------------------------


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

    Raises `ValueError` with fewer than 2 images, and for convolutions other than `Conv2d` with zero padding in numbers.
    """
    images = _all_images(batches)
    if len(images) < 2:
        raise ValueError("AdaRound needs at least 2 images: some to learn from and others to measure on")
    # Still float32: the second pass rounds each layer as the images get there.
    quantized = simulate.prepare(model, policy)
    bits = {name: b for name, (b, _) in policy.bits(quantized).items() if b is not None}
    targets, report = {}, []

    def remember(name, layer, output):
        if name in bits:
            places = _Places(layer, output, positions, seed)
            targets[name] = places, places.outputs(output)

    def learn(name, layer, x):
        if name not in bits:
            return
        places, wanted = targets.pop(name)
        layer.weight_qparams = simulate.weight_qparams(layer.weight.detach(), policy, bits[name])
        grid = _Grid(layer.weight.detach(), layer.weight_qparams)
        fit, held = _problems(layer, places.inputs(x), wanted, places.fit)
        generator = torch.Generator().manual_seed(seed)
        q = _learn_rounding(grid, fit, steps, batch_size, lr, strength, generator)
        chance = grid.moved_at_random(int((q != grid.nearest).sum()), generator)
        errors = [float(held.error(grid.values(each))) for each in (grid.nearest, q, chance)]
        report.append(Rounding(name, q.numel(), float((q != grid.nearest).double().mean()), *errors))
        layer.weight.data = grid.values(q)

    _go_through(quantized, images, after=remember)
    _go_through(quantized, images, before=learn)
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
        w = layers[rounding.name].weight
        grid = _Grid(w.detach(), simulate.weight_qparams(w.detach(), policy, bits[rounding.name][0]))
        w.data = grid.values(grid.moved_at_random(round(rounding.moved * rounding.weights), generator))
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


# What a layer sees, and what it should make of it ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Find weights w with inputs · w ≈ targets: one layer as matrix products, without its bias.

    inputs: `(groups, rows, weights per channel)`, what each of some places in the output sees of the input. targets:
    `(groups, rows, channels per group)`. places: how many places the rows stand for.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    places: int

    def error(self, w):
        """Return the mean squared error per output value with the weights `w` of the layer."""
        w = w.reshape(len(self.inputs), self.targets.shape[2], -1)
        off = torch.baddbmm(self.targets, self.inputs, w.mT, beta=-1)
        return off.square().sum() / (self.places * w.shape[0] * w.shape[1])

    def condensed(self):
        """Return a problem of as few rows as there are weights per channel, if that is fewer, with the same error for all w.

        The same but for a constant: with the Cholesky factor RᵀR = XᵀX, |Xw − y|² = |Rw − R⁻ᵀXᵀy|² + constant.
        """
        k = self.inputs.shape[2]
        if k >= self.inputs.shape[1]:
            return self
        x, y = self.inputs.double(), self.targets.double()
        gram = x.mT @ x
        damping = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)  # inputs may repeat each other, or be 0
        factor = torch.linalg.cholesky(gram + damping[:, None, None] * torch.eye(k, dtype=x.dtype))
        targets = torch.linalg.solve_triangular(factor, x.mT @ y, upper=False)
        return _Problem(factor.mT.float().contiguous(), targets.float(), self.places)

    def some(self, count, generator):
        """Return the problem with `count` of its rows, drawn at random; all of it if condensed or no larger than that."""
        rows = self.inputs.shape[1]
        if rows < self.places or rows <= count:
            return self
        chosen = torch.randint(rows, (count,), generator=generator)
        return _Problem(self.inputs[:, chosen], self.targets[:, chosen], count)


def _problems(layer, inputs, targets, fit):
    """Return two `_Problem`s, of the first `fit` places and of the others; inputs, targets: `(places, ...)`."""
    groups = getattr(layer, "groups", 1)
    targets = targets if layer.bias is None else targets - layer.bias
    x, y = (t.unflatten(1, (groups, -1)).transpose(0, 1).contiguous() for t in (inputs, targets))
    return _Problem(x[:, :fit], y[:, :fit], fit), _Problem(x[:, fit:], y[:, fit:], x.shape[1] - fit)


class _Places:
    """Places in the output of a layer, drawn at random: the first `fit` from three quarters of the images, then half as many
    from the others. A place of a convolution is an image and a position; of a linear layer, one of its rows.
    """

    def __init__(self, layer, output, positions, seed):
        if not isinstance(layer, nn.Linear):
            numbers = isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)
            if not numbers or layer.padding_mode != "zeros":
                raise ValueError(f"expected a linear layer or a Conv2d with zero padding in numbers, got {layer}")
        self.layer = layer
        total = output.numel() // layer.weight.shape[0]
        seen = total - max(1, len(output) // 4) * (total // len(output))
        generator = torch.Generator().manual_seed(seed)
        fit = torch.randperm(seen, generator=generator)[:positions]
        held = seen + torch.randperm(total - seen, generator=generator)[: positions // 2]
        self.index, self.fit = torch.cat([fit, held]), len(fit)

    def outputs(self, output):
        """Return the output at the places: `(places, channels)`."""
        if isinstance(self.layer, nn.Linear):
            return output.flatten(0, -2)[self.index]
        image, row, column = self._positions(*output.shape[2:])
        return output[image, :, row, column]

    def inputs(self, x):
        """Return what each place sees of the input: `(places, channels · kernel height · kernel width)`."""
        if isinstance(self.layer, nn.Linear):
            return x.flatten(0, -2)[self.index]
        (kh, kw), (sh, sw), (dh, dw) = self.layer.kernel_size, self.layer.stride, self.layer.dilation
        ph, pw = self.layer.padding
        x = F.pad(x, (pw, pw, ph, ph))
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        image, row, column = self._positions(height, width)
        seen = [x[image, :, row * sh + i * dh, column * sw + j * dw] for i in range(kh) for j in range(kw)]
        return torch.stack(seen, 2).flatten(1)

    def _positions(self, height, width):
        return self.index // (height * width), self.index // width % height, self.index % width


def _go_through(model, images, *, before=None, after=None):
    """Run `model` once, calling `before(name, layer, input)` and `after(name, layer, output)` at each layer on the way.

    What `after` returns, if anything, takes the place of the output.
    """
    hooks = []
    for name, layer in weights.layers(model).items():
        if before is not None:
            hook = functools.partial(_before, before, name)
            hooks.append(layer.register_forward_pre_hook(hook))
        if after is not None:
            hooks.append(layer.register_forward_hook(functools.partial(_after, after, name)))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _before(visit, name, layer, args):
    visit(name, layer, args[0])


def _after(visit, name, layer, args, output):
    return visit(name, layer, output)


def _all_images(batches):
    found = list(simulate.inputs(batches))
    if not found:
        raise ValueError("there are no images to measure on: batches was empty")
    return torch.cat(found)
