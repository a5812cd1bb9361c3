"""What an instruction set is worth: the same files timed in processes in which oneDNN may use only a part of the processor.

`ONEDNN_MAX_CPU_ISA` (oneDNN's developer guide, "CPU dispatcher control") is read once, by the first thing oneDNN does, and a
value it does not know is ignored in silence: so each level has a process of its own, which reports what oneDNN took it for.
"""

from dataclasses import dataclass

import torch

from . import cpu
from .child import in_child
from .loading import load_model
from .profiling import onednn
from .timing import Timing, latency

ALL = "DEFAULT"  # oneDNN's word for no limit
NEEDS = {"AVX2": "avx2", "AVX2_VNNI": "avx_vnni", "AVX512_CORE": "avx512bw", "AVX512_CORE_VNNI": "avx512_vnni"}


@dataclass(frozen=True)
class AtLevel:
    """One level: the `Timing`s of both files, the instruction set as oneDNN names it, and what computed the convolutions of
    the INT8 model, the most frequent first. `int8.speedup` is over FP32 at the same level, which has fewer instructions too."""

    level: str
    isa: str
    fp32: Timing
    int8: Timing
    convolutions: tuple


def levels():
    """Return the levels that make a difference on this processor, from the smallest; on other than x86 there is only `ALL`."""
    return [level for level, flag in NEEDS.items() if flag in cpu.flags()] + [ALL]


def at_level(level, int8, fp32, name="resnet18", *, size=224, rounds=40, warmup=5, threads=None):
    """Time an INT8 model against its FP32 one in a fresh process that may use `level` at most, and return the `AtLevel`.

    int8: a file written by `backends.save`, of an engine that computes by oneDNN (`"onednn"`, `"pt2e"`, and most of `"x86"`).
    fp32: float weights as safetensors, with the architecture `name`. size: of the one image, `size` × `size` pixels. The rest
    is as in `timing.latency`. torch's own kernels, for additions and pooling, are not limited by it.
    """
    options = {"rounds": rounds, "warmup": warmup, "threads": threads or torch.get_num_threads()}
    return in_child(_time_files, level, int8, fp32, name, size, options, env={cpu.ISA_LIMIT: level})


def _time_files(level, int8, fp32, name, size, options):
    models = {"FP32": load_model(fp32, name), "INT8": load_model(int8)}
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = latency({key: lambda model=model: model(image) for key, model in models.items()}, **options)
    seen = onednn(lambda: models["INT8"](image))
    return AtLevel(level, seen.isa, found["FP32"], found["INT8"], tuple(seen.implementations()))
