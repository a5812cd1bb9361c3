"""A quantized model computed in float arithmetic: what its kernels are meant to compute, whatever short cuts they take.

`integer.IntegerModel` runs the same steps on integers; this one needs no engine, and no operation that integers lack.
"""

import torch
from torch.nn import functional as F

from .. import affine


class FloatModel:
    """The steps of a quantized model on real numbers; callable, images → logits.

    steps: list of `integer.Step`s. Weights are dequantized once. Every result is rounded to the values that its integers
    can mean (`affine.fake_quantize`), except where a step's output is None: there the engine goes on with unrounded numbers.

    Raises `ValueError` for a step without a counterpart here.
    """

    def __init__(self, steps):
        self.steps = steps
        self._run = {step.name: _compile(step) for step in steps}
        last_use = {name: step.name for step in steps for name in step.inputs}
        self._unneeded = {step.name: [n for n in step.inputs if last_use[n] == step.name] for step in steps}

    @torch.no_grad()
    def __call__(self, images):
        """Return float32 logits `(n, classes)` of float images `(n, channels, height, width)`."""
        values = {"": images}
        for step in self.steps:
            values[step.name] = self.run(step, *(values[name] for name in step.inputs or ("",)))
            for name in self._unneeded[step.name]:
                values.pop(name, None)
        return values[self.steps[-1].name]

    def run(self, step, *inputs):
        """Return what one step makes of its inputs, float32 tensors that hold the real numbers the integers mean."""
        result = self._run[step.name](*inputs)
        return result if step.output is None else affine.fake_quantize(result, step.output)


def _compile(step):
    """Return one step as a function of float tensors, before its result is rounded."""
    options = step.options
    if step.op in ("conv2d", "linear"):
        return _compile_sum(step.op, **options)
    if step.op in ("quantize", "same", "dequantize"):
        return lambda x: x
    if step.op == "add":
        relu = options.get("relu", False)
        return lambda a, b: (a + b).relu() if relu else a + b
    if step.op == "clamp":
        return lambda x: x.clamp(options["low"], options["high"])
    if step.op == "max_pool2d":
        return lambda x: F.max_pool2d(x, **options)
    if step.op == "global_avg_pool2d":
        return lambda x: x.mean((2, 3), keepdim=True)
    if step.op == "flatten":
        return lambda x: x.flatten(options["start_dim"])
    raise ValueError(f"step {step.name}: {step.op} has no counterpart in float arithmetic here")


def _compile_sum(op, *, weight, weight_scale, bias, relu=False, **geometry):
    weight = weight.float() * weight_scale.float().reshape(-1, *(1,) * (weight.ndim - 1))
    operation = F.conv2d if op == "conv2d" else F.linear

    def run(x):
        result = operation(x, weight, bias, **geometry)
        return result.relu() if relu else result

    return run
