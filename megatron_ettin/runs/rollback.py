"""Going back to an earlier step of a run (`ettin train --from-step N`): later checkpoints are put aside, not deleted.

A job that is requeued runs the same command again and must go on, not back: what was done is written down, and done
once for the same step and the same `data.skip`."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.parsing import load_json
from megatron_ettin.checkpoint import directory
from megatron_ettin.config.values import row_ranges

RECORD = "rolled_back.json"
ASIDE = "rolled_back"  # folder of what was put aside


def check_roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> None:
    """Raise UserError where the run neither went back to `step` before nor has a checkpoint of it."""
    if not _was_done(run_dir, step, skip):
        directory.at_step(run_dir, step)


def _was_done(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    # earlier versions recorded the skips as text
    done = [(entry.get("to"), row_ranges(entry.get("skip"), "skip")) for entry in rolled_back(run_dir)]
    return (step, skip) in done


def roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    """Make `step` the newest checkpoint of the run; False where that was done before. Raises UserError where the run
    has no such checkpoint. A kill in between leaves nothing that the same call does not finish."""
    if _was_done(run_dir, step, skip):
        return False
    done = rolled_back(run_dir)
    target = directory.at_step(run_dir, step)
    if target.parent != directory.checkpoints_folder(run_dir):
        raise UserError(f"--from-step {step}: {target} holds weights alone; begin a new run with --init-from {target}")
    directory.verify(target)
    write_atomically(target.parent / directory.LATEST, target.name + "\n")
    aside = run_dir / ASIDE
    for path in (*directory.list_checkpoints(run_dir), *directory.list_milestones(run_dir)):
        if directory.step_of(path) > step:
            place = aside / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            os.rename(path, place)
    entry = {"to": step, "skip": skip, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomically(run_dir / RECORD, json.dumps([*done, entry], indent=1) + "\n")
    return True


def rolled_back(run_dir: Path) -> list[dict[str, Any]]:
    """When the run went back, oldest first. Raises UserError."""
    path = run_dir / RECORD
    if not path.exists():
        return []
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    return found if isinstance(found, list) else []
