"""What a network costs before any machine is named: multiplications and numbers moved, layer by layer."""

from dataclasses import dataclass

import torch

from . import weights


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer: multiply-accumulates `macs`, and how many numbers are its `weights` (biases, about a
    thousandth, left out), its `inputs` and its `outputs`."""

    name: str
    macs: int
    weights: int
    inputs: int
    outputs: int

    def bytes(self, weight_bits=32, activation_bits=None):
        """Return the bytes moved if each number is read, or written, once; activations are as wide as weights by default."""
        activations = (self.inputs + self.outputs) * (activation_bits or weight_bits)
        return (self.weights * weight_bits + activations) / 8


def cost(model, image_shape, *, batch=1):
    """Return a list of `LayerCost`, one a convolution or linear layer of `model` in the order they run.

    image_shape: of one image, such as `(3, 224, 224)`. batch: images at once; weights count once for all of them, and once for
    each call of a layer that is called several times. What has no weights to multiply, such as pooling or the addition of a
    residual block, is not counted. `model` is a float module, run once in evaluation mode and put back as it was.
    """
    found = {}
    layers = weights.layers(model)

    def count(name):
        def hook(layer, inputs, output):
            each = layer.weight[0].numel()  # products that make one number of the output
            numbers = (output.numel() * each, layer.weight.numel(), inputs[0].numel(), output.numel())
            before = found.get(name, (0, 0, 0, 0))
            found[name] = tuple(a + b for a, b in zip(before, numbers, strict=True))

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    # Of every part: a frozen batch norm of a network in training is in evaluation mode.
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(batch, *image_shape))
    finally:
        model.train(modes[model])  # of exported networks, the mode is more than a flag
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return [LayerCost(name, *numbers) for name, numbers in found.items()]
