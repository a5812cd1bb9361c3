"""Float networks in eager torch, as well as it can: batch norms folded, channels last, in float32, bfloat16 or float16."""

import torch
from torch import nn

from .. import weights
from . import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def engines():
    """Return the one engine of this family, which runs everywhere."""
    return [Engine("torch", True, "part of this torch")]


class Eager(nn.Module):
    """A float network with its own type of numbers inside: float32 inputs `(n, ...)` → float32 logits, any n and size.

    It uses torch's threads, as they are set at each call.
    """

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype, self.meta = network, dtype, {}
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        return self.network(channels_last(images, self.dtype)).float()


def deploy(model, precision, image_shape):
    return Eager(prepare(model, precision), DTYPES[precision])


def prepare(model, precision):
    """Return a copy of `model` with its batch norms folded, channels last, and weights of the given precision."""
    # Folded before it is rounded: batch norms alone would round once more, and each costs a pass over memory.
    folded = weights.fold_batch_norm(model).requires_grad_(False)
    network = folded.to(DTYPES[precision])
    for parameter in network.parameters():
        parameter.data = channels_last(parameter.data, parameter.dtype)
    return network


def channels_last(x, dtype):
    """Return `x` as `dtype`, laid out channels last where it has the 4 dimensions that this takes."""
    return x.to(dtype, memory_format=torch.channels_last if x.ndim == 4 else torch.preserve_format)
