"""Fewer than 8 bits for real: integers packed without gaps, and files whose size can be computed by hand."""

from dataclasses import replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import affine, files, models, simulate, weights
from .rounding.awq import InputScale, scale_input

FORMAT = "squeeze-packed-4"
EARLIER = ("squeeze-packed-2", "squeeze-packed-3")  # without a checksum, the first without scaled inputs too


def pack(q, bits=4):
    """Pack integers of `bits` bits (1 to 8) without gaps; return uint8 `(ceil(numel · bits / 8),)`.

    q: integer tensor of any shape with values in 0..2^bits−1, or in −2^(bits−1)..2^(bits−1)−1 (two's complement).
    The first integer takes the lowest bits of the first byte. Raises `ValueError` when a value does not fit.
    """
    _check_bits(bits)
    if q.is_floating_point() or q.is_complex():
        raise ValueError(f"expected integers, got {q.dtype}: quantize first")
    q = q.reshape(-1)
    if q.numel():
        low, high = int(q.min()), int(q.max())
        if low < -(2 ** (bits - 1)) or high > (2 ** (bits - 1) if low < 0 else 2**bits) - 1:
            raise ValueError(f"values {low}..{high} do not fit in {bits} bits")
    # Eight codes of `bits` bits fill exactly `bits` bytes; uint8 drops the bits of a code that belong to the next byte.
    codes = q.to(torch.uint8).bitwise_and_(2**bits - 1)
    codes = nn.functional.pad(codes, (0, -len(q) % 8)).view(-1, 8)
    packed = torch.zeros(len(codes), bits, dtype=torch.uint8)
    for code, byte, shift in _overlaps(bits):
        packed[:, byte] |= codes[:, code] << shift if shift >= 0 else codes[:, code] >> -shift
    return packed.reshape(-1)[: _packed_bytes(len(q), bits)].clone()


def unpack(packed, shape, bits=4, *, signed=True):
    """Return the integers that `pack` packed, in `shape`: int8 when signed, else uint8.

    Raises `ValueError` when `packed` does not hold exactly as many bytes as `shape` needs.
    """
    _check_bits(bits)
    n = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.numel() != _packed_bytes(n, bits):
        raise ValueError(
            f"{n} integers of {bits} bits need {_packed_bytes(n, bits)} bytes of uint8, got {packed.numel()} of {packed.dtype}"
        )
    blocks = nn.functional.pad(packed.reshape(-1), (0, -packed.numel() % bits)).view(-1, bits)
    codes = torch.zeros(len(blocks), 8, dtype=torch.uint8)
    for code, byte, shift in _overlaps(bits):
        codes[:, code] |= blocks[:, byte] >> shift if shift >= 0 else blocks[:, byte] << -shift
    codes = codes.reshape(-1)[:n].reshape(shape)
    if signed:  # at the top of the byte the sign bit is int8's own, and shifting back copies it
        return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)
    return codes & (2**bits - 1)


def _overlaps(bits):
    """Yield `(code, byte, shift)`: code `code` of eight, shifted left by `shift` (right if negative), has bits in byte `byte`."""
    for code in range(8):
        first, last = code * bits // 8, (code * bits + bits - 1) // 8
        for byte in range(first, last + 1):
            yield code, byte, code * bits - 8 * byte


def quantize_groupwise(w, *, bits=4, group_size=32, symmetric=True, ragged=False):
    """Return `(q, qparams)`: the integers of a weight `(rows, ...)` with one scale per `group_size` weights of a row.

    Scales are rounded to FP16 values, because that is how they are stored. The rest is as in `affine.choose_qparams`; raises
    `ValueError` for weights so large that FP16 has no scale for them, too.
    """
    chosen = affine.choose_qparams(w, bits=bits, symmetric=symmetric, group_size=group_size, ragged=ragged)
    qparams = replace(chosen, scale=simulate.fp16_scale(chosen.scale))
    return affine.quantize(w, qparams), qparams


def bits_per_weight(bits, group_size, *, symmetric=True):
    """Return the honest bits of one weight: its own, plus its share of an FP16 scale (and of a zero point)."""
    return bits + (16 + (0 if symmetric else bits)) / group_size


