"""Write the parts of a release that are not revisions: `main`, its card and curve, and the data orders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync
from megatron_ettin.base.parsing import load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.release.card import CURVE, main_card
from megatron_ettin.release.chain import PhaseRun, Revision
from megatron_ettin.release.plan import WORK, ReleasePlan, ReleaseResult, WriteOrder
from megatron_ettin.release.record import RECORD, read_record, write_record
from megatron_ettin.release.revision import publish_revision

ORDERS = "data_order"
CARD = "README.md"


def write_main(plan: ReleasePlan, records: Sequence[dict[str, Any]], result: ReleaseResult) -> None:
    """Publish the last of `records` as `main`: its files by hard links, with the card of the whole release."""
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
        (folder / CURVE).write_bytes(plan.draw_curve([run.path for run in chain.runs]))
    except UserError as error:
        result.notes.append(f"no training curve: {error}")
    card = (final / CARD).read_text(encoding="utf-8")
    text = main_card(card, chain, records, result.orders, (folder / CURVE).is_file(), plan.repository)
    (folder / CARD).write_text(text, encoding="utf-8")
    expected = {key: value for key, value in records[-1].items() if key not in ("files", "parity")}
    write_record(folder, expected)
    if read_record(out / "main") != read_record(folder):
        publish_revision(folder, out / "main")


def write_orders(
    plan: ReleasePlan, write_order: WriteOrder, revisions: Sequence[Revision], result: ReleaseResult
) -> None:
    """Write data_order/PHASE.parquet of every phase up to its last released step.

    An order that cannot be written gives a note.
    """
    out = plan.out
    try:
        known = load_json((out / RECORD).read_text(encoding="utf-8")).get(ORDERS) or {}
    except (OSError, ValueError):
        known = {}
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
            written = write_order(run.path, last_step, temporary)
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


def _is_written(path: Path, entry: dict[str, Any] | None, run: PhaseRun, last_step: int) -> bool:
    """Return whether the order of a phase is there as the index describes it and as the run has it now."""
    if not entry or not path.is_file() or path.stat().st_size != entry.get("bytes"):
        return False
    try:
        fingerprint = load_json((run.path / "order.json").read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError):
        return False
    return entry.get("last_step") == last_step and entry.get("fingerprint") == fingerprint
