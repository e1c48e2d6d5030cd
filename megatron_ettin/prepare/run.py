"""`ettin prepare` without its command line: plan, run the tasks, stage, publish.

Everything happens in `.tmp-NAME/` beside the output: the frozen plan, a record per finished task, then the staged
dataset, which one rename publishes. A killed prepare is therefore continued by running it again, and DATASET is
complete or absent. What was asked for is hashed (settings, and the inputs' names and sizes): a finished dataset answers
"already there" to the same request and is never overwritten by another one.
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
from megatron_ettin.data.indexed import token_dtype
from megatron_ettin.data.manifest import FILE_NAME, read_manifest
from megatron_ettin.data.packing_index import PackingIndex
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare import cluster
from megatron_ettin.prepare.engine import Counter, Progress, raise_first_error, run_here, run_local, run_on_ray
from megatron_ettin.prepare.formats import PassedOver
from megatron_ettin.prepare.frozen_plan import changed_since, freeze
from megatron_ettin.prepare.input_file import check_unchanged
from megatron_ettin.prepare.inputs import InputFile, list_inputs
from megatron_ettin.prepare.request import (
    PrepareRequest,
    check_request,
    hash_of_settings,
    rewritten_input,
    settings_of,
    working_place,
    write_inputs,
)
from megatron_ettin.prepare.staging import NoDocumentsError, read_task_records, stage
from megatron_ettin.prepare.task import IngestSettings

LOCK_SECONDS = 3.0


@dataclass
class PrepareResult:
    dataset: Dataset
    heldout: Dataset | None
    already_complete: bool
    seconds: float = 0.0
    tokens_written: int = 0  # by this command; less than the dataset's after a resume
    tasks_resumed: int = 0
    passed_over: PassedOver = field(default_factory=PassedOver)
    times_compared: bool = True  # where it was already complete: the inputs' times too, not only their sizes


def prepare(request: PrepareRequest, progress: Progress) -> PrepareResult | cluster.Submitted:
    """Make the dataset, continue making it, or find it made. On a cluster: submit it, or tell how far it is."""
    began = time.monotonic()
    request = check_request(request)
    tokenizer = load_tokenizer(request.tokenizer)
    files, passed_over = list_inputs(request.inputs, request.format, request.out)
    build = Build(request, tokenizer, files, progress)
    found = build.finished()
    if found is not None:
        build.clear()
        result = found
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
    """The finished dataset of this very request, None where nothing is, UserError where something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE_NAME).is_file():
        raise UserError(f"--out {out}: exists and is not a dataset; name a new directory")
    if read_manifest(out).settings_sha256 != settings_sha256:
        raise UserError(f"--out {out}: holds a dataset of other settings or inputs; name another or remove it")
    return open_dataset(out)


def heldout_of(dataset: Dataset) -> Dataset | None:
    folder = dataset.path / "heldout"
    return open_dataset(folder) if (folder / FILE_NAME).is_file() else None


