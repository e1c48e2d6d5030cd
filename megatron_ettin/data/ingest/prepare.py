"""`ettin prepare` without its command line: plan, run the tasks, stage, publish.

Everything happens in `.tmp-NAME/` beside the output: a record per finished task, then the staged dataset, which one
rename publishes. A killed prepare is therefore continued by running it again, and DATASET is complete or absent. What
was asked for is hashed (settings, and the inputs' names and sizes): a finished dataset answers "already there" to the
same request and is never overwritten by another one. Change times of the inputs count only for continuing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.indexed import token_dtype
from megatron_ettin.data.ingest.documents import count_line_ends
from megatron_ettin.data.ingest.inputs import InputFile, Segment, Task, cut_tasks, list_inputs
from megatron_ettin.data.ingest.request import PrepareRequest, check_request, hash_of_settings
from megatron_ettin.data.ingest.staging import read_task_records, stage
from megatron_ettin.data.ingest.task import IngestSettings, record_path, run_task_in_worker, start_worker
from megatron_ettin.data.manifest import FILE_NAME, read_manifest, sync_directory, write_json_durably
from megatron_ettin.data.rows import ensure_row_plan
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer

LINES_IN_POOL = 64  # so many segments of split files and more are counted by several processes


@dataclass
class PrepareResult:
    dataset: Dataset
    heldout: Dataset | None
    already_complete: bool
    seconds: float = 0.0
    tokens_written: int = 0  # by this process; less than the dataset's after a resume
    tasks_resumed: int = 0
    empty_files: list[str] = field(default_factory=list)


Progress = Callable[[int, int, int], None]  # input bytes done, of how many, tokens written


def prepare(request: PrepareRequest, progress: Progress) -> PrepareResult:
    """Make the dataset, continue making it, or find it made."""
    began = time.monotonic()
    check_request(request)
    tokenizer = load_tokenizer(request.tokenizer)
    files, empty = list_inputs(request.inputs, request.format)
    settings_sha256 = hash_of_settings(request, tokenizer, files)
    found = existing_output(request.out, settings_sha256)
    if found is None:
        work = request.out.parent / f".tmp-{request.out.name}"
        with working_directory(work):
            result = build(request, tokenizer, files, settings_sha256, work, progress)
    else:
        result = PrepareResult(found, heldout_of(found), already_complete=True)
    for dataset in filter(None, (result.dataset, result.heldout)):
        for seq_len in request.seq_lens:
            ensure_row_plan(dataset, seq_len)
    result.seconds = time.monotonic() - began
    result.empty_files = empty
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


@contextlib.contextmanager
def working_directory(work: Path) -> Iterator[None]:
    """Hold `work` alone. A user's mistake removes it; a kill, a full disk or a lost worker leaves it to go on with."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"--out: cannot write {work.parent}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another `ettin prepare` is writing it") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except BrokenProcessPool:
            reason = "a worker process died (out of memory?)"
            raise UserError(f"{reason}; run the same command again, with fewer --workers, to continue") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{work}: {error.strerror}; make room and run the same command again to continue") from None
        shutil.rmtree(work, ignore_errors=True)


def build(
    request: PrepareRequest,
    tokenizer: Tokenizer,
    files: list[InputFile],
    settings_sha256: str,
    work: Path,
    progress: Progress,
) -> PrepareResult:
    tasks = planned_tasks(work, files, settings_sha256, request.workers)
    (work / "tasks").mkdir(exist_ok=True)
    tokenizer.save(work / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    settings = IngestSettings(
        work, request.rule, dtype.str, request.text_key, request.id_key, request.add_prefix_space, request.holdout
    )
    pending = [task for task in tasks if not record_path(work, task.index).is_file()]
    tokens = run_tasks(pending, tasks, settings, request.workers, progress) if pending else 0
    records = read_task_records(work, len(tasks))
    staged = stage(work, records, request, tokenizer, settings_sha256)
    for dataset in filter(None, (open_dataset(staged), heldout_of(open_dataset(staged)))):
        for seq_len in request.seq_lens:
            ensure_row_plan(dataset, seq_len)
    sync_directory(staged)
    os.rename(staged, request.out)  # an empty directory in its place gives way
    sync_directory(request.out.parent)
    dataset = open_dataset(request.out)
    resumed = len(tasks) - len(pending)
    return PrepareResult(dataset, heldout_of(dataset), False, tokens_written=tokens, tasks_resumed=resumed)


def planned_tasks(work: Path, files: list[InputFile], settings_sha256: str, workers: int) -> list[Task]:
    """The tasks, with line numbers. A working directory of another plan, or of inputs changed since, is emptied."""
    changed = [file.path.stat().st_mtime_ns for file in files]
    plan = {"settings_sha256": settings_sha256, "mtime_ns": changed}
    try:
        stored: dict[str, Any] = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    tasks = cut_tasks(files)
    if {key: stored.get(key) for key in plan} == plan:
        first_lines = stored["first_lines"]
    else:
        for entry in work.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        first_lines = first_line_numbers(tasks, workers)
        write_json_durably(work / "plan.json", {**plan, "first_lines": first_lines})
    numbers = iter(first_lines)
    return [
        Task(task.index, tuple(replace(segment, first_line=next(numbers)) for segment in task.segments))
        for task in tasks
    ]


def first_line_numbers(tasks: list[Task], workers: int) -> list[int]:
    """For every segment the number of its first line: where files are split, their line ends are counted first."""
    segments = [segment for task in tasks for segment in task.segments]
    split = [segment for segment in segments if not segment.is_whole]
    if len(split) < LINES_IN_POOL or workers == 1:
        counted = list(map(line_ends_before_next, split))
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            counted = pool.map(line_ends_before_next, split, chunksize=4)
    counts = iter(counted)
    numbers: list[int] = []
    number = 1
    for segment in segments:
        number = 1 if segment.start == 0 else number
        numbers.append(number)
        number += 0 if segment.is_whole else next(counts)
    return numbers


def line_ends_before_next(segment: Segment) -> int:
    """How far a segment moves the line number. The first line of a segment comes after the newlines before start - 1
    and one more, which is counted with the file's first segment."""
    begin = max(segment.start - 1, 0)
    return count_line_ends(segment.file.path, begin, segment.end - 1) + (1 if segment.start == 0 else 0)


def run_tasks(
    pending: list[Task], tasks: list[Task], settings: IngestSettings, workers: int, progress: Progress
) -> int:
    """Run the pending tasks in spawned processes; the first error ends them all. Returns the tokens written."""
    weights = {task.index: sum(segment.end - segment.start for segment in task.segments) for task in tasks}
    total = sum(weights.values())
    done = total - sum(weights[task.index] for task in pending)
    tokens = 0
    progress(done, total, tokens)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(pending)), context, initializer=start_worker, initargs=(settings,))
    try:
        queue = iter(pending)
        running: dict[Future[int], Task] = {}
        while True:
            while len(running) < 2 * workers and (task := next(queue, None)) is not None:
                running[pool.submit(run_task_in_worker, task)] = task
            if not running:
                return tokens
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                tokens += future.result()
                done += weights[task.index]
                progress(done, total, tokens)
    finally:
        processes = list((pool._processes or {}).values())
        for process in processes if running else ():
            process.terminate()  # an error or an interrupt: what is unfinished will be done again
        pool.shutdown(wait=True, cancel_futures=True)
