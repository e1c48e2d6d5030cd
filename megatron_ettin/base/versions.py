"""Read the versions of this package and of others without importing them: `ettin --version` must answer at once.

`first_difference` compares the versions and settings of the ranks, and names the rank that differs.
"""

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
# libraries that decide the numbers of a step
LIBRARIES = ("torch", "megatron-core", "transformer-engine", "deepspeed")
# if two clocks are further apart, log lines of the hosts are easily put in the wrong order
CLOCK_SECONDS = 5.0
LISTED_RANKS = 3
GIT_SECONDS = 2.0
# limit for a slow file system, after which a run records no commit
SLOW_GIT_SECONDS = 10.0


def version_of(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_commit() -> str | None:
    """Return `1a2b3c4d5` or `1a2b3c4d5.dirty` for a git checkout of this package; None elsewhere or if git fails."""
    root = Path(megatron_ettin.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ("describe", "--always", "--abbrev=9", "--exclude=*", "--dirty=.dirty")
    try:
        return _git(root, *describe, seconds=GIT_SECONDS) or None
    except (OSError, subprocess.SubprocessError):
        return None


def code_version() -> str:
    """Return `0.1.0`, in a checkout `0.1.0+g1a2b3c4d5`, with changes `0.1.0+g1a2b3c4d5.dirty`."""
    commit = describe_commit()
    return megatron_ettin.__version__ + (f"+g{commit}" if commit else "")


def version_text() -> str:
    """Return the text of `ettin --version`: the versions of this package, of Python and of the libraries."""
    libraries = [f"{name} {version}" for name in SHOWN if (version := version_of(name))]
    return f"ettin {code_version()}\n" + ", ".join([f"Python {platform.python_version()}", *libraries])


def library_versions() -> str:
    """Return the versions of the installed `LIBRARIES` in one line."""
    return ", ".join(f"{name} {version}" for name in LIBRARIES if (version := version_of(name)))


@cache
def code_hash() -> str:
    """Return 12 digits of the sha256 over the package's .py files: the version does not show an edited checkout."""
    folder = Path(megatron_ettin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def recorded_commit() -> str | None:
    """Return the commit that a run records, followed by `+` if tracked files were changed since.

    None if the package does not run from a checkout, or if git fails.
    """
    folder = Path(megatron_ettin.__file__).parent
    try:
        # fails for a package that lies untracked in another project's tree
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str, seconds: float = SLOW_GIT_SECONDS) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout.strip()


def first_difference(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str | None:
    """Return a line for the first fact that differs between ranks; None if all agree.

    Args:
        hosts: the host of each rank.
        facts: each rank's values by name, the same names on every rank.
    """
    for name in facts[0]:
        values = [fact[name] for fact in facts]
        usual, count = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            listed = ", ".join(f"rank {rank} on {hosts[rank]}: {values[rank]}" for rank in odd[:LISTED_RANKS])
            more = f" and {len(odd) - LISTED_RANKS} more" if len(odd) > LISTED_RANKS else ""
            return f"the ranks differ in {name}: {listed}{more}; the other {count} have {usual}"
    return None


def clock_warnings(hosts: Sequence[str], now: Sequence[float]) -> list[str]:
    """Return a line for each host whose clock is more than 5 s from the median.

    Args:
        hosts: the host of each rank.
        now: seconds that each rank's clock showed at the same time.
    """
    middle = statistics.median(now)
    off = {host: seconds - middle for host, seconds in zip(hosts, now, strict=True)}
    return [
        f"warning: the clock of {host} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the others"
        for host, seconds in off.items()
        if abs(seconds) > CLOCK_SECONDS
    ]
