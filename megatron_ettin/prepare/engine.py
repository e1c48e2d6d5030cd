"""Run the tasks of a plan: in this process, or by datatrove's executors on local processes, a SLURM cluster or Ray.

A task is a rank of datatrove. It is done when its record lies in `tasks/`, whoever ran it; datatrove's own marks are
brought in line with the records before each launch. Its logs go to `log/` in the working directory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError, serve_parent
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare.frozen_plan import load_tasks
from megatron_ettin.prepare.inputs import Task
from megatron_ettin.prepare.task import SPLITS, IngestSettings, record_path, run_task

# input bytes done, of how many, tokens written
Progress = Callable[[int, int, int], None]
POLL_SECONDS = 0.25
POLLED_TASKS_A_SECOND = 4_000
# to the main thread
WORKER_LOST = signal.SIGUSR2
LOST = "a worker process died (out of memory?); run the same command again, with fewer --workers, to continue"


@dataclass(frozen=True)
class IngestStep:
    """Step of datatrove's pipeline that runs one task. It pickles small: the task itself is in prepare.json."""

    settings: IngestSettings

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Run task `rank`, and leave its error in a file where it fails."""
        work = self.settings.work
        prepare_process()
        running, failed = work / "running" / str(rank), error_path(work, rank)
        running.parent.mkdir(exist_ok=True)
        running.write_text(str(os.getpid()))
        try:
            run_task(load_tasks(work)[rank], self.settings, tokenizer_of(work))
            failed.unlink(missing_ok=True)
        except Exception as error:
            failed.parent.mkdir(exist_ok=True)
            failed.write_text(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise
        finally:
            running.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def tokenizer_of(work: Path) -> Tokenizer:
    """Load the tokenizer that the working directory holds, once in a process."""
    return load_tokenizer(work / "tokenizer")


@lru_cache(maxsize=1)
def prepare_process() -> None:
    """Set a worker process up, once: one thread of tokenizing, Ctrl-C left to the parent, an end with it."""
    import multiprocess

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocess.parent_process()
    if parent is not None:
        serve_parent(parent.sentinel)


def error_path(work: Path, rank: int) -> Path:
    """Return the file in which a task that failed leaves its one line."""
    return work / "errors" / f"{rank:05d}"


@dataclass
class Counter:
    """Progress of a plan's tasks, by their records. `open` holds the numbers of those that are not done."""

    work: Path
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.weights = {task.index: sum(s.end - s.start for s in task.segments) for task in self.tasks}
        self.total = sum(self.weights.values())
        self.open = {i for i in self.weights if not record_path(self.work, i).is_file()}
        # tasks done before
        self.resumed = len(self.weights) - len(self.open)
        # of the tasks that finish while this counts
        self.tokens = 0

    @property
    def done(self) -> int:
        """Return the bytes of input that are done."""
        return self.total - sum(self.weights[i] for i in self.open)

    def refresh(self) -> None:
        """Read the records that were written since."""
        # one question, not one a task: file systems are shared
        there = set(os.listdir(self.work / "tasks"))
        for index in [i for i in self.open if record_path(self.work, i).name in there]:
            record = json.loads(record_path(self.work, index).read_text(encoding="utf-8"))
            self.tokens += sum(record[split]["tokens"] for split in SPLITS if split in record)
            self.open.discard(index)

    def pending(self) -> list[Task]:
        """Return the tasks that are not done."""
        return [task for task in self.tasks if task.index in self.open]


