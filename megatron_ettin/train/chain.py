"""Train several runs in one job: the phases of `ettin train --phase all`, and the members of `--sweep`.

Every phase begins from the one before, and a chain that was stopped goes on in the phase where it stopped. Everything
about later phases that can be checked is checked before the first one starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ettin.config.schema import Config
from megatron_ettin.train.job import TrainArgs, TrainJob, prepare_job
from megatron_ettin.train.run_log import is_finished


def chain_jobs(stages: Sequence[tuple[Config, TrainArgs]]) -> list[TrainJob]:
    """Return the phases that are left to train, the last one always, in order. Raises UserError.

    Args:
        stages: All phases in order; each but the first begins from the run directory of the one before.
    """
    left = list(stages)
    while len(left) > 1 and is_finished(left[0][0], left[0][1].run_dir):
        left.pop(0)
    return [prepare_job(config, args) for config, args in left]


def sweep_jobs(stages: Sequence[tuple[Config, TrainArgs]]) -> list[TrainJob]:
    """Return the members of a sweep that are left to train. Raises UserError."""
    return [prepare_job(config, args) for config, args in stages if not is_finished(config, args.run_dir)]
