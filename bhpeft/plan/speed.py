"""How fast: whether streaming the frozen weights to the GPU is hidden behind computing with them.

With offload every rank copies its shard to its GPU once in the forward pass and once in the backward pass (with
checkpointing too: a layer is computed again right before its gradient, and stays gathered between). Copying and
computing overlap, so a micro-step takes the longer of

    t_stream  = 2 shard / link                          whatever the batch
    t_compute = tokens f / F                            f: FLOP a token, F: FLOP/s

and streaming is hidden from   tokens* = 2 shard F / (f link)   on. Where f is 2 FLOP a weight and pass and a weight has
b bytes, tokens* = b F / (2 link): neither the model's size nor the number of passes counts. What ranks exchange among
themselves is not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

PASSES = 2


@dataclass(frozen=True)
class Rates:
    """link: bytes/s from host to GPU; flops: FLOP/s of matrix products; source: where they are from, in words."""

    link: float
    flops: float
    source: str


def break_even_tokens(streamed: float, flops_per_token: float, rates: Rates) -> float:
    """Tokens of a micro-step from which streaming is hidden.

    Args:
        streamed: bytes that one rank copies to its GPU in a micro-step, all passes together.
    """
    return streamed * rates.flops / (flops_per_token * rates.link)


def step_seconds(streamed: float, flops: float, rates: Rates) -> tuple[float, float]:
    """(seconds of streaming, seconds of computing) of a micro-step; it takes the longer of them at best."""
    return streamed / rates.link, flops / rates.flops


def measure_rates(dtype: torch.dtype) -> Rates:
    """Both rates of this machine, in a second: a matrix product, and a copy from pinned host memory (or in memory)."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    size = 8192 if on_gpu else 512
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = best_of(lambda: a @ a, on_gpu)
    host = torch.zeros((256 if on_gpu else 64) * 2**20, dtype=torch.uint8)
    host = host.pin_memory() if on_gpu else host
    target = torch.empty_like(host, device=device)
    copying = best_of(lambda: target.copy_(host, non_blocking=True), on_gpu)
    what = f"measured here ({torch.cuda.get_device_name()})" if on_gpu else "measured here (CPU, memory to memory)"
    return Rates(host.numel() / copying, 2 * size**3 / seconds, what)


def best_of(function, on_gpu: bool, times: int = 4) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(times):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
