"""Output folders written beside and renamed when whole: a conversion that was killed leaves nothing under its name."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ettin.config.errors import UserError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed on the way out if the body has not renamed it."""
    out = Path(out).absolute()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is there; name a new folder")
    staging = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield staging
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