def plan_rows(dataset: Dataset, request: PrepareRequest) -> None:
    """The packing indices asked for, of the dataset and of its held-out part."""
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
        self.work = working_place(request.out)

    def finished(self) -> PrepareResult | None:
        """The dataset of this very request, where it is there. Raises UserError where another one is, or where an input
        was written since.
        """
        out = self.request.out
        found = existing_output(out, self.settings_sha256)
        if found is None:
            return None
        known, rewritten = rewritten_input(out, self.files)
        if rewritten is not None and not self.request.accept_copied:
            raise UserError(
                f"--out {out}: was made of inputs of the same names and sizes, but {rewritten.url} was written at"
                " another time: the dataset may hold other text; name another --out, remove it, or say --accept-copied"
                " where only the time differs"
            )
        compared = known and rewritten is None
        return PrepareResult(found, heldout_of(found), already_complete=True, times_compared=compared)

    def run(self) -> PrepareResult:
        """All the way, with processes of this machine or on Ray."""
        with working_directory(self.work):
            cluster.check_not_queued(self.work)
            if (found := self.finished_meanwhile()) is not None:
                return found
            settings, counter = self.planned()
            if counter.open:
                self.run_tasks(settings, counter)
            raise_first_error(self.work, counter)
            dataset = self.publish(len(counter.tasks))
        return PrepareResult(
            dataset, heldout_of(dataset), False, tokens_written=counter.tokens, tasks_resumed=counter.resumed
        )

    def clear(self) -> None:
        """Remove what a launch left that was killed right after it had published."""
        if self.work.is_dir():
            with contextlib.suppress(UserError), working_directory(self.work):
                shutil.rmtree(self.work, ignore_errors=True)

    def finished_meanwhile(self) -> PrepareResult | None:
        """The dataset, where another `ettin prepare` published it between the listing of the inputs and the lock."""
        found = self.finished()
        if found is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        return found

    def run_tasks(self, settings: IngestSettings, counter: Counter) -> None:
        if self.request.executor == "ray":
            run_on_ray(settings, counter, self.request.workers, self.progress)
        elif self.request.workers == 1:
            run_here(settings, counter, self.progress)
        else:
            run_local(settings, counter, self.request.workers, self.progress)

    def submit(self) -> PrepareResult | cluster.Submitted:
        """To the cluster; with `--wait` until the dataset is there."""
        with working_directory(self.work):
            if (found := self.finished_meanwhile()) is not None:
                return found
            jobs = cluster.submitted_jobs(self.work)
            difference = changed_since(self.work, self.settings, self.files)
            if difference and cluster.queue_states(jobs):
                raise UserError(f"jobs {', '.join(jobs)} are queued or running and {difference}; scancel them first")
            settings, counter = self.planned()
            submitted = cluster.submit_or_look(settings, self.request, counter)
        if not self.request.wait:
            return submitted
        cluster.wait(self.request.out, self.work, submitted.jobs, counter, self.progress)
        dataset = open_dataset(self.request.out)
        return PrepareResult(
            dataset, heldout_of(dataset), False, tokens_written=counter.tokens, tasks_resumed=counter.resumed
        )

    def planned(self) -> tuple[IngestSettings, Counter]:
        """What the tasks need in the working directory: the frozen plan, the tokenizer."""
        tasks = freeze(self.work, self.settings, self.files, self.request.replan)
        (self.work / "tasks").mkdir(exist_ok=True)
        if not (self.work / "tokenizer").is_dir():  # tasks on other machines may be reading it
            beside = self.work / ".tmp-tokenizer"
            shutil.rmtree(beside, ignore_errors=True)
            self.tokenizer.save(beside)
            os.rename(beside, self.work / "tokenizer")
        request = self.request
        settings = IngestSettings(
            self.work, request.rule, token_dtype(self.tokenizer.vocab_size).str, request.text_key, request.id_key,
            request.add_prefix_space, request.holdout, request.tokens_key, request.tokens_first,
            request.format == "text",
        )  # fmt: skip
        return settings, Counter(self.work, tasks)

    def publish(self, num_tasks: int) -> Dataset:
        """Merge the records, plan rows, and put the dataset in its place."""
        out = self.request.out
        check_unchanged(self.files)
        records = read_task_records(self.work, num_tasks)
        try:
            staged = stage(self.work, records, self.request, self.tokenizer, self.settings_sha256)
        except NoDocumentsError:
            shutil.rmtree(self.work, ignore_errors=True)  # there is nothing in the tasks to go on with
            raise
        write_inputs(staged, self.files)
        plan_rows(open_dataset(staged), self.request)
        remove_leftovers(staged)
        fsync(staged)
        publish_folder(staged, out)
        shutil.rmtree(self.work, ignore_errors=True)
        return open_dataset(out)


def remove_leftovers(folder: Path) -> None:
    """What was being written when an earlier launch was killed: temporary names, anywhere in the dataset."""
    for path in list(folder.rglob(".tmp-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def working_directory(work: Path) -> Iterator[None]:
    """Hold `work` alone. A mistake before anything was done removes it; whatever happens later leaves it to go on
    with.
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
                raise  # whoever submitted it asks for the reason, which lies in it
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
    """Lock for this process alone; the helpers of one that was killed a moment ago are given the time to end."""
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
            elif not (work / "lock").exists():  # whoever held it has just published and removed the folder
                raise UserError(f"{work}: another `ettin prepare` has just finished it; run the same command again")
            return
