"""datatrove's executors as `ettin prepare` uses them. Imported only where one is asked for: datatrove is an extra."""

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
from megatron_ettin.base.processes import serve_parent

try:
    import multiprocess
    import multiprocess.util
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from loguru import logger
except ImportError as error:
    raise UserError(
        f"several processes need datatrove ({error}): pip install 'megatron_ettin[data]', or give --workers 1"
    ) from None

JOBS_IN_ARRAY = 1_000  # what SLURM's MaxArraySize allows without asking


@lru_cache(maxsize=1)
def nowhere() -> IO[str]:
    """Never closed: a log handler may still write to it."""
    return open(os.devnull, "w")


class Quiet:
    """datatrove logs each task to standard error besides its file; the terminal is the progress bar's."""

    def run(self) -> Any:
        logger.remove()  # of this process, whose standard error is the progress report's
        return super().run()  # type: ignore[misc]

    def _run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        logger.remove()
        with contextlib.redirect_stderr(nowhere()):
            return super()._run_for_rank(*arguments, **named)  # type: ignore[misc]


class QuietLocalExecutor(Quiet, LocalPipelineExecutor):
    def run(self) -> Any:
        # datatrove forks a manager process, which nothing would end if this process were killed
        multiprocess.util.register_after_fork(self, lambda executor: end_with_parent())
        return super().run()


def end_with_parent() -> None:
    parent = multiprocess.parent_process()
    if parent is not None:
        serve_parent(parent.sentinel)


class QuietRayExecutor(Quiet, RayPipelineExecutor):
    pass


def local_executor(step: Any, tasks: int, workers: int, log: Path) -> LocalPipelineExecutor:
    """Spawned, not forked: the parent has threads."""
    return QuietLocalExecutor([step], tasks=tasks, workers=workers, logging_dir=str(log), start_method="spawn")


def ray_executor(step: Any, tasks: int, workers: int, log: Path) -> RayPipelineExecutor:
    """On the Ray cluster that RAY_ADDRESS names, else on one of this machine."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'megatron_ettin[ray]'") from None
    logger.remove()  # it warns at construction that the log folder has to be shared, which docs/prepare.md says too
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    return QuietRayExecutor([step], tasks=tasks, workers=workers, logging_dir=str(log))


class ArrayExecutor(SlurmPipelineExecutor):
    """A job array. The cluster's own defaults hold for what the user did not say (partition, QOS, mail), and there is
    no further job to add up datatrove's statistics: the dataset's manifest has the counts.
    """

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        arguments = super().get_sbatch_args(max_array)
        if {"mem", "mem-per-gpu"} & set(arguments):
            del arguments["mem-per-cpu"]  # datatrove's own; sbatch takes one of the three
        return {key: value for key, value in arguments.items() if value is not None}

    def launch_merge_stats(self) -> None:
        pass


def slurm_executor(
    step: Any, tasks: int, workers: int, log: Path, time: str, partition: str | None, sbatch: dict[str, str]
) -> ArrayExecutor:
    """Each job runs `tasks_per_job` tasks with this very interpreter; `workers` jobs at once."""
    logger.remove()  # of this process: what it would say, the command says in its own words
    return ArrayExecutor(
        [step],
        tasks=tasks,
        time=time,
        partition=partition,  # type: ignore[arg-type]  # None: the cluster's default
        workers=workers,
        job_name="ettin-prepare",
        qos="",
        env_command=environment_command(),
        sbatch_args=sbatch,
        max_array_size=JOBS_IN_ARRAY,
        tasks_per_job=-(-tasks // JOBS_IN_ARRAY),
        logging_dir=str(log),
        slurm_logs_folder=str(log / "slurm"),
        mail_type="NONE",
    )


@contextlib.contextmanager
def errors_of_programs() -> Iterator[IO[bytes]]:
    """A file that takes what programs started meanwhile say on standard error: datatrove lets sbatch speak to the
    terminal. The descriptor is replaced, since a child knows no other.
    """
    with tempfile.TemporaryFile() as said:
        terminal = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def environment_command() -> str:
    """Compute nodes find this interpreter's commands first."""
    return f'export PATH="{Path(sys.executable).parent}:$PATH"'
