"""Write the scripts of a submission into the run and hand them to sbatch: all of it, or nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.launch import supervisor
from megatron_ettin.launch.request import BatchJob, Submission
from megatron_ettin.launch.run_state import job_of_event, query_jobs, read_events, runs_of_event
from megatron_ettin.launch.script import render_script

SUBMIT_SECONDS = 120.0
WAITING = ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED")
NEVER = ("Partition", "BadConstraints", "InvalidAccount", "InvalidQOS")


class WrittenFiles:
    """Files written for a submission, which are removed or restored when it fails."""

    def __init__(self) -> None:
        self.before: dict[Path, bytes | None] = {}
        self.folders: list[Path] = []

    def make_folder(self, path: Path) -> None:
        """Make a folder with its parents. Raises UserError."""
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror or error})") from None
        self.folders += reversed(missing)

    def write_file(self, path: Path, text: str) -> None:
        """Write a file whole. Raises UserError."""
        self.before.setdefault(path, path.read_bytes() if path.exists() else None)
        try:
            write_atomically(path, text, durable=False)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None

    def undo(self) -> None:
        """Restore every file, and remove the folders that were made."""
        for path, content in self.before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        for folder in reversed(self.folders):
            # something else may be in it by now
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_submission(jobs: Sequence[BatchJob], submission: Submission) -> WrittenFiles:
    """Write scripts, snapshots and the supervisor into the submission's folder.

    Raises:
        UserError: nothing is left then.
    """
    written, folder = WrittenFiles(), submission.folder
    try:
        written.make_folder(folder / "supervisor")
        for path in sorted(Path(supervisor.__file__).parent.glob("*.py")):
            written.write_file(folder / "supervisor" / path.name, path.read_text(encoding="utf-8"))
        for job in jobs:
            written.write_file(script_path(job, submission), render_script(job, submission))
            for name, text in job.snapshots.items():
                written.write_file(folder / name, text)
    except UserError:
        written.undo()
        raise
    return written


def script_path(job: BatchJob, submission: Submission) -> Path:
    """Return the path of a job's script."""
    return submission.folder / f"{job.name}.sbatch"


def submit(jobs: Sequence[BatchJob], submission: Submission, after: str | None) -> dict[str, str]:
    """Submit the jobs with sbatch.

    Args:
        jobs: in order; a job may depend on one before it.
        submission: what they have in common.
        after: a dependency of the first job, as sbatch writes it.

    Returns:
        Job ids by name.

    Raises:
        UserError: quotes SLURM. Jobs of the same submission that were already queued are cancelled.
    """
    if after is None:
        _check_not_queued(jobs, submission)
    written = write_submission(jobs, submission)
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            dependency = after
            if job.after is not None:
                # each run of an array waits for the one with its index
                dependency = f"{'aftercorr' if job.is_array else 'afterok'}:{ids[job.after]}"
            ids[job.name] = _sbatch(job, submission, dependency)
    except UserError:
        if ids:
            subprocess.run(["scancel", *ids.values()], capture_output=True, check=False)
        written.undo()
        raise
    except KeyboardInterrupt:
        written.undo()
        raise
    for job in jobs:
        _record(job, submission, ids[job.name])
    return ids


def why_never_starts(job_id: str) -> str | None:
    """Return why an accepted job will never start, where SLURM knows (most sites let it be queued all the same)."""
    reasons = {job.reason for job in query_jobs(job_id) if job.state == "PENDING"}
    return next((reason for reason in sorted(reasons) if reason.startswith(NEVER)), None)


def _check_not_queued(jobs: Sequence[BatchJob], submission: Submission) -> None:
    """Raise UserError where an earlier job of the same runs waits or runs: a second one would find them locked."""
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


def _record(job: BatchJob, submission: Submission, job_id: str) -> None:
    """Append the submission to the events that the supervisor continues."""
    record = {
        "time": time.time(),
        "job": job_id,
        "event": "submitted",
        "name": job.name,
        "nodes": submission.allocation.nodes,
        "runs": [str(run.run_dir) for run in job.runs],
    }
    with open(submission.folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