def run_here(settings: IngestSettings, counter: Counter, progress: Progress) -> None:
    """Run one task after another in this process: one worker is one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    remove_unfinished(settings.work)
    tokenizer = tokenizer_of(settings.work)
    progress(counter.done, counter.total, counter.tokens)
    for task in counter.pending():
        run_task(task, settings, tokenizer)
        counter.refresh()
        progress(counter.done, counter.total, counter.tokens)


def run_local(settings: IngestSettings, counter: Counter, workers: int, progress: Progress) -> None:
    """Run the tasks in several processes of this machine. The first error of a task ends them all and is raised."""
    from megatron_ettin.prepare.executors import local_executor

    work = settings.work
    remove_unfinished(work)
    agree_on_completed(work, counter)
    count = min(workers, len(counter.open))
    executor = local_executor(IngestStep(settings), len(counter.tasks), count, work / "log")
    monitor = WorkerMonitor(counter, progress)
    with monitor:
        try:
            executor.run()
        except KeyboardInterrupt:
            if monitor.lost:
                raise UserError(LOST) from None
            raise
        finally:
            end_children()
    counter.refresh()


def end_children() -> None:
    """End what the pool left when it was interrupted, because Python waits for such processes at exit."""
    import multiprocess

    for child in multiprocess.active_children():
        child.terminate()
        child.join(5)


def remove_unfinished(work: Path) -> None:
    """Remove shards of processes that were killed, and old errors. The lock is held, so nobody writes them."""
    for path in (work / "tasks").glob(".tmp-*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(work / "errors", ignore_errors=True)


def run_on_ray(settings: IngestSettings, counter: Counter, workers: int, progress: Progress) -> None:
    """Run the tasks on a Ray cluster that shares this file system. `raise_first_error` reports what failed."""
    from megatron_ettin.prepare.executors import ray_executor

    agree_on_completed(settings.work, counter)
    progress(counter.done, counter.total, counter.tokens)
    ray_executor(IngestStep(settings), len(counter.tasks), workers, settings.work / "log").run()
    counter.refresh()
    progress(counter.done, counter.total, counter.tokens)


class WorkerMonitor:
    """Report progress while local processes work, and notice a process that was killed.

    The pool would start another process and wait for the lost task for ever. The main thread is interrupted instead,
    and `lost` is set. The interrupt is a signal of its own, because SIGINT is ignored where a shell started the command
    in the background. After Ctrl-C nothing is lost: the pool ends its workers.
    """

    def __init__(self, counter: Counter, progress: Progress) -> None:
        self.counter, self.progress = counter, progress
        self.lost = self._interrupted = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch workers", daemon=True)

    def __enter__(self) -> None:
        self._handlers = {WORKER_LOST: signal.signal(WORKER_LOST, self._on_worker_lost)}
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        for stale in running_files(self.counter.work):
            stale.unlink(missing_ok=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _on_worker_lost(self, number: int, frame: object) -> None:
        if not self._interrupted:
            self.lost = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._end.wait(max(POLL_SECONDS, len(self.counter.tasks) / POLLED_TASKS_A_SECOND)):
            self.counter.refresh()
            self.progress(self.counter.done, self.counter.total, self.counter.tokens)
            if any((self.counter.work / "errors").glob("*")):
                # a task failed: the pool ends the others, which are not lost
                continue
            if any(is_lost(file) for file in running_files(self.counter.work)):
                signal.pthread_kill(threading.main_thread().ident or 0, WORKER_LOST)
                return


def running_files(work: Path) -> list[Path]:
    """List the files that name the tasks being worked on, each with the worker's process id."""
    return list((work / "running").glob("*"))


def is_lost(file: Path) -> bool:
    """Return whether the process that works on a task is gone although the task is not done."""
    try:
        pid = int(file.read_text())
        os.kill(pid, 0)
    except (ValueError, PermissionError):
        # being written; somebody's
        return False
    except FileNotFoundError:
        return False
    except ProcessLookupError:
        return file.exists()
    return False


def agree_on_completed(work: Path, counter: Counter) -> None:
    """Bring datatrove's marks of completed tasks in line with the records."""
    marks = work / "log" / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    for task in counter.tasks:
        mark = marks / f"{task.index:05d}"
        if task.index in counter.open:
            mark.unlink(missing_ok=True)
        elif not mark.exists():
            mark.touch()


def raise_first_error(work: Path, counter: Counter) -> None:
    """Raise UserError with the line of the first task that failed, where tasks are left over."""
    counter.refresh()
    if not counter.open:
        return
    failed = sorted((work / "errors").glob("*"))
    reason = failed[0].read_text() if failed else "their processes ended without a word; the logs are in " + str(work)
    raise UserError(f"{len(counter.open)} of {len(counter.tasks)} tasks are not done: {reason}")
