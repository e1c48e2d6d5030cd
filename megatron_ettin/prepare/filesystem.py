"""List and open inputs: paths through the operating system, URLs (s3://, gs://, hf://, memory://) through fsspec.

An input is named by a string: a path or a URL. `file://` URLs are paths. Remote files are opened for streaming, never
copied. A file's time of change or ETag is kept as text, because it is only compared.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.parsing import load_json
from megatron_ettin.base.paths import checked_name, path_in

BUFFER_BYTES = 1 << 20
# size of a read: a request over a network costs tens of milliseconds
REMOTE_BLOCK_BYTES = 8 << 20
# keys of fsspec's `info` that tell a file's last change, the best first
CHANGE_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Entry:
    """A file or directory as its file system describes it."""

    url: str
    is_directory: bool
    bytes: int
    modified: str
    """Text that changes with the content (mtime in ns, ETag); empty if the file system gives none."""


def local_path(url: str) -> str | None:
    """Return the path of a local file or folder, None for a remote one."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url else url


def canonical(url: str) -> str:
    """Return the absolute path of a local input, or a URL without the slash at its end.

    The path is absolute, so that an unfinished dataset can be continued from any directory.
    """
    path = local_path(url)
    if path is not None:
        return os.path.abspath(path)
    return url if url.endswith("://") else url.rstrip("/")


def joined(folder: str, name: str) -> str:
    """Return the path or URL of a name in a folder."""
    return os.path.join(folder, name) if local_path(folder) is not None else f"{folder.rstrip('/')}/{name}"


def joined_in(folder: str, name: object, named_by: str, nested: bool = False) -> str:
    """Return the path or URL of the file `name` in a folder, checked because the file `named_by` gave the name.

    Args:
        folder: path or URL of the folder.
        name: the name as read.
        named_by: the file that has the name, for messages.
        nested: whether the name may lie in a subfolder, with slashes.

    Raises:
        UserError: the file would lie outside of the folder, also through a link.
    """
    path = local_path(folder)
    if path is not None:
        return str(path_in(Path(path), name, named_by, nested))
    try:
        return joined(folder, checked_name(name, nested))
    except ValueError as error:
        raise UserError(f"{named_by}: {error}; refused") from None


def parent_of(url: str) -> str:
    """Return the folder that a file or folder lies in."""
    if local_path(url) is not None:
        return os.path.dirname(url) or "."
    return url.rpartition("/")[0]


def base_name(url: str) -> str:
    """Return the last part of a path (links followed) or URL. A dataset uses it as the name of an INPUT."""
    path = local_path(url)
    if path is not None:
        return os.path.basename(os.path.realpath(path)) or "root"
    return url.partition("://")[2].rstrip("/").rpartition("/")[2] or url.partition("://")[0]


def file_system_of(url: str) -> tuple[Any, str]:
    """Return (fsspec file system, path on it) of a remote URL. Raises UserError."""
    protocol = url.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        return system, str(path)
    except ImportError as error:
        how = first_line(error)
        raise UserError(f"{url}: reading {protocol}:// needs a package that is not installed ({how})") from None
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("file", "s3", "gs", "hf", "memory"))
        raise UserError(f"{url}: {first_line(error)}; known are {known} and what else fsspec knows") from None
    except Exception as error:
        # each file system has its own exceptions, for example for credentials and networks
        raise unreachable(url, error) from None


def find(url: str) -> Entry | None:
    """Return the entry of a file or folder, None if it does not exist. Raises UserError if it cannot be read."""
    path = local_path(url)
    if path is not None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        return Entry(path, stat.S_ISDIR(status.st_mode), status.st_size, str(status.st_mtime_ns))
    system, remote = file_system_of(url)
    try:
        return entry_of(url, system.info(remote))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise unreachable(url, error) from None


def entries(folder: str) -> list[Entry]:
    """List a directory, sorted by name, without hidden entries. Links are followed. Raises UserError."""
    path = local_path(folder)
    if path is not None:
        try:
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        # `find` returns None for a broken link
        return [entry for name in names if (entry := find(joined(path, name)))]
    system, remote = file_system_of(folder)
    try:
        listed = system.ls(remote, detail=True)
    except Exception as error:
        raise unreachable(folder, error) from None
    named = {raw["name"].rstrip("/").rpartition("/")[2]: raw for raw in listed if not is_folder_itself(raw, remote)}
    return [entry_of(joined(folder, name), named[name]) for name in sorted(named) if name and not name.startswith(".")]


def is_folder_itself(raw: dict[str, Any], remote: str) -> bool:
    """Return whether a listed object stands for the listed directory itself, as object stores may include."""
    return str(raw["name"]).strip("/") == remote.strip("/")


def entry_of(url: str, raw: dict[str, Any]) -> Entry:
    """Return the entry of a remote file or folder from `raw`, fsspec's `info` of it."""
    changed = next((str(raw[key]) for key in CHANGE_KEYS if raw.get(key)), "")
    return Entry(url, raw["type"] == "directory", int(raw.get("size") or 0), changed)


def walk(folder: str) -> Iterator[tuple[str, list[Entry], list[Entry]]]:
    """Yield (directory, its directories, its files), top down and sorted.

    The caller may remove entries from the list of directories, which are then not entered (like `os.walk`). Links to
    directories are followed, and each directory is visited once.
    """
    visited: set[str] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        path = local_path(here)
        real = here if path is None else os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        listed = entries(here)
        folders = [entry for entry in listed if entry.is_directory]
        yield here, folders, [entry for entry in listed if not entry.is_directory]
        pending += [entry.url for entry in reversed(folders)]


def open_input(url: str) -> IO[bytes]:
    """Open a file to read: buffered, with `seek`. Raises UserError."""
    path = local_path(url)
    if path is not None:
        try:
            return open(path, "rb", buffering=BUFFER_BYTES)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    system, remote = file_system_of(url)
    try:
        stream: IO[bytes] = system.open(remote, "rb", block_size=REMOTE_BLOCK_BYTES)
        return stream
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except Exception as error:
        raise unreachable(url, error) from None


def read_json(url: str) -> Any:
    """Return the parsed content of a small file, None if it is not JSON."""
    with open_input(url) as stream:
        raw = stream.read()
    try:
        return load_json(raw)
    except ValueError:
        return None


def unreachable(url: str, error: BaseException) -> UserError:
    """Return the error for a remote file that cannot be read; a UserError is returned unchanged."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{url}: cannot be read ({type(error).__name__}: {first_line(error)})")
