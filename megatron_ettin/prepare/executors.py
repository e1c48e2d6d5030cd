"""Adapt datatrove's executors. This module is imported only when one is used, because datatrove is an extra."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.request import PrepareRequest

try:
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
    from loguru import logger
except ImportError as error:
    raise UserError(f"--executor slurm and ray need datatrove ({error}): pip install 'megatron_ettin[data]'") from None

# largest job array that SLURM's default of MaxArraySize allows
JOBS_IN_ARRAY = 1_000


@lru_cache(maxsize=1)
def devnull() -> IO[str]:
    """Return a file that drops what is written. It is never closed, because a log handler may still write to it."""
    return open(os.devnull, "w")


class QuietRayExecutor(RayPipelineExecutor):
    """Executor on a Ray cluster.

    It silences datatrove's log on standard error, which would break the progress bar. Log files are kept.
    """

    def run(self) -> Any:
        """Run the tasks without a log on standard error."""
        logger.remove()
        return super().run()

    def _run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        logger.remove()
        with contextlib.redirect_stderr(devnull()):
            return super()._run_for_rank(*arguments, **named)


def ray_executor(step: Any, tasks: int, workers: int, log: Path) -> RayPipelineExecutor:
    """Return an executor on the Ray cluster that RAY_ADDRESS names, else on a new one on this host."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'megatron_ettin[ray]'") from None
    # the executor would warn at construction that the log folder has to be shared, which docs/prepare.md says
    logger.remove()
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    return QuietRayExecutor([step], tasks=tasks, workers=workers, logging_dir=str(log))


class ArrayExecutor(SlurmPipelineExecutor):
    """Executor that submits a job array.

    The cluster's defaults hold for options that the user did not give (partition, QOS, mail). datatrove's job that
    merges statistics is not submitted, because the dataset's manifest has the counts.
    """

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Return datatrove's options of sbatch merged with the user's, which win."""
        arguments = super().get_sbatch_args(max_array)
        if {"mem", "mem-per-gpu"} & set(arguments):
            # sbatch takes one of the three, and datatrove always sets this one
            del arguments["mem-per-cpu"]
        return {key: value for key, value in arguments.items() if value is not None}

    def launch_merge_stats(self) -> None:
        """Submit nothing: the manifest has the counts."""
        pass


def slurm_executor(step: Any, tasks: int, request: PrepareRequest, log: Path) -> ArrayExecutor:
    """Return an executor for a job array: up to `request.workers` jobs run at once, with this Python interpreter."""
    # drop datatrove's log on standard error; `ettin prepare` reports instead
    logger.remove()
    return ArrayExecutor(
        [step],
        tasks=tasks,
        time=request.slurm_time,
        # None: the cluster's default
        partition=request.slurm_partition,
        workers=request.workers,
        job_name="ettin-prepare",
        qos="",
        # compute nodes find this interpreter's commands first
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
        sbatch_args=dict(request.slurm_arguments),
        max_array_size=JOBS_IN_ARRAY,
        tasks_per_job=-(-tasks // JOBS_IN_ARRAY),
        logging_dir=str(log),
        slurm_logs_folder=str(log / "slurm"),
        mail_type="NONE",
    )


@contextlib.contextmanager
def capture_stderr() -> Iterator[IO[bytes]]:
    """Redirect file descriptor 2 to a temporary file and yield it, to capture what sbatch writes there.

    datatrove lets sbatch write to the terminal, and a child process inherits the descriptor only.
    """
    with tempfile.TemporaryFile() as messages:
        terminal = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
