"""What engines share: reading calibration images and graphs, converting quietly, and, outside torch, networks as files."""

import contextlib
import gc
import io
import logging
import sys
import warnings

import torch
from torch import nn

from ..output import captured

# They remember the device of each network by the network itself.
UNIQUE_DEVICE = {
    "torchao.utils": "_assert_and_get_unique_device",
    "torch.ao.quantization.fx.utils": "assert_and_get_unique_device",
}


class Program(nn.Module):
    """What `quantize_static` and `deploy` return for such an engine; gradients never pass through it.

    engine: name for messages. run: function, contiguous float32 images `(n, *image_shape)` → float32 logits. content: name →
    bytes of the engine's own file or files, which `backends.save` stores. image_shape: of one image.

    images: float32 `(n, *image_shape)`, any n. Raises `ValueError` for another type or size.
    """

    def __init__(self, engine, run, content, image_shape):
        super().__init__()
        self.meta = {}
        self.engine, self.run, self.content, self.image_shape = engine, run, content, tuple(image_shape)
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        check(images, self.image_shape, self.engine)
        return self.run(images.detach().contiguous())


def check(images, image_shape, engine):
    """Raise `ValueError` unless `images` are float32 and of the size that a model was made for."""
    if images.dtype != torch.float32:
        raise ValueError(f"expected float32 images, got {images.dtype}: convert them with images.float()")
    if tuple(images.shape[1:]) != tuple(image_shape):
        raise ValueError(
            f"this model was made for images of shape {tuple(image_shape)}, got {tuple(images.shape[1:])}: engine {engine!r} "
            "fixes their size, so make it again for this one"
        )


def flatten(program):
    """Return the bytes of a program as uint8 tensors, and the size of images it takes."""
    tensors = {name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in program.content.items()}
    return tensors, {"image_shape": list(program.image_shape)}


def unflatten(tensors):
    """Return name → bytes, as `flatten` got them."""
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def argument(node, position, name, default=None):
    """Return what a node of torch.fx passes as its argument number `position`, or by `name`."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def start_dim(node):
    """Return the dimension that a `flatten` of torch.fx starts at; raises `ValueError` unless it goes on to the last."""
    end = argument(node, 2, "end_dim", -1)
    if end != -1:
        raise ValueError(
            f"{node.name}: flatten with end_dim={end} has no counterpart in course_utils.integer, which flattens up to the last "
            "dimension: leave end_dim=-1"
        )
    return argument(node, 1, "start_dim", 0)


def first_and_all(calibration):
    """Return the first batch of `calibration`, and an iterator over all of them.

    Raises `ValueError` when there is none.
    """
    calibration = iter(calibration)
    first = next(calibration, None)
    if first is None:
        raise ValueError("the calibration set is empty: activation ranges need at least one batch of real images")

    def batches():
        yield first
        yield from calibration

    return first, batches()


@contextlib.contextmanager
def quietly(*loggers):
    """Keep away warnings, and what the named loggers have to say below an error, that a learner can do nothing about."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def making(*loggers):
    """Be `quietly`, and let go of the copies of the network that torch and torchao keep of each export and conversion."""
    before = set(_export_globals())
    with quietly(*loggers):
        try:
            yield
        finally:
            for name in [name for name in _export_globals().keys() - before if name.startswith("__compiled_fn_")]:
                del _export_globals()[name]
            for module, name in UNIQUE_DEVICE.items():
                with contextlib.suppress(AttributeError, KeyError):  # private functions, which may go
                    getattr(sys.modules[module], name).cache_clear()
            gc.collect()  # graphs hold reference cycles


def _export_globals():
    return getattr(sys.modules.get("torch._dynamo.functional_export"), "__dict__", {})


@contextlib.contextmanager
def mute():
    """Keep away what compiled libraries print past Python, or through its `sys.stderr`, which in a notebook is no file; on an
    error it is added to the exception as a note."""
    said = io.StringIO()
    try:
        with captured(2) as printed, contextlib.redirect_stderr(said):
            yield
    except Exception as error:
        error.add_note(printed[0] + said.getvalue())
        raise
