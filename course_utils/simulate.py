"""Whole networks as they would compute with few bits, simulated in float32: the accuracy of any policy, not its speed.

    policy = Policy(weights=4, activations=8, observer="mse", first_last=8)
    quantized = quantize(model, policy, calibration)
    print(policy, size(model, policy).total)

What is simulated is the usual weight and activation quantizer (Nagel et al. 2021, arXiv 2106.08295, section 2): every weight
of a layer is a value that its bits can hold, so is every input of a layer, and sums are exact.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import affine, observers, weights

OBSERVERS = {
    "minmax": observers.MinMax,
    "mse": observers.MSE,
    "percentile": observers.Percentile,
    "entropy": observers.Entropy,
}
TITLES = {"minmax": "min-max", "mse": "MSE", "percentile": "percentile", "entropy": "entropy"}


@dataclass(frozen=True)
class Policy:
    """How a network is quantized; `str(policy)` says all of it, and belongs beside every number.

    weights: bits of the weights, 2 to 8, or None for float32. activations: bits of what goes into each layer (one asymmetric
    range per tensor), or None for float32. granularity: of the weight scales: `"tensor"`, `"channel"` (per output channel) or
    a number of weights that share one within a row. symmetric: weights without a zero point. clip: range of the weights,
    `"minmax"` or `"mse"` (`affine.choose_qparams`). observer: range of the activations, a key of `OBSERVERS`.
    first_last: bits of weights and activations of the first and the last layer, in the order in which they are registered
    (`weights.layers`), where the policy quantizes them at all; by default they are like the others. layers: bits of the
    weights of single layers by name (None for float32); goes before everything else. fold: batch norms are folded into the
    weights first, for which `torch.fx` must be able to trace a network that has some.

    Raises `ValueError` for values that are none of these.
    """

    weights: int | None = 8
    activations: int | None = None
    granularity: str | int = "channel"
    symmetric: bool = True
    clip: str = "minmax"
    observer: str = "minmax"
    first_last: int | None = None
    layers: dict = field(default_factory=dict, hash=False)
    fold: bool = True

    def __post_init__(self):
        bits = {"weights": self.weights, "activations": self.activations, "first_last": self.first_last}
        bits |= {f"layers[{name!r}]": b for name, b in self.layers.items()}
        for name, b in bits.items():
            if b is not None and (type(b) is not int or not 2 <= b <= 8):
                raise ValueError(f"{name} must be a number of bits from 2 to 8, or None for float32, got {b!r}")
        group = self.granularity
        if group not in ("tensor", "channel") and (type(group) is not int or group < 1):
            raise ValueError(f'granularity must be "tensor", "channel" or a group size of at least 1, got {group!r}')
        if self.clip not in affine.CLIPS:
            raise ValueError(f"clip must be one of {', '.join(affine.CLIPS)}, got {self.clip!r}")
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}")

    def __str__(self):
        per = f"groups of {self.granularity}" if isinstance(self.granularity, int) else f"per-{self.granularity}"
        parts = ["weights float32" if self.weights is None else f"W{self.weights}"]
        parts.append(
            "activations float32" if self.activations is None else f"A{self.activations} {TITLES[self.observer]}"
        )
        if self.weights is not None or any(self.layers.values()):
            parts[0] += f" {per} {TITLES[self.clip]}"
            parts.append(f"{'symmetric' if self.symmetric else 'asymmetric'} weights")
        if self.first_last is not None:
            parts.insert(2, f"first+last {self.first_last} bits")
        for b in sorted(set(self.layers.values()), key=lambda b: b or 32):
            names = [name for name, bits in self.layers.items() if bits == b]
            listed = ", ".join(names) if len(names) <= 3 else f"{len(names)} layers"
            parts.insert(-1, f"{listed} {'float32' if b is None else f'W{b}'}")
        return ", ".join([*parts, f"batch norm {'' if self.fold else 'not '}folded"])

    def bits(self, model):
        """Return name → (bits of weights, bits of activations) for each layer of `model`, None meaning float32.

        Raises `ValueError` when `layers` names a layer that the model does not have.
        """
        names = list(weights.layers(model))
        unknown = set(self.layers) - set(names)
        if unknown:
            raise ValueError(
                f"no convolution or linear layer is called {', '.join(sorted(unknown))}; there are: {', '.join(names)}"
            )
        found = dict.fromkeys(names, (self.weights, self.activations))
        if self.first_last is not None and names:
            ends = tuple(b and self.first_last for b in (self.weights, self.activations))
            found |= {names[0]: ends, names[-1]: ends}
        return found | {name: (b, found[name][1]) for name, b in self.layers.items()}


class FakeQuantize(nn.Module):
    """Rounds what goes through it to the values of one `affine.QParams` per tensor; float32 in, float32 out.

    As `affine.fake_quantize` but in torch's one fused kernel, which multiplies by 1 / scale, so that a value just between two
    steps may go to the other one. Its gradient is that of the identity inside the range and 0 outside (the straight-through
    estimator, Bengio et al. 2013, arXiv 1308.3432).
    """

    def __init__(self, qparams):
        super().__init__()
        self.register_buffer("scale", qparams.scale)
        self.register_buffer("zero_point", qparams.zero_point)
        self.qmin, self.qmax = qparams.qmin, qparams.qmax

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def qparams(self):
        """Return the `affine.QParams`."""
        return affine.QParams(self.scale, self.zero_point, self.qmin, self.qmax)

    def extra_repr(self):
        return f"scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}, integers {self.qmin}..{self.qmax}"


def quantize(model, policy, calibration=None):
    """Return a copy of `model` (evaluation mode) that computes as `policy` says; biases and sums stay float32.

    calibration: batches of images, or of `(images, labels)` as `data.batches` yields them, to choose the ranges of activations
    by; labels are not used. Raises `ValueError` when it is needed and missing or empty, for layers the model has not, for
    layers whose activations are to be quantized and that are never called, and as `prepare` does.
    """
    model = quantize_weights(prepare(model, policy), policy)
    return model if policy.activations is None else quantize_activations(model, policy, calibration)


def prepare(model, policy):
    """Return the float32 network that `policy` starts from: a copy of `model` in evaluation mode, batch norms folded or not.

    Raises `ValueError` for layers the model has not, for weights that are to be rounded and are no parameter or not float32
    (`weights.check_weights`), and for batch norms that are to be folded in a network that `torch.fx` cannot trace.
    """
    weights.check_weights(model, [name for name, (bits, _) in policy.bits(model).items() if bits is not None])
    return weights.fold_batch_norm(model) if policy.fold else copy.deepcopy(model).eval()


def quantize_weights(model, policy):
    """Return a copy of `model` whose weights are rounded to nearest; each such layer has its `QParams` as `weight_qparams`.

    A matrix that a layer shares with another module, as a language model's head may with the embedding (tied weights), is
    rounded in the layer alone: in the copy each has its own. model: as `prepare` returns it.
    """
    model = copy.deepcopy(model)
    for name, (bits, _) in policy.bits(model).items():
        if bits is not None:
            layer = weights.layers(model)[name]
            layer.weight_qparams = weight_qparams(layer.weight.data, policy, bits)
            weights.set_weight(layer, affine.fake_quantize(layer.weight.data, layer.weight_qparams))
    return model


def weight_qparams(w, policy, bits):
    """Return the `QParams` of one layer's weights; scales are rounded to FP16 values, because that is how they are stored.

    Raises `ValueError` for weights so large that their scale has none.
    """
    size = policy.granularity if isinstance(policy.granularity, int) else None
    chosen = affine.choose_qparams(
        w,
        bits=bits,
        symmetric=policy.symmetric,
        axis=0 if policy.granularity == "channel" else None,
        group_size=size,
        ragged=True,
        clip=policy.clip,
    )
    return replace(chosen, scale=fp16_scale(chosen.scale))


def fp16_scale(scale):
    """Return the scales `scale` rounded to FP16 values, as float32; raises `ValueError` for one beyond the largest, 65504."""
    stored = scale.half().float()
    if stored.isinf().any():
        raise ValueError(f"a scale of {float(scale.max()):.3g} cannot be stored in FP16: the weights are too large")
    return stored.clamp(min=2.0**-24)  # FP16 has none below that; weights that small become zeros


def quantize_activations(model, policy, calibration):
    """Return a copy of `model` that rounds what goes into each layer, within ranges observed on `calibration`.

    The ranges are those of `model` as it is given, with its rounded weights, and activations still in float32.
    Each layer gets its quantizer as a submodule `input_quantizer`, which acts before the layer's own forward.
    Raises `ValueError` for a missing or empty calibration set, for a layer that is never called (unless `policy.layers` leaves
    it in float32: then it is left alone), and for a model whose activations are quantized already.
    """
    ranges = Calibration(model, policy)
    ranges.observe(calibration or ())
    return ranges.quantized()


class Calibration:
    """Observes what goes into the layers of `model` that `policy` quantizes; ask for `quantized()` after any number of images.

    `quantize_activations` in two steps, for a model that is to be judged after 1, 4, 16, … images without seeing any twice.
    Raises `ValueError` for a model whose activations are quantized already.
    """

    def __init__(self, model, policy):
        self.model, self.policy = copy.deepcopy(model).eval(), policy
        if any(isinstance(module, FakeQuantize) for module in model.modules()):
            raise ValueError("the activations of this model are quantized already: start from the one without")
        self.bits = {name: bits for name, (_, bits) in policy.bits(model).items() if bits is not None}
        self.seen = {}
        self.images = 0

    @torch.no_grad()
    def observe(self, batches):
        """Let the images of `batches`, whose items are images or `(images, labels)`, widen the ranges."""

        def hook(name):
            def observe(layer, args):
                self.seen.setdefault(name, OBSERVERS[self.policy.observer]()).observe(args[0])

            return observe

        layers = weights.layers(self.model)
        hooks = [layers[name].register_forward_pre_hook(hook(name)) for name in self.bits]
        try:
            for images in inputs(batches):
                self.model(images)
                self.images += len(images)
        finally:
            for each in hooks:
                each.remove()

    def quantized(self):
        """Return a copy of the model that rounds within the ranges so far.

        Raises `ValueError` before the first image, and for layers that no image came to (see `quantize_activations`).
        """
        if not self.images:
            raise ValueError(
                f"the calibration set is empty: {self.policy} needs real images to choose activation ranges by"
            )
        left_out = {name for name, bits in self.policy.layers.items() if bits is None}
        missing = [name for name in self.bits if name not in self.seen and name not in left_out]
        if missing:
            raise never_called(missing)
        model = copy.deepcopy(self.model)
        layers = weights.layers(model)
        for name, observer in self.seen.items():
            set_input_quantizer(layers[name], FakeQuantize(observer.qparams(bits=self.bits[name])))
        return model


def never_called(names):
    """Return the `ValueError` for layers whose inputs are needed, but whose forward was not called."""
    return ValueError(
        f"no input ever came to {', '.join(names)}: the network does not call such a layer, or takes only its weights, as "
        f"nn.MultiheadAttention does with out_proj; leave it out with Policy(layers={dict.fromkeys(names)})"
    )


def set_input_quantizer(layer, quantizer):
    """Let the module `quantizer` act on what goes into `layer`, of which it becomes the submodule `input_quantizer`."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input)


