"""Check for `ettin doctor` that this device computes correctly and fast, and that ranks reach each other.

Products are repeated and must give the same bits each time; some of their rows are compared with float64. All-reduces
sum whole numbers, which is exact.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ettin.platform.device import Platform

ROWS_CHECKED = 8
PRODUCTS_PER_GROUP = 10
# relative to the largest element: bf16 has 8 bits, and sums of n products are rounded once
TOLERANCE = 0.02
GPU_SIDE, CPU_SIDE = 8192, 768
GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20


@dataclass(frozen=True)
class Products:
    """Result of the matrix products."""

    flops: float
    """Operations per second, median over groups of products."""
    slowest: float
    """Operations per second of the slowest group."""
    dtype: str
    side: int
    error: str | None
    """Error message; None if nothing is wrong."""


@dataclass(frozen=True)
class AllReduces:
    """Result of the all-reduces."""

    bytes_per_second: float
    """Bytes that each rank sends and receives, 2 (n - 1) / n of the size, per second; 0 with one rank."""
    size_bytes: int
    world: int
    error: str | None
    """Error message; None if nothing is wrong."""


def products(platform: Platform, seconds: float, side: int | None = None) -> Products:
    """Compute products of square matrices of length `side` for about `seconds`: bf16 on a GPU, else fp32."""
    side = side or (GPU_SIDE if platform.is_gpu else CPU_SIDE)
    dtype = torch.bfloat16 if platform.is_gpu else torch.float32
    generator = torch.Generator(device=platform.device).manual_seed(0)
    a, b = (torch.randn(side, side, device=platform.device, dtype=dtype, generator=generator) for _ in range(2))
    first = torch.mm(a, b)
    error = wrong_rows(a, b, first)
    rates: list[float] = []
    deadline = time.monotonic() + seconds
    while not rates or (error is None and time.monotonic() < deadline):
        platform.synchronize()
        began = time.perf_counter()
        for _ in range(PRODUCTS_PER_GROUP):
            last = torch.mm(a, b)
        platform.synchronize()
        rates.append(PRODUCTS_PER_GROUP * 2 * side**3 / (time.perf_counter() - began))
        if not torch.equal(first, last):
            error = error or "the same product twice gave other bits"
    rates.sort()
    return Products(rates[len(rates) // 2], rates[0], str(dtype).removeprefix("torch."), side, error)


def wrong_rows(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> str | None:
    """Return what is wrong with some rows of a product compared with float64 on the CPU; None if nothing is."""
    rows = torch.linspace(0, a.shape[0] - 1, ROWS_CHECKED).long()
    want = a.cpu()[rows].double() @ b.cpu().double()
    difference = float((product.cpu()[rows].double() - want).abs().max() / want.abs().max())
    # a NaN is not within it
    if difference <= TOLERANCE:
        return None
    return f"a product of {a.shape[0]} x {a.shape[1]} is off by {difference:.2g} of its largest element"


def all_reduces(platform: Platform, seconds: float, size_bytes: int | None = None) -> AllReduces:
    """All-reduce over the default group for about `seconds` (collective)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    size = size_bytes or (GPU_BYTES if platform.is_gpu else CPU_BYTES)
    base = torch.arange(size // 4, device=platform.device, dtype=torch.float32).remainder_(64)
    want = base * world + world * (world - 1) / 2
    durations: list[float] = []
    error, more = None, torch.ones(1, device=platform.device)
    deadline = time.monotonic() + seconds
    while more.item():
        mine = base + rank
        platform.synchronize()
        began = time.perf_counter()
        dist.all_reduce(mine)
        platform.synchronize()
        durations.append(time.perf_counter() - began)
        if not torch.equal(mine, want):
            error = f"{int((mine != want).sum())} of {mine.numel()} sums over {world} ranks are wrong"
        more.fill_(float(error is None and time.monotonic() < deadline))
        # all ranks stop after the same round
        dist.broadcast(more, src=0)
    durations.sort()
    wire = 2 * (world - 1) / world * size
    return AllReduces(wire / durations[len(durations) // 2], size, world, error)
