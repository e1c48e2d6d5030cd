"""Store benchmark results as JSON lines: append each result, read them back to resume, and compare two files.

The module also makes the combinations of --layouts, --precision and --sweep that a benchmark measures.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.overrides import Member, members

BEGAN, DONE, INVALID, NO_MEMORY = "began", "done", "invalid", "out of memory"
STOPPED, FAILED = "stopped", "failed"
STATES = (BEGAN, DONE, INVALID, NO_MEMORY, STOPPED, FAILED)
# keys that identify a measurement: two results of one measurement agree in them
IDENTITY_KEYS = (
    *("size", "objective", "phase", "words", "gpus", "device"),
    *("config", "data", "chunk_tokens", "micro_batches", "quick"),
)
# relative noise that is always assumed; smaller differences are never reported
LEAST_NOISE = 0.02


def identity_key(row: dict[str, Any]) -> str:
    """Return the text that identifies the measurement of a result."""
    return json.dumps([row.get(name) for name in IDENTITY_KEYS])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read the last result of every measurement by `identity_key`, in the order of the file; {} if there is no file.

    Raises:
        UserError: a line is not a result.
    """
    if not path.is_file():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = load_json(line)
        except ValueError:
            row = None
        if not is_result(row):
            raise UserError(f"{path}:{number}: not a result of `ettin bench`")
        rows[identity_key(row)] = row
    return rows


def is_result(row: Any) -> bool:
    """Return whether a parsed line is a result of `ettin bench`."""
    if not isinstance(row, dict) or row.get("state") not in STATES or not isinstance(row.get("words"), list):
        return False
    return row["state"] != DONE or {"tokens_per_second", "tokens_per_second_range"} <= row.keys()


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a result as a line of JSON and sync it to the disk. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None


def check_writable(path: Path, option: str) -> None:
    """Raise UserError, naming the command-line `option`, if a file cannot be written."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; expected a file")
    folder = next(one for one in path.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written")


def failure(error: BaseException) -> dict[str, Any]:
    """Return the state, and the reason, of a measurement that ended with an error."""
    import torch

    reason = first_line(error)[:200]
    # a full GPU raises torch's error, a full host the others
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return {"state": NO_MEMORY, "reason": reason}
    if isinstance(error, KeyboardInterrupt):
        return {"state": STOPPED}
    return {"state": FAILED, "reason": f"{type(error).__name__}: {reason}"}


def should_measure(last: dict[str, Any] | None, is_only: bool) -> bool:
    """Return whether to measure a combination whose last result is `last`.

    It is measured if it has no result or was stopped, or if it is invalid and the only combination.
    """
    return last is None or last["state"] == STOPPED or (is_only and last["state"] == INVALID)


def known_result(last: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a combination that is not measured again; one that never ended counts as out of memory."""
    if last["state"] != BEGAN:
        return last
    return last | {"state": NO_MEMORY, "reason": "it ended the process, or was ended with it (--again measures it)"}


def name_of(row: dict[str, Any], common: Collection[str] = ()) -> str:
    """Return the size, objective and overrides, without those that are `common` to all."""
    return " ".join([row["size"], row["objective"], *(word for word in row["words"] if word not in common)])


