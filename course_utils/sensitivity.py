"""Where few bits hurt: every layer alone at few bits, and a budget of bits spent where they help most."""

import heapq
from dataclasses import dataclass

import torch

from . import affine, measure, simulate, weights


@dataclass(frozen=True)
class Sensitivity:
    """What one layer alone at few bits does to the network, measured three ways.

    n: its number of weights. sqnr: signal-to-quantization-noise ratio of its weights in dB; needs no data. divergence:
    Kullback-Leibler divergence of the network's predictions from the float ones, mean over images in nats; needs images.
    comparison: the `measure.Comparison` with the float network; needs images and labels.
    """

    name: str
    n: int
    sqnr: float
    divergence: float
    comparison: measure.Comparison


@torch.no_grad()
def scan(model, policy, batches):
    """Return the `Sensitivity` of each convolution and linear layer: its weights as `policy` says, all others in float32.

    model: in evaluation mode. policy: a `simulate.Policy`; only what it says of weights counts here. batches: iterable of
    `(images, labels)` that can be gone through again, as `data.batches` returns. The model itself stays as it is.

    Raises `ValueError` when there is no image, and for layers that the policy names and the model has not.
    """
    model = simulate.prepare(model, policy)
    expected = [(model(images).log_softmax(1), labels) for images, labels in batches]
    if not expected:
        raise ValueError(measure.NO_IMAGES)
    found = []
    for name, (bits, _) in policy.bits(model).items():
        layer = weights.layers(model)[name]
        original = layer.weight
        weights.set_weight(layer, affine.fake_quantize(original, simulate.weight_qparams(original, policy, bits)))
        logits = [model(images).log_softmax(1) for images, _ in batches]
        sqnr = affine.sqnr(original, layer.weight)
        layer.weight = original
        found.append(Sensitivity(name, original.numel(), sqnr, *_against(expected, logits)))
    return found


def _against(expected, logits):
    """Return `(divergence, Comparison)` of log-probabilities `logits` against pairs of expected ones and labels."""
    ours, labels = (torch.cat(parts) for parts in zip(*expected, strict=True))
    theirs = torch.cat(logits)
    divergence = (ours.exp() * (ours - theirs)).sum(1).mean()
    return float(divergence), measure.compare_predictions(ours.argmax(1), theirs.argmax(1), labels)


def spend(sensitivities, average_bits, *, fewest=2, most=8):
    """Return `{layer name: bits}`, whole numbers from `fewest` to `most`, that average at most `average_bits` per weight.

    Each further bit halves the step and so quarters the noise power; to first order (Dong et al. 2019, HAWQ,
    arXiv 1905.03696, sum such terms over the layers) the damage of a layer at b bits is in proportion to
    divergence · 4^(−b). All layers start at `fewest`; the next bit always goes to the layer whose damage falls most per bit
    of memory.

    Raises `ValueError` when `average_bits` lies below `fewest`, or the bits are not 2 <= fewest <= most <= 8.
    """
    if not 2 <= fewest <= most <= 8:
        raise ValueError(f"need 2 <= fewest <= most <= 8, got {fewest} and {most}")
    if average_bits < fewest:
        raise ValueError(f"an average of {average_bits} bits cannot be kept: every layer takes at least {fewest}")
    bits = {layer.name: fewest for layer in sensitivities}
    left = (average_bits - fewest) * sum(layer.n for layer in sensitivities)
    queue = [(-max(layer.divergence, 0) / layer.n, index) for index, layer in enumerate(sensitivities)]
    heapq.heapify(queue)
    while queue:
        damage, index = heapq.heappop(queue)
        layer = sensitivities[index]
        if layer.n > left or bits[layer.name] == most:
            continue  # a smaller layer may still fit
        left -= layer.n
        bits[layer.name] += 1
        heapq.heappush(queue, (damage / 4, index))
    return bits
