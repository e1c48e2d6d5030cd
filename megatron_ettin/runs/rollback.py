"""Roll a run back to an earlier step (`ettin train --from-step N`); later checkpoints are moved aside, not deleted.

A requeued job runs the same command again and must continue instead of going back again: each rollback is recorded, and
done once for the same step and the same `data.skip`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.checkpoint import directory
from megatron_ettin.config.values import row_ranges
from megatron_ettin.runs.directory import ROLLED_BACK, RunDirectory

# folder of the checkpoints that were moved aside
ASIDE = "rolled_back"


def check_roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> None:
    """Raise UserError where the run neither went back to `step` before nor has a checkpoint of it."""
    if not _was_done(run_dir, step, skip):
        directory.at_step(run_dir, step)


def _was_done(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    # earlier versions recorded the skips as text
    done = [(entry.get("to"), row_ranges(entry.get("skip"), "skip")) for entry in RunDirectory(run_dir).rollbacks]
    return (step, skip) in done


def roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    """Make `step` the newest checkpoint of the run; return False where that was done before.

    The same call finishes what a killed one began. Raises UserError where the run has no such checkpoint.
    """
    if _was_done(run_dir, step, skip):
        return False
    target = directory.at_step(run_dir, step)
    if target.parent != directory.checkpoints_folder(run_dir):
        raise UserError(f"--from-step {step}: {target} holds weights alone; begin a new run with --init-from {target}")
    directory.verify(target)
    write_atomically(target.parent / directory.LATEST, target.name + "\n")
    aside = run_dir / ASIDE
    for path in (*directory.list_checkpoints(run_dir), *directory.list_milestones(run_dir)):
        if directory.step_of(path) > step:
            target_path = aside / path.parent.name / path.name
            target_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target_path, ignore_errors=True)
            os.rename(path, target_path)
    entry = {"to": step, "skip": skip, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomically(run_dir / ROLLED_BACK, json.dumps([*RunDirectory(run_dir).rollbacks, entry], indent=1) + "\n")
    return True
