"""Record what a rank does: torch's profiler around some steps, ranges for nsys, and torch's flight recorder.

The flight recorder keeps the last collectives of each process group, started and completed, for a hang report.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ettin.base.errors import UserError
from megatron_ettin.platform.device import Platform

# operations in the summary
TOP = 15
NAME_CHARACTERS = 60
# allocations kept for a snapshot
HISTORY_ENTRIES = 200_000
# collectives that the flight recorder keeps per rank, some hundred bytes each
FLIGHT_RECORDER_ENTRIES = 2000
# variables of torch 2.10 and newer, and of older versions
FLIGHT_RECORDER_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
# seconds to wait for the record, because a device that hangs may never answer
DUMP_SECONDS = 5.0


class Profiler:
    """Profile from `start` to `stop`; then `write` the files."""

    def __init__(self, platform: Platform, memory: bool) -> None:
        if memory and not platform.is_gpu:
            raise UserError("profile.memory: needs a GPU, found none; profile.memory=false leaves the snapshot out")
        self.platform, self.memory = platform, memory
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if platform.is_gpu else [])
        self.profile = profile(activities=activities)

    def start(self) -> None:
        """Begin to record."""
        self.platform.synchronize()
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        # for `nsys profile --capture-range=cudaProfilerApi`
        if self.platform.is_gpu:
            torch.cuda.profiler.start()
        self.profile.start()

    def stop(self) -> None:
        """End the recording."""
        self.platform.synchronize()
        self.profile.stop()
        if self.platform.is_gpu:
            torch.cuda.profiler.stop()

    def write(self, folder: Path, name: str) -> str:
        """Write NAME.trace.json.gz (for Perfetto), NAME.txt and NAME.memory.pickle, and return the text of NAME.txt.

        Raises OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
        text = summary(self.profile.key_averages(), self.platform.is_gpu)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return text


def summary(averages: Any, is_gpu: bool) -> str:
    """Return a table of the operations with most time of their own: device time on a GPU, else CPU time."""
    attribute = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = [(getattr(entry, attribute), entry.count, entry.key) for entry in averages]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = sum(row[0] for row in rows) or 1
    lines = [f"{'seconds':>9} {'share':>6} {'calls':>7}  operation ({'device' if is_gpu else 'processor'} time)"]
    for microseconds, count, key in rows[:TOP]:
        lines.append(f"{microseconds / 1e6:9.4f} {microseconds / total:6.1%} {count:7,}  {key[:NAME_CHARACTERS]}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def trace_range(platform: Platform, name: str, enabled: bool) -> Iterator[None]:
    """Mark a range in traces, and on a GPU for nsys; do nothing unless `enabled`."""
    if not enabled:
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


def enable_flight_recorder() -> None:
    """Make NCCL process groups created from now on keep their last collectives."""
    if not any(name in os.environ for name in FLIGHT_RECORDER_VARIABLES):
        os.environ.update(dict.fromkeys(FLIGHT_RECORDER_VARIABLES, str(FLIGHT_RECORDER_ENTRIES)))


def dump_flight_recorder(path: Path) -> bool:
    """Write the flight recorder's record (a pickle, for `torchfrtrace`); return False if there is none within 5 s."""
    done: list[bool] = []

    def dump() -> None:
        # exists in builds with NCCL
        read = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if read is None or not torch.cuda.is_initialized():
            return
        with contextlib.suppress(RuntimeError, OSError):
            path.write_bytes(read())
            done.append(True)

    thread = threading.Thread(target=dump, name="flight recorder", daemon=True)
    thread.start()
    thread.join(DUMP_SECONDS)
    return bool(done)
