"""Check the names that files give of other files, and join them to paths, in this one place.

A manifest, an index or a checkpoint's metadata may have been made by anyone. A name out of one that held `..`, or that
led out of its folder by a link, would let whoever made it choose which files are read, copied, replaced or removed.
tests/test_architecture.py refuses any other way from such a name to a path.
"""

from __future__ import annotations

import enum
import os
import re
from pathlib import Path

from megatron_ettin.base.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SHOWN_CHARACTERS = 80


class Links(enum.Enum):
    """Choose which symbolic links below a folder `path_in` refuses."""

    INSIDE = "inside"
    """Refuse those that lead out of it."""
    NONE = "none"
    """Refuse all."""
    UNCHECKED = "unchecked"
    """Do not look: for names of which the files have been checked."""


def checked_name(name: object, nested: bool = False) -> str:
    """Return the name of a file if it can lie nowhere but in the folder that it is joined to.

    Args:
        name: what a file says.
        nested: whether it may lie in a folder below, with `/` between.

    Raises:
        ValueError: for anything but a name, without saying where it stands.
    """
    if not isinstance(name, str):
        raise ValueError(f"a {type(name).__name__} is no name of a file")
    parts = name.split("/") if nested else [name]
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") or "/" in part for part in parts):
        raise ValueError(f"{name[:_SHOWN_CHARACTERS]!r} leads out of its folder or is no name of a file")
    return name


def checked_sha256(value: object) -> str:
    """Return a fingerprint if it is 64 hexadecimal digits. Raises ValueError."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        shown = repr(value[:_SHOWN_CHARACTERS]) if isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{shown} is no sha256 (64 hexadecimal digits)")
    return value


def path_in(
    folder: Path,
    name: object,
    named_by: object,
    nested: bool = False,
    links: Links = Links.INSIDE,
    root: Path | None = None,
) -> Path:
    """Join a name that a file gives to the folder that it is meant for.

    Args:
        folder: trusted; it may be a link itself.
        name: as in `checked_name`.
        named_by: the file that gives the name, for messages.
        nested: as in `checked_name`.
        links: what is done about symbolic links below `folder`.
        root: the folder that links may lead to, `folder` by default.

    Raises:
        UserError: naming the file and what it says.
    """
    try:
        checked = checked_name(name, nested)
    except ValueError as error:
        raise UserError(f"{named_by}: {error}; refused") from None
    path = Path(folder) / checked
    if links is not Links.UNCHECKED:
        below = Path(folder)
        for part in checked.split("/"):
            below = below / part
            try:
                is_link = below.is_symlink()
            except OSError as error:
                # a name that is too long for the file system
                raise UserError(f"{named_by}: {checked[:_SHOWN_CHARACTERS]!r}: {error.strerror}; refused") from None
            if is_link:
                _check_link(below, Path(root or folder), links)
    return path


def _check_link(link: Path, root: Path, links: Links) -> None:
    target = os.path.realpath(link)
    if links is Links.NONE:
        raise UserError(f"{link}: a link to {target}; refused: put the file itself there")
    if not Path(target).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{link}: a link to {target}, outside of its folder; refused: put the file itself there")


def refuse_links(folder: Path) -> None:
    """Raise UserError naming the first symbolic link anywhere below `folder`."""
    for inside, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(inside) / name
            if path.is_symlink():
                _check_link(path, Path(folder), Links.NONE)
