"""Submit the tasks of `ettin prepare --executor slurm` as a job array, and one job that finishes the dataset.

The finishing job is the same command with local processes. It runs the tasks that are not done, merges and publishes.
The command itself returns when both are submitted. If it is run again, it reports their progress. It submits the
missing tasks again only if none of its jobs is queued or running. Job ids are kept in `submitted.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.data.manifest import FILE_NAME
from megatron_ettin.prepare.engine import Counter, IngestStep, Progress, sync_completion_marks
from megatron_ettin.prepare.request import PrepareRequest

SUBMITTED = "submitted.json"
WAIT_SECONDS = 2.0
QUEUE_ATTEMPTS = 4
FINISHING_CPUS = 4


@dataclass(frozen=True)
class Submitted:
    """State of an unfinished dataset on the cluster."""

    jobs: list[str]
    """Id of the job array, if there is one, and of the finishing job."""
    states: dict[str, int]
    """SLURM state -> number of jobs and array tasks in the queue."""
    tasks_done: int
    num_tasks: int
    new: bool
    """True if this command submitted the jobs."""

    def __str__(self) -> str:
        states = ", ".join(f"{count} {state.lower()}" for state, count in self.states.items()) or "none queued"
        verb = "submitted" if self.new else "queued or running"
        return f"{self.tasks_done} of {self.num_tasks} tasks done; {verb}: jobs {', '.join(self.jobs)} ({states})"


def submit_or_look(request: PrepareRequest, counter: Counter) -> Submitted:
    """Submit the pending tasks and the finishing job, or report on those submitted before.

    Raises:
        UserError: SLURM cannot be used, or the jobs submitted before ended without the dataset.
    """
    if any(character.isspace() for character in str(request.work)):
        raise UserError(f"--out: {str(request.out)!r} has a space in its path, which sbatch's scripts cannot name")
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise UserError(f"--executor slurm: no {program} on this machine; run it where jobs are submitted")
    work, total = request.work, len(counter.tasks)
    jobs = submitted_jobs(work)
    states = queue_states(jobs)
    if states:
        return Submitted(jobs, states, total - len(counter.pending), total, new=False)
    if jobs and (why := failure_reason(work)):
        (work / SUBMITTED).unlink()
        raise UserError(f"jobs {', '.join(jobs)} ended without the dataset: {why}; run again to submit anew")
    jobs = submit(request, counter)
    states = {}
    # the jobs are submitted even if squeue does not answer
    with contextlib.suppress(UserError):
        states = queue_states(jobs)
    return Submitted(jobs, states, total - len(counter.pending), total, new=True)


def submit(request: PrepareRequest, counter: Counter) -> list[str]:
    """Submit the job array and the finishing job, and return their ids. Raises UserError if sbatch refuses one."""
    from megatron_ettin.prepare.executors import capture_stderr, slurm_executor

    work = request.work
    shutil.rmtree(work / "errors", ignore_errors=True)
    jobs = []
    if counter.pending:
        sync_completion_marks(work, counter)
        executor = slurm_executor(IngestStep(request), len(counter.tasks), request, work / "log")
        with capture_stderr() as messages:
            try:
                executor.run()
            except subprocess.CalledProcessError:
                messages.seek(0)
                raise UserError(f"sbatch refused the job array: {last_line(messages.read().decode())}") from None
        jobs.append(str(executor.job_id))
        # stored at once, so that the array is known if the second submission fails
        write_json(work / SUBMITTED, {"jobs": jobs})
    script = work / "finish.slurm"
    script.write_text(finishing_script(work, request), encoding="utf-8")
    after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
    done = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
    if done.returncode:
        subprocess.run(["scancel", *jobs], capture_output=True)
        (work / SUBMITTED).unlink(missing_ok=True)
        raise UserError(f"sbatch refused the finishing job: {last_line(done.stderr)}; the array was cancelled")
    jobs.append(done.stdout.strip().partition(";")[0])
    write_json(work / SUBMITTED, {"jobs": jobs})
    return jobs


def finishing_script(work: Path, request: PrepareRequest) -> str:
    """Return the batch script of the job that finishes the dataset."""
    options: dict[str, str | None] = {
        "job-name": "ettin-prepare-finish",
        "time": request.slurm_time,
        "partition": request.slurm_partition,
        "cpus-per-task": str(FINISHING_CPUS),
        "output": str(work / "log" / "finish.out"),
        **dict(request.slurm_arguments),
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    run = shlex.join([sys.executable, "-m", "megatron_ettin", "prepare", *finishing_command(request)])
    where = shlex.quote(os.getcwd())
    return "\n".join(["#!/bin/bash", *lines, f"cd {where} || exit 1", f"exec {run}", ""])


def submitted_jobs(work: Path) -> list[str]:
    """Return the ids of the jobs submitted before; empty if there are none."""
    try:
        return [str(job) for job in json.loads((work / SUBMITTED).read_text(encoding="utf-8"))["jobs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_not_queued(work: Path) -> None:
    """Raise UserError if jobs of this dataset are queued or running, unless this process runs in one of them."""
    jobs = submitted_jobs(work)
    if jobs and os.environ.get("SLURM_JOB_ID") not in jobs and shutil.which("squeue") and queue_states(jobs):
        raise UserError(f"{work}: jobs {', '.join(jobs)} are queued or running; scancel them, or use --executor slurm")


def queue_states(jobs: list[str]) -> dict[str, int]:
    """Return SLURM state -> number of jobs and array tasks of these ids; empty if none is in the queue."""
    states: dict[str, int] = {}
    # one call per id: squeue refuses a list if it does not know one of its ids any more
    for job in jobs:
        for state in job_states(job):
            states[state] = states.get(state, 0) + 1
    return states


def job_states(job: str) -> list[str]:
    """Return the states of a job's array tasks, or of a single job; empty if squeue does not know the id.

    Raises:
        UserError: squeue does not answer.
    """
    for attempt in range(QUEUE_ATTEMPTS):
        if attempt:
            time.sleep(WAIT_SECONDS * attempt)
        done = subprocess.run(["squeue", "-h", "-r", "-j", job, "-o", "%T"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split()
        if "Invalid job id" in done.stderr:
            return []
    raise UserError(f"squeue does not answer: {last_line(done.stderr)}; nothing was submitted, try again later")


def wait(out: Path, work: Path, jobs: list[str], counter: Counter, progress: Progress) -> None:
    """Wait until the finishing job has published the dataset.

    Raises:
        UserError: the jobs ended without it; the message has the first error.
    """
    while not (out / FILE_NAME).is_file():
        # the finishing job may be moving the records away
        with contextlib.suppress(OSError):
            counter.refresh()
        progress(counter.done, counter.total, counter.tokens)
        try:
            queued = queue_states(jobs[-1:])
        except UserError:
            # squeue may answer next time, and the jobs go on without it
            continue
        if not queued:
            # a shared file system may show the file late
            time.sleep(WAIT_SECONDS)
            if (out / FILE_NAME).is_file():
                return
            why = failure_reason(work) or f"they left no word in {work / 'log'} (cancelled?)"
            # the next launch submits anew
            (work / SUBMITTED).unlink(missing_ok=True)
            raise UserError(f"jobs {', '.join(jobs)} ended without the dataset: {why}")
        time.sleep(WAIT_SECONDS)


def failure_reason(work: Path) -> str:
    """Return the first failed task's error, else the last line of the finishing job; empty if there is neither."""
    failed = sorted((work / "errors").glob("*"))
    if failed:
        return failed[0].read_text(encoding="utf-8")
    try:
        reason = last_line((work / "log" / "finish.out").read_text(encoding="utf-8"))
    except OSError:
        return ""
    return reason.removeprefix("ettin prepare: ")


def last_line(text: str) -> str:
    """Return the last line of a program's message, or "no reason given"."""
    return (text.strip().splitlines() or ["no reason given"])[-1]


def finishing_command(request: PrepareRequest) -> list[str]:
    """Return the arguments of `ettin prepare` for the same request with local processes."""
    rule = request.rule
    options: dict[str, object] = {
        "out": request.out,
        "tokenizer": request.tokenizer,
        "chunk-tokens": rule.chunk_tokens,
        "min-chunk-tokens": rule.min_chunk_tokens,
        "skip-tokens": rule.skip_tokens,
        "end-token": rule.end_token,
        "format": request.format,
        **({} if request.tokens_first else {"text-key": request.text_key}),
        "tokens-key": request.tokens_key,
        "id-key": request.id_key,
        "holdout": repr(request.holdout),
        "workers": FINISHING_CPUS,
    }
    if request.seq_lens:
        options["seq-len"] = ",".join(map(str, request.seq_lens))
    return [*request.inputs, *(f"--{name}={value}" for name, value in options.items())]
