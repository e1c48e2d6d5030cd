"""Freeze the settings, the inputs and the tasks of an unfinished dataset in prepare.json, at the first launch.

Every later launch, with any number of workers and any executor, works on these tasks. Task 17 always means the same
bytes of the same files, so the record "task 17 is done" stays true. Once a task is finished, an input that has changed
since is refused by name. `--replan` makes new tasks and keeps the finished ones whose input has not changed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.base.parsing import load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.manifest import SHARD_SUFFIXES
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.inputs import Task, cut_tasks
from megatron_ettin.prepare.task import SPLITS, record_path, shard_prefixes

FILE_NAME = "prepare.json"
VERSION = 1


def freeze(work: Path, settings: dict[str, Any], files: list[InputFile], replan: bool) -> list[Task]:
    """Return the frozen tasks of a work folder. Make and freeze new ones if there are none or if anything has changed.

    Args:
        work: the work folder of the dataset.
        settings: the settings of `ettin prepare` that decide the content.
        files: the input files, in order.
        replan: whether to make new tasks even if some are finished. Without finished tasks they are made in any case.

    Raises:
        UserError: without `replan`, a plan with finished tasks was made for other settings or inputs.
    """
    stored = read_plan(work)
    wanted = wanted_plan(settings, files)
    difference = first_difference(stored, wanted) if stored else ""
    if stored and not difference:
        return tasks_of(stored)
    kept = 0
    tasks = cut_tasks(files)
    if stored and any(record_path(work, i).is_file() for i in range(stored["num_tasks"])):
        if not replan:
            raise UserError(
                f"{work}: begun with other settings or inputs: {difference}; run what it was begun with, or add "
                "--replan: finished tasks whose input did not change are kept"
            )
        # these shards are numbered by the old plan
        shutil.rmtree(work / "dataset", ignore_errors=True)
        shutil.rmtree(work / "errors", ignore_errors=True)
        kept = keep_unchanged(work, stored, wanted, tasks)
    if not kept:
        empty(work)
    # by number, so that each of 100,000 files is named only once
    number = {file: i for i, file in enumerate(files)}
    cut = [[[number[s.file], s.start, s.end] for s in task.segments] for task in tasks]
    write_json(work / FILE_NAME, {**wanted, "num_tasks": len(tasks), "tasks": cut})
    return tasks


def read_plan(work: Path) -> dict[str, Any] | None:
    """Return the content of prepare.json; None if it is missing, unreadable or of another version."""
    try:
        stored: dict[str, Any] = load_json((work / FILE_NAME).read_text(encoding="utf-8"))
        return stored if stored["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=1)
def load_tasks(work: Path) -> list[Task]:
    """Read the frozen tasks, once in each worker process. Raises UserError if there are none."""
    stored = read_plan(work)
    if stored is None:
        raise UserError(f"{work / FILE_NAME}: missing or damaged; run `ettin prepare` again")
    return tasks_of(stored)


def tasks_of(stored: dict[str, Any]) -> list[Task]:
    """Return the tasks of a stored plan."""
    files = [restored_file(raw) for raw in stored["inputs"]]
    return [
        Task(i, tuple(Segment(files[file], start, end) for file, start, end in segments))
        for i, segments in enumerate(stored["tasks"])
    ]


def first_difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe the first difference between a stored plan and the wanted one, for a message; empty if there is none."""
    before, now = stored["settings"], wanted["settings"]
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    old = {raw["url"]: raw for raw in stored["inputs"]}
    new = {raw["url"]: raw for raw in wanted["inputs"]}
    for url in {**old, **new}:
        if url not in new:
            return f"{url} is gone"
        if url not in old:
            return f"{url} was added"
        if old[url]["bytes"] != new[url]["bytes"]:
            return f"{url} had {old[url]['bytes']} bytes and has {new[url]['bytes']}"
        if old[url] != new[url]:
            return f"{url} was written since"
    return "" if stored["inputs"] == wanted["inputs"] else "the order of the inputs"


def keep_unchanged(work: Path, stored: dict[str, Any], wanted: dict[str, Any], tasks: list[Task]) -> int:
    """Remove the records and shards of finished tasks, except of tasks that the new plan has unchanged.

    Args:
        work: the work folder.
        stored: the old plan.
        wanted: settings and inputs of the new plan.
        tasks: tasks of the new plan.

    Returns:
        The number of finished tasks that are kept.
    """
    before = tasks_of(stored)
    kept = 0
    for i, task in enumerate(before):
        same = stored["settings"] == wanted["settings"] and i < len(tasks) and task == tasks[i]
        if same and is_whole(work, i):
            kept += 1
            continue
        record_path(work, i).unlink(missing_ok=True)
        for prefix in shard_prefixes(work, i):
            for suffix in SHARD_SUFFIXES:
                prefix.with_name(prefix.name + suffix).unlink(missing_ok=True)
    return kept


def is_whole(work: Path, index: int) -> bool:
    """Return whether all shards of a finished task exist with the sizes in its record."""
    try:
        record = load_json(record_path(work, index).read_text(encoding="utf-8"))
        return all(
            path_in(prefix.parent, prefix.name + suffix, record_path(work, index)).stat().st_size == file["bytes"]
            for split, prefix in zip(SPLITS, shard_prefixes(work, index), strict=True)
            for suffix, file in record.get(split, {}).get("files", {}).items()
        )
    except (OSError, ValueError, KeyError, UserError):
        return False


def changed_since(work: Path, settings: dict[str, Any], files: list[InputFile]) -> str:
    """Describe the first difference to the frozen settings and inputs; empty if there is none or nothing is frozen."""
    stored = read_plan(work)
    return first_difference(stored, wanted_plan(settings, files)) if stored else ""


def stored_file(file: InputFile) -> dict[str, Any]:
    """Return a file as an entry of prepare.json, which has its format under `kind`."""
    return {"kind" if key == "format" else key: value for key, value in asdict(file).items()}


def restored_file(raw: dict[str, Any]) -> InputFile:
    """Return the file of an entry that `stored_file` made."""
    return InputFile(**{"format" if key == "kind" else key: value for key, value in raw.items()})


def wanted_plan(settings: dict[str, Any], files: list[InputFile]) -> dict[str, Any]:
    """Return the version, settings and inputs, which must equal those of a stored plan for it to be valid."""
    return {"version": VERSION, "settings": json.loads(json.dumps(settings)), "inputs": [stored_file(f) for f in files]}


def empty(work: Path) -> None:
    """Remove everything but the lock from the work folder."""
    for entry in work.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
