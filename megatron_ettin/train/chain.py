"""`ettin train --phase all`: pretrain, extend and decay in one job, each in its own run directory.

Every phase begins from the one before; a chain that was stopped goes on in the phase where it stopped. What can be
checked of later phases is checked before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ettin.config.schema import Config
from megatron_ettin.train.hooks.console import is_finished
from megatron_ettin.train.trainer import TrainArgs, prepare, run_jobs


def run_chain(stages: Sequence[tuple[Config, TrainArgs]]) -> bool:
    """Train the phases one after another; True if the job was asked to stop before the last was done. `stages`: in
    order; each but the first begins from the run directory before it."""
    left = list(stages)
    while len(left) > 1 and is_finished(left[0][0], left[0][1].run_dir):
        left.pop(0)
    return run_jobs([prepare(config, launch) for config, launch in left])


def run_sweep(stages: Sequence[tuple[Config, TrainArgs]]) -> bool:
    """Train the members of a sweep that are not finished; True if the job was asked to stop before the last was done.
    A member whose loss is not finite does not stop the others."""
    left = [prepare(config, launch) for config, launch in stages if not is_finished(config, launch.run_dir)]
    return bool(left) and run_jobs(left, each_alone=True)
