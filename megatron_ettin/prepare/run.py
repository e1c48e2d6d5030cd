"""Make a dataset without the command line: plan, run the tasks, stage, publish.

Everything happens in `.tmp-NAME/` next to the output: the frozen plan, a record per finished task, then the staged
dataset, which one rename publishes. A killed prepare is therefore continued by running it again, and DATASET is
complete or absent. The request is hashed (settings, and the inputs' names and sizes). If a finished dataset has the
same hash, nothing is done; if it has another one, it is not overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeldError, fsync, publish_folder, try_lock
from megatron_ettin.base.log import log_warning
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.manifest import FILE_NAME, read_manifest
from megatron_ettin.data.packing_index import PackingIndex
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare import cluster
from megatron_ettin.prepare.engine import Counter, Progress, raise_first_error, run_here, run_local, run_on_ray
from megatron_ettin.prepare.formats import PassedOver
from megatron_ettin.prepare.frozen_plan import changed_since, freeze
from megatron_ettin.prepare.input_file import InputFile, check_unchanged
from megatron_ettin.prepare.inputs import list_inputs
from megatron_ettin.prepare.request import (
    PrepareRequest,
    check_request,
    hash_of_settings,
    rewritten_input,
    settings_of,
    write_inputs,
)
from megatron_ettin.prepare.staging import NoDocumentsError, read_task_records, stage

LOCK_SECONDS = 3.0


@dataclass
class PrepareResult:
    """A finished dataset, and what this command did to make it."""

    dataset: Dataset
    heldout: Dataset | None
    already_complete: bool
    seconds: float = 0.0
    tokens_written: int = 0
    """Number of tokens that this command wrote; after a resume, fewer than the dataset has."""
    tasks_resumed: int = 0
    passed_over: PassedOver = field(default_factory=PassedOver)
    times_compared: bool = True
    """False if a complete dataset was recognised by names and sizes of its inputs only, not by their times."""


def prepare(request: PrepareRequest, progress: Progress) -> PrepareResult | cluster.Submitted:
    """Make the dataset, or the rest of an unfinished one; do nothing if it is finished.

    With the SLURM executor, submit the jobs that make it, or report how far they are.
    """
    began = time.monotonic()
    request = check_request(request)
    tokenizer = load_tokenizer(request.tokenizer)
    files, passed_over = list_inputs(request.inputs, request.format, request.out)
    build = Build(request, tokenizer, files, progress)
    finished = build.finished()
    if finished is not None:
        build.clear()
        result = finished
    else:
        answer = build.submit() if request.executor == "slurm" else build.run()
        if isinstance(answer, cluster.Submitted):
            return answer
        result = answer
    plan_rows(result.dataset, request)
    result.seconds = time.monotonic() - began
    result.passed_over = passed_over
    return result


def existing_output(out: Path, settings_sha256: str) -> Dataset | None:
    """Return the dataset at `out` if its settings have this hash; None if nothing is there.

    Raises:
        UserError: `out` is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE_NAME).is_file():
        raise UserError(f"--out {out}: exists and is not a dataset; name a new directory")
    if read_manifest(out).settings_sha256 != settings_sha256:
        raise UserError(f"--out {out}: holds a dataset of other settings or inputs; name another or remove it")
    return open_dataset(out)


def heldout_of(dataset: Dataset) -> Dataset | None:
    """Return the held-out part of a dataset, None if it has none."""
    folder = dataset.path / "heldout"
    return open_dataset(folder) if (folder / FILE_NAME).is_file() else None


def plan_rows(dataset: Dataset, request: PrepareRequest) -> None:
    """Build the requested packing indices of the dataset and of its held-out part."""
    for part in filter(None, (dataset, heldout_of(dataset))):
        for seq_len in request.seq_lens:
            PackingIndex.build_or_open(part, seq_len, workers=request.workers)


