"""Bias correction: what rounding does to the mean of a layer's output, taken back."""

import copy

from torch import nn

from .. import weights
from .walk import all_images, go_through


def bias_correction(model, quantized, batches):
    """Return a copy of `quantized` whose layers put out the same means, channel by channel, as those of `model`.

    Rounded weights are off by some Δw, and Δw · mean(input) is the same for every image: it shifts the output as no noise
    does, and a bias can take it back. The empirical form of Nagel et al. 2019 (DFQ, arXiv 1906.04721, section 4.2) and
    Finkelstein et al. 2019 (1906.03193): layer after layer, the mean over images and positions of float output − quantized
    output is added to the bias.

    model: the float32 network that was quantized. quantized: from `simulate.quantize` or `adaround`. batches: images, or
    `(images, labels)`, whose labels are not used. Raises `ValueError` without an image, and when the layers of the two differ.
    """
    images = all_images(batches)
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

    go_through(model, images, after=remember)
    del model  # a copy that is not needed while the quantized one runs
    go_through(quantized, images, after=correct)
    return quantized


def _channel_means(layer, output):
    return output.flatten(0, -2).mean(0) if isinstance(layer, nn.Linear) else output.flatten(2).mean((0, 2))


def _same_folding(model, quantized):
    """Return a copy of the float32 network in which the batch norms that `quantized` has no more are folded."""
    left = [
        [name for name, module in each.named_modules() if isinstance(module, nn.BatchNorm2d)]
        for each in (model, quantized)
    ]
    return copy.deepcopy(model).eval() if left[0] == left[1] else weights.fold_batch_norm(model)
