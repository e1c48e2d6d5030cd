"""A release folder: one sub-folder a revision, `main` for the final one, `data_order`, and an index.

A run that is killed at any moment leaves whole revisions and `.work`; the next one makes what is missing and ends in
the same bytes. Revisions of checkpoints that were deleted meanwhile stay."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeld, try_lock, write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json
from megatron_ettin.convert.verify import Logits
from megatron_ettin.release.chain import Chain, Revision
from megatron_ettin.release.finish import DrawCurve, WriteOrder, write_main, write_orders
from megatron_ettin.release.record import RECORD, Options, is_released, made_of, read_record
from megatron_ettin.release.revision import WORK, Job, Outcome, make_all, worker_count

RESERVED = {"main", "data_order", WORK, RECORD}


@dataclass(frozen=True)
class Plan:
    """What `ettin release` was asked for. The callables belong to floors that conversion does not see."""

    chain: Chain
    out: Path
    options: Options
    our_logits: Logits
    write_order: WriteOrder | None
    draw_curve: DrawCurve
    workers: int | None = None
    recheck: bool = False  # compare checksums of what is released already, not its sizes alone
    replace: bool = False  # revisions made of other weights too
    repository: str | None = None  # OWNER/NAME of the hub, for the code in the card of `main`


@dataclass
class Result:
    """Names of revisions, oldest first. `failed`: name -> why. `notes`: what to tell besides."""

    revisions: list[str]
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_each: dict[str, float] = field(default_factory=dict)
    workers: int = 0


def release(plan: Plan, report: Callable[[int, int, Outcome | None], None] | None = None) -> Result:
    """Make what is missing of the release. Raises UserError (before anything is written where it can) and WorkerLost.

    `report(done, all, outcome)` is called at the start and after each revision."""
    began = time.perf_counter()
    revisions = plan.chain.revisions()
    with _locked(plan.out, _identity(plan)):
        result = Result([revision.name for revision in revisions], notes=list(plan.chain.notes))
        _make_revisions(plan, revisions, result, report)
        if plan.write_order is not None:
            write_orders(plan.out, plan.chain, revisions, plan.write_order, result.orders, result.notes)
        if revisions[-1].name not in result.failed:
            _finish(plan, revisions, result)
        shutil.rmtree(plan.out / WORK, ignore_errors=True)
    result.seconds = time.perf_counter() - began
    return result


def _make_revisions(
    plan: Plan, revisions: list[Revision], result: Result, report: Callable[[int, int, Outcome | None], None] | None
) -> None:
    wanted = _wanted(plan, revisions, result)
    if report is not None:
        report(0, len(wanted), None)
    if not wanted:
        return
    result.workers = worker_count(plan.workers, len(wanted), plan.chain.runs[-1].config.model)
    for done, outcome in enumerate(make_all(wanted, result.workers), start=1):
        result.seconds_each[outcome.name] = outcome.seconds
        if outcome.error is None:
            result.made.append(outcome.name)
        else:
            result.failed[outcome.name] = outcome.error
        if report is not None:
            report(done, len(wanted), outcome)


def _wanted(plan: Plan, revisions: list[Revision], result: Result) -> list[Job]:
    """What is missing or differs. Raises UserError where a revision there is of other weights: most likely of a run
    that differs in no more than its learning rate, and the two would lie mixed."""
    wanted = []
    for revision in revisions:
        folder = plan.out / revision.name
        try:
            made = made_of(revision, plan.options)
        except UserError as error:
            result.failed[revision.name] = str(error)
            continue
        if is_released(folder, made, plan.recheck):
            result.kept.append(revision.name)
            continue
        if not plan.replace and read_record(folder).get("source", made["source"]) != made["source"]:
            raise UserError(
                f"--out {plan.out}: its {revision.name} is of other weights than {revision.checkpoint or 'these'};"
                " name a new folder, or --replace to make it anew"
            )
        wanted.append(Job(revision, plan.out, plan.options, plan.our_logits))
    return wanted


def _finish(plan: Plan, revisions: list[Revision], result: Result) -> None:
    """`main` and the index, over all revisions that are there, those of deleted checkpoints too."""
    names = [revision.name for revision in revisions if revision.name not in result.failed]
    records = sorted_records(plan.out, names)
    write_main(plan.out, plan.chain, records, result.orders, plan.draw_curve, result.notes, plan.repository)
    index = {
        **_identity(plan),
        "main": revisions[-1].name,
        "revisions": [{key: one[key] for key in ("revision", "phase", "step", "total_tokens")} for one in records],
        "data_order": result.orders,
    }
    _write_index(plan.out, index)


def sorted_records(out: Path, names: list[str]) -> list[dict[str, Any]]:
    """release.json and parity.json of every revision in `out`, in the order of the chain; `names` are known to be
    whole, others are of checkpoints that the runs no longer have."""
    order = {"pretrain": 0, "extend": 1, "decay": 2, "cross": 3}
    records = []
    for folder in out.iterdir():
        record = read_record(folder) if folder.is_dir() and folder.name not in RESERVED else {}
        if record and "parity.json" in record["files"]:
            record["parity"] = load_json((folder / "parity.json").read_text(encoding="utf-8"))
            records.append(record)
    return sorted(records, key=lambda one: (order.get(one["phase"], 9), one["step"]))


def _identity(plan: Plan) -> dict[str, Any]:
    """What all revisions of a release have in common."""
    config = plan.chain.runs[-1].config
    return {
        **{"format": 1, "name": plan.options.name, "objective": config.run.objective, "size": config.run.size},
        **{"dtype": plan.options.dtype, "seed": plan.chain.runs[0].config.run.seed},
    }


@contextlib.contextmanager
def _locked(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Make or enter the release folder, one process at a time. Raises UserError where it holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is there; name a folder")
    index = out / RECORD
    if out.is_dir() and any(out.iterdir()) and not index.is_file():
        raise UserError(f"--out {out}: not empty and no release; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    try:
        try:
            why = try_lock(handle)
        except LockHeld:
            raise UserError(f"--out {out}: another `ettin release` is writing there; wait for it") from None
        if why is not None:
            log_warning(f"warning: {out}: its file system has no locks ({why}); start no second release into it")
        _check_index(index, identity)
        if not index.is_file():
            _write_index(out, identity)
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / WORK).mkdir()
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); run it again later") from None
    finally:
        os.close(handle)


def _check_index(index: Path, identity: dict[str, Any]) -> None:
    if not index.is_file():
        return
    try:
        found = load_json(index.read_text(encoding="utf-8"))
        differing = [key for key in ("name", "objective", "size") if found[key] != identity[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index}: unreadable; name another folder") from None
    for key in differing:
        raise UserError(
            f"--out {index.parent}: holds the release of {key} {found[key]}, this one has {identity[key]}; name a new"
            " folder"
        )


def _write_index(out: Path, index: dict[str, Any]) -> None:
    """Replaced only where it changes."""
    text = json.dumps(index, indent=1) + "\n"
    path = out / RECORD
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
