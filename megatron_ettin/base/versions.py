"""Versions of this package and of others, without importing them: `ettin --version` must answer at once."""

from __future__ import annotations

import platform
import subprocess
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
