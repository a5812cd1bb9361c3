"""Quantization-aware training: fake-quantizers with gradients, put into any network by the names of its layers.

    prepared = prepare(model, policy, calibration)        # float32 weights, rounded in every forward pass
    training.finetune(prepared, images, steps=100)        # an ordinary loop
    quantized = convert(prepared)                         # a network as `simulate.quantize` returns it

Rounding has no useful derivative, so its backward pass is replaced: by the straight-through estimator (Bengio et al. 2013,
arXiv 1308.3432), or by that of LSQ (Esser et al. 2020, 1902.08153), which learns the scales as well. Needs torch alone.
"""

import contextlib
import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import affine, simulate, weights

SCALES = ("mixed", "learned", "observed")
SMALLEST = 2.0**-24  # of FP16, in which scales are stored
AVERAGING = 0.05  # share of the newest batch in an observed range of activations

# Two ways through the rounding -------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """Fake-quantize `x`; backward, the gradient passes as if nothing had been rounded.

    forward(x, scale, zero_point, qmin, qmax, mask): scale and zero_point broadcast against `x`. mask: whether values beyond
    the range, which no small step can bring back, get the gradient 0 that clipping has; else they get all of it.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax, mask):
        q = (x / scale).round_().add_(zero_point)
        ctx.save_for_backward((q >= qmin) & (q <= qmax) if mask else None)
        return q.clamp_(qmin, qmax).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None, None, None, None


