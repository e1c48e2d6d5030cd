"""The parts of a release that are not revisions: `main`, its card and picture, and the data order of every phase."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync
from megatron_ettin.base.parsing import load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.release.card import CURVE, main_card
from megatron_ettin.release.chain import Chain, PhaseRun, Revision
from megatron_ettin.release.record import RECORD, read_record, write_record
from megatron_ettin.release.revision import WORK, put

ORDERS = "data_order"
CARD = "README.md"
DrawCurve = Callable[[list[Path]], bytes]  # run directories, phases in order -> a PNG; raises UserError
# (run directory, last step, file to write) -> what was written, or None where that would be too much; raises UserError
WriteOrder = Callable[[Path, int, Path], dict[str, Any] | None]


def write_main(
    out: Path,
    chain: Chain,
    records: Sequence[dict[str, Any]],
    orders: dict[str, dict[str, Any]],
    draw_curve: DrawCurve,
    notes: list[str],
    repository: str | None = None,
) -> None:
    """The last of `records` under the name `main`: its files by hard links, with the card of the whole release."""
    final = path_in(out, records[-1]["revision"], out / RECORD)
    folder = out / WORK / "main"
    folder.mkdir()
    for name in records[-1]["files"]:
        if name != CARD:
            _link(path_in(final, name, final / RECORD, nested=True), path_in(folder, name, final / RECORD, nested=True))
    try:
        (folder / CURVE).write_bytes(draw_curve([run.path for run in chain.runs]))
    except UserError as error:
        notes.append(f"no training curve: {error}")
    card = (final / CARD).read_text(encoding="utf-8")
    text = main_card(card, chain, records, orders, (folder / CURVE).is_file(), repository)
    (folder / CARD).write_text(text, encoding="utf-8")
    made = {key: value for key, value in records[-1].items() if key not in ("files", "parity")}
    write_record(folder, made)
    if read_record(out / "main") != read_record(folder):
        put(folder, out / "main")


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_orders(
    out: Path,
    chain: Chain,
    revisions: Sequence[Revision],
    write_order: WriteOrder,
    orders: dict[str, dict[str, Any]],
    notes: list[str],
) -> None:
    """data_order/PHASE.parquet of every phase up to its last released step. One that cannot be written is told of."""
    known = _index(out).get(ORDERS) or {}
    for run in chain.runs:
        last_step = max((one.step for one in revisions if one.run is run), default=0)
        if not last_step:
            continue
        path = out / ORDERS / f"{run.phase}.parquet"
        if _is_written(path, known.get(run.phase), run, last_step):
            orders[run.phase] = known[run.phase]
            continue
        beside = out / WORK / path.name
        try:
            written = write_order(run.path, last_step, beside)
        except UserError as error:
            notes.append(f"no data order of {run.phase}: {error}")
            continue
        if written is None:
            notes.append(f"no data order of {run.phase}: too many rows; --order all writes them all")
            continue
        path.parent.mkdir(exist_ok=True)
        fsync(beside)
        os.replace(beside, path)
        size = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        orders[run.phase] = {"file": path.name, "last_step": last_step, **written, **size}


def _is_written(path: Path, entry: dict[str, Any] | None, run: PhaseRun, last_step: int) -> bool:
    if not entry or not path.is_file() or path.stat().st_size != entry.get("bytes"):
        return False
    try:
        fingerprint = load_json((run.path / "order.json").read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError):
        return False
    return entry.get("last_step") == last_step and entry.get("fingerprint") == fingerprint


def _index(out: Path) -> dict[str, Any]:
    try:
        return load_json((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
