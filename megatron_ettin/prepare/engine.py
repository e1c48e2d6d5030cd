"""Run the tasks of a plan: in this process, in several of this machine, or by datatrove on a SLURM cluster or Ray.

A task is done when its record lies in `tasks/`, whichever process ran it. datatrove calls a task a rank. Its marks of
completed ranks are made to agree with the records before each launch, and its logs go to `log/`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError, serve_parent
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare.frozen_plan import load_tasks
from megatron_ettin.prepare.inputs import Task
from megatron_ettin.prepare.request import PrepareRequest
from megatron_ettin.prepare.task import SPLITS, record_path, run_task

# called with (input bytes done, input bytes in all, tokens written)
Progress = Callable[[int, int, int], None]
LOST = "a worker process died (out of memory?); run the same command again, with fewer --workers, to continue"


@dataclass(frozen=True)
class IngestStep:
    """Step of datatrove's pipeline that runs one task. Its pickle is small: tasks are read from prepare.json."""

    request: PrepareRequest

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Run task `rank`. If it fails, write its error to `error_path` and raise it again."""
        failed = error_path(self.request.work, rank)
        try:
            run_numbered(rank, self.request)
            failed.unlink(missing_ok=True)
        except Exception as error:
            failed.parent.mkdir(exist_ok=True)
            failed.write_text(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise


def run_numbered(index: int, request: PrepareRequest) -> int:
    """Run task `index` in a worker process with one tokenizer thread. Returns the number of tokens written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return run_task(load_tasks(request.work)[index], request, tokenizer_of(request.work))


@lru_cache(maxsize=1)
def tokenizer_of(work: Path) -> Tokenizer:
    """Load the tokenizer in a working directory, once per process."""
    return load_tokenizer(work / "tokenizer")


def error_path(work: Path, rank: int) -> Path:
    """Return the path of the file with a failed task's error message."""
    return work / "errors" / f"{rank:05d}"


@dataclass
class Counter:
    """Progress of a plan's tasks, from their records. `pending` is the set of the numbers of tasks not done."""

    work: Path
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.task_bytes = {task.index: sum(s.end - s.start for s in task.segments) for task in self.tasks}
        self.total = sum(self.task_bytes.values())
        self.pending = {i for i in self.task_bytes if not record_path(self.work, i).is_file()}
        # tasks done before
        self.resumed = len(self.task_bytes) - len(self.pending)
        # tokens of the tasks finished since this object was made
        self.tokens = 0

    @property
    def done(self) -> int:
        """Return the bytes of input of the finished tasks."""
        return self.total - sum(self.task_bytes[i] for i in self.pending)

    def finish(self, index: int, tokens: int) -> None:
        """Count a task that has written its record."""
        self.tokens += tokens
        self.pending.discard(index)

    def refresh(self) -> None:
        """Count the pending tasks whose records other processes have written."""
        # one listdir is less load for a shared file system than one stat per task
        there = set(os.listdir(self.work / "tasks"))
        for index in [i for i in self.pending if record_path(self.work, i).name in there]:
            record = json.loads(record_path(self.work, index).read_text(encoding="utf-8"))
            self.finish(index, sum(record[split]["tokens"] for split in SPLITS if split in record))


def run_here(request: PrepareRequest, counter: Counter, progress: Progress) -> None:
    """Run the pending tasks one after another in this process, with one tokenizer thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    remove_unfinished(request.work)
    # not `tokenizer_of`, which caches: this process may make another dataset at the same path later
    tokenizer = load_tokenizer(request.work / "tokenizer")
    progress(counter.done, counter.total, counter.tokens)
    for task in [task for task in counter.tasks if task.index in counter.pending]:
        counter.finish(task.index, run_task(task, request, tokenizer))
        progress(counter.done, counter.total, counter.tokens)


def run_local(request: PrepareRequest, counter: Counter, workers: int, progress: Progress) -> None:
    """Run the pending tasks in several processes of this host. The first error ends all of them and is raised."""
    remove_unfinished(request.work)
    progress(counter.done, counter.total, counter.tokens)
    # forked processes would inherit the parent's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=serve_parent) as pool:
        try:
            running = {pool.submit(run_numbered, index, request): index for index in sorted(counter.pending)}
            for done in as_completed(running):
                counter.finish(running[done], done.result())
                progress(counter.done, counter.total, counter.tokens)
        except BaseException as error:
            # otherwise the pool would wait for the running tasks, which take minutes
            for process in list(pool._processes.values()):
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(LOST) from None
            raise


def remove_unfinished(work: Path) -> None:
    """Remove shards of killed processes and old error files. The caller holds the lock, so no process writes them."""
    for path in (work / "tasks").glob(".tmp-*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(work / "errors", ignore_errors=True)


def run_on_ray(request: PrepareRequest, counter: Counter, workers: int, progress: Progress) -> None:
    """Run the pending tasks on a Ray cluster that shares this file system. `raise_first_error` reports failed ones."""
    from megatron_ettin.prepare.executors import ray_executor

    sync_completion_marks(request.work, counter)
    progress(counter.done, counter.total, counter.tokens)
    ray_executor(IngestStep(request), len(counter.tasks), workers, request.work / "log").run()
    counter.refresh()
    progress(counter.done, counter.total, counter.tokens)


def sync_completion_marks(work: Path, counter: Counter) -> None:
    """Make datatrove's marks of completed tasks, which it skips, agree with the records."""
    marks = work / "log" / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    for task in counter.tasks:
        mark = marks / f"{task.index:05d}"
        if task.index in counter.pending:
            mark.unlink(missing_ok=True)
        elif not mark.exists():
            mark.touch()


def raise_first_error(work: Path, counter: Counter) -> None:
    """Raise UserError with the first failed task's error if a task is not done."""
    counter.refresh()
    if not counter.pending:
        return
    failed = sorted((work / "errors").glob("*"))
    reason = failed[0].read_text() if failed else "their processes ended without a word; the logs are in " + str(work)
    raise UserError(f"{len(counter.pending)} of {len(counter.tasks)} tasks are not done: {reason}")
