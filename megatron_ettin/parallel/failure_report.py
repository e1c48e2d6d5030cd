"""Write the files by which a launch's supervisor (launch/supervisor) knows how a rank failed.

They lie in the folder that ETTIN_ATTEMPT_DIR names; without it nothing is written. Every status file of a rank is
written by `write_status`: these, the heartbeat (faults/heartbeat.py), and those of RUN/watch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_exception
from megatron_ettin.parallel.env import rank_of_environment

FOLDER_VARIABLE = "ETTIN_ATTEMPT_DIR"
HEARTBEAT = "heartbeat.json"
# last lines of an error that a record keeps
KEPT_LINES = 12


def report_folder() -> Path | None:
    """Return the folder that this launch's supervisor reads; None without a supervisor."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def record_failure(error: BaseException, category: str = "error") -> None:
    """Write how this rank failed to `rank_00003.json`: host, time and the last lines of the error.

    Args:
        error: what ended the rank.
        category: "user" for a mistake and "stopped" for numbers, which no restart mends; otherwise "error".
    """
    folder = report_folder()
    if folder is None:
        return
    lines = traceback.format_exception(error) if category == "error" else [str(error)]
    last = "".join(lines).rstrip().splitlines()[-KEPT_LINES:]
    _write_once(folder, rank_of_environment(), None, category, last)


def record_stall(rank: int, host: str, line: str) -> None:
    """Write that all ranks wait for this one."""
    folder = report_folder()
    if folder is not None:
        _write_once(folder, rank, host, "stalled", [line])


def _write_once(folder: Path, rank: int, host: str | None, category: str, lines: list[str]) -> None:
    path = folder / f"rank_{rank:05d}.json"
    # the first failure caused the later ones
    if not path.exists():
        write_status(path, rank, host, **{"kind": category, "lines": lines})


class PeerFailureError(RuntimeError):
    """Another rank failed. Raised on the ranks that did not, so that the supervisor finds the one that did."""


def raise_on_all(error: Exception, ranks: Collection[int], own: int) -> NoReturn:
    """Raise `error` on the ranks that it names, and PeerFailureError on the others."""
    if own in ranks:
        raise error
    raise PeerFailureError(f"another rank failed: {error}") from None


def end_now(error: BaseException) -> NoReturn:
    """Record and log the error and end this process, whatever it still holds."""
    record_failure(error)
    log_exception(error)
    os._exit(1)


def write_status(path: Path, rank: int, host: str | None = None, **details: Any) -> None:
    """Replace a rank's status file, a JSON object of `rank`, `host`, `time` (seconds since 1970) and `details`.

    Never raises: a heartbeat that a full disk refuses must not end a run.

    Args:
        path: the file.
        rank: the rank that it is about.
        host: the rank's host; this one by default.
        details: what it is about, in plain types.
    """
    record = {"rank": rank, "host": socket.gethostname() if host is None else host, "time": time.time(), **details}
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(record) + "\n", durable=False)


@functools.cache
def exit_with_parent() -> None:
    """End this process when the one that started it has gone.

    A rank whose slurmstepd or torchrun agent was killed is seen by nobody, and would go on holding its GPU. A command
    calls this first, before its large imports: a launcher that is killed meanwhile would leave another parent behind.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="exit with parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    record_failure(RuntimeError("the process that started this rank (slurmstepd or torchrun's agent) is gone"))
    os._exit(1)
