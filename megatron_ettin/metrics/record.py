"""Read and write `metrics.jsonl`, the record that all else is derived from: one JSON object a step, each step once.

Non-finite numbers are written as null, so that every line is strict JSON, which any JSON reader accepts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.base.parsing import load_json

METRICS_FILE = "metrics.jsonl"
ROLLED_BACK_FILE = "metrics.rolled_back.jsonl"
DAMAGED_FILE = "metrics.damaged.jsonl"
TAIL_BYTES = 64 << 10


def iter_metrics(
    path: Path, damaged: list[tuple[int, bytes]], missing_ok: bool = False
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line without its line end, its JSON object) for every sound line of a metrics file.

    A sound line is a JSON object, with a whole number for its step if it has one. A last line that is not sound is left
    out, because a killed writer may leave half of one.

    Args:
        path: the file.
        damaged: list to which (number from 1, text) of every other line that is not sound is added.
        missing_ok: stop without an error if the file cannot be read.

    Raises:
        UserError: the file cannot be read, unless `missing_ok`.
    """
    last: tuple[int, bytes] | None = None
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removesuffix(b"\n")
                if not line.strip():
                    continue
                if last is not None:
                    damaged.append(last)
                content = _sound_object(line)
                last = (number, line) if content is None else None
                if content is not None:
                    yield line, content
    except OSError as error:
        if not missing_ok:
            raise UserError(f"metrics {path}: {error.strerror or error}") from None


def _sound_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is not one, or its step is not a whole number."""
    try:
        content = load_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and type(content.get("step", 0)) is int else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the object of every sound line, in order, and warn of damaged lines. Raises UserError."""
    damaged: list[tuple[int, bytes]] = []
    lines = [content for _, content in iter_metrics(Path(path), damaged)]
    if damaged:
        log_warning(f"warning: {path}:{damaged[0][0]}: {_describe_damage(damaged)}; left out")
    return lines


def read_last_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of the sound lines in a file's last 64 KiB, in order; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return []
    return [content for line in lines if (content := _sound_object(line)) is not None]


def _describe_damage(damaged: list[tuple[int, bytes]]) -> str:
    return f"not a JSON object with a step{f', and {len(damaged) - 1} more lines' if len(damaged) > 1 else ''}"


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Replace the content of a file by these lines, or leave it as it was if that fails."""
    write_atomically(path, b"".join(line + b"\n" for line in lines))


class JsonlSink:
    """Writer of metrics.jsonl, one line for each step. The kernel has the line when `log` returns.

    So kill -9 tears one line at most. A line that cannot be written (a full disk, a quota) waits in memory and is
    written before the next one. The run saves no checkpoint meanwhile, so none is newer than the record.

    Args:
        path: the file.
        resume_step: the step of the checkpoint that a run continues from. Later lines move to
            metrics.rolled_back.jsonl, so that the record has each step once; they are copied before they are removed.

    Attributes:
        problem: why lines wait to be written; None if none wait.
    """

    required = True

    def __init__(self, path: str | Path, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._mend(resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._waiting: list[bytes] = []
        self.problem: str | None = None

    def _mend(self, resume_step: int | None) -> None:
        damaged: list[tuple[int, bytes]] = []
        # without the objects, which might not fit into memory for a million lines
        lines = [(line, content.get("step", 0)) for line, content in iter_metrics(self.path, damaged)]
        # a full disk or an editor can damage lines: keep them in another file, and let the run continue
        if damaged:
            aside = self.path.with_name(DAMAGED_FILE)
            log_warning(f"warning: {self.path}:{damaged[0][0]}: {_describe_damage(damaged)}; moved to {aside.name}")
            earlier = aside.read_bytes().splitlines() if aside.exists() else []
            _replace(aside, [*earlier, *(line for _, line in damaged)])
        past = [line for line, step in lines if resume_step is not None and step > resume_step]
        if past:
            rolled_back = self.path.with_name(ROLLED_BACK_FILE)
            earlier = [line for line, _ in iter_metrics(rolled_back, [])] if rolled_back.exists() else []
            # equal if an earlier start was killed between the two replacements of files below
            if earlier[-len(past) :] != past:
                _replace(rolled_back, earlier + past)
        dropped = set(past)
        kept = [line for line, _ in lines if line not in dropped]
        if b"".join(line + b"\n" for line in kept) != self.path.read_bytes():
            _replace(self.path, kept)

    def log(self, values: Mapping[str, Any]) -> None:
        """Append the line of a step, or keep it in memory if it cannot be written."""
        self._waiting.append(json.dumps(finite(values), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the waiting lines in order until one cannot be written."""
        count, earlier = len(self._waiting), self.problem
        self.problem = None
        while self._waiting and self.problem is None:
            self.problem = self._why_not_written(self._waiting[0])
            if self.problem is None:
                del self._waiting[0]
        if self.problem is not None and earlier is None:
            log_warning(f"warning: {self.problem}; lines wait in memory, and nothing is saved before they are written")
        elif self.problem is None and earlier is not None:
            log_info(f"{self.path}: the {count} lines that waited are written")

    def _why_not_written(self, line: bytes) -> str | None:
        """Write a line and return None, or restore the file's length and return the reason."""
        try:
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                # a partial write raises no error; writing the rest does
                while written < len(line):
                    written += self._file.write(line[written:])
                return None
            except OSError as failed:
                error = failed
            # so that the next try does not append to half a line
            os.ftruncate(self._file.fileno(), end)
        except OSError as failed:
            error = failed
        return f"{self.path}: {error.strerror or error}"

    def close(self) -> None:
        """Write the waiting lines, force the file to the disk, and warn of lines that are lost."""
        if self._file.closed:
            return
        self._write_waiting()
        if self._waiting:
            lost = "line" if len(self._waiting) == 1 else f"{len(self._waiting)} lines"
            log_warning(f"warning: {self.problem}; the last {lost} could not be written")
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def finite(value: Any) -> Any:
    """Return a copy of a value for strict JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
