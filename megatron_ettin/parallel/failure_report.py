"""Write the files that tell a launch's supervisor (launch/supervisor) how a rank failed.

They are in the folder that ETTIN_ATTEMPT_DIR names; without that variable nothing is written. `write_status` writes
every status file of a rank: these, the heartbeat (faults/heartbeat.py), and the files of RUN/watch.
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
# number of last lines of an error that a record keeps
KEPT_LINES = 12


def report_folder() -> Path | None:
    """Return the folder that this launch's supervisor reads; None if there is no supervisor."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def record_failure(error: BaseException, category: str = "error") -> None:
    """Write host, time and the last lines of this rank's error to a file such as `rank_00003.json`.

    Args:
        error: the error that ended the rank.
        category: "user" for a mistake of the user, "stopped" for a run that ended itself, for example because of its
            losses, otherwise "error". A restart helps in neither of the first two cases.
    """
    folder = report_folder()
    if folder is None:
        return
    lines = traceback.format_exception(error) if category == "error" else [str(error)]
    last = "".join(lines).rstrip().splitlines()[-KEPT_LINES:]
    _write_once(folder, rank_of_environment(), None, category, last)


def record_stall(rank: int, host: str, line: str) -> None:
    """Write to the file of `rank` that the other ranks wait for it; `line` says in which operation."""
    folder = report_folder()
    if folder is not None:
        _write_once(folder, rank, host, "stalled", [line])


def _write_once(folder: Path, rank: int, host: str | None, category: str, lines: list[str]) -> None:
    path = folder / f"rank_{rank:05d}.json"
    # keep the first failure, because it caused the later ones
    if not path.exists():
        write_status(path, rank, host, **{"kind": category, "lines": lines})


class PeerFailureError(RuntimeError):
    """Another rank failed. The other ranks raise this, so that the supervisor can tell them from the failed one."""


def raise_on_all(error: Exception, ranks: Collection[int], own: int) -> NoReturn:
    """Raise `error` on the ranks that it names, and PeerFailureError on the others."""
    if own in ranks:
        raise error
    raise PeerFailureError(f"another rank failed: {error}") from None


def end_now(error: BaseException) -> NoReturn:
    """Record and log the error, and end this process with 1 without any cleanup."""
    record_failure(error)
    log_exception(error)
    os._exit(1)


def write_status(path: Path, rank: int, host: str | None = None, **details: Any) -> None:
    """Replace a rank's status file, a JSON object of `rank`, `host`, `time` (seconds since 1970) and `details`.

    An OSError is ignored, because a run must not end when a full disk refuses a heartbeat.

    Args:
        path: the file.
        rank: the rank that the file describes.
        host: the rank's host; None takes this host.
        details: further entries, in types that JSON has.
    """
    record = {"rank": rank, "host": socket.gethostname() if host is None else host, "time": time.time(), **details}
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(record) + "\n", durable=False)


@functools.cache
def exit_with_parent() -> None:
    """Start a thread that ends this process when its parent process has ended.

    If its slurmstepd or torchrun agent is killed, nothing else would end the rank, which would keep its GPU. A command
    calls this before its large imports: if the launcher ended during them, this process would already have another
    parent.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="exit with parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    record_failure(RuntimeError("the process that started this rank (slurmstepd or torchrun's agent) is gone"))
    os._exit(1)
