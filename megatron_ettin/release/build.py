"""Build a release folder: a sub-folder for each revision, `main`, `data_order`, and the index release.json.

`main` has the files of the final revision. A release that is killed leaves only complete revisions and `.work`; the
next release makes the missing revisions and ends in the same bytes. Revisions of deleted checkpoints stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeldError, fsync, publish_folder, try_lock, write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json, read_json_object
from megatron_ettin.base.paths import path_in
from megatron_ettin.convert.verify import Logits
from megatron_ettin.release.card import CURVE, dataset_names, main_card
from megatron_ettin.release.chain import PREFIXES, Revision, revisions_of
from megatron_ettin.release.revision import (
    RECORD,
    WORK,
    ReleaseOptions,
    RevisionResult,
    choose_worker_count,
    expected_record,
    is_released,
    make_revisions,
    read_record,
    write_record,
)
from megatron_ettin.runs import order_export
from megatron_ettin.runs.chain import PhaseChain
from megatron_ettin.runs.directory import RunDirectory

ORDERS = "data_order"
CARD = "README.md"
RESERVED = {"main", ORDERS, WORK, RECORD}
ProgressReport = Callable[[int, int, RevisionResult | None], None]
"""Arguments: number done, number in all, latest result (None at the start)."""
DrawCurve = Callable[[PhaseChain], bytes]
"""Draw the loss curve of a chain of phases; return PNG bytes. Raises UserError."""
MOST_ORDER_ROWS = 20_000_000
"""Most rows of a phase whose data order is written; a longer order is written only with `--order all`."""


@dataclass(frozen=True)
class ReleasePlan:
    """Request for a release. It has callables for the logits and the curve, whose packages may not be imported here."""

    chain: PhaseChain
    out: Path
    """The release folder."""
    options: ReleaseOptions
    our_logits: Logits
    draw_curve: DrawCurve
    orders: str = "auto"
    """Data orders to write: `auto` (those of at most MOST_ORDER_ROWS), `all` or `none`."""
    workers: int | None = None
    """Worker processes; None: as many as cores and memory allow."""
    recheck: bool = False
    """Compare the checksums of existing revisions, not only their file sizes."""
    replace: bool = False
    """Make a revision again if the existing one has other weights; without it, that raises UserError."""
    repository: str | None = None
    """OWNER/NAME on the hub, for the example code in the card of `main`; None: not pushed."""


@dataclass
class ReleaseResult:
    """The outcome of a release."""

    revisions: list[str]
    """Names of all revisions, oldest first."""
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Names of revisions that were complete already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a revision that could not be made -> reason."""
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Phase -> its data order, as release.json describes it."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user."""
    seconds: float = 0.0
    seconds_each: dict[str, float] = field(default_factory=dict)
    """Name of a revision that a worker handled -> seconds."""
    workers: int = 0
    """Worker processes used; 0 if nothing was missing."""


def release(plan: ReleasePlan, report: ProgressReport | None = None) -> ReleaseResult:
    """Make the missing revisions, then the data orders, `main` and the index.

    `main` and the index are written only if the last revision did not fail.

    Args:
        plan: the request.
        report: called at the start and after each revision.

    Raises:
        UserError: the chain has no checkpoint, or the folder cannot be used or holds other weights.
        WorkerLostError: a worker process was killed.
    """
    began = time.perf_counter()
    revisions = revisions_of(plan.chain)
    with _locked(plan.out, _identity(plan)):
        result = ReleaseResult([revision.name for revision in revisions], notes=list(plan.chain.notes))
        _make_revisions(plan, revisions, result, report)
        if plan.orders != "none":
            _write_orders(plan, revisions, result)
        if revisions[-1].name not in result.failed:
            records = _sorted_records(plan.out)
            _write_main(plan, records, result)
            keys = ("revision", "phase", "step", "total_tokens")
            index = {
                **_identity(plan),
                "main": records[-1]["revision"],
                "revisions": [{key: record[key] for key in keys} for record in records],
                ORDERS: result.orders,
            }
            _write_index(plan.out, index)
        shutil.rmtree(plan.out / WORK, ignore_errors=True)
    result.seconds = time.perf_counter() - began
    return result


