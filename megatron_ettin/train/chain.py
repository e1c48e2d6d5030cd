"""`ettin train --phase all`: pretrain, extend and decay in one job, each in its own run directory.

Every phase begins from the one before; a chain that was stopped goes on in the phase where it stopped. What can be
checked of later phases is checked before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ettin.checkpoint.directory import latest, read_progress
from megatron_ettin.config.schema import Config
from megatron_ettin.train.loop import Launch, prepare, run_jobs
from megatron_ettin.train.progress import Progress, is_done


def run_chain(stages: Sequence[tuple[Config, Launch]]) -> bool:
    """Train the phases one after another; True if the job was asked to stop before the last was done. `stages`: in
    order; each but the first begins from the run directory before it."""
    left = list(stages)
    while len(left) > 1 and is_finished(*left[0]):
        left.pop(0)
    return run_jobs([prepare(config, launch) for config, launch in left])


def run_sweep(stages: Sequence[tuple[Config, Launch]]) -> bool:
    """Train the members of a sweep that are not finished; True if the job was asked to stop before the last was done.
    A member whose loss is not finite does not stop the others."""
    left = [prepare(config, launch) for config, launch in stages if not is_finished(config, launch)]
    return bool(left) and run_jobs(left, each_alone=True)


def is_finished(config: Config, launch: Launch) -> bool:
    """Whether the phase has trained all it was asked to."""
    if not (launch.run_dir / "checkpoints").is_dir():
        return False
    newest = latest(launch.run_dir)
    if newest is None:
        return False
    saved = read_progress(newest)
    return is_done(config, Progress(int(saved.get("step", 0)), int(saved.get("tokens", 0))))
