"""Layer after layer through a network: what each one sees, and what it should make of it."""

import functools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .. import simulate, weights


def go_through(model, images, *, before=None, after=None, names=None):
    """Run `model` once, calling `before(name, layer, input)` and `after(name, layer, output)` at each layer on the way.

    What `before` returns, if anything, takes the place of the input, and what `after` returns that of the output. names: of
    the layers to stop at; by default all that are called. Raises `ValueError` for a layer that is called more than once, and
    for one of `names` that is never called.
    """
    hooks, calls = [], Counter()
    for name, layer in weights.layers(model).items():
        if names is not None and name not in names:
            continue
        hooks.append(layer.register_forward_pre_hook(functools.partial(_count, calls, name)))
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
    missing = [name for name in names or () if not calls[name]]
    if missing:
        raise simulate.never_called(missing)


def _count(calls, name, layer, args):
    calls[name] += 1
    if calls[name] > 1:
        raise ValueError(
            f"{name} is called more than once in one forward pass, and what repairs it for one call is wrong for the others: "
            f"leave it out with Policy(layers={{{name!r}: None}}); bias_correction is for networks without such a layer"
        )


def _before(visit, name, layer, args):
    return visit(name, layer, args[0])


def _after(visit, name, layer, args, output):
    return visit(name, layer, output)


def all_images(batches, *, held_out=False):
    """Return the images, or whatever else the network takes, of all `batches` together.

    held_out: some of them will be kept to measure on. Raises `ValueError` if there are none, or then fewer than 2.
    """
    found = list(simulate.inputs(batches))
    if not found:
        raise ValueError("there are no images to measure on: batches was empty")
    images = torch.cat(found)
    if held_out and len(images) < 2:
        raise ValueError("at least 2 images or sequences are needed: some to learn from and others to measure on")
    return images


@dataclass(frozen=True)
class Problem:
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
        return Problem(factor.mT.float().contiguous(), targets.float(), self.places)

    def some(self, count, generator):
        """Return the problem with `count` of its rows, drawn at random; all of it if condensed or no larger than that."""
        rows = self.inputs.shape[1]
        if rows < self.places or rows <= count:
            return self
        chosen = torch.randint(rows, (count,), generator=generator)
        return Problem(self.inputs[:, chosen], self.targets[:, chosen], count)


def problems(layer, inputs, targets, fit):
    """Return two `Problem`s, of the first `fit` places and of the others; inputs, targets: `(places, ...)`."""
    groups = getattr(layer, "groups", 1)
    targets = targets if layer.bias is None else targets - layer.bias
    x, y = (t.unflatten(1, (groups, -1)).transpose(0, 1).contiguous() for t in (inputs, targets))
    return Problem(x[:, :fit], y[:, :fit], fit), Problem(x[:, fit:], y[:, fit:], x.shape[1] - fit)


class Places:
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