class LearnedStep(torch.autograd.Function):
    """Fake-quantize `x` with a scale that has a gradient too: LSQ (Esser et al. 2020, arXiv 1902.08153, equations 3 and 5).

    forward(x, scale, zero_point, qmin, qmax, gradient_scale): as `StraightThrough` with its mask, which looks at x / scale
    before it is rounded here: what lies beyond the range by less than half a step counts as clipped. The output is
    (q − zero_point) · scale with q = round(x / scale) + zero_point; the rounding passes gradients, so d output / d scale is
    q − zero_point − x / scale inside the range, and q − zero_point where `x` is clipped. gradient_scale multiplies it.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax, gradient_scale):
        low, high = qmin - zero_point, qmax - zero_point
        ctx.save_for_backward(x, scale, low, high)  # x, which others have saved already, and not x / scale
        ctx.gradient_scale = gradient_scale
        return (x / scale).clamp_(low, high).round_().mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        x, scale, low, high = ctx.saved_tensors
        ratio = x / scale
        clipped = ratio.clamp(low, high)
        inside = ratio == clipped
        slope = clipped.round_().sub_(ratio * inside).mul_(gradient)
        return gradient * inside, ctx.gradient_scale * slope.sum_to_size(scale.shape), None, None, None, None


# The quantizers of a network ---------------------------------------------------------------------------------------------


class LearnedScale(nn.Module):
    """A fake-quantizer whose scale is a parameter (`LearnedStep`); its zero point stays what it was.

    qparams: where it starts. count: how many values of the weights share a scale; for activations, by default, what one image
    has of them. The gradient of a scale is a sum over all of them, so LSQ multiplies it by 1 / √(count · qmax), which keeps
    the relative changes of scales and weights alike. gradient_scale: another factor than that. Called with `fold`, it rounds
    `x` as if it were multiplied by that (`WeightQuantizer`); so does `ObservedScale`.
    """

    def __init__(self, qparams, *, count=None, gradient_scale=None):
        super().__init__()
        self.scale = nn.Parameter(qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.float())
        self.like, self.count, self.gradient_scale = qparams, count, gradient_scale

    def forward(self, x, fold=None):
        factor = self.gradient_scale
        if factor is None:
            factor = ((self.count or x[0].numel()) * self.like.qmax) ** -0.5
        scale = self.scale.clamp(min=SMALLEST)  # a step of the optimizer could carry it below 0
        scale, zero_point = (affine.spread(p, x, self.like) for p in (scale, self.zero_point))
        return LearnedStep.apply(x, _over(scale, fold), zero_point, self.like.qmin, self.like.qmax, factor)

    def qparams(self):
        """Return the present `affine.QParams`."""
        return replace(self.like, scale=self.scale.detach().clamp(min=SMALLEST), zero_point=self.zero_point.int())


class ObservedScale(nn.Module):
    """A fake-quantizer whose scale follows the range of what it sees in training mode (Jacob et al. 2018, arXiv 1712.05877).

    qparams, bits, symmetric: where it starts, and what `affine.qparams_from_range` goes on with. averaging: share of the
    newest batch in the range (`observers.MovingAverage`); 1 for weights, which are all there at every step. mask: of
    `StraightThrough`. After `disable_observer()` the scale stands still.
    """

    def __init__(self, qparams, bits, *, symmetric, averaging, mask=True):
        super().__init__()
        for name in ("scale", "zero_point"):
            self.register_buffer(name, getattr(qparams, name).clone())
        for name, q in (("low", qparams.qmin), ("high", qparams.qmax)):
            self.register_buffer(name, (q - qparams.zero_point) * qparams.scale)
        self.register_buffer("observing", torch.tensor(True))
        self.like, self.bits, self.symmetric, self.averaging, self.mask = qparams, bits, symmetric, averaging, mask

    def forward(self, x, fold=None):
        if self.training and self.observing:
            with contextlib.suppress(ValueError):  # no numbers any more: the range stays, and the loss will tell
                self._observe(_times(x.detach(), fold))
        scale, zero_point = (affine.spread(p, x, self.like) for p in (self.scale, self.zero_point))
        return StraightThrough.apply(x, _over(scale, fold), zero_point, self.like.qmin, self.like.qmax, self.mask)

    def _observe(self, x):
        shared = {"axis": self.like.axis, "group_size": self.like.group_size}
        for end, found in zip((self.low, self.high), affine.extremes(x, **shared, ragged=True), strict=True):
            end.lerp_(found.to(end), self.averaging)
        scheme = {"bits": self.bits, "symmetric": self.symmetric, "signed": self.like.qmin < 0}
        found = affine.qparams_from_range(self.low, self.high, **scheme, **shared)
        self.scale.copy_(found.scale)
        self.zero_point.copy_(found.zero_point)

    def disable_observer(self):
        """Let the scale stand still from now on."""
        self.observing.fill_(False)

    def qparams(self):
        """Return the present `affine.QParams`."""
        return replace(self.like, scale=self.scale.clone(), zero_point=self.zero_point.clone())


class WeightQuantizer(nn.Module):
    """A parametrization of a layer's weight: what the layer computes with is the rounded weight.

    With a batch norm after the layer, weights are rounded as they will be once it is folded: times f = γ / √(σ² + ε) per
    output channel, and then divided by it, so that the batch norm finds what it expects (Krishnamoorthi 2018, arXiv
    1806.08342, section 3.2.2). To round w · f with a scale and divide by f is to round w with the scale / f. σ² is the running
    variance, and f a constant to the gradient.
    """

    def __init__(self, quantizer, batch_norm=None):
        super().__init__()
        self.quantizer = quantizer
        self._batch_norm = (batch_norm,)  # in a tuple, because it is the network's, and no part of this

    def forward(self, w):
        return self.quantizer(w, self.factor(w))

    def factor(self, w):
        """Return f in a shape that broadcasts against the weights `w`, or None without a batch norm."""
        return _fold_factor(self._batch_norm[0], w)


# Whole networks ----------------------------------------------------------------------------------------------------------


def prepare(model, policy, calibration=None, *, scales="mixed", mask=True, gradient_scale=None):
    """Return a copy of `model` in training mode that rounds as `policy` says, and starts with the scales of `simulate.quantize`.

    Any network will do: each convolution and linear layer keeps its class; its weight gets a `WeightQuantizer` as
    parametrization, its input an `input_quantizer`. Batch norms stay and train; `policy.fold` says whether weights are
    rounded as if folded. `prepared.policy` is the policy.

    calibration: batches of images for the first ranges of activations. scales: `"learned"` (LSQ), `"observed"` (min-max of
    weights, moving averages of activations), or `"mixed"`: observed for 8-bit weights, whose scales are so small
    that a step of the optimizer moves them too far, and learned for everything else. mask: of `StraightThrough`;
    gradient_scale: of `LearnedScale`, None for LSQ's.

    Raises `ValueError` for a network without convolution or linear layer, a layer name in `policy.layers` that there is not,
    a calibration set that is needed and missing or empty, and as `simulate.quantize` does: among others for a
    network that has been through here already.
    """
    if scales not in SCALES:
        raise ValueError(f"scales must be one of {', '.join(SCALES)}, got {scales!r}")
    bits = policy.bits(model)
    if not bits:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer: there is nothing to quantize")
    start = weights.layers(simulate.quantize(model, policy, calibration))
    model = copy.deepcopy(model).eval()
    norms = weights.batch_norms(model) if policy.fold else {}

    def weight_quantizer(qparams, bits, w):
        if scales == "observed" or (scales == "mixed" and bits == 8):
            return ObservedScale(qparams, bits, symmetric=policy.symmetric, averaging=1.0, mask=mask)
        return LearnedScale(qparams, count=w.numel() // qparams.scale.numel(), gradient_scale=gradient_scale)

    def input_quantizer(qparams, bits):
        if scales == "observed":
            return ObservedScale(qparams, bits, symmetric=False, averaging=AVERAGING, mask=mask)
        return LearnedScale(qparams, gradient_scale=gradient_scale)

    for name, layer in weights.layers(model).items():
        weight_bits, activation_bits = bits[name]
        if weight_bits is not None:
            norm = model.get_submodule(norms[name]) if name in norms else None
            w = _times(layer.weight.detach(), _fold_factor(norm, layer.weight))
            rounded = weight_quantizer(simulate.weight_qparams(w, policy, weight_bits), weight_bits, w)
            parametrize.register_parametrization(layer, "weight", WeightQuantizer(rounded, norm))
        # A layer that is never called, and that `policy.layers` leaves out, has none either.
        if (first := getattr(start[name], "input_quantizer", None)) is not None:
            simulate.set_input_quantizer(layer, input_quantizer(first.qparams(), activation_bits))
    model.policy = policy
    return model.train()


def freeze(model):
    """Stop quantization ranges and batch-norm statistics from moving; weights and learned scales go on learning.

    For networks from `prepare` and from `backends.prepare_qat`; a later `model.train()` lets the statistics go again.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif hasattr(module, "disable_observer"):  # a fake-quantizer
            module.disable_observer()


