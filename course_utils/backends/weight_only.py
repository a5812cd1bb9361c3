"""Linear layers whose weights stay small in memory, by torch's own kernels: INT8 or INT4 weights, BF16 inputs.

    fast = quantize_weight_only(model, bits=4, group_size=128)

Reading a weight takes longer than using it as long as few rows of input share it, as when a language model writes one token
after the other: then fewer bytes are less time. The integers are unpacked in registers, on the way to an ordinary BF16 or
float32 product (`aten::_weight_int4pack_mm_for_cpu`, `aten::_weight_int8pack_mm`). There is no such kernel for convolutions.
"""

import contextlib
import copy
import functools

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import affine, int4, weights

GROUP_SIZES = (32, 64, 128, 256)  # that the INT4 kernel has code for
ROWS = 16  # it takes so many output channels at a time


class Int8Linear(nn.Module):
    """A linear layer with INT8 weights and one scale per output channel; inputs go in as BF16, outputs come back as they came.

    q: int8 `(out, in)`. scale: float32 `(out,)`. bias: float32 `(out,)` or None.
    """

    def __init__(self, q, scale, bias=None):
        super().__init__()
        self.register_buffer("q", q.contiguous())
        self.register_buffer("scale", scale.bfloat16())
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int8pack_mm(rows, self.q, self.scale).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A linear layer with packed INT4 weights and a scale and an offset per group; inputs go in as BF16.

    q: integers 0..15 `(out, in)`. scale, offset: float32 `(out, in / group_size)`; a weight is (q − 8) · scale + offset.
    Raises `ValueError` for a group size that the kernel has no code for, or that does not divide a row.
    """

    def __init__(self, q, scale, offset, group_size, bias=None):
        super().__init__()
        if group_size not in GROUP_SIZES or q.shape[1] % group_size:
            raise ValueError(
                f"the INT4 kernel takes groups of {', '.join(map(str, GROUP_SIZES))} weights that fill a row of "
                f"{q.shape[1]}, got {group_size}"
            )
        self.out, self.group_size, self.bias = len(q), group_size, bias
        if short := -len(q) % ROWS:
            q, scale, offset = (nn.functional.pad(part, (0, 0, 0, short)) for part in (q, scale, offset))
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1))
        parameters = torch.stack([scale, offset], -1).transpose(0, 1)  # groups, out, 2
        self.register_buffer("scales", parameters.contiguous().bfloat16())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.scales)
        y = y[:, : self.out].to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def quantize_weight_only(model, *, bits=4, group_size=128, layers=None):
    """Return a copy of `model` (evaluation mode) whose linear layers keep their weights in 4 or 8 bits and compute with them.

    Weights that are 4-bit integers in groups already (`simulate.quantize`, `rounding.gptq`, `smollm.load`) stay those; others
    are rounded to nearest, symmetric, in groups of `group_size` at 4 bits and per output channel at 8. The `input_scale` that
    `rounding.awq` gave a layer stays in front of it. layers: bits of single layers by name, None for one that stays as it is.
    So does, always, the `out_proj` of `nn.MultiheadAttention`, which takes the weights without calling the layer. The fast path
    of PyTorch's transformer encoders does so with all of theirs, hence it is off in the copy. Raises `ValueError` for other
    bits, for a name that no linear layer has, for bits of such an `out_proj`, and as `Int4Linear`.
    """
    linears = {name: layer for name, layer in weights.layers(model).items() if isinstance(layer, nn.Linear)}
    if unknown := set(layers or ()) - set(linears):
        raise ValueError(f"no linear layer is called {', '.join(sorted(unknown))}; there are: {', '.join(linears)}")
    uncalled = [name for name, layer in linears.items() if isinstance(layer, NonDynamicallyQuantizableLinear)]
    chosen = dict.fromkeys(linears, bits) | dict.fromkeys(uncalled) | (layers or {})
    if other := set(chosen.values()) - {4, 8, None}:
        raise ValueError(f"there are kernels for 4 and 8 bits, got {', '.join(map(str, sorted(other)))}")
    if packed := [name for name in uncalled if chosen[name] is not None]:
        raise ValueError(
            f"{', '.join(packed)} cannot be packed, for nn.MultiheadAttention takes the weights without calling it: leave it out "
            "of layers"
        )
    chosen = {name: bits for name, bits in chosen.items() if bits is not None}
    replaced = [linears[name].weight for name in chosen]
    model = copy.deepcopy(model, {id(weight): weight for weight in replaced}).eval()  # without copies of these
    for name, bits in chosen.items():
        layer = model.get_submodule(name)
        small = int4_linear(layer, group_size) if bits == 4 else int8_linear(layer)
        scale = getattr(layer, "input_scale", None)
        model.set_submodule(name, small if scale is None else nn.Sequential(scale, small))
    _leave_fast_path(model)
    return model


def _leave_fast_path(model):
    """Let PyTorch's transformer encoders call their linear layers, of which their fast path takes the weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # as for any other activation, which that path does not have


