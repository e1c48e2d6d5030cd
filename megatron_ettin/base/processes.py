"""Tie a worker process to its parent: it ends when the parent does and leaves Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def serve_parent(sentinel: int | None = None) -> None:
    """End this worker process when its parent ends, and ignore Ctrl-C, on which the parent acts.

    A worker calls this first. A parent that was killed cannot tell its workers, and a worker that is blocked in a full
    pipe would stay for ever, so a thread waits for the parent's end.

    Args:
        sentinel: the parent's, where another library than multiprocessing started this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    sentinel = parent.sentinel if sentinel is None and parent is not None else sentinel
    if sentinel is not None:
        threading.Thread(target=_end_with, args=(sentinel,), name="end with parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