def shared_overrides(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the overrides that all results have; [] for a single result."""
    shared = set.intersection(*(set(row["words"]) for row in rows)) if len(rows) > 1 else set()
    return [word for word in rows[0]["words"] if word in shared]


def noise(row: dict[str, Any]) -> float:
    """Return half of the relative difference between the slowest and the fastest step, at least `LEAST_NOISE`."""
    slowest, fastest = row["tokens_per_second_range"]
    return max(LEAST_NOISE, float(fastest - slowest) / 2 / float(row["tokens_per_second"]))


def compare(old: Path, new: Path) -> list[dict[str, Any]]:
    """Compare every measurement that both files have.

    Returns:
        An object for each with `name`, `ratio` (new tokens per second to old), `noise` (of both) and `moved` (whether
        the ratio differs from 1 by more than the noise).

    Raises:
        UserError: a file is missing, or the files have no measurement in common.
    """
    for path in (old, new):
        if not path.is_file():
            raise UserError(f"--compare {path}: no such file")
    before, after = read(old), read(new)
    common, rows = shared_overrides([*after.values()]) if after else [], []
    for key, row in after.items():
        other = before.get(key)
        if other is None or {row["state"], other["state"]} != {DONE}:
            continue
        ratio, bound = row["tokens_per_second"] / other["tokens_per_second"], noise(row) + noise(other)
        moved = abs(ratio - 1) > bound
        rows.append({"name": name_of(row, common), "ratio": ratio, "noise": bound, "moved": moved})
    if not rows:
        raise UserError(f"--compare {old} {new}: no measurement is in both")
    return rows


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a table."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  new / old  noise"]
    for row in rows:
        word = ("faster" if row["ratio"] > 1 else "SLOWER") if row["moved"] else ""
        lines.append(f"{row['name']:{width}}  {row['ratio']:9.3f}  {row['noise']:5.1%}  {word}".rstrip())
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table, fastest first. Those that did not run come last, with the reason."""
    common = shared_overrides(rows)
    width = max(len(name_of(row, common)) for row in rows)
    lines = [f"{'':{width}}  tokens/s/GPU  slowest - fastest  TFLOP/s    MFU     GiB"]
    for row in sorted(rows, key=lambda row: -row.get("tokens_per_second_per_gpu", 0)):
        name = f"{name_of(row, common):{width}}"
        if row["state"] != DONE:
            lines.append(f"{name}  {row['state']}{': ' * ('reason' in row)}{row.get('reason', '')}")
            continue
        low, high = (value / row["gpus"] for value in row["tokens_per_second_range"])
        lines.append(
            f"{name}  {row['tokens_per_second_per_gpu']:12,.0f}  {low:7,.0f} - {high:7,.0f}"
            f"  {row['tflops_per_second_per_gpu']:7.2f}  {row['mfu']:5.1%}  {row['peak_memory_bytes'] / 2**30:6.2f}"
        )
    return "\n".join([*lines, *([f"all with {' '.join(common)}"] if common else [])])


def detail_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines about the fastest measurement: peak of its MFU, parts of a step, communication and memory."""
    done = [row for row in rows if row["state"] == DONE]
    if not done:
        return []
    best = max(done, key=lambda row: row["tokens_per_second_per_gpu"])
    whole = sum(best["phase_seconds"].values())
    parts = sorted(best["phase_seconds"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in parts if seconds)
    lines = [f"MFU: of {best['peak_flops'] / 1e12:,.3g} TFLOP/s a GPU, {best['peak_source']}"]
    lines.append(f"a step of the fastest, {whole:.3f} s: {shares}")
    if best.get("communication_bytes"):
        sent = ", ".join(f"{axis} {count / 2**20:,.1f}" for axis, count in best["communication_bytes"].items())
        lines.append(f"it hands to collectives and transfers, MiB a rank: {sent}")
    if best.get("predicted_memory_bytes"):
        names = {"tensors at its fullest": "peak_tensor_bytes", "as predicted": "predicted_memory_bytes"}
        names["in all (of a process without a GPU: resident)"] = "peak_memory_bytes"
        sizes = ", ".join(f"{best[key] / 2**30:.2f} {name}" for name, key in names.items())
        lines.append(f"memory of the fullest rank, GiB: {sizes}")
    return lines


AXES = ("tp", "pp", "vpp", "cp")
PART = re.compile(r"(tp|pp|vpp?|cp)([1-9][0-9]*)|sp|dp")


def combinations(layouts: str | None, precisions: str | None, sweeps: Sequence[str]) -> list[Member]:
    """Return the members of the sweep, layouts changing slowest; one without values if nothing is swept.

    Args:
        layouts: text of --layouts, or None.
        precisions: text of --precision, or None.
        sweeps: texts of --sweep, each KEY=VALUE,VALUE,...

    Raises:
        UserError: a key is swept twice, or a value is not valid.
    """
    sweeps = [*([f"precision.name={precisions}"] if precisions is not None else []), *sweeps]
    inner = members(sweeps) if sweeps else [Member("", {})]
    if layouts is None:
        return inner
    outer = layout_values(layouts)
    if twice := sorted(outer[0].keys() & inner[0].values.keys()):
        raise UserError(f"--sweep {twice[0]}: --layouts sets it already; remove one of the two")
    combined = [layout | member.values for layout in outer for member in inner]
    return [Member(" ".join(f"{key}={value}" for key, value in values.items()), values) for values in combined]


def layout_values(text: str) -> list[dict[str, str]]:
    """Parse layouts such as `dp,tp2,tp2pp2` and return the overrides of each.

    An axis that one layout names is set in all of them.

    Raises:
        UserError: a name is not a layout, or two layouts are the same.
    """
    parsed = [_degrees(name.strip()) for name in text.split(",")]
    axes = [axis for axis in AXES if any(axis in degrees for degrees in parsed)] or ["tp"]
    has_sequence_parallel = any("sp" in degrees for degrees in parsed)
    rows = []
    for degrees in parsed:
        values = {f"parallel.{axis}": degrees.get(axis, "1") for axis in axes}
        if has_sequence_parallel:
            values["parallel.sequence_parallel"] = str("sp" in degrees).lower()
        if values in rows:
            raise UserError(f"--layouts {text}: two layouts are the same")
        rows.append(values)
    return rows


def _degrees(name: str) -> dict[str, str]:
    """Parse `tp2pp4sp` to {tp: "2", pp: "4", sp: ""}."""
    parts = list(PART.finditer(name))
    # vp is the older name of vpp
    degrees = {{"vp": "vpp"}.get(part[1], part[1]) or part[0]: part[2] or "" for part in parts}
    if not name or "".join(part[0] for part in parts) != name or len(degrees) < len(parts):
        raise UserError(
            f"--layouts: {name!r}: write tp, pp, vpp or cp with a degree, and sp for sequence parallelism, such as"
            " dp,tp2,tp2sp,tp2pp2; what is left of the ranks is data-parallel"
        )
    return degrees
