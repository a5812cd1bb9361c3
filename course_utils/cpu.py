"""The processor and memory this process may use: the facts that decide how fast, and how exact, 8-bit arithmetic is."""

import contextlib
import ctypes
import gc
import os
import platform
from pathlib import Path

CORES = Path("/sys/devices/system/cpu")
GROUPS = Path("/sys/fs/cgroup")

# Flag (as /proc/cpuinfo spells it) → what it means for INT8. The rest of the course names the flags that a machine has.
ISA_FLAGS = {
    "avx2": "INT8 kernels with 256-bit registers",
    "avx512f": "INT8 kernels with 512-bit registers",
    "avx512_vnni": "four INT8 products summed into INT32 by one instruction, no 16-bit saturation",
    "avx_vnni": "VNNI in 256-bit registers",
    "avx512_bf16": "BF16 dot products",
    "avx512_fp16": "FP16 arithmetic",
    "amx_int8": "INT8 matrix tiles",
    "asimd": "INT8 kernels with 128-bit registers (NEON)",
    "asimddp": "four INT8 products summed into INT32 by one instruction (NEON)",
    "i8mm": "INT8 matrix products (NEON)",
    "sve": "scalable vectors",
}

ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # what oneDNN is told by how much of the processor it may use
WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}  # its words for limits below VNNI


def name():
    """Return the processor's name as the system gives it."""
    return _cpuinfo("model name", "Hardware", "CPU part") or platform.processor() or platform.machine()


def flags():
    """Return the set of the processor's instruction-set flags in lower case, spelled as in Linux' /proc/cpuinfo.

    Elsewhere the set holds only what torch and the architecture give away.
    """
    found = set(_cpuinfo("flags", "Features").lower().split())
    if found:
        return found
    if platform.machine().lower() in ("arm64", "aarch64"):
        # Every 64-bit ARM has NEON; every Apple one also has its dot products.
        return {"asimd", "asimddp"} if platform.system() == "Darwin" else {"asimd"}
    import torch

    return {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512f"}}.get(torch.backends.cpu.get_cpu_capability(), set())


def is_x86():
    """Return whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_vnni():
    """Return whether an x86 processor sums INT8 products straight into INT32 (else kernels may saturate at 16 bits).

    It does not where oneDNN is held to older instructions, by `ONEDNN_MAX_CPU_ISA`, or its older name
    `DNNL_MAX_CPU_ISA` (oneDNN's page "CPU dispatcher control").
    """
    limit = os.environ.get(ISA_LIMIT, os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit in WITHOUT_VNNI:
        return False
    return bool(flags() & ({"avx_vnni"} if limit.startswith("AVX2_VNNI") else {"avx512_vnni", "avx_vnni"}))


def has_bf16():
    """Return whether the processor has arithmetic for BF16; without it BF16 is emulated, many times slower than FP32."""
    return bool(flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def cores():
    """Return how many logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def last_level_cache():
    """Return the bytes of the last-level caches of the cores this process may run on, or None where Linux does not tell."""
    found = {}
    for core in sorted(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)):
        for index in (CORES / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, size, shared = (
                    (index / part).read_text().strip() for part in ("level", "size", "shared_cpu_list")
                )
                found[int(level), shared] = int(size.removesuffix("K")) * 1024  # cores that share one name it alike
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in found), default=None)
    return sum(size for (level, _), size in found.items() if level == last) or None


def memory_gib():
    """Return the memory this process may use in GiB (the container's limit where there is one), or None if unknown."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(min(installed, _container_limit() or installed) / 2**30, 1)


def trim_memory():
    """Give memory that was freed back to the system, where the C library is glibc; elsewhere do nothing.

    glibc keeps freed memory in case it is asked for again, so a process that made many networks stays as large as if it
    still had them all.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def trim_after_each_cell():
    """In a notebook, let every cell end with `trim_memory`, so that the peaks of its cells do not add up; elsewhere do nothing."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None and _after_cell not in shell.events.callbacks["post_run_cell"]:
        # What is imported stays: without looking through all of it a collection takes no time. Most of it is torchvision's,
        # which every lesson comes to.
        with contextlib.suppress(Exception):
            import torchvision  # noqa: F401
        gc.freeze()
        shell.events.register("post_run_cell", _after_cell)


def _after_cell(_result):
    trim_memory()


def _container_limit():
    # Binder and CI containers see the host's memory; their own limit is that of a control group they are in, or of one above it
    # (version 2, then version 1).
    own, limits = {}, []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own[controllers] = path.strip("/")
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        group = GROUPS / controller / own.get(controller, "")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # absent, or the word "max"
                limits.append(int((folder / name).read_text()))
    return min(limits, default=None)


def _cpuinfo(*keys):
    # x86 and ARM name the same facts differently; there is no such file outside Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() in keys), "")
