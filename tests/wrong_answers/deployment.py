"""Wrong answers to the exercises of notebook 06."""

from statistics import NormalDist

import torch


def bits_kept(q, zero_point, signed):
    wanted = torch.int8 if signed else torch.uint8
    return q.view(wanted), zero_point.view(wanted)


def xor(q, zero_point, signed):
    wanted = torch.int8 if signed else torch.uint8
    return tuple((part.view(torch.uint8) ^ 128).view(wanted) for part in (q, zero_point))


def held(q, zero_point, signed):
    low, high, wanted = (-128, 127, torch.int8) if signed else (0, 255, torch.uint8)
    return tuple(part.short().clamp(low, high).to(wanted) for part in (q, zero_point))


def moved(q, zero_point, signed, by=128, zero_by=128):
    if q.is_signed() == signed:
        return q, zero_point
    if signed:
        return (q.short() - by).to(torch.int8), (zero_point.short() - zero_by).to(torch.int8)
    return (q.short() + by).to(torch.uint8), (zero_point.short() + zero_by).to(torch.uint8)


def halved(q, zero_point, signed):
    if q.is_signed() == signed:
        return q, zero_point
    wanted = torch.int8 if signed else torch.uint8
    return (q >> 1).to(wanted), (zero_point >> 1).to(wanted)


def wilson(k, n, z, divisor=True, square=2):
    p = k / n
    centre, half = p + z**square / n / 2, z * (p * (1 - p) / n + (z**square / n) / (4 * n)) ** 0.5
    whole = 1 + z**square / n if divisor else 1
    return p, (centre - half) / whole, (centre + half) / whole


def same_class(first, second):
    return sum(a == b for a, b in zip(first.max(1).indices.tolist(), second.max(1).indices.tolist(), strict=True))


def same_logits(first, second, z=1.96):
    return wilson(sum(torch.allclose(a, b) for a, b in zip(first, second, strict=True)), len(first), z)


def each_logit(first, second, z=1.96):
    return wilson(int(torch.isclose(first, second).sum()), first.numel(), z)


def down_the_images(first, second, z=1.96):
    return wilson(int((first.argmax(dim=0) == second.argmax(dim=0)).sum()), first.shape[1], z)


def simple_interval(first, second, z=1.96):
    p = same_class(first, second) / len(first)
    standard_error = (p * (1 - p) / len(first)) ** 0.5
    return p, p - z * standard_error, p + z * standard_error


def along(x, parameter, axis):
    """A scale or zero point as a tensor of the shape of `x`."""
    if parameter.dim() == 0:
        return parameter.expand(x.shape)
    return parameter.expand(*x.transpose(axis, -1).shape).transpose(axis, -1)


def linear(x, scale, zero_point, axis=1, rounding=torch.round, low=None, high=None):
    s, z = along(x, scale, axis), along(x, zero_point.float(), axis)
    ends = torch.iinfo(zero_point.dtype)
    q = torch.maximum(rounding(x / s) + z, torch.tensor(float(ends.min)))
    q = torch.minimum(q, torch.tensor(float(ends.max)))
    return q.to(zero_point.dtype), s * (q - z)


def away(u):
    return torch.where(u < 0, -((0.5 - u).floor()), (u + 0.5).floor())


def rounded_last(x, scale, zero_point, axis=1):
    s, z = along(x, scale, axis), along(x, zero_point.float(), axis)
    ends = torch.iinfo(zero_point.dtype)
    q = (x / s + z).clamp(ends.min, ends.max).round()
    return q.to(zero_point.dtype), s * (q - z)


def overflowing(x, scale, zero_point, axis=1):
    s, z = along(x, scale, axis), along(x, zero_point.long(), axis)
    low = torch.iinfo(zero_point.dtype).min
    q = torch.remainder(torch.round(x / s).long() + z - low, 256) + low
    return q.to(zero_point.dtype), s * (q - z)


def bytes_only(x, scale, zero_point, axis=1):
    s, z = along(x, scale, axis), along(x, zero_point.long(), axis)
    q = (torch.round(x / s).long() + z).clamp(min=0, max=255).to(zero_point.dtype)
    return q, s * (q.long() - z)


def back_in_bytes(x, scale, zero_point, axis=1):
    q, _ = linear(x, scale, zero_point, axis)
    return q, (q - along(x, zero_point, axis)).float() * along(x, scale, axis)


def last_dimension(x, scale, zero_point, axis=1):
    q = (torch.round(x / scale) + zero_point).clamp(
        torch.iinfo(zero_point.dtype).min, torch.iinfo(zero_point.dtype).max
    )
    return q.to(zero_point.dtype), (q - zero_point) * scale


def second_dimension(x, scale, zero_point, axis=1):
    if scale.dim():
        shape = (1, -1, *[1] * (x.dim() - 2))
        return last_dimension(x, scale.reshape(shape), zero_point.reshape(shape))
    return last_dimension(x, scale, zero_point)


