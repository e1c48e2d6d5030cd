"""Results of benchmarks as JSON lines: appended as they come, read back to go on, compared with another file's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.config.json_reading import load_json

BEGAN, DONE, INVALID, NO_MEMORY = "began", "done", "invalid", "out of memory"
SAME = ("size", "objective", "phase", "words", "gpus", "device")  # what makes two results those of one measurement
LEAST_NOISE = 0.02  # relative; smaller differences are never told as ones


def key_of(row: dict[str, Any]) -> str:
    return json.dumps([row.get(name) for name in SAME])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last state of every measurement, in order. Raises UserError for a file that is none."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = load_json(line)
            found[key_of(row)] = row
        except (ValueError, AttributeError):
            raise UserError(f"{path}:{number}: is no result of `ettin bench`") from None
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def name_of(row: dict[str, Any]) -> str:
    words = " ".join(row["words"])
    return f"{row['size']} {row['objective']}{' ' * bool(words)}{words}"


def noise(row: dict[str, Any]) -> float:
    """Half of what its steps differ by, relative."""
    slowest, fastest = row["tokens_per_second_range"]
    return max(LEAST_NOISE, (fastest - slowest) / 2 / row["tokens_per_second"])


def compare(old: Path, new: Path) -> list[dict[str, Any]]:
    """Every measurement that both have: `ratio` of tokens a second, and whether it `moved` beyond the noise of both.
    Raises UserError where they have none in common."""
    before, after = read(old), read(new)
    rows = []
    for key, row in after.items():
        other = before.get(key)
        if other is None or {row["state"], other["state"]} != {DONE}:
            continue
        ratio, bound = row["tokens_per_second"] / other["tokens_per_second"], noise(row) + noise(other)
        rows.append({"name": name_of(row), "ratio": ratio, "noise": bound, "moved": abs(ratio - 1) > bound})
    if not rows:
        raise UserError(f"--compare {old} {new}: no measurement is in both")
    return rows


def comparison(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  new / old  noise"]
    for row in rows:
        word = ("faster" if row["ratio"] > 1 else "SLOWER") if row["moved"] else ""
        lines.append(f"{row['name']:{width}}  {row['ratio']:9.3f}  {row['noise']:5.1%}  {word}".rstrip())
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The fastest first; what did not run last, with why."""
    width = max(len(name_of(row)) for row in rows)
    lines = [f"{'':{width}}  tokens/s/GPU  slowest - fastest  TFLOP/s    MFU     GiB"]
    for row in sorted(rows, key=lambda row: -row.get("tokens_per_second_per_gpu", 0)):
        if row["state"] != DONE:
            lines.append(f"{name_of(row):{width}}  {row['state']}{': ' * ('reason' in row)}{row.get('reason', '')}")
            continue
        low, high = (value / row["gpus"] for value in row["tokens_per_second_range"])
        lines.append(
            f"{name_of(row):{width}}  {row['tokens_per_second_per_gpu']:12,.0f}  {low:7,.0f} - {high:7,.0f}"
            f"  {row['tflops_per_second_per_gpu']:7.2f}  {row['mfu']:5.1%}  {row['peak_memory_bytes'] / 2**30:6.2f}"
        )
    return "\n".join(lines)
