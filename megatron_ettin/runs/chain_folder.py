"""The folder of `--phase all`: it holds a run directory for each phase and is none itself."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.base.log import log_warning

CHAIN = ("pretrain", "extend", "decay")


def phases_in(folder: Path) -> list[Path]:
    """Return the run directories of the phases that have begun in a chain's folder, in order; none of other folders."""
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        return []
    return [folder / phase for phase in CHAIN if (folder / phase / "config.yaml").is_file()]


def last_phase(path: Path) -> Path:
    """Return the last phase's run directory where `path` is a chain's folder, and say so; `path` itself elsewhere."""
    phases = phases_in(path)
    if not phases:
        return path
    log_warning(f"{path}: holds {', '.join(one.name for one in phases)}; reading {phases[-1]}")
    return phases[-1]