class Graph:
    """The nodes around a convolution."""

    def __init__(self, nodes, outputs):
        self.nodes, self.outputs = nodes, outputs
        self.convolutions = [node for node in nodes if node[0] == "Conv"]

    def rounded(self, name):
        return any(result == name and op.startswith("Dequantize") for op, _, result in self.nodes)

    def readers(self, name):
        return [node for node in self.nodes if name in node[1]]

    def read_by_one(self, name, op):
        readers = [each[0] for each in self.readers(name)]
        return readers == [op] and name not in self.outputs

    def right_before(self, conv):
        return self.rounded(conv[1][0]) and self.rounded(conv[1][1])

    def right_after(self, conv):
        if self.read_by_one(conv[2], "Relu"):
            conv = self.readers(conv[2])[0]
        return self.read_by_one(conv[2], "QuantizeLinear")


def fused(nodes, outputs, before=Graph.right_before, after=Graph.right_after):
    graph = Graph(nodes, outputs)
    return [conv[2] for conv in graph.convolutions if before(graph, conv) and after(graph, conv)]


def any_reader(graph, conv):
    if conv[2] in graph.outputs:
        return False
    for reader in graph.readers(conv[2]):
        if reader[0] == "QuantizeLinear":
            return True
        if reader[0] == "Relu" and reader[2] not in graph.outputs:
            if "QuantizeLinear" in [op for op, _, _ in graph.readers(reader[2])]:
                return True
    return False


def relu_is_enough(graph, conv):
    return graph.read_by_one(conv[2], "Relu") or graph.read_by_one(conv[2], "QuantizeLinear")


WRONG = {
    "signed-or-unsigned": {
        "only converts the type": bits_kept,
        "moves what need not move": xor,
        "saturates": held,
        "zero point left where it was": lambda q, z, signed: moved(q, z, signed, zero_by=0),
        "off by one": lambda q, z, signed: moved(q, z, signed, by=127, zero_by=127),
        "drops a bit": halved,
    },
    "predictions-agree": {
        "compares logits": same_logits,
        "compares every logit": each_logit,
        "the largest of each column": down_the_images,
        "the simple interval": simple_interval,
        "not divided": lambda a, b, z=1.96: wilson(same_class(a, b), len(a), z, divisor=False),
        "z not squared": lambda a, b, z=1.96: wilson(same_class(a, b), len(a), z, square=1),
    },
    "quantize-linear": {
        "zero point before rounding": rounded_last,
        "half away from zero": lambda x, s, z, axis=1: linear(x, s, z, axis, away),
        "truncates": lambda x, s, z, axis=1: linear(x, s, z, axis, torch.fix),
        "wraps around": overflowing,
        "always unsigned": bytes_only,
        "back in 8 bits": back_in_bytes,
        "the last dimension, whatever the axis": last_dimension,
        "the channels of activations, whatever the axis": second_dimension,
    },
    "fused-convolutions": {
        "the bias has to be an integer too": lambda nodes, outputs: fused(
            nodes, outputs, before=lambda graph, conv: not [name for name in conv[1] if not graph.rounded(name)]
        ),
        "forgets what the graph returns": lambda nodes, outputs: fused(nodes, []),
        "other readers overlooked": lambda nodes, outputs: fused(nodes, outputs, after=any_reader),
        "a float weight passes": lambda nodes, outputs: fused(
            nodes, outputs, before=lambda graph, conv: graph.rounded(conv[1][0])
        ),
        "float activations pass": lambda nodes, outputs: fused(
            nodes, outputs, before=lambda graph, conv: graph.rounded(conv[1][1])
        ),
        "does not look at what comes before": lambda nodes, outputs: fused(
            nodes, outputs, before=lambda graph, conv: True
        ),
        "does not look at what comes after": lambda nodes, outputs: fused(
            nodes, outputs, after=lambda graph, conv: True
        ),
        "no ReLU between": lambda nodes, outputs: fused(
            nodes, outputs, after=lambda graph, conv: graph.read_by_one(conv[2], "QuantizeLinear")
        ),
        "a ReLU is enough": lambda nodes, outputs: fused(nodes, outputs, after=relu_is_enough),
    },
}
ELSE = {
    "signed-or-unsigned": {"its dtype is torch.int16": lambda q, z, signed: (q.short() - 128, z.short() - 128)},
    "predictions-agree": {
        "it is": lambda a, b, z=1.96: [
            100 * each for each in wilson(same_class(a, b), len(a), NormalDist().inv_cdf(0.975))
        ],
        "a 99 % interval": lambda a, b, z=1.96: wilson(same_class(a, b), len(a), 1.96),
    },
    "quantize-linear": {
        "its dtype is torch.uint8, not torch.int8": lambda x, s, z, axis=1: (
            linear(x, s, z, axis)[0].to(torch.uint8),
            linear(x, s, z, axis)[1],
        ),
        "2 values were asked for": lambda x, s, z, axis=1: linear(x, s, z, axis)[0],
    },
    "fused-convolutions": {
        "1 values were asked for": lambda nodes, outputs: len(fused(nodes, outputs)),
        "KeyError": lambda nodes, outputs: fused(
            nodes, outputs, before=lambda graph, conv: {y: op for op, _, y in nodes}[conv[1][0]] == "DequantizeLinear"
        ),
    },
}
