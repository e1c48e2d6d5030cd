"""Writes the scripts of a submission beside the run and hands them to sbatch: all of it, or nothing is left behind."""

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
from megatron_ettin.launch.queue import shown
from megatron_ettin.launch.request import Job, Work
from megatron_ettin.launch.run_state import read_events
from megatron_ettin.launch.script import script_of

SUBMIT_SECONDS = 120.0
WAITING = ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED")
NEVER = ("Partition", "BadConstraints", "InvalidAccount", "InvalidQOS")


class Written:
    """Files made for a submission, which go again, or become what they were, when it fails."""

    def __init__(self) -> None:
        self.before: dict[Path, bytes | None] = {}
        self.folders: list[Path] = []

    def folder(self, path: Path) -> None:
        """Make it, with its parents. Raises UserError."""
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror or error})") from None
        self.folders += reversed(missing)

    def file(self, path: Path, text: str) -> None:
        """Write it whole. Raises UserError."""
        self.before.setdefault(path, path.read_bytes() if path.exists() else None)
        try:
            write_atomically(path, text, durable=False)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None

    def undo(self) -> None:
        for path, content in self.before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        for folder in reversed(self.folders):
            with contextlib.suppress(OSError):  # something else is in it by now
                folder.rmdir()


def write(jobs: Sequence[Job], work: Work) -> Written:
    """Scripts, snapshots and the supervisor, in the submission's folder. Raises UserError, with nothing left."""
    written = Written()
    try:
        written.folder(work.folder)
        source = Path(supervisor.__file__).parent
        written.folder(work.folder / "supervisor")
        for path in sorted(source.glob("*.py")):
            written.file(work.folder / "supervisor" / path.name, path.read_text(encoding="utf-8"))
        for job in jobs:
            written.file(script_path(job, work), script_of(job, work))
            for name, text in job.snapshots.items():
                written.file(work.folder / name, text)
    except UserError:
        written.undo()
        raise
    return written


def script_path(job: Job, work: Work) -> Path:
    return work.folder / f"{job.name}.sbatch"


def submit(jobs: Sequence[Job], work: Work, after: str | None) -> dict[str, str]:
    """Job ids by name. `after`: a dependency of the first, as sbatch writes it. Raises UserError with SLURM's own words
    for what it refuses; jobs of the same submission that were already queued are cancelled."""
    if after is None:
        _check_not_queued(jobs, work)
    written = write(jobs, work)
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            ids[job.name] = _sbatch(job, work, _dependency(job, ids) or after)
    except UserError:
        if ids:
            subprocess.run(["scancel", *ids.values()], capture_output=True, check=False)
        written.undo()
        raise
    except KeyboardInterrupt:
        written.undo()
        raise
    for job in jobs:
        _record(job, work, ids[job.name])
    return ids


def held_for_good(job_id: str) -> str | None:
    """Why a job that was accepted will never start, where SLURM knows (most sites let it be queued all the same)."""
    reasons = {job.reason for job in shown(job_id) if job.state == "PENDING"}
    return next((reason for reason in sorted(reasons) if reason.startswith(NEVER)), None)


def _check_not_queued(jobs: Sequence[Job], work: Work) -> None:
    """Raise UserError where an earlier job of the same runs waits or runs: the second would find the runs locked."""
    runs = {str(member.run_dir) for job in jobs for member in job.members}
    for event in read_events(work.folder):
        if event["event"] == "submitted" and runs & set(event.get("runs", [])):
            for job in shown(str(event["job"])):
                if job.state in WAITING:
                    told = f"job {job.id} of an earlier submission is {job.state}; scancel it first, or give --after"
                    raise UserError(f"{work.folder.parent}: {told} afterany:{event['job']}")


def _dependency(job: Job, ids: dict[str, str]) -> str | None:
    """Of an array, each member waits for the one of its own number."""
    return None if job.after is None else f"{'aftercorr' if job.is_array else 'afterok'}:{ids[job.after]}"


def _sbatch(job: Job, work: Work, dependency: str | None) -> str:
    command = ["sbatch", "--parsable"]
    if dependency is not None:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    command.append(str(script_path(job, work)))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError("--submit: no sbatch on this machine; run it where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--submit: sbatch did not answer within {SUBMIT_SECONDS:.0f} s") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        told = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said)
        raise UserError(f"sbatch refused {job.name}: {told}")
    return done.stdout.strip().partition(";")[0]


def _record(job: Job, work: Work, job_id: str) -> None:
    """In the events that the supervisor goes on with."""
    record = {
        "time": time.time(),
        "job": job_id,
        "event": "submitted",
        "name": job.name,
        "nodes": work.allocation.nodes,
        "runs": [str(member.run_dir) for member in job.members],
    }
    with open(work.folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
