"""One linear layer by every way that this machine has: when are small weights fast weights?"""

import itertools
import math

import torch

from . import backends, cpu, timing

CALLS = 8  # multiplications in one timed call
BEYOND_CACHES, MOST = 64, 512  # megabytes of weights that each way goes through, at least and at most


def latencies(size, rows, rounds, *, group_size=128):
    """Return number of rows → `timing.Timings` of the ways of `backends.linear_ways`, a call being `CALLS` multiplications.

    size: rows and columns of the weights. From 2048 on, each way goes through as many matrices as take twice what the
    last-level caches hold, at least `BEYOND_CACHES` megabytes, so that it has to read each of them from memory again; the
    smaller its weights, the more matrices, and a call goes on where the one before stopped. Smaller sizes have two matrices a
    way, which stay in the caches: what is timed then is arithmetic and the call itself. So it may be, too, where caches hold
    more than a way may take: `MOST` megabytes, or a 32nd of the memory.

    rows: how many rows of input share the weights, a list. rounds: interleaved rounds for few rows, a third of them for 16
    and more.
    """
    generator = torch.Generator().manual_seed(0)
    ways, stacks = backends.linear_ways(group_size=group_size), {}
    megabytes = _megabytes()
    for way, (bits, make) in reversed(ways.items()):  # the small ones first: making them takes memory for a while
        count = max(2, math.ceil(megabytes * 8e6 / (bits * size**2))) if size >= 2048 else 2
        made = [make(torch.randn(size, size, generator=generator).mul_(0.02)) for _ in range(count)]
        stacks[way] = itertools.cycle(made)

    def multiply(way, x):
        for call in itertools.islice(stacks[way], CALLS):
            call(x)

    found = {}
    for n in rows:
        x = torch.randn(n, size, generator=generator)
        calls = {way: lambda way=way, x=x: multiply(way, x) for way in ways}
        found[n] = timing.latency(calls, rounds=rounds if n < 16 else max(3, rounds // 3), warmup=1)
    return found


def _megabytes():
    """Return how many megabytes of weights each way goes through; some five ways share the memory with what runs beside."""
    caches, memory = cpu.last_level_cache() or 0, (cpu.memory_gib() or 0) * 2**30
    return max(BEYOND_CACHES, min(2 * caches / 1e6, memory / 32e6, MOST))
