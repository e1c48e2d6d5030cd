"""All ranks of a launch beside each other: do they meet, is the same installed, do their clocks agree, do sums over
them come out right, and which of them is slow?

Seconds of products on every device of this process, and sums over its ranks: right, and how fast?"""

from __future__ import annotations

import dataclasses
import os
import platform as python
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

from megatron_ettin.base.errors import RankError, first_line
from megatron_ettin.base.versions import (
    CLOCK_SECONDS,
    clock_warnings,
    code_hash,
    code_version,
    first_difference,
    library_versions,
)
from megatron_ettin.doctor.findings import Finding, flops_text, ok, problem, warning
from megatron_ettin.parallel.collectives import all_gather_object, barrier
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group, release_store
from megatron_ettin.platform import Platform, detect, inventory
from megatron_ettin.platform.device import gpu_count
from megatron_ettin.platform.sanity import AllReduces, Products, all_reduces, products

ARRIVAL_SECONDS = 120.0
SLOW_RANK = 0.85  # of the median rank's rate
TOLD = 4


def rank_findings(place: DistributedEnv, platform: Platform, own: Sequence[Finding], quick: bool) -> list[Finding]:
    """The same list on every rank, but where they do not meet. `own`: what this rank has found by itself; what is
    wrong of the others' is in the list with their hosts. Collective."""
    try:
        init_process_group(place, platform, arrival_seconds=ARRIVAL_SECONDS)
    except RankError as error:
        todo = "are all started? are MASTER_ADDR and the port reachable from each host, is a firewall between them?"
        return [problem("rendezvous", str(error), todo)]
    try:
        measured = None if quick else products_finding(platform)
        hosts = all_gather_object(socket.gethostname())
        found = [ok("rendezvous", f"{place.world} ranks by {place.source}; hosts: {len(set(hosts))}")]
        found += _differences(hosts, all_gather_object(_facts(platform)))
        barrier()
        found.append(judge_clocks(hosts, all_gather_object(time.time())))
        if measured is not None:
            found.append(judge_rates(hosts, all_gather_object(measured)))
        seconds = 0.0 if quick else GPU_SECONDS if platform.is_gpu else CPU_SECONDS
        sums = all_gather_object(all_reduce_finding(all_reduces(platform, seconds), platform))
        found.append(next((one for one in sums if one.state != "ok"), sums[0]))
        return found + _others(hosts, all_gather_object(list(own)))
    except RuntimeError as error:  # a rank that died, a network that is cut
        return [
            problem(
                "ranks", f"rank {place.rank}: {first_line(error)[:200]}", "NCCL_DEBUG=INFO tells more of GPUs' networks"
            )
        ]
    finally:
        destroy_process_group()
        release_store()


def _facts(platform: Platform) -> dict[str, str]:
    """What should be equal everywhere, by its name."""
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
    """A finding for each fact in which ranks differ; code and libraries end a run."""
    found = []
    for name in facts[0]:
        line = first_difference(hosts, [{name: fact[name]} for fact in facts])
        if line is not None and name in ("code of megatron_ettin", "libraries"):
            found.append(problem("ranks alike", line, "one environment on a file system that all share"))
        elif line is not None:
            found.append(warning("ranks alike", line, "start them with the same environment, on the same hardware"))
    return found or [ok("ranks alike", f"the same {', '.join(facts[0])}")]


def judge_clocks(hosts: Sequence[str], now: Sequence[float]) -> Finding:
    """`now`: seconds of each rank's clock, read when all had met."""
    spread = max(now) - min(now)
    off = clock_warnings(hosts, now)
    if off:
        lines = "; ".join(line.removeprefix("warning: ") for line in off[:TOLD])
        return warning("clocks", lines, "start chrony or ntpd there", spread_seconds=spread)
    return ok("clocks", f"within {spread * 1e3:.0f} ms (bound: {CLOCK_SECONDS:g} s)", spread_seconds=spread)