def _make_revisions(
    plan: ReleasePlan, revisions: list[Revision], result: ReleaseResult, report: ProgressReport | None
) -> None:
    missing = _missing(plan, revisions, result)
    if report is not None:
        report(0, len(missing), None)
    if not missing:
        return
    result.workers = choose_worker_count(plan.workers, len(missing), plan.chain.runs[-1].config.model)
    made = make_revisions(missing, plan.out, plan.options, plan.our_logits, result.workers)
    for done, one in enumerate(made, start=1):
        result.seconds_each[one.name] = one.seconds
        if one.error is None:
            result.made.append(one.name)
        else:
            result.failed[one.name] = one.error
        if report is not None:
            report(done, len(missing), one)


def _missing(plan: ReleasePlan, revisions: list[Revision], result: ReleaseResult) -> list[Revision]:
    """Return the revisions that are missing or differ; add the others to `result` as kept or failed.

    Raises:
        UserError: an existing revision has other weights (most likely of a run with another learning rate) and
            `plan.replace` is not set. The release would mix the revisions of two models.
    """
    missing = []
    for revision in revisions:
        folder = plan.out / revision.name
        try:
            expected = expected_record(revision, plan.options)
        except UserError as error:
            result.failed[revision.name] = str(error)
            continue
        if is_released(folder, expected, plan.recheck):
            result.kept.append(revision.name)
            continue
        if not plan.replace and read_record(folder).get("source", expected["source"]) != expected["source"]:
            raise UserError(
                f"--out {plan.out}: its {revision.name} is of other weights than {revision.checkpoint or 'these'};"
                " name a new folder, or --replace to make it anew"
            )
        missing.append(revision)
    return missing


def _sorted_records(out: Path) -> list[dict[str, Any]]:
    """Return release.json of every revision in `out`, oldest first, with its parity.json under the key `parity`."""
    records = []
    for folder in out.iterdir():
        record = read_record(folder) if folder.is_dir() and folder.name not in RESERVED else {}
        if record and "parity.json" in record["files"]:
            record["parity"] = load_json((folder / "parity.json").read_text(encoding="utf-8"))
            records.append(record)
    rank = {phase: number for number, phase in enumerate(PREFIXES)}
    return sorted(records, key=lambda one: (rank.get(one["phase"], 9), one["step"]))


def _identity(plan: ReleasePlan) -> dict[str, Any]:
    """Return the index entries that all revisions of a release share."""
    config = plan.chain.runs[-1].config
    return {
        **{"format": 1, "name": plan.options.name, "objective": config.run.objective, "size": config.run.size},
        **{"dtype": plan.options.dtype, "seed": plan.chain.runs[0].config.run.seed},
    }


