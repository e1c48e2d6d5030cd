"""Read the launches of a run (history.jsonl), its science keys, and the phases in the folder of `--phase all`.

history.jsonl has one object a launch; the first says where the run began. The folder of `--phase all` holds a run
directory for each phase and is none itself. Versions that judged spikes by the mean and standard deviation of loss and
norm had no science keys for bad steps: such a run continues under the new rule, and only its record shows which of its
updates were left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json, read_json_lines
from megatron_ettin.config.key_names import current_name
from megatron_ettin.config.overrides import read_yaml
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.science import GUARD_KEYS, science_keys

HISTORY = "history.jsonl"


def read_launches(run_dir: Path, unreadable: list[int] | None = None) -> list[dict[str, Any]]:
    """Return every launch's record, oldest first.

    Lines that a full disk or a kill has torn are left out; their numbers go to `unreadable`.
    """
    launches = read_json_lines(run_dir / HISTORY, unreadable, count_torn=True)
    return [launch for launch in launches if launch]


def allowed_changes(launch: dict[str, Any]) -> list[str]:
    """Return the science keys that a launch was allowed to change, by its record."""
    changes = launch.get("changes")
    return [current_name(key) for key in changes if isinstance(key, str)] if isinstance(changes, list) else []


def first_launch(run_dir: Path) -> dict[str, Any] | None:
    """Return the first launch's record; None where the run has not begun or its record cannot be read."""
    try:
        with open(run_dir / HISTORY, encoding="utf-8") as file:
            record = load_json(file.readline())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


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


def stored_science_keys(path: Path) -> dict[str, object]:
    """Return the science keys of a config.yaml.

    The keys of the anomaly detector are left out where the file's version did not fix them.

    Raises:
        UserError: the file cannot be read.
    """
    keys = science_keys(from_yaml(path))
    if fixes_guard(path):
        return keys
    return {key: value for key, value in keys.items() if key not in GUARD_KEYS}


def fixes_guard(path: Path) -> bool:
    """Return whether a config.yaml's version has the anomaly detector's keys among its science keys."""
    return "spike_ratio" in (read_yaml(path).get("resilience") or {})