def judge_rates(hosts: Sequence[str], measured: Sequence[Finding]) -> Finding:
    """The products of all ranks: who is wrong, who is slow."""
    bad = [f"rank {rank} on {hosts[rank]}: {one.text}" for rank, one in enumerate(measured) if one.state == "problem"]
    if bad:
        todo = next(one.todo for one in measured if one.state == "problem")
        return problem("products", "; ".join(bad[:TOLD]), todo)
    rates = [one.figures["tflops"] for one in measured]
    usual = statistics.median(rates)
    slow = [rank for rank, rate in enumerate(rates) if rate < SLOW_RANK * usual]
    text = f"{flops_text(usual * 1e12)} by the median rank, {min(rates) / usual:.0%} to {max(rates) / usual:.0%} of it"
    if slow:
        told = ", ".join(f"rank {rank} on {hosts[rank]}: {rates[rank] / usual:.0%}" for rank in slow[:TOLD])
        todo = "all wait for the slowest: leave its host out (sbatch --exclude), or see what else runs there"
        return warning("products", f"{text}; slow: {told}", todo, tflops=rates)
    return ok("products", f"{text}; right", tflops=rates)


def _others(hosts: list[str], every: list[list[Finding]]) -> list[Finding]:
    """What is wrong on hosts other than rank 0's, once a host."""
    found: dict[tuple[str, str, str], Finding] = {}
    for host, findings in zip(hosts, every, strict=True):
        for finding in findings if host != hosts[0] else ():
            if finding.state in ("warning", "problem"):
                named = dataclasses.replace(finding, name=f"{host}: {finding.name}")
                found.setdefault((host, finding.name, finding.text), named)
    return list(found.values())


GPU_SECONDS, CPU_SECONDS = 5.0, 0.5  # of each of the two
LEAST_OF_PEAK = 0.5  # of the data sheet's figure
LEAST_OF_MEDIAN = 0.8  # the slowest group of products beside the usual one
BROKEN = "take this machine out of the partition and test the device (dcgmi diag -r 3; memtest)"


def alone_findings() -> list[Finding]:
    """Products on each GPU in turn (or the processor), and a sum over one rank, which starts the backend."""
    count = max(gpu_count(), 1)
    found = [products_finding(detect("auto", index), index if count > 1 else None, count) for index in range(count)]
    platform = detect("auto", 0)
    try:
        init_process_group(DistributedEnv(0, 1, 0, None, 0, "alone"), platform)
        try:
            found.append(all_reduce_finding(all_reduces(platform, 0.0), platform))
        finally:
            destroy_process_group()
    except RuntimeError as error:
        todo = "NCCL_DEBUG=INFO tells more; is the library's version that of torch?"
        found.append(problem("all-reduce", f"{platform.backend} does not start: {first_line(error)}", todo))
    return found


def products_finding(platform: Platform, index: int | None = None, devices: int = 1) -> Finding:
    """Products on one device. `devices`: that share the seconds."""
    name = "products" if index is None else f"products, gpu {index}"
    try:
        done = products(platform, (GPU_SECONDS if platform.is_gpu else CPU_SECONDS) / devices)
    except RuntimeError as error:  # torch's errors of devices, out of memory too
        return problem(name, f"{platform.name}: {first_line(error)}", "look at `nvidia-smi` and dmesg")
    return judge_products(name, platform.name, platform.peak_flops, done)


def judge_products(name: str, device: str, peak_flops: float | None, done: Products) -> Finding:
    """What the measured rate says. `peak_flops`: of the data sheet, where it is known."""
    text = f"{flops_text(done.flops)} in {done.dtype} at {done.side:,} on {device}"
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
    """What the sums say."""
    if done.error:
        return problem("all-reduce", done.error, BROKEN)
    if done.world == 1:
        return ok("all-reduce", f"{platform.backend} starts; with one rank nothing is sent (--ranks: between ranks)")
    rate = done.bytes_per_second / 1e9
    text = f"{rate:,.3g} GB/s a rank by {platform.backend}, {done.world} ranks, {done.size_bytes >> 20} MiB; right"
    return ok("all-reduce", text, gb_per_second=rate, ranks=done.world)