def int8_linear(layer):
    """Return the linear `layer` as an `Int8Linear`, rounded to nearest."""
    chosen = [affine.choose_qparams(w, bits=8, symmetric=True, axis=0) for w in _parts(layer)]
    q = torch.cat([affine.quantize(w, qparams) for w, qparams in zip(_parts(layer), chosen, strict=True)])
    return Int8Linear(q, torch.cat([qparams.scale for qparams in chosen]), layer.bias)


def int4_linear(layer, group_size):
    """Return the linear `layer` as an `Int4Linear`, with the integers that it has or, without any, rounded to nearest."""
    if hasattr(layer, "stored"):
        q, scale, minimum = layer.stored  # a weight is q · scale + minimum
        return Int4Linear(q, scale, minimum + 8 * scale, q.shape[1] // scale.shape[1], layer.bias)
    qparams = getattr(layer, "weight_qparams", None)
    if qparams is None or qparams.group_size is None or qparams.qmax - qparams.qmin != 15:
        return Int4Linear(*_nearest(layer, group_size), group_size, layer.bias)
    zero_point = (qparams.zero_point - qparams.qmin).float()  # of integers that start at 0
    q = affine.quantize(layer.weight.detach(), qparams).int() - qparams.qmin
    return Int4Linear(q, qparams.scale, (8 - zero_point) * qparams.scale, qparams.group_size, layer.bias)


def _nearest(layer, group_size):
    """Return the integers 0..15, scales and offsets of a linear layer, rounded to nearest in groups, symmetric."""
    if layer.in_features % group_size:
        raise ValueError(
            f"groups of {group_size} do not fill rows of {layer.in_features} weights: take one of {GROUP_SIZES}"
        )
    parts = [int4.quantize_groupwise(w, bits=4, group_size=group_size) for w in _parts(layer)]
    q, scale = torch.cat([q for q, _ in parts]), torch.cat([qparams.scale for _, qparams in parts])
    return q + 8, scale, torch.zeros_like(scale)


def _parts(layer):
    """Return the weights of a linear layer some rows at a time: what rounding them takes is several times their own memory."""
    return layer.weight.detach().split(512)


def ways(group_size):
    """Return name → `(bits per weight, make)`: `make(w)` gives a callable that multiplies rows of float32 inputs by `w`.

    The INT4 ways round to the same integers. ONNX Runtime is among them where it is installed.
    """
    # Not `int4.bits_per_weight`: of each group torch's kernel keeps a BF16 scale and a BF16 offset, ONNX Runtime an FP32 scale.
    int4_bits = 4 + 32 / group_size
    found = {
        "FP32": (32, lambda w: functools.partial(nn.functional.linear, weight=w)),
        "BF16": (16, lambda w: functools.partial(_in_bf16, w=w.bfloat16())),
        "INT8 weights": (8, lambda w: int8_linear(_linear(w))),
        "INT4 weights": (int4_bits, lambda w: int4_linear(_linear(w), group_size)),
    }
    with contextlib.suppress(ImportError):
        import onnx  # noqa: F401

        from . import onnxruntime

        def make(w):
            q, scale, _ = _nearest(_linear(w), group_size)
            return onnxruntime.int4_linear(q, scale, group_size)

        found["INT4 weights, ONNX Runtime"] = int4_bits, make
    return found


def _linear(w):
    layer = nn.Linear(*reversed(w.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def _in_bf16(x, w):
    return nn.functional.linear(x.bfloat16(), w).float()