def save_packed(model, path, *, bits=4, group_size=32, symmetric=True):
    """Write `model` with packed convolution and linear weights to `path` (safetensors); return the bytes written.

    A network whose weights or activations are quantized already (`simulate.quantize`, those of `rounding`, `qat.convert`) is
    stored as it is, with the ranges of its activations and the factors of `rounding.awq`; `bits`, `group_size` and `symmetric`
    are for those that are not, whose batch norms are folded and whose weights are rounded to nearest. The last group of a row
    may be shorter: the 147 weights of a first filter of ResNet18 are no multiple of 32. Biases, float32 weights and whatever
    else remains are stored as FP16. The file is replaced in one step.

    The model must be one of `course_utils.models`: its architecture is stored by name. Raises `ValueError` for others, and
    for one whose layers have become others since, as the caps of `rounding.cross_layer_equalization` in MobileNetV2, the
    biases that `rounding.bias_correction` gives convolutions with a batch norm, or a last layer with other classes; nothing
    is written then.
    """
    architecture = models.architecture(model)
    found = weights.layers(model)
    chosen = {name: (layer, layer.weight_qparams) for name, layer in found.items() if hasattr(layer, "weight_qparams")}
    if not chosen and not any(hasattr(layer, "input_quantizer") for layer in found.values()):
        model = weights.fold_batch_norm(model)
        for name, layer in weights.layers(model).items():
            _, qparams = quantize_groupwise(
                layer.weight.data, bits=bits, group_size=group_size, symmetric=symmetric, ragged=True
            )
            chosen[name] = layer, qparams
    folded = not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    _check_architecture(model, _unquantized(architecture, folded))
    tensors, layers = {}, {}
    for name, (layer, qparams) in chosen.items():
        layer_bits = (qparams.qmax - qparams.qmin).bit_length()
        symmetric = qparams.qmin < 0 and not qparams.zero_point.any()
        tensors[f"{name}.weight.packed"] = pack(affine.quantize(layer.weight.data, qparams), layer_bits)
        tensors[f"{name}.weight.scale"] = qparams.scale.half()
        if not symmetric:
            tensors[f"{name}.weight.zero_point"] = pack(qparams.zero_point, layer_bits)
        shared = {"axis": qparams.axis, "group_size": qparams.group_size, "symmetric": symmetric}
        layers[name] = {"shape": list(layer.weight.shape), "bits": layer_bits, **shared}
    for key, value in model.state_dict().items():
        if key.removesuffix(".weight") not in chosen:
            small = value.is_floating_point() and ".input_quantizer." not in key
            tensors[key] = value.half() if small else value
    inputs = {
        name: [layer.input_quantizer.qmin, layer.input_quantizer.qmax]
        for name, layer in weights.layers(model).items()
        if hasattr(layer, "input_quantizer")
    }
    scaled = {
        name: layer.input_scale.dim for name, layer in weights.layers(model).items() if hasattr(layer, "input_scale")
    }
    layout = {"architecture": architecture, "folded": folded, "layers": layers, "inputs": inputs, "scaled": scaled}
    return files.save_tensors(path, tensors, {"format": FORMAT, **layout})


def load_packed(path):
    """Return the model stored by `save_packed`, in evaluation mode: its weights are unpacked to float32 once.

    Raises `FileNotFoundError`, and `ValueError` when the file is not of that format, or a byte of it has changed. What it says
    about sizes is held against what it holds before memory is taken for them.
    """
    layout, state = files.load_tensors(path, remedy="write it again with save_packed")
    found = layout.get("format")
    if found not in (FORMAT, *EARLIER):
        raise ValueError(
            f"{path} was not written by this save_packed (format {found!r}, expected {FORMAT!r}): write it again"
        )
    if found not in EARLIER:
        files.check_tensors(path, layout, state, remedy="write it again with save_packed")
    try:
        return _rebuild(layout, state)
    except Exception as error:  # whatever a damaged layout leads to
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): write it again with save_packed"
        ) from error


