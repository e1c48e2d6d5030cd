"""`metrics.jsonl`, the record of truth: one JSON object a step, each step once.

Non-finite numbers are written as null: every line is strict JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.config.json_reading import load_json

METRICS_FILE = "metrics.jsonl"
ROLLED_BACK_FILE = "metrics.rolled_back.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a metrics file, in order. A torn last line (a killed writer) is left out."""
    return [load_json(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that hold an object, without their newline. Raises UserError for damage before the last line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"metrics {path}: {error.strerror or error}") from None
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if not isinstance(load_json(line), dict):
                raise ValueError
        except ValueError:
            if any(later.strip() for later in lines[number:]):
                raise UserError(f"metrics {path}:{number}: not a JSON object; the file is damaged") from None
            continue
        kept.append(line)
    return kept


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """The file with exactly these lines, or as it was before."""
    beside = path.with_name(f".tmp-{path.name}")
    with open(beside, "wb") as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class JsonlSink:
    """Appends one line a step, in the kernel's hands when `log` returns: kill -9 loses nothing, at worst tears a line.

    `resume_step`: the step of the checkpoint a run goes on from. Lines past it move to metrics.rolled_back.jsonl, so
    that the record has each step once; they are copied there before they leave here."""

    required = True

    def __init__(self, path: str | Path, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._mend(resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def _mend(self, resume_step: int | None) -> None:
        lines = _whole_lines(self.path)
        past = [line for line in lines if resume_step is not None and load_json(line).get("step", 0) > resume_step]
        if past:
            rolled_back = self.path.with_name(ROLLED_BACK_FILE)
            earlier = _whole_lines(rolled_back) if rolled_back.exists() else []
            if earlier[-len(past) :] != past:  # equal: killed between the two replacements below
                _replace(rolled_back, earlier + past)
            dropped = set(past)
            lines = [line for line in lines if line not in dropped]
        if past or b"".join(line + b"\n" for line in lines) != self.path.read_bytes():
            _replace(self.path, lines)

    def log(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(finite(values), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: a line was written in part (disk full?)")
        except OSError:
            os.ftruncate(self._file.fileno(), end)  # so that a retry does not append to half a line
            raise

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def finite(value: Any) -> Any:
    """`value` as strict JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
