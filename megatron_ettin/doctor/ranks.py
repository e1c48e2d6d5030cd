"""Compare all ranks of a launch: whether they meet, their versions, their clocks and their speed.

Each rank multiplies matrices on its device, and all ranks all-reduce, for some seconds; results are checked and speeds
measured. A process that is no rank of a launch multiplies on each of its GPUs. Products are repeated and must give the
same bits each time; some of their rows are compared with float64. All-reduces sum whole numbers, which is exact.
"""

from __future__ import annotations

import dataclasses
import os
import platform as python
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ettin.base.errors import RankError, first_line
from megatron_ettin.base.versions import (
    CLOCK_SECONDS,
    clock_warnings,
    code_hash,
    code_version,
    first_difference,
    library_versions,
)
from megatron_ettin.doctor.findings import Finding, format_flops, ok, problem, warning
from megatron_ettin.parallel.collectives import all_gather_object, barrier
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group, release_store
from megatron_ettin.platform import Platform, detect, inventory
from megatron_ettin.platform.device import gpu_count

ARRIVAL_SECONDS = 120.0
# a rank below this share of the median rank's rate is slow
SLOW_RANK = 0.85
MOST_NAMED = 4
# seconds of the products, and again of the all-reduces
GPU_SECONDS, CPU_SECONDS = 5.0, 0.5
# a GPU below this share of the data sheet's rate gets a warning
LEAST_OF_PEAK = 0.5
# a warning if the slowest group of products is below this share of the median group's rate
LEAST_OF_MEDIAN = 0.8
ROWS_CHECKED = 8
PRODUCTS_PER_GROUP = 10
# relative to the largest element: bf16 has 8 bits, and sums of n products are rounded once
TOLERANCE = 0.02
GPU_SIDE, CPU_SIDE = 8192, 768
GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20
BROKEN = "take this host out of the partition and test the device (dcgmi diag -r 3; memtest)"


@dataclass(frozen=True)
class Products:
    """Result of the matrix products."""

    flops: float
    """Operations per second, median over groups of products."""
    slowest: float
    """Operations per second of the slowest group."""
    dtype: str
    side: int
    """Number of rows and of columns."""
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


def rank_findings(env: DistributedEnv, platform: Platform, own: Sequence[Finding], quick: bool) -> list[Finding]:
    """Compare all ranks (collective).

    Args:
        env: this process among the ranks.
        platform: this rank's device.
        own: this rank's findings about its host.
        quick: whether to measure nothing.

    Returns:
        The same list on every rank, unless they do not meet. It has the warnings and problems of hosts other than
        rank 0's too, with the names of these hosts.
    """
    try:
        init_process_group(env, platform, arrival_seconds=ARRIVAL_SECONDS)
    except RankError as error:
        todo = "are all started? are MASTER_ADDR and the port reachable from each host, is a firewall between them?"
        return [problem("rendezvous", str(error), todo)]
    try:
        measured = None if quick else products_finding(platform)
        hosts = all_gather_object(socket.gethostname())
        findings = [ok("rendezvous", f"{env.world} ranks by {env.source}; hosts: {len(set(hosts))}")]
        findings += _differences(hosts, all_gather_object(_facts(platform)))
        barrier()
        findings.append(judge_clocks(hosts, all_gather_object(time.time())))
        if measured is not None:
            findings.append(judge_rates(hosts, all_gather_object(measured)))
        seconds = 0.0 if quick else GPU_SECONDS if platform.is_gpu else CPU_SECONDS
        sums = all_gather_object(all_reduce_finding(all_reduces(platform, seconds), platform))
        findings.append(next((one for one in sums if one.state != "ok"), sums[0]))
        return findings + _on_other_hosts(hosts, all_gather_object(list(own)))
    except RuntimeError as error:
        # a rank died, or a network is cut
        text = f"rank {env.rank}: {first_line(error)[:200]}"
        return [problem("ranks", text, "NCCL_DEBUG=INFO logs more about GPUs' networks")]
    finally:
        destroy_process_group()
        release_store()


