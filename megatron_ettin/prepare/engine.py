"""Running the tasks of a plan: in this process, or by datatrove's executors on local processes, a SLURM cluster or Ray.

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

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.processes import serve_parent
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ettin.prepare.frozen_plan import load_tasks
from megatron_ettin.prepare.inputs import Task
from megatron_ettin.prepare.task import SPLITS, IngestSettings, record_path, run_task

Progress = Callable[[int, int, int], None]  # input bytes done, of how many, tokens written
POLL_SECONDS = 0.25
POLLED_TASKS_A_SECOND = 4_000
WORKER_LOST = signal.SIGUSR2  # to the main thread
LOST = "a worker process died (out of memory?); run the same command again, with fewer --workers, to continue"


@dataclass(frozen=True)
class IngestStep:
    """One task, as a step of datatrove's pipeline; pickles small, the task itself is in prepare.json."""

    settings: IngestSettings

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
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
    return load_tokenizer(work / "tokenizer")


@lru_cache(maxsize=1)
def prepare_process() -> None:
    """Once a worker process: one thread of tokenizing, Ctrl-C left to the parent, an end with it."""
    import multiprocess

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocess.parent_process()
    if parent is not None:
        serve_parent(parent.sentinel)


def error_path(work: Path, rank: int) -> Path:
    """Where a task that failed leaves its one line."""
    return work / "errors" / f"{rank:05d}"


@dataclass
class Counter:
    """How far the tasks of a plan are, by their records: `open` holds the numbers of those that are not done."""

    work: Path
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.weights = {task.index: sum(s.end - s.start for s in task.segments) for task in self.tasks}
        self.total = sum(self.weights.values())
        self.open = {i for i in self.weights if not record_path(self.work, i).is_file()}
        self.resumed = len(self.weights) - len(self.open)  # tasks done before
        self.tokens = 0  # of the tasks that finish while this counts

    @property
    def done(self) -> int:
        """Bytes of input that are done."""
        return self.total - sum(self.weights[i] for i in self.open)

    def refresh(self) -> None:
        there = set(os.listdir(self.work / "tasks"))  # one question, not one a task: file systems are shared
        for index in [i for i in self.open if record_path(self.work, i).name in there]:
            record = json.loads(record_path(self.work, index).read_text(encoding="utf-8"))
            self.tokens += sum(record[split]["tokens"] for split in SPLITS if split in record)
            self.open.discard(index)

    def pending(self) -> list[Task]:
        return [task for task in self.tasks if task.index in self.open]


def run_here(settings: IngestSettings, counter: Counter, progress: Progress) -> None:
    """One task after another in this process: one worker is one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    remove_unfinished(settings.work)
    tokenizer = tokenizer_of(settings.work)
    progress(counter.done, counter.total, counter.tokens)
    for task in counter.pending():
        run_task(task, settings, tokenizer)
        counter.refresh()
        progress(counter.done, counter.total, counter.tokens)


def run_local(settings: IngestSettings, counter: Counter, workers: int, progress: Progress) -> None:
    """Several processes on this machine. The first error of a task ends them all and is raised."""
    from megatron_ettin.prepare.executors import local_executor

    work = settings.work
    remove_unfinished(work)
    agree_on_completed(work, counter)
    count = min(workers, len(counter.open))
    executor = local_executor(IngestStep(settings), len(counter.tasks), count, work / "log")
    watch = Watch(counter, progress)
    with watch:
        try:
            executor.run()
        except KeyboardInterrupt:
            if watch.lost:
                raise UserError(LOST) from None
            raise
        finally:
            end_children()
    counter.refresh()


def end_children() -> None:
    """Whatever the pool left when it was interrupted: a process that nobody ends is waited for at exit."""
    import multiprocess

    for child in multiprocess.active_children():
        child.terminate()
        child.join(5)


def remove_unfinished(work: Path) -> None:
    """Shards of processes that were killed; under the lock, so that nobody is writing them. And errors told before."""
    for path in (work / "tasks").glob(".tmp-*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(work / "errors", ignore_errors=True)


def run_on_ray(settings: IngestSettings, counter: Counter, workers: int, progress: Progress) -> None:
    """On a Ray cluster that shares this file system. What failed is told by `raise_first_error`."""
    from megatron_ettin.prepare.executors import ray_executor

    agree_on_completed(settings.work, counter)
    progress(counter.done, counter.total, counter.tokens)
    ray_executor(IngestStep(settings), len(counter.tasks), workers, settings.work / "log").run()
    counter.refresh()
    progress(counter.done, counter.total, counter.tokens)


class Watch:
    """While local processes work: report progress, and notice a process that was killed. The pool would put another in
    its place and wait for the lost task for ever; the main thread is interrupted instead, and `lost` is set. By a
    signal of its own: where a shell started the command in the background, SIGINT is ignored. After Ctrl-C nothing is
    lost: the pool ends its workers.
    """

    def __init__(self, counter: Counter, progress: Progress) -> None:
        self.counter, self.progress = counter, progress
        self.lost = self._interrupted = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch workers", daemon=True)

    def __enter__(self) -> None:
        self._handlers = {WORKER_LOST: signal.signal(WORKER_LOST, self._tell_lost)}
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._tell_interrupted)
        for stale in running_files(self.counter.work):
            stale.unlink(missing_ok=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _tell_interrupted(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _tell_lost(self, number: int, frame: object) -> None:
        if not self._interrupted:
            self.lost = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._end.wait(max(POLL_SECONDS, len(self.counter.tasks) / POLLED_TASKS_A_SECOND)):
            self.counter.refresh()
            self.progress(self.counter.done, self.counter.total, self.counter.tokens)
            if any((self.counter.work / "errors").glob("*")):
                continue  # a task failed: the pool ends the others, which are not lost
            if any(is_lost(file) for file in running_files(self.counter.work)):
                signal.pthread_kill(threading.main_thread().ident or 0, WORKER_LOST)
                return


def running_files(work: Path) -> list[Path]:
    return list((work / "running").glob("*"))


def is_lost(file: Path) -> bool:
    """Whether the process that works on a task is gone without having put the task down."""
    try:
        pid = int(file.read_text())
        os.kill(pid, 0)
    except (ValueError, PermissionError):
        return False  # being written; somebody's
    except FileNotFoundError:
        return False
    except ProcessLookupError:
        return file.exists()
    return False


def agree_on_completed(work: Path, counter: Counter) -> None:
    """Make datatrove's marks say what the records say."""
    marks = work / "log" / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    for task in counter.tasks:
        mark = marks / f"{task.index:05d}"
        if task.index in counter.open:
            mark.unlink(missing_ok=True)
        elif not mark.exists():
            mark.touch()


def raise_first_error(work: Path, counter: Counter) -> None:
    """UserError where tasks are left over: the line of the first that failed."""
    counter.refresh()
    if not counter.open:
        return
    failed = sorted((work / "errors").glob("*"))
    reason = failed[0].read_text() if failed else "their processes ended without a word; the logs are in " + str(work)
    raise UserError(f"{len(counter.open)} of {len(counter.tasks)} tasks are not done: {reason}")
