"""Locks of files and folders against other processes, on file systems that have them and on those that have not."""

from __future__ import annotations

import errno
import fcntl

# what flock says where another process has the lock; NFS says the second
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockHeld(Exception):
    """Another process has the lock."""


def try_lock(handle: int) -> str | None:
    """Lock an open file or folder for this process alone, without waiting.

    Returns:
        None, or why nothing is locked: a file system may have no locks (Lustre without `-o flock`, other mounts), which
        is no sign of another process. Whoever asks goes on, and says once that nothing keeps a second one out.

    Raises:
        LockHeld: another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise LockHeld from None
        return error.strerror or str(error)
    return None
