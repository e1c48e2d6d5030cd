"""Seconds of products on every device of this process, and sums over its ranks: right, and how fast?"""

from __future__ import annotations

from typing import Any

from megatron_ettin.doctor.findings import Finding, first_line, flops_text, ok, problem, warning
from megatron_ettin.parallel.rendezvous import Place, join, leave
from megatron_ettin.platform import Platform, detect
from megatron_ettin.platform.device import gpu_count
from megatron_ettin.platform.sanity import AllReduces, Products, all_reduces, products

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
        join(Place(0, 1, 0, None, 0, "alone"), platform)
        try:
            found.append(all_reduce_finding(all_reduces(platform, 0.0), platform))
        finally:
            leave()
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