def to_round(prepared):
    """Return name → `(w, qparams)` of each layer: the float32 weights as they go into rounding, and the `QParams` they meet."""
    found = {}
    with torch.no_grad():
        for name, layer in weights.layers(prepared).items():
            if parametrize.is_parametrized(layer, "weight"):
                (quantizer,) = layer.parametrizations.weight
                w = layer.parametrizations.weight.original.detach()
                found[name] = _times(w, quantizer.factor(w)), quantizer.quantizer.qparams()
    return found


def convert(prepared):
    """Return the network that `prepared` has become, as `simulate.quantize` returns it: evaluation mode, rounded weights.

    Batch norms are folded if the policy says so. Weight scales are rounded to FP16 values, because that is how they are
    stored. Raises `ValueError` for a network that is not from `prepare`, and for scales that FP16 has not.
    """
    if not isinstance(getattr(prepared, "policy", None), simulate.Policy):
        raise ValueError(f"expected a network from qat.prepare, got {type(prepared).__name__}")
    chosen = to_round(prepared)
    model = copy.deepcopy(prepared).eval()
    for name, layer in weights.layers(model).items():
        if name in chosen:
            # Not `remove_parametrizations`: copies share the class that it would take the weight from.
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            layer.weight = nn.Parameter(chosen[name][0])
        if hasattr(layer, "input_quantizer"):
            layer.input_quantizer = simulate.FakeQuantize(layer.input_quantizer.qparams())
    if model.policy.fold:
        model = weights.fold_batch_norm(model)
    for name, (w, qparams) in chosen.items():
        # The integers stay as trained.
        stored = replace(qparams, scale=simulate.fp16_scale(qparams.scale))
        layer = weights.layers(model)[name]
        layer.weight = nn.Parameter(affine.dequantize(affine.quantize(w, qparams), stored))
        layer.weight_qparams = stored
    return model


def _times(w, factor):
    return w if factor is None else w * factor


def _over(scale, factor):
    """Return scale / factor; by 0, where the batch norm deletes the channel whatever its weights, nothing is divided."""
    return scale if factor is None else scale / torch.where(factor == 0, 1.0, factor)


@torch.no_grad()
def _fold_factor(norm, w):
    """Return what folding `norm` multiplies the weights `w` by, in a shape that broadcasts against them; None without one."""
    if norm is None:
        return None
    gamma = 1.0 if norm.weight is None else norm.weight
    return (gamma / (norm.running_var + norm.eps).sqrt()).reshape(-1, *[1] * (w.ndim - 1))
