"""torch's profiler around some steps, with what the device adds: its kernels, its allocations, ranges for nsys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ettin.base.errors import UserError
from megatron_ettin.platform.device import Platform

TOP = 15  # kernels of the summary
NAME_CHARACTERS = 60
HISTORY_ENTRIES = 200_000  # allocations remembered for a snapshot


class Profiler:
    """From `start` to `stop`; then `write`."""

    def __init__(self, platform: Platform, memory: bool) -> None:
        if memory and not platform.is_gpu:
            raise UserError("profile.memory: needs a GPU, found none; profile.memory=false leaves the snapshot out")
        self.platform, self.memory = platform, memory
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if platform.is_gpu else [])
        self.profile = profile(activities=activities)

    def start(self) -> None:
        self.platform.synchronize()
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        if self.platform.is_gpu:  # for `nsys profile --capture-range=cudaProfilerApi`
            torch.cuda.profiler.start()
        self.profile.start()

    def stop(self) -> None:
        self.platform.synchronize()
        self.profile.stop()
        if self.platform.is_gpu:
            torch.cuda.profiler.stop()

    def write(self, folder: Path, name: str) -> str:
        """NAME.trace.json.gz (open in Perfetto), NAME.txt (the summary, which is returned), NAME.memory.pickle. Raises
        OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
        text = summary(self.profile.key_averages(), self.platform.is_gpu)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return text


def summary(averages: Any, is_gpu: bool) -> str:
    """The operations that took most time by themselves, on the device where there is one."""
    attribute = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = [(getattr(one, attribute), one.count, one.key) for one in averages]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = sum(row[0] for row in rows) or 1
    lines = [f"{'seconds':>9} {'share':>6} {'calls':>7}  operation ({'device' if is_gpu else 'processor'} time)"]
    for microseconds, count, key in rows[:TOP]:
        lines.append(f"{microseconds / 1e6:9.4f} {microseconds / total:6.1%} {count:7,}  {key[:NAME_CHARACTERS]}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def named(platform: Platform, name: str, on: bool) -> Iterator[None]:
    """A range in traces, and on a GPU for nsys; nothing where it is not `on`."""
    if not on:
        yield
        return
    with torch.profiler.record_function(name):
        if platform.is_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if platform.is_gpu:
                torch.cuda.nvtx.range_pop()
