"""What a process that works for another one owes it: to end when its parent does, and to leave signals to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def serve_parent(sentinel: int | None = None) -> None:
    """To be called first in a worker process. A parent that was killed cannot tell its workers, and one that is blocked
    in a full pipe would stay for ever: a thread waits for the parent's end. Ctrl-C is the parent's to act on.
    `sentinel`: of the parent, where another library than multiprocessing started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    sentinel = parent.sentinel if sentinel is None and parent is not None else sentinel
    if sentinel is not None:
        threading.Thread(target=_end_with, args=(sentinel,), name="end with parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
