"""Where the time goes: which kernels ran, by torch's profiler and by oneDNN's own word, and how long each layer took."""

import functools
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch

from .output import captured
from .tables import Table

INPUT = "(input)"


@dataclass(frozen=True)
class Kernel:
    """One operator: `calls` and `ms` of its own in one run, and its `share` of the time of all."""

    name: str
    calls: float
    ms: float
    share: float


class Kernels(list):
    """`Kernel`s, the longest first; prints as a table. `in` looks for a name: `"quantized::conv2d" in found`."""

    def __contains__(self, name):
        return any(kernel.name == name for kernel in self)

    def calls(self, name):
        """Return how often the operators whose name begins with `name` were called in one run."""
        return sum(kernel.calls for kernel in self if kernel.name.startswith(name))

    def table(self, top=10):
        """Return the `top` longest as a `Table`."""
        rows = [[k.name, f"{k.calls:g}", f"{k.ms:.3f}", f"{k.share:.1%}"] for k in self[:top]]
        return Table(["operator", "calls", "own ms", "share"], rows)

    def __str__(self):
        return str(self.table())

    __repr__ = __str__

    def _repr_markdown_(self):
        return self.table()._repr_markdown_()


def kernels(fn, *, runs=5, warmup=2, mode=torch.no_grad):
    """Return the operators that torch's profiler sees in `fn()`, as `Kernels` with their own time, without what they call.

    runs, warmup: calls that are averaged, and that come before. mode: as in `timing.latency`. Profiling itself takes a few
    microseconds an operator: shares are what to read, times come from `latency`. An engine outside of torch shows nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    with mode():
        for _ in range(warmup):
            fn()
        with captured(2), profile(activities=[ProfilerActivity.CPU]) as seen:  # it logs there
            for _ in range(runs):
                fn()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) or 1
    return Kernels(
        Kernel(e.key, e.count / runs, e.self_cpu_time_total / 1000 / runs, e.self_cpu_time_total / total)
        for e in events
    )


@dataclass(frozen=True)
class OneDNN:
    """What oneDNN says of itself: the instruction set `isa` it works with, and how often it called what, `calls`.

    calls: a `Counter` of `(operation, implementation)`, such as `("convolution", "brg_conv_fwd:avx512_core_vnni")`.
    """

    isa: str
    calls: Counter

    def implementations(self, operation="convolution"):
        """Return the names of what computed `operation`, the most frequent first."""
        return [name for (found, name), _ in self.calls.most_common() if found == operation]


def onednn(fn, *, mode=torch.no_grad):
    """Return what oneDNN did in one call `fn()`, as an `OneDNN`; empty where torch has none, or `fn` did not use it.

    It comes from oneDNN's verbose mode, which prints to the standard output of the process, whence it is read. isa is empty if
    that mode was on in this process before: it introduces itself once.
    """
    if not torch.backends.mkldnn.is_available():
        return OneDNN("", Counter())
    isa = onednn_isa()
    with mode():
        fn()
        lines = _verbose(fn)
    return OneDNN(isa, Counter((line[5], line[6]) for line in lines if line[2:5] == ["primitive", "exec", "cpu"]))


@functools.cache
def onednn_isa():
    """Return the instruction set that oneDNN works with in this process, in its words; empty where torch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ""
    lines = _verbose(lambda: torch.zeros(2, 2).to_mkldnn())
    found = [",".join(line[4:]) for line in lines if line[2:4] == ["info", "cpu"]]
    return next((text.removeprefix("isa:") for text in found if text.startswith("isa:")), "")


def _verbose(fn):
    with captured(1) as output, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        fn()
    return [line.split(",") for line in output[0].splitlines() if line.startswith("onednn_verbose")]


class LayerTimes(dict):
    """Median milliseconds of each layer by name, in the order they ran; what ran before the first is `INPUT`."""

    def table(self):
        """Return the times as a `Table`, longest first."""
        total = sum(self.values())
        rows = [
            [name, f"{ms:.3f}", f"{ms / total:.1%}"] for name, ms in sorted(self.items(), key=lambda item: -item[1])
        ]
        return Table(["layer, and what follows it", "median ms", "share"], rows)

    def __str__(self):
        return str(self.table())

    __repr__ = __str__

    def _repr_markdown_(self):
        return self.table()._repr_markdown_()


def by_layer(model, images, *, rounds=20, warmup=3):
    """Return how long each convolution and linear layer of `model` takes on `images`, as `LayerTimes`.

    model: a float module that torch.fx can trace, or one that `backends` quantized. What follows a layer until the next one
    (batch norm, ReLU, pooling, an addition) counts with it, because kernels for integers do part of that in one go: so a float
    network and its quantized copy have the same layers, and their times add up to that of the network, but for the steps
    from one operation to the next.

    rounds, warmup: runs whose median is taken, and runs before them. Raises `ValueError` for a model that cannot be traced.
    """
    stopwatch = _Stopwatch(_graph(model))
    runs = []
    with torch.no_grad():
        for index in range(-warmup, rounds):
            stopwatch.layers = {}
            stopwatch.run(images)
            if index >= 0:
                runs.append(stopwatch.layers)
    return LayerTimes({name: statistics.median(run[name] for run in runs) for name in runs[0]})


def layer_speedups(before, after):
    """Return how many times as fast each layer became, as a dict: two `LayerTimes` of the same layers, or of most of them."""
    return {name: ms / after[name] for name, ms in before.items() if after.get(name)}


def _graph(model):
    """Return what computes `model` as a graph module."""
    if isinstance(model, torch.fx.GraphModule):
        return model
    # Of engine "pt2e": the last of its graphs is the one that runs.
    if isinstance(graph := getattr(model, "graphs", [None])[-1], torch.fx.GraphModule):
        return graph
    try:
        return torch.fx.symbolic_trace(model)
    except Exception as error:
        raise ValueError(
            f"cannot see the layers of this {type(model).__name__}: torch.fx cannot trace it ({error})"
        ) from None


class _Stopwatch(torch.fx.Interpreter):
    """Runs a graph node by node, and adds the milliseconds of each to `layers`, under the layer that it belongs to."""

    def run(self, *args):
        self.layer = INPUT
        return super().run(*args)

    def run_node(self, node):
        self.layer = self._layer(node) or self.layer
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        began = time.perf_counter_ns()
        result = getattr(self, node.op)(node.target, args, kwargs)
        took = time.perf_counter_ns() - began
        if node.op.startswith("call"):
            self.layers[self.layer] = self.layers.get(self.layer, 0) + took / 1e6
        return result

    def _layer(self, node):
        """Return the name of the layer that begins with `node`, None for any other node."""
        if node.op == "call_module":
            kind = type(self.module.get_submodule(node.target)).__name__
            return node.target if re.search("Conv|Linear", kind) else None
        if node.op != "call_function" or not re.search("conv|linear", str(node.target)):
            return None
        # In an exported graph the layer's name survives in those of its parameters.
        names = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
        found = [re.fullmatch(r"(.+?)[._](weight_bias|weight|bias)", name) for name in names]
        return next((match[1] for match in found if match), node.name)
