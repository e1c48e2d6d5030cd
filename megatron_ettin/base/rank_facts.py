"""What ranks tell each other before they work together, and who of them is the odd one."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import megatron_ettin

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "deepspeed")  # what decides a step's numbers
CLOCK_SECONDS = 5.0  # log lines of two hosts further apart are put in the wrong order
TOLD_RANKS = 3
GIT_SECONDS = 10.0  # on a slow file system; a run does without it


@cache
def code_hash() -> str:
    """Of every Python file of the package: an edited checkout has the version of the one it was made from."""
    folder = Path(megatron_ettin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def commit() -> str | None:
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
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
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
