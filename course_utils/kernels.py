"""One linear layer by every way that this machine has: when are small weights fast weights?"""

import itertools
import math

import torch

from . import backends, timing

CALLS = 8  # multiplications in one timed call
BEYOND_CACHES = 64  # megabytes of weights that each way goes through


def latencies(size, rows, rounds, *, group_size=128):
    """Return number of rows → `timing.Timings` of the ways of `backends.linear_ways`, a call being `CALLS` multiplications.

    size: rows and columns of the weights. Each way goes through as many matrices as take more than the caches hold together,
    so that it has to read each of them from memory again; the smaller its weights, the more matrices. rows: how many rows of
    input share the weights, a list. rounds: interleaved rounds for few rows, a third of them for 16 and more.
    """
    generator = torch.Generator().manual_seed(0)
    ways, stacks = backends.linear_ways(group_size=group_size), {}
    for way, (bits, make) in reversed(ways.items()):  # the small ones first: making them takes memory for a while
        count = max(2, math.ceil(BEYOND_CACHES * 8e6 / (bits * size**2))) if size >= 2048 else 2
        stacks[way] = [make(torch.randn(size, size, generator=generator).mul_(0.02)) for _ in range(count)]

    def multiply(way, x):
        for call in itertools.islice(itertools.cycle(stacks[way]), CALLS):
            call(x)

    found = {}
    for n in rows:
        x = torch.randn(n, size, generator=generator)
        calls = {way: lambda way=way, x=x: multiply(way, x) for way in ways}
        found[n] = timing.latency(calls, rounds=rounds if n < 16 else max(3, rounds // 3), warmup=1)
    return found
