"""torch's flight recorder: the last collectives of every process group, which were begun and which were done."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

ENTRIES = 2000  # of each rank, some hundred bytes each
PATIENCE_SECONDS = 5.0  # for a device that may answer nothing any more
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # torch 2.10 and newer, older ones


def record() -> None:
    """Have NCCL's groups that are made from here on keep their last collectives."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ.update(dict.fromkeys(VARIABLES, str(ENTRIES)))


def dump(path: Path) -> bool:
    """Write what was recorded (a pickle, for `torchfrtrace`); whether there was anything. Waits for 5 s at most."""
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(_dump(path)), name="flight recorder", daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return bool(done and done[0])


def _dump(path: Path) -> bool:
    read = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # of builds with NCCL
    if read is None or not torch.cuda.is_initialized():
        return False
    try:
        path.write_bytes(read())
    except (RuntimeError, OSError):
        return False
    return True
