"""Networks compiled by torch's own compiler, Inductor, with frozen weights: oneDNN kernels and C++ loops made here.

Frozen means that weights are constants of the program: only then are they laid out for oneDNN in advance, and only then are
the patterns of quantized layers found (PyTorch's tutorial "PyTorch 2 Export Quantization with X86 Backend through Inductor").
Both need gradients off when the program is made.
"""

import contextlib
import os
import shutil

import torch
from torch import nn

from . import Engine, eager, program

COMPILERS = ("c++", "g++", "clang++", "cl")


def engines():
    """Return the one engine of this family, and what to install where it does not run."""
    why = needs_compiler()
    return [Engine("inductor", why is None, why or "part of this torch, with the C++ compiler of this machine")]


def needs_compiler():
    """Return what to do where there is no C++ compiler, which Inductor cannot do without; None where there is one."""
    if any(name and shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS)):
        return None
    return "torch.compile needs a C++ compiler, and there is none here: install g++ (apt install g++) or clang"


class Compiled(nn.Module):
    """A traced network as programs of Inductor: float32 images `(n, *image_shape)` → float32 logits, any n.

    graph: what torch.export returns, as a module, for any number of images, of type `dtype`. A program is made when it is first
    needed, in up to a minute: one for a single image, and one or two for all other numbers (oneDNN has other kernels from 16
    images on). They use as many threads as torch had when this was made, oneDNN's kernels in them as many as torch has at the
    call. Raises `ValueError` for images of another size or type, `RuntimeError` when they cannot be compiled.
    """

    def __init__(self, graph, image_shape, dtype=torch.float32, engine="inductor"):
        super().__init__()
        self.image_shape, self.dtype, self.engine, self.meta = tuple(image_shape), dtype, engine, {}
        self.options = {"freezing": True, "cpp.threads": torch.get_num_threads()}
        # Without the hooks of exported graphs, which look at every input once more. And in a tuple, for others refuse eval().
        self.compiled = (torch.compile(torch.fx.GraphModule(graph, graph.graph), fullgraph=True),)
        self.seen = set()
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        from torch._dynamo import mark_dynamic
        from torch._inductor import config

        program.check(images, self.image_shape, self.engine)
        images, n = eager.channels_last(images.detach(), self.dtype), len(images)
        if n > 1:
            mark_dynamic(images, 0)
        # The options at every call, because a program may have to be made at any.
        with config.patch(self.options), contextlib.nullcontext() if n in self.seen else _explained():
            logits = self.compiled[0](images).float()
        self.seen.add(n)
        return logits


def deploy(model, precision, image_shape):
    network, dtype = eager.prepare(model, precision), eager.DTYPES[precision]
    example = eager.channels_last(torch.zeros(2, *image_shape), dtype)
    exported = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return Compiled(exported.module(), image_shape, dtype)


@contextlib.contextmanager
def _explained():
    """Say what failures of torch's compiler mean, and keep away its warnings."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        with program.quietly("torch.utils.cpp_extension"):  # which misses a GPU
            yield
    except TorchDynamoException as error:
        first_line = str(error).partition("\n")[0]
        raise RuntimeError(
            f"torch.compile could not make a program of this network ({first_line}). It needs a working C++ compiler and "
            "Python's headers (apt install g++ python3-dev)"
        ) from None