@contextlib.contextmanager
def _locked(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Make and lock the release folder, and empty `.work`. Raises UserError if it is in use or holds other files."""
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
            reason = try_lock(handle)
        except LockHeldError:
            raise UserError(f"--out {out}: another `ettin release` is writing there; wait for it") from None
        if reason is not None:
            log_warning(f"warning: {out}: its file system has no locks ({reason}); start no second release into it")
        if index.is_file():
            _check_index(index, identity)
        else:
            _write_index(out, identity)
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / WORK).mkdir()
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); run it again later") from None
    finally:
        os.close(handle)


def _check_index(index: Path, identity: dict[str, Any]) -> None:
    """Raise UserError if the folder holds the release of another model, or its index is unreadable."""
    try:
        there = load_json(index.read_text(encoding="utf-8"))
        differing = [key for key in ("name", "objective", "size") if there[key] != identity[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index}: unreadable; name another folder") from None
    if differing:
        key = differing[0]
        raise UserError(
            f"--out {index.parent}: holds the release of {key} {there[key]}, this one has {identity[key]}; name a new"
            " folder"
        )


def _write_index(out: Path, index: dict[str, Any]) -> None:
    """Write release.json of the release folder unless it has this content already."""
    text = json.dumps(index, indent=1) + "\n"
    path = out / RECORD
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def _write_main(plan: ReleasePlan, records: Sequence[dict[str, Any]], result: ReleaseResult) -> None:
    """Publish the last of `records` as `main`: hard links to its files, with the curve and the card of the release."""
    out, chain = plan.out, plan.chain
    final = path_in(out, records[-1]["revision"], out / RECORD)
    folder = out / WORK / "main"
    folder.mkdir()
    for name in records[-1]["files"]:
        if name != CARD:
            source = path_in(final, name, final / RECORD, nested=True)
            target = path_in(folder, name, final / RECORD, nested=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                # the file system has no hard links
                shutil.copyfile(source, target)
    try:
        (folder / CURVE).write_bytes(plan.draw_curve(chain))
    except UserError as error:
        result.notes.append(f"no training curve: {error}")
    card = (final / CARD).read_text(encoding="utf-8")
    text = main_card(card, chain, records, result.orders, (folder / CURVE).is_file(), plan.repository)
    (folder / CARD).write_text(text, encoding="utf-8")
    expected = {key: value for key, value in records[-1].items() if key not in ("files", "parity")}
    write_record(folder, expected)
    if read_record(out / "main") != read_record(folder):
        publish_folder(folder, out / "main", aside=folder.with_name("main.replaced"))


def _write_orders(plan: ReleasePlan, revisions: Sequence[Revision], result: ReleaseResult) -> None:
    """Write data_order/PHASE.parquet of every phase up to its last released step, and add its entry to `result`.

    If an order cannot be written or is too long, a note is added instead.
    """
    out = plan.out
    known = read_json_object(out / RECORD).get(ORDERS) or {}
    for run in plan.chain.runs:
        last_step = max((one.step for one in revisions if one.run is run), default=0)
        if not last_step:
            continue
        path = out / ORDERS / f"{run.phase}.parquet"
        if _is_written(path, known.get(run.phase), run, last_step):
            result.orders[run.phase] = known[run.phase]
            continue
        temporary = out / WORK / path.name
        try:
            written = _write_order(run.path, last_step, temporary, is_limited=plan.orders != "all")
        except UserError as error:
            result.notes.append(f"no data order of {run.phase}: {error}")
            continue
        if written is None:
            result.notes.append(f"no data order of {run.phase}: too many rows; --order all writes them all")
            continue
        path.parent.mkdir(exist_ok=True)
        fsync(temporary)
        os.replace(temporary, path)
        size = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        result.orders[run.phase] = {"file": path.name, "last_step": last_step, **written, **size}


def _write_order(run_dir: Path, last_step: int, out: Path, is_limited: bool) -> dict[str, Any] | None:
    """Write steps 1 to `last_step` of a run's data order as parquet, with datasets by name. Raises UserError.

    Returns:
        The number of chunks and the fingerprint; None, without writing, if `is_limited` and the order is too long.
    """
    config, corpus = order_export.open_run(run_dir)
    order_export.check_same_order(run_dir, corpus)
    steps = range(1, last_step + 1)
    rows = order_export.batch_sizes(config, corpus, steps).rows_before(last_step)
    if is_limited and rows > MOST_ORDER_ROWS:
        return None
    paths = [str(dataset.path) for dataset in corpus.datasets]
    names = dict(zip(paths, dataset_names(paths), strict=True))
    return {"chunks": order_export.write_parquet(out, config, corpus, steps, names), "fingerprint": corpus.fingerprint}


def _is_written(path: Path, entry: dict[str, Any] | None, run: RunDirectory, last_step: int) -> bool:
    """Return whether the file at `path` matches its index entry, and the entry matches the run and `last_step`."""
    if not entry or not path.is_file() or path.stat().st_size != entry.get("bytes"):
        return False
    return entry.get("last_step") == last_step and entry.get("fingerprint") == run.order.get("fingerprint")
