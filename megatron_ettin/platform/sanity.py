"""Does this device compute what it should, how fast, and do ranks hear each other? For `ettin doctor`.

Products are repeated and have to give the same bits each time, and rows of them are compared with float64. All-reduces
are of whole numbers, whose sum is exact."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ettin.platform.device import Platform

ROWS_CHECKED = 8
PRODUCTS_AT_ONCE = 10
TOLERANCE = 0.02  # of the largest element: bf16 has 8 bits, and sums of n products are rounded once
GPU_SIDE, CPU_SIDE = 8192, 768
GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20


@dataclass(frozen=True)
class Products:
    """`error`: what is wrong, None: nothing. `flops`: operations a second, median of groups; `slowest`: least."""

    flops: float
    slowest: float
    dtype: str
    side: int
    error: str | None


@dataclass(frozen=True)
class AllReduces:
    """`bytes_per_second` that went over each rank's wire, 2 (n - 1) / n of the size: 0 where there is one rank."""

    bytes_per_second: float
    size_bytes: int
    world: int
    error: str | None


def products(platform: Platform, seconds: float, side: int | None = None) -> Products:
    """Matrix products for about `seconds`: bf16 on a GPU, fp32 elsewhere. `side`: of the square matrices."""
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
        for _ in range(PRODUCTS_AT_ONCE):
            last = torch.mm(a, b)
        platform.synchronize()
        rates.append(PRODUCTS_AT_ONCE * 2 * side**3 / (time.perf_counter() - began))
        if not torch.equal(first, last):
            error = error or "the same product twice gave other bits"
    rates.sort()
    return Products(rates[len(rates) // 2], rates[0], str(dtype).removeprefix("torch."), side, error)


def wrong_rows(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> str | None:
    """What is wrong with some rows of a product, beside float64 on the processor. None: nothing."""
    rows = torch.linspace(0, a.shape[0] - 1, ROWS_CHECKED).long()
    want = a.cpu()[rows].double() @ b.cpu().double()
    difference = float((product.cpu()[rows].double() - want).abs().max() / want.abs().max())
    if difference <= TOLERANCE:  # false of a NaN
        return None
    return f"a product of {a.shape[0]} x {a.shape[1]} is off by {difference:.2g} of its largest element"


def all_reduces(platform: Platform, seconds: float, size_bytes: int | None = None) -> AllReduces:
    """Sums over the ranks of the default group for about `seconds`; every rank has to call it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    size = size_bytes or (GPU_BYTES if platform.is_gpu else CPU_BYTES)
    base = torch.arange(size // 4, device=platform.device, dtype=torch.float32).remainder_(64)
    want = base * world + world * (world - 1) / 2
    taken: list[float] = []
    error, more = None, torch.ones(1, device=platform.device)
    deadline = time.monotonic() + seconds
    while more.item():
        mine = base + rank
        platform.synchronize()
        began = time.perf_counter()
        dist.all_reduce(mine)
        platform.synchronize()
        taken.append(time.perf_counter() - began)
        if not torch.equal(mine, want):
            error = f"{int((mine != want).sum())} of {mine.numel()} sums over {world} ranks are wrong"
        more.fill_(float(error is None and time.monotonic() < deadline))
        dist.broadcast(more, src=0)  # all stop at once
    taken.sort()
    wire = 2 * (world - 1) / world * size
    return AllReduces(wire / taken[len(taken) // 2], size, world, error)