def inputs(batches):
    """Yield the images of `batches`, whose items are images or `(images, labels)`."""
    for batch in batches:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _quantize_input(layer, args):
    return layer.input_quantizer(args[0]), *args[1:]


@dataclass(frozen=True)
class Size:
    """What is stored, in bytes: packed `weights`, their FP16 `scales` and packed `zero_points`, and the `rest` in FP16."""

    weights: int
    scales: int
    zero_points: int
    rest: int

    @property
    def total(self):
        return self.weights + self.scales + self.zero_points + self.rest


def size(model, policy):
    """Return the `Size` of `model` stored as `policy` says: the tensors of `int4.save_packed`, without the file's header.

    Integers of each layer are packed without gaps; biases, layers that stay float32 and whatever else there is (batch norms
    that are not folded) are stored as FP16. A tensor with several names counts once; one that a rounded layer shares with an
    embedding counts for both, since `quantize` rounds that of the layer alone. Activations are not stored; neither are their
    ranges counted. Raises `ValueError` as `prepare` does.
    """
    model = prepare(_shapes(model), policy)
    stored, rounded = Counter(), set()
    for name, (bits, _) in policy.bits(model).items():
        if bits is None:
            continue
        layer = weights.layers(model)[name]
        w, scales = layer.weight, weight_scales(layer.weight, policy)
        rounded.add(layer)
        stored["weights"] += -(-w.numel() * bits // 8)
        stored["scales"] += 2 * scales
        stored["zero_points"] += 0 if policy.symmetric else -(-scales * bits // 8)
    rest = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, kind = key.rpartition(".")
        if kind != "weight" or model.get_submodule(owner) not in rounded:
            rest[id(tensor)] = tensor
    for tensor in rest.values():
        stored["rest"] += tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
    return Size(**{part: stored[part] for part in ("weights", "scales", "zero_points", "rest")})


def _shapes(model):
    """Return a copy of `model` whose tensors have shapes and types, but neither numbers nor memory."""
    memo = {}  # what `deepcopy` takes for copied already; a tensor with two names stays one
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def weight_scales(w, policy):
    """Return how many scales the weights `w` of one layer have."""
    if isinstance(policy.granularity, int):
        return len(w) * -(-w[0].numel() // policy.granularity)
    return len(w) if policy.granularity == "channel" else 1
