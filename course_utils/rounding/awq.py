"""Activation-aware scaling: weights that meet large inputs are made larger before they are rounded."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import affine, simulate, weights
from .walk import Places, all_images, go_through, problems

STRENGTHS = tuple(step / 20 for step in range(20))


@dataclass(frozen=True)
class Scaling:
    """What `awq` did to one layer: the `strength` it chose, and the mean squared error of the output, `nearest` and by `awq`.

    Measured on the inputs that the quantized network has, from other images or sequences than the strength was chosen by.
    """

    name: str
    weights: int
    strength: float
    nearest: float
    awq: float


class InputScale(nn.Module):
    """Divides the input of a layer by one factor per channel, with which its weights are multiplied."""

    def __init__(self, factors, dim):
        super().__init__()
        self.register_buffer("factors", factors)
        self.dim = dim

    def forward(self, x):
        return x / self.factors.reshape(-1, *[1] * (-self.dim - 1))


def awq(model, policy, batches, *, positions=1024, random=False, seed=0):
    """Return `(quantized, report)`: `model` with weights rounded after those of important inputs were scaled up.

    Lin et al. 2024 (AWQ, arXiv 2306.00978): a weight that is multiplied by s before it is rounded, and whose input is divided
    by s, has 1 / s of the error as long as it does not set the scale of its group. s = (mean |input|)^strength for each input
    channel, and of 20 strengths from 0, which is rounding to nearest, the one with the least squared error of the layer's
    output is kept. Each layer gets its factors, rounded to FP16 values, as an `InputScale` in front of it; in deployment a
    norm or linear layer before it takes them over, at no cost.

    batches, positions, seed and report are as in `gptq`, the report's entries `Scaling`. random: the control, for which the
    means are dealt out to the channels by chance. Layers with grouped inputs (depthwise convolutions) are rounded to nearest.
    Raises `ValueError` with fewer than 2 images, for convolutions other than `Conv2d` with zero padding in numbers, for layers
    that are called more than once or never, and as `simulate.quantize` does.
    """
    images = all_images(batches, held_out=True)
    quantized = simulate.prepare(model, policy)
    bits = {name: b for name, (b, _) in policy.bits(quantized).items() if b is not None}
    generator = torch.Generator().manual_seed(seed)
    report = []

    def visit(name, layer, x):
        output = layer.forward(x)
        places = Places(layer, output, positions, seed)
        fit, held = problems(layer, places.inputs(x), places.outputs(output), places.fit)
        w, channel = layer.weight.detach(), -1 if isinstance(layer, nn.Linear) else -3
        size = x.movedim(channel, 0).flatten(1).abs().mean(1).clamp(min=1e-8)
        if random:
            size = size[torch.randperm(len(size), generator=generator)]
        best = None
        for strength in STRENGTHS if getattr(layer, "groups", 1) == 1 else (0.0,):
            factors = _factors(size, strength)
            larger = w * factors.reshape(1, -1, *[1] * (w.ndim - 2)) if strength else w
            qparams = simulate.weight_qparams(larger, policy, bits[name])
            rounded = affine.fake_quantize(larger, qparams)
            as_seen = rounded / factors.reshape(1, -1, *[1] * (w.ndim - 2)) if strength else rounded
            error = float(fit.error(as_seen))
            if best is None:
                nearest = as_seen  # of strength 0
            if best is None or error < best[0]:
                best = error, strength, factors, rounded, qparams, as_seen
        _, strength, factors, rounded, layer.weight_qparams, as_seen = best
        weights.set_weight(layer, rounded)
        report.append(Scaling(name, w.numel(), strength, float(held.error(nearest)), float(held.error(as_seen))))
        if not strength:
            return x
        scale_input(layer, InputScale(factors, channel))
        return layer.input_scale(x)  # this pass is under way already

    go_through(quantized, images, before=visit, names=bits)
    if policy.activations is not None:
        quantized = simulate.quantize_activations(quantized, policy, [images])
    return quantized, report


def scale_input(layer, scale):
    """Let the `InputScale` act on what goes into `layer`, of which it becomes the submodule `input_scale`."""
    layer.input_scale = scale
    layer.register_forward_pre_hook(_scale_input)


def _scale_input(layer, args):
    return layer.input_scale(args[0]), *args[1:]


def _factors(size, strength):
    """Return the factors of the channels, around 1."""
    factors = size**strength
    return (factors / (factors.max() * factors.min()).sqrt()).half().float().clamp(min=2.0**-14)