def _facts(platform: Platform) -> dict[str, str]:
    """Return the facts that should be equal on every rank, by name."""
    return {
        "code of megatron_ettin": f"{code_version()} ({code_hash()})",
        "libraries": library_versions(),
        "Python": python.python_version(),
        "device": platform.name,
        "driver": inventory.driver() or "none",
        "collectives": inventory.collectives(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def _differences(hosts: list[str], facts: list[dict[str, str]]) -> list[Finding]:
    """Return a finding for each fact in which ranks differ: a problem for code and libraries, else a warning."""
    findings = []
    for name in facts[0]:
        line = first_difference(hosts, [{name: fact[name]} for fact in facts])
        if line is not None and name in ("code of megatron_ettin", "libraries"):
            findings.append(problem("ranks alike", line, "one environment on a file system that all share"))
        elif line is not None:
            findings.append(warning("ranks alike", line, "start them with the same environment, on the same hardware"))
    return findings or [ok("ranks alike", f"the same {', '.join(facts[0])}")]


def judge_clocks(hosts: Sequence[str], now: Sequence[float]) -> Finding:
    """Return a finding on the ranks' clocks `now`, in seconds, which were read right after a barrier."""
    spread = max(now) - min(now)
    off = clock_warnings(hosts, now)
    if off:
        lines = "; ".join(line.removeprefix("warning: ") for line in off[:MOST_NAMED])
        return warning("clocks", lines, "start chrony or ntpd there", spread_seconds=spread)
    return ok("clocks", f"within {spread * 1e3:.0f} ms (bound: {CLOCK_SECONDS:g} s)", spread_seconds=spread)


def judge_rates(hosts: Sequence[str], measured: Sequence[Finding]) -> Finding:
    """Return a finding on the products of all ranks, naming the wrong or slow ones; `measured` is in order of ranks."""
    bad = [f"rank {rank} on {hosts[rank]}: {one.text}" for rank, one in enumerate(measured) if one.state == "problem"]
    if bad:
        todo = next(one.todo for one in measured if one.state == "problem")
        return problem("products", "; ".join(bad[:MOST_NAMED]), todo)
    rates = [one.figures["tflops"] for one in measured]
    usual = statistics.median(rates)
    slow = [rank for rank, rate in enumerate(rates) if rate < SLOW_RANK * usual]
    text = (
        f"{format_flops(usual * 1e12)} by the median rank, {min(rates) / usual:.0%} to {max(rates) / usual:.0%} of it"
    )
    if slow:
        named = ", ".join(f"rank {rank} on {hosts[rank]}: {rates[rank] / usual:.0%}" for rank in slow[:MOST_NAMED])
        todo = "all ranks wait for the slowest: leave its host out (sbatch --exclude), or look at what else runs there"
        return warning("products", f"{text}; slow: {named}", todo, tflops=rates)
    return ok("products", f"{text}; right", tflops=rates)


def _on_other_hosts(hosts: list[str], every: list[list[Finding]]) -> list[Finding]:
    """Return warnings and problems of hosts other than rank 0's, once for each host."""
    findings: dict[tuple[str, str, str], Finding] = {}
    for host, own in zip(hosts, every, strict=True):
        for finding in own if host != hosts[0] else ():
            if finding.state in ("warning", "problem"):
                named = dataclasses.replace(finding, name=f"{host}: {finding.name}")
                findings.setdefault((host, finding.name, finding.text), named)
    return list(findings.values())


def single_rank_findings() -> list[Finding]:
    """Check products on each GPU in turn (or the CPU), and an all-reduce over one rank, which starts the backend."""
    count = max(gpu_count(), 1)
    findings = [products_finding(detect("auto", index), index if count > 1 else None, count) for index in range(count)]
    platform = detect("auto", 0)
    try:
        init_process_group(DistributedEnv(0, 1, 0, None, 0, "alone"), platform)
        try:
            findings.append(all_reduce_finding(all_reduces(platform, 0.0), platform))
        finally:
            destroy_process_group()
    except RuntimeError as error:
        todo = "NCCL_DEBUG=INFO logs more; is the library's version that of torch?"
        findings.append(problem("all-reduce", f"{platform.backend} does not start: {first_line(error)}", todo))
    return findings


def products(platform: Platform, seconds: float, side: int | None = None) -> Products:
    """Multiply and check matrices [side, side] for about `seconds`, in bf16 on a GPU, else in fp32."""
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
    """Compare some rows of a product with float64 on the CPU; return an error message, or None if they agree."""
    rows = torch.linspace(0, a.shape[0] - 1, ROWS_CHECKED).long()
    want = a.cpu()[rows].double() @ b.cpu().double()
    difference = float((product.cpu()[rows].double() - want).abs().max() / want.abs().max())
    # False for a NaN, which is an error
    if difference <= TOLERANCE:
        return None
    return f"a product of {a.shape[0]} x {a.shape[1]} is off by {difference:.2g} of its largest element"


def all_reduces(platform: Platform, seconds: float) -> AllReduces:
    """All-reduce over the default group for about `seconds` and check the sums (collective)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    size = GPU_BYTES if platform.is_gpu else CPU_BYTES
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


def products_finding(platform: Platform, index: int | None = None, devices: int = 1) -> Finding:
    """Measure products on one device and return a finding; `devices` devices share the seconds."""
    name = "products" if index is None else f"products, gpu {index}"
    try:
        done = products(platform, (GPU_SECONDS if platform.is_gpu else CPU_SECONDS) / devices)
    except RuntimeError as error:
        # errors of the device, out of memory too
        return problem(name, f"{platform.name}: {first_line(error)}", "look at `nvidia-smi` and dmesg")
    return judge_products(name, platform.name, platform.peak_flops, done)


def judge_products(name: str, device: str, peak_flops: float | None, done: Products) -> Finding:
    """Return a finding on measured products; `peak_flops`: the data sheet's operations per second, or None."""
    text = f"{format_flops(done.flops)} in {done.dtype} at {done.side:,} on {device}"
    figures: dict[str, Any] = {"tflops": done.flops / 1e12, "slowest_tflops": done.slowest / 1e12}
    if peak_flops:
        figures["of_peak"] = done.flops / peak_flops
        text += f", {figures['of_peak']:.0%} of the data sheet's {peak_flops / 1e12:,.0f}"
    if done.error:
        return problem(name, f"{device} computes wrongly: {done.error}", BROKEN, **figures)
    todo = "is it shared, hot or capped? `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"
    if peak_flops and figures["of_peak"] < LEAST_OF_PEAK:
        return warning(name, text, todo, **figures)
    if peak_flops and done.slowest < LEAST_OF_MEDIAN * done.flops:
        return warning(name, f"{text}, at times {done.slowest / done.flops:.0%} of that", todo, **figures)
    return ok(name, f"{text}; right", **figures)


def all_reduce_finding(done: AllReduces, platform: Platform) -> Finding:
    """Return a finding on measured all-reduces."""
    if done.error:
        return problem("all-reduce", done.error, BROKEN)
    if done.world == 1:
        return ok("all-reduce", f"{platform.backend} starts; with one rank nothing is sent (--ranks: between ranks)")
    rate = done.bytes_per_second / 1e9
    text = f"{rate:,.3g} GB/s a rank by {platform.backend}, {done.world} ranks, {done.size_bytes >> 20} MiB; right"
    return ok("all-reduce", text, gb_per_second=rate, ranks=done.world)
