"""`ettin prepare --executor slurm`: a job array for the tasks and, after it, one job that finishes the dataset.

The finishing job is the same command with local processes: it finds the tasks done, or does what is left, merges and
publishes. The command itself returns when both are submitted; run again it tells how far they are, and submits what is
missing only where nothing of it is queued or running any more. Job ids are kept in `submitted.json`.
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
from megatron_ettin.prepare.engine import Counter, IngestStep, Progress, agree_on_completed
from megatron_ettin.prepare.request import PrepareRequest
from megatron_ettin.prepare.task import IngestSettings

SUBMITTED = "submitted.json"
WAIT_SECONDS = 2.0
QUEUE_ATTEMPTS = 4
FINISHING_CPUS = 4


@dataclass(frozen=True)
class Submitted:
    """Where an unfinished dataset stands on the cluster."""

    jobs: list[str]  # the array's (or arrays'), and last the finishing job
    states: dict[str, int]  # of what is queued or running, by SLURM's name
    tasks_done: int
    num_tasks: int
    new: bool  # submitted by this very command

    def __str__(self) -> str:
        states = ", ".join(f"{count} {state.lower()}" for state, count in self.states.items()) or "none queued"
        verb = "submitted" if self.new else "queued or running"
        return f"{self.tasks_done} of {self.num_tasks} tasks done; {verb}: jobs {', '.join(self.jobs)} ({states})"


def submit_or_look(settings: IngestSettings, request: PrepareRequest, counter: Counter) -> Submitted:
    """Submit the pending tasks and the finishing job, or tell how those submitted before are doing."""
    if any(character.isspace() for character in str(settings.work)):
        raise UserError(f"--out: {str(request.out)!r} has a space in its path, which sbatch's scripts cannot name")
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise UserError(f"--executor slurm: no {program} on this machine; run it where jobs are submitted")
    work, total = settings.work, len(counter.tasks)
    jobs = submitted_jobs(work)
    states = queue_states(jobs)
    if states:
        return Submitted(jobs, states, total - len(counter.open), total, new=False)
    if jobs and (why := told_reason(work)):
        (work / SUBMITTED).unlink()
        raise UserError(f"jobs {', '.join(jobs)} ended without the dataset: {why}; run again to submit anew")
    jobs = submit(settings, request, counter)
    states = {}
    with contextlib.suppress(UserError):  # submitted they are, whether squeue answers or not
        states = queue_states(jobs)
    return Submitted(jobs, states, total - len(counter.open), total, new=True)


def submit(settings: IngestSettings, request: PrepareRequest, counter: Counter) -> list[str]:
    from megatron_ettin.prepare.executors import errors_of_programs, slurm_executor

    work = settings.work
    shutil.rmtree(work / "errors", ignore_errors=True)
    jobs = []
    arguments = dict(request.slurm_arguments)
    if counter.open:
        agree_on_completed(work, counter)
        executor = slurm_executor(
            IngestStep(settings), len(counter.tasks), request.workers, work / "log", request.slurm_time,
            request.slurm_partition, arguments,
        )  # fmt: skip
        with errors_of_programs() as said:
            try:
                executor.run()
            except subprocess.CalledProcessError:
                said.seek(0)
                raise UserError(f"sbatch refused the job array: {last_line(said.read().decode())}") from None
        jobs.append(str(executor.job_id))
        write_json(work / SUBMITTED, {"jobs": jobs})  # before anything else can fail
    script = work / "finish.slurm"
    script.write_text(finishing_script(work, request, arguments), encoding="utf-8")
    after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
    done = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
    if done.returncode:
        subprocess.run(["scancel", *jobs], capture_output=True)
        (work / SUBMITTED).unlink(missing_ok=True)
        raise UserError(f"sbatch refused the finishing job: {last_line(done.stderr)}; the array was cancelled")
    jobs.append(done.stdout.strip().partition(";")[0])
    write_json(work / SUBMITTED, {"jobs": jobs})
    return jobs


def finishing_script(work: Path, request: PrepareRequest, arguments: dict[str, str]) -> str:
    options: dict[str, str | None] = {
        "job-name": "ettin-prepare-finish",
        "time": request.slurm_time,
        "partition": request.slurm_partition,
        "cpus-per-task": str(FINISHING_CPUS),
        "output": str(work / "log" / "finish.out"),
        **arguments,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    run = shlex.join([sys.executable, "-m", "megatron_ettin", "prepare", *finishing_command(request)])
    where = shlex.quote(os.getcwd())
    return "\n".join(["#!/bin/bash", *lines, f"cd {where} || exit 1", f"exec {run}", ""])


def submitted_jobs(work: Path) -> list[str]:
    try:
        return [str(job) for job in json.loads((work / SUBMITTED).read_text(encoding="utf-8"))["jobs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_not_queued(work: Path) -> None:
    """Raise UserError where jobs of this dataset are still to come; the finishing job itself is one of them."""
    jobs = submitted_jobs(work)
    if jobs and os.environ.get("SLURM_JOB_ID") not in jobs and shutil.which("squeue") and queue_states(jobs):
        raise UserError(f"{work}: jobs {', '.join(jobs)} are queued or running; scancel them, or use --executor slurm")


def queue_states(jobs: list[str]) -> dict[str, int]:
    """How many jobs and array tasks of these ids are in each state; empty when the queue knows none of them."""
    states: dict[str, int] = {}
    for job in jobs:  # one by one: squeue refuses a list that has one id too old to know
        for state in asked_queue(job):
            states[state] = states.get(state, 0) + 1
    return states


def asked_queue(job: str) -> list[str]:
    """The states of a job's parts. Raises UserError where squeue does not answer: that is not an empty queue."""
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
    """Until the finishing job has published the dataset. Raises UserError with the first error where it has not."""
    while not (out / FILE_NAME).is_file():
        with contextlib.suppress(OSError):  # the finishing job may be moving the records away
            counter.refresh()
        progress(counter.done, counter.total, counter.tokens)
        try:
            queued = queue_states(jobs[-1:])
        except UserError:
            continue  # it will answer again; the jobs do not depend on it
        if not queued:
            time.sleep(WAIT_SECONDS)  # the file system of another machine may be late
            if (out / FILE_NAME).is_file():
                return
            why = told_reason(work) or f"they left no word in {work / 'log'} (cancelled?)"
            (work / SUBMITTED).unlink(missing_ok=True)  # told: the next launch submits anew
            raise UserError(f"jobs {', '.join(jobs)} ended without the dataset: {why}")
        time.sleep(WAIT_SECONDS)


def told_reason(work: Path) -> str:
    """The line that a user needs, of what the jobs left behind; empty where they left nothing, as cancelled ones do."""
    failed = sorted((work / "errors").glob("*"))
    if failed:
        return failed[0].read_text(encoding="utf-8")
    try:
        said = last_line((work / "log" / "finish.out").read_text(encoding="utf-8"))
    except OSError:
        return ""
    return said.removeprefix("ettin prepare: ")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def finishing_command(request: PrepareRequest) -> list[str]:
    """The same request, with local processes in place of the cluster."""
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