def _rebuild(layout, state):
    """Return the model that a file's layout and tensors describe; a damaged layout ends in errors of many types."""
    model = _unquantized(layout["architecture"], layout["folded"])  # until the tensors have proved its sizes
    found = weights.layers(model)
    for name, dim in layout.get("scaled", {}).items():  # before the ranges, which are of what has been scaled
        factors = state[f"{name}.input_scale.factors"].float()
        channel = -1 if isinstance(found[name], nn.Linear) else -3
        if dim != channel or factors.shape != found[name].weight.shape[1:2]:
            raise ValueError(f"the factors of the inputs of {name} do not fit it")
        scale_input(found[name], InputScale(factors, channel))
    for name, (qmin, qmax) in layout["inputs"].items():
        if not type(qmin) is type(qmax) is int or not -128 <= qmin < qmax <= 255:
            raise ValueError(f"{name} rounds its input to integers {qmin!r}..{qmax!r}")
        scale, zero_point = (state[f"{name}.input_quantizer.{key}"].reshape(()) for key in ("scale", "zero_point"))
        qparams = affine.QParams(scale.float(), zero_point.int(), qmin, qmax)
        simulate.set_input_quantizer(found[name], simulate.FakeQuantize(qparams))
    for name, stored in layout["layers"].items():
        shape = found[name].weight.shape
        if list(shape) != stored["shape"]:
            raise ValueError(f"{name} has weights of shape {stored['shape']}, expected {list(shape)}")
        qparams = _stored_qparams(state, f"{name}.weight", stored)
        q = unpack(state.pop(f"{name}.weight.packed"), shape, stored["bits"], signed=qparams.qmin < 0)
        state[f"{name}.weight"] = affine.dequantize(q, qparams)
        found[name].weight_qparams = qparams
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    # Copied, for what safetensors returns is the file itself, mapped into memory.
    state = {key: value.to(dtypes.get(key, value.dtype), copy=True) for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model


def _unquantized(architecture, folded):
    """Return the network that a file names, without memory for its tensors."""
    model = skeleton(models.build, **architecture)
    return weights.fold_batch_norm(model) if folded else model.eval()


def _check_architecture(model, expected):
    """Raise `ValueError` unless `model` has the tensors of `expected`, besides those of its quantization."""
    own = (".input_quantizer.", ".input_scale.")
    found, wanted = (
        {key: tuple(tensor.shape) for key, tensor in each.state_dict().items() if not any(part in key for part in own)}
        for each in (model, expected)
    )
    differ = [
        f"{key} is {found.get(key, 'missing')}, expected {wanted.get(key, 'none')}"
        for key in found | wanted
        if found.get(key) != wanted.get(key)
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"a file could not be loaded again, for this {type(model).__name__} is no longer what course_utils.models builds "
            f"({'; '.join(differ[:3])}{more}): build it with the num_classes it has, fold batch norms before bias_correction, do "
            "not equalize a network with ReLU6, and give what qat.prepare returned to qat.convert first"
        )


class _Unfilled(TorchFunctionMode):
    """Skips what fills new weights: on device "meta" there is nothing to fill, and torch loads its compiler to do it."""

    FILL = torch.Tensor.normal_, torch.Tensor.uniform_  # besides torch.nn.init

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__ or function in self.FILL:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def skeleton(make, **sizes):
    """Return the network `make(**sizes)` on torch's device "meta": it has all shapes and takes no memory, however large it is."""
    with _Unfilled(), torch.device("meta"):
        return make(**sizes)


def _stored_qparams(state, key, stored):
    """Take scale and zero point of one weight out of `state` and return its `QParams`."""
    bits, scale, group_size = stored["bits"], state.pop(f"{key}.scale").float(), stored["group_size"]
    _check_bits(bits)
    if stored["symmetric"]:
        qmin, qmax, zero_point = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.zeros_like(scale, dtype=torch.int32)
    else:
        qmin, qmax = 0, 2**bits - 1
        zero_point = unpack(state.pop(f"{key}.zero_point"), scale.shape, bits, signed=False).int()
    if group_size is not None:  # a group that is longer than a row is the row
        group_size = min(group_size, torch.Size(stored["shape"])[1:].numel())
    return affine.QParams(scale, zero_point, qmin, qmax, stored["axis"], group_size)


def _packed_bytes(n, bits):
    return -(-n * bits // 8)


def _check_bits(bits):
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
