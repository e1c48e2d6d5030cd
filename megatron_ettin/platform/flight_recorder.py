"""Write torch's flight recorder to a file: the last collectives of each process group, started and completed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

# per rank, some hundred bytes each
ENTRIES = 2000
# a device that hangs may never answer
TIMEOUT_SECONDS = 5.0
# torch 2.10 and newer, older versions
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def enable() -> None:
    """Make NCCL process groups created from now on keep their last collectives."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ.update(dict.fromkeys(VARIABLES, str(ENTRIES)))


def dump(path: Path) -> bool:
    """Write the record (a pickle, for `torchfrtrace`) within 5 s, and return whether there was one."""
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(_dump(path)), name="flight recorder", daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    return bool(done and done[0])


def _dump(path: Path) -> bool:
    # exists in builds with NCCL
    read = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if read is None or not torch.cuda.is_initialized():
        return False
    try:
        path.write_bytes(read())
    except (RuntimeError, OSError):
        return False
    return True