class Build:
    """One unfinished dataset and its working directory."""

    def __init__(
        self, request: PrepareRequest, tokenizer: Tokenizer, files: list[InputFile], progress: Progress
    ) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self.files = files
        self.progress = progress
        self.settings = settings_of(request, tokenizer)
        self.settings_sha256 = hash_of_settings(self.settings, files)
        self.work = request.work

    def finished(self) -> PrepareResult | None:
        """Return the dataset if the same request has already made it, else None.

        Raises:
            UserError: another dataset is there, or an input was written since.
        """
        out = self.request.out
        finished = existing_output(out, self.settings_sha256)
        if finished is None:
            return None
        known, rewritten = rewritten_input(out, self.files)
        if rewritten is not None and not self.request.accept_copied:
            raise UserError(
                f"--out {out}: was made of inputs of the same names and sizes, but {rewritten.url} was written at"
                " another time: the dataset may hold other text; name another --out, remove it, or say --accept-copied"
                " where only the time differs"
            )
        compared = known and rewritten is None
        return PrepareResult(finished, heldout_of(finished), already_complete=True, times_compared=compared)

    def run(self) -> PrepareResult:
        """Make the dataset with processes of this machine or on Ray."""
        with working_directory(self.work):
            cluster.check_not_queued(self.work)
            if (finished := self.finished_meanwhile()) is not None:
                return finished
            counter = self.planned()
            if counter.pending:
                self.run_tasks(counter)
            raise_first_error(self.work, counter)
            dataset = self.publish(len(counter.tasks))
        return PrepareResult(
            dataset, heldout_of(dataset), False, tokens_written=counter.tokens, tasks_resumed=counter.resumed
        )

    def clear(self) -> None:
        """Remove the working directory that a launch left because it was killed right after it published."""
        if self.work.is_dir():
            with contextlib.suppress(UserError), working_directory(self.work):
                shutil.rmtree(self.work, ignore_errors=True)

    def finished_meanwhile(self) -> PrepareResult | None:
        """Return the dataset if another `ettin prepare` published it after the inputs were listed, else None."""
        finished = self.finished()
        if finished is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        return finished

    def run_tasks(self, counter: Counter) -> None:
        """Run the pending tasks with the executor of the request."""
        workers = min(self.request.workers, len(counter.pending))
        if self.request.executor == "ray":
            run_on_ray(self.request, counter, self.request.workers, self.progress)
        elif workers == 1:
            run_here(self.request, counter, self.progress)
        else:
            run_local(self.request, counter, workers, self.progress)

    def submit(self) -> PrepareResult | cluster.Submitted:
        """Submit the work to the cluster; with `--wait` wait until the dataset is published."""
        with working_directory(self.work):
            if (finished := self.finished_meanwhile()) is not None:
                return finished
            jobs = cluster.submitted_jobs(self.work)
            difference = changed_since(self.work, self.settings, self.files)
            if difference and cluster.queue_states(jobs):
                raise UserError(f"jobs {', '.join(jobs)} are queued or running and {difference}; scancel them first")
            counter = self.planned()
            submitted = cluster.submit_or_look(self.request, counter)
        if not self.request.wait:
            return submitted
        cluster.wait(self.request.out, self.work, submitted.jobs, counter, self.progress)
        dataset = open_dataset(self.request.out)
        return PrepareResult(
            dataset, heldout_of(dataset), False, tokens_written=counter.tokens, tasks_resumed=counter.resumed
        )

    def planned(self) -> Counter:
        """Freeze the plan, make the folders `tasks/` and `tokenizer/` for the tasks, and return their progress."""
        tasks = freeze(self.work, self.settings, self.files, self.request.replan)
        (self.work / "tasks").mkdir(exist_ok=True)
        # an existing folder stays, because tasks on other hosts may be reading it
        if not (self.work / "tokenizer").is_dir():
            temporary = self.work / ".tmp-tokenizer"
            shutil.rmtree(temporary, ignore_errors=True)
            self.tokenizer.save(temporary)
            os.rename(temporary, self.work / "tokenizer")
        return Counter(self.work, tasks)

    def publish(self, num_tasks: int) -> Dataset:
        """Stage the dataset, build its packing indices, and rename it to its final path. Raises UserError."""
        out = self.request.out
        check_unchanged(self.files)
        records = read_task_records(self.work, num_tasks)
        try:
            staged = stage(self.work, records, self.request, self.tokenizer, self.settings_sha256)
        except NoDocumentsError:
            # a later launch could use nothing of it
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        write_inputs(staged, self.files)
        plan_rows(open_dataset(staged), self.request)
        remove_leftovers(staged)
        fsync(staged)
        publish_folder(staged, out)
        shutil.rmtree(self.work, ignore_errors=True)
        return open_dataset(out)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of an earlier launch that was killed, anywhere in the dataset."""
    for path in list(folder.rglob(".tmp-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def working_directory(work: Path) -> Iterator[None]:
    """Create and lock the folder `work` for the block. Raises UserError instead of OSError.

    If a UserError comes before any task is finished or job submitted, the folder is removed. Otherwise it is kept for
    the next launch.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 (held until the end)
    except FileNotFoundError:
        raise UserError(f"{work}: another `ettin prepare` has just finished it; run the same command again") from None
    except OSError as error:
        raise UserError(f"--out: cannot write {work.parent}: {error.strerror}") from None
    with lock:
        take(lock.fileno(), work)
        try:
            yield
        except UserError as error:
            finished = len(list((work / "tasks").glob("task_*.json")))
            if cluster.submitted_jobs(work):
                # the folder stays: the command that submitted the jobs reads the reason from it
                raise
            if finished:
                kept = f"{finished} finished task{'s are' if finished > 1 else ' is'} kept in {work}"
                raise UserError(f"{error} ({kept})") from None
            shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room and run" if full else "when that is mended, run"
            where = error.filename or work
            raise UserError(
                f"{work if full else where}: {error.strerror or error}; {remedy} the same command again to continue"
            ) from None


def take(lock: int, work: Path) -> None:
    """Lock the folder `work` by the open file `lock`. Raises UserError if another process holds the lock.

    It waits up to LOCK_SECONDS, because workers of a process that was just killed may still hold it.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            why = try_lock(lock)
        except LockHeldError:
            if time.monotonic() > deadline:
                raise UserError(f"{work}: another `ettin prepare` is writing it") from None
            time.sleep(0.1)
        else:
            if why is not None:
                log_warning(f"warning: {work}: its file system has no locks ({why}); start no second prepare into it")
            elif not (work / "lock").exists():
                # the process that held the lock has just published and removed the folder
                raise UserError(f"{work}: another `ettin prepare` has just finished it; run the same command again")
            return
