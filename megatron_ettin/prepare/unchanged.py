"""Whether the inputs of `ettin prepare` are still what was listed: asked again before a dataset is published."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import find, local_path
from megatron_ettin.prepare.input_file import InputFile

REMEDY = "let nothing write to it and run again with --replan"
# on a network an answer takes milliseconds
ASKED_AT_ONCE = 32


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError naming the first input that is not as it was listed.

    What was read of such a file may be neither the old content nor the new.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for difference in pool.map(change_of, files):
            if difference:
                raise UserError(f"{difference}; {REMEDY}")


def change_of(file: InputFile) -> str:
    """Return how an input differs from what was listed, or an empty string."""
    now = find(file.url)
    if now is None:
        return f"{file.url}: was removed while it was read"
    if now.bytes != file.bytes:
        return f"{file.url}: had {file.bytes:,} bytes when it was listed and has {now.bytes:,}"
    # a remote file system may tell of one file's time in two ways; a pair of files has two times
    if local_path(file.url) is not None and now.modified not in file.modified.split():
        return f"{file.url}: was written to while it was read"
    return ""


def shrunk(file: InputFile, end: int) -> UserError:
    """The error for a file that ends before it should."""
    return UserError(f"{file.url}: ends at byte {end:,}, it had {file.bytes:,} when it was listed; {REMEDY}")
