"""Check file names that were read from a file, and join them to a folder.

A manifest, an index or a checkpoint's metadata may have been made by anyone. With a name that has `..` in it, or a link
that leads out of the folder, its author could choose which files are read, copied, replaced or removed. So only this
module makes paths of such names (tests/test_architecture.py checks it).
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
    """Which symbolic links below a folder `path_in` refuses."""

    INSIDE = "inside"
    """Refuse links that lead out of the folder."""
    NONE = "none"
    """Refuse all links."""
    UNCHECKED = "unchecked"
    """Check no links, because the files were checked before."""


def checked_name(name: object, nested: bool = False) -> str:
    """Return `name` if it is a file name that cannot lead out of the folder to which it is joined.

    Args:
        name: a value read from a file.
        nested: whether the name may have `/` in it, for a file in a folder below.

    Raises:
        ValueError: `name` is not such a name. The message does not say in which file it stands.
    """
    if not isinstance(name, str):
        raise ValueError(f"a {type(name).__name__} is no name of a file")
    parts = name.split("/") if nested else [name]
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") or "/" in part for part in parts):
        raise ValueError(f"{name[:_SHOWN_CHARACTERS]!r} leads out of its folder or is no name of a file")
    return name


def checked_sha256(value: object) -> str:
    """Return the value if it is a sha256, 64 lower-case hexadecimal digits. Raises ValueError."""
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
    """Check a name that was read from a file, and join it to a folder.

    Args:
        folder: the trusted folder that the file is in; it may be a link itself.
        name: as in `checked_name`.
        named_by: the file that the name was read from, for messages.
        nested: as in `checked_name`.
        links: which symbolic links below `folder` are refused.
        root: the folder that links may lead into, `folder` by default.

    Raises:
        UserError: the name or a link is refused. The message names `named_by`, or the link and its target.
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
