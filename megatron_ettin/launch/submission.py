"""Write the scripts of a submission into the run and submit them with sbatch; an error leaves no file and no job."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.launch import supervisor
from megatron_ettin.launch.request import BatchJob, Submission
from megatron_ettin.launch.run_state import job_of_event, query_jobs, read_events, runs_of_event
from megatron_ettin.launch.script import render_script
from megatron_ettin.launch.supervisor.log import EventLog

# timeout of sbatch
SUBMIT_SECONDS = 120.0
# states of a job that has not ended
WAITING = ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED")
# first words of SLURM's reasons for which a job will never start
NEVER = ("Partition", "BadConstraints", "InvalidAccount", "InvalidQOS")


def write_submission(jobs: Sequence[BatchJob], submission: Submission) -> contextlib.ExitStack:
    """Write scripts, snapshots and the supervisor into the submission's folder.

    Returns:
        A stack whose `close` restores every file and removes the folders that were made.

    Raises:
        UserError: something cannot be written. After this or any other error, no new file is left.
    """
    folder = submission.folder
    with contextlib.ExitStack() as undo:
        _make_folder(folder / "supervisor", undo)
        for path in sorted(Path(supervisor.__file__).parent.glob("*.py")):
            _write_file(folder / "supervisor" / path.name, path.read_text(encoding="utf-8"), undo)
        for job in jobs:
            _write_file(script_path(job, submission), render_script(job, submission), undo)
            for name, text in job.snapshots.items():
                _write_file(folder / name, text, undo)
        return undo.pop_all()


def _make_folder(path: Path, undo: contextlib.ExitStack) -> None:
    """Make a folder with its parents; closing `undo` removes those that were made. Raises UserError."""
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.is_dir():
                undo.callback(_remove_if_empty, folder)
                folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror or error})") from None


def _remove_if_empty(folder: Path) -> None:
    # another process may have put files into it
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_file(path: Path, text: str, undo: contextlib.ExitStack) -> None:
    """Write a file atomically; closing `undo` restores its former content or removes it. Raises UserError."""
    if path.exists():
        undo.callback(path.write_bytes, path.read_bytes())
    else:
        undo.callback(path.unlink, missing_ok=True)
    try:
        write_atomically(path, text, durable=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def script_path(job: BatchJob, submission: Submission) -> Path:
    """Return the path of a job's script."""
    return submission.folder / f"{job.name}.sbatch"


def submit(jobs: Sequence[BatchJob], submission: Submission, after: str | None) -> dict[str, str]:
    """Submit the jobs with sbatch.

    Args:
        jobs: the jobs in order; each may depend on an earlier one.
        submission: the settings that they share.
        after: dependency, as sbatch reads it, of jobs that depend on no other; None: refuse runs already in the queue.

    Returns:
        Name of a job -> its id.

    Raises:
        UserError: SLURM refuses a job. The jobs of this submission that were already queued are cancelled.
    """
    if after is None:
        _check_not_queued(jobs, submission)
    ids: dict[str, str] = {}
    with write_submission(jobs, submission) as undo:
        for job in jobs:
            dependency = after
            if job.after is not None:
                # each run of an array waits for the one with its index
                dependency = f"{'aftercorr' if job.is_array else 'afterok'}:{ids[job.after]}"
            ids[job.name] = _sbatch(job, submission, dependency)
            undo.callback(subprocess.run, ["scancel", ids[job.name]], capture_output=True, check=False)
        undo.pop_all()
    for job in jobs:
        # the supervisor appends to the same file
        events = EventLog(str(submission.folder), ids[job.name])
        runs = [str(run.run_dir) for run in job.runs]
        events.record("submitted", name=job.name, nodes=submission.allocation.nodes, runs=runs)
    return ids


def why_never_starts(job_id: str) -> str | None:
    """Return SLURM's reason why a queued job will never start; None if there is no such reason."""
    reasons = {job.reason for job in query_jobs(job_id) if job.state == "PENDING"}
    return next((reason for reason in sorted(reasons) if reason.startswith(NEVER)), None)


def _check_not_queued(jobs: Sequence[BatchJob], submission: Submission) -> None:
    """Raise UserError if an earlier job of the same runs waits or runs, because a run is locked while it trains."""
    runs = {str(run.run_dir) for job in jobs for run in job.runs}
    for event in read_events(submission.folder):
        earlier = job_of_event(event)
        if event["event"] == "submitted" and runs & set(runs_of_event(event)) and earlier is not None:
            for job in query_jobs(earlier):
                if job.state in WAITING:
                    raise UserError(
                        f"{submission.folder.parent}: job {job.id} of an earlier submission is {job.state}; scancel it"
                        f" first, or give --after afterany:{earlier}"
                    )


def _sbatch(job: BatchJob, submission: Submission, dependency: str | None) -> str:
    """Submit one job and return its id. Raises UserError."""
    command = ["sbatch", "--parsable"]
    if dependency is not None:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    command.append(str(script_path(job, submission)))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError("--submit: no sbatch on this machine; run it where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--submit: sbatch did not answer within {SUBMIT_SECONDS:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        reason = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines)
        raise UserError(f"sbatch refused {job.name}: {reason}")
    return done.stdout.strip().partition(";")[0]
