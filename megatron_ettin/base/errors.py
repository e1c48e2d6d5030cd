"""Define how processes end: a command's errors and exit statuses, and workers that end with their parent.

A user's mistake ends a command with one line and status 2; a saved run that has to be requeued ends with status 75.
"""

from __future__ import annotations

import difflib
import os
import signal
import threading
import warnings
from collections.abc import Iterable

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
# as shells report Ctrl-C
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the key or file, the value found, the values allowed."""

    def __init__(self, message: object = "") -> None:
        """Escape line ends, which names from files may hold, so that the message stays one line."""
        super().__init__(str(message).replace("\r", "\\r").replace("\n", "\\n"))


class RankError(UserError):
    """A mistake that only this rank can see (its device, its disk); every rank that meets one reports it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type's name if it has none."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the end of an error message, or an empty string if no allowed name is close.

    A name with equally many, but other, digits is not suggested: 18m may mean 17m or 68m.
    """
    candidates = [one for one in allowed if _digits(one) == _digits(name) or len(_digits(one)) != len(_digits(name))]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def warn_renamed(old: str, new: str) -> None:
    """Issue a DeprecationWarning at the line that used a former name."""
    warnings.warn(f"{old} is now {new}; the old name will be removed", DeprecationWarning, stacklevel=3)


def serve_parent() -> None:
    """End this worker process when its parent ends, and ignore Ctrl-C, on which the parent acts.

    A worker calls this first. A parent that was killed cannot tell its workers, and a worker that is blocked in a full
    pipe would stay for ever, so a thread waits for the parent's end.
    """
    # imported late, because every command imports this module and few have workers
    import multiprocessing.connection

    def end_with_parent(watched: int) -> None:
        multiprocessing.connection.wait([watched])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_with_parent, args=(parent.sentinel,), name="end with parent", daemon=True).start()
