"""Versions of this package and of others, without importing them: `ettin --version` must answer at once.

What ranks tell each other before they work together, and who of them is the odd one."""

from __future__ import annotations

import hashlib
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import megatron_ettin

SHOWN = (
    *("torch", "megatron-core", "transformer-engine", "deepspeed", "flash-attn"),
    *("transformers", "tokenizers", "datasets", "numpy", "pyarrow"),
)
GIT_SECONDS = 2.0


def version_of(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """`1a2b3c4d5` or `1a2b3c4d5.dirty` where this package lies in a git checkout of its own, else None."""
    root = Path(megatron_ettin.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=9", "--exclude=*", "--dirty=.dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def code_version() -> str:
    """`0.1.0`, in a checkout `0.1.0+g1a2b3c4d5`, with changes `0.1.0+g1a2b3c4d5.dirty`."""
    found = commit()
    return megatron_ettin.__version__ + (f"+g{found}" if found else "")


def version_text() -> str:
    """What `ettin --version` prints: this package, then what it stands on."""
    found = [f"{name} {version}" for name in SHOWN if (version := version_of(name))]
    return f"ettin {code_version()}\n" + ", ".join([f"Python {platform.python_version()}", *found])


LIBRARIES = ("torch", "megatron-core", "transformer-engine", "deepspeed")  # what decides a step's numbers
CLOCK_SECONDS = 5.0  # log lines of two hosts further apart are put in the wrong order
TOLD_RANKS = 3
SLOW_GIT_SECONDS = 10.0  # on a slow file system; a run does without it


@cache
def code_hash() -> str:
    """Of every Python file of the package: an edited checkout has the version of the one it was made from."""
    folder = Path(megatron_ettin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def recorded_commit() -> str | None:
    """The commit of the checkout that the package runs from, `+` behind it where tracked files were changed since; None
    where it is no checkout."""
    folder = Path(megatron_ettin.__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # a package in another project's tree is none of it
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return found + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=SLOW_GIT_SECONDS
    )
    return done.stdout.strip()


def versions() -> str:
    """Those of the libraries that are installed, in one line."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def first_difference(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str | None:
    """A line for the first fact that not all ranks have: who differs, what they have, what the most have."""
    for name in facts[0]:
        values = [fact[name] for fact in facts]
        usual, count = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            told = ", ".join(f"rank {rank} on {hosts[rank]}: {values[rank]}" for rank in odd[:TOLD_RANKS])
            more = f" and {len(odd) - TOLD_RANKS} more" if len(odd) > TOLD_RANKS else ""
            return f"the ranks differ in {name}: {told}{more}; the other {count} have {usual}"
    return None


def clock_warnings(hosts: Sequence[str], now: Sequence[float]) -> list[str]:
    """A line for each host whose clock is off. `now`: seconds that the ranks' clocks showed at the same moment."""
    middle = statistics.median(now)
    off = {host: seconds - middle for host, seconds in zip(hosts, now, strict=True)}
    return [
        f"warning: the clock of {host} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the others"
        for host, seconds in off.items()
        if abs(seconds) > CLOCK_SECONDS
    ]
