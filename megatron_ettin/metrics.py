"""Where a run's numbers go: `metrics.jsonl` always (the record of truth), TensorBoard and Weights & Biases beside it.

The trainer hands one flat dict a step to `FanOut.log`. A failure of the record raises, because a run whose numbers are
lost is not worth its GPU hours; any other sink that fails is named once in a warning and switched off, because a
dashboard must never stop a run. Optional sinks open at their first line, so that opening is isolated as well.
Non-finite numbers are written as null: every line is strict JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ettin.config.errors import UserError

METRICS_FILE = "metrics.jsonl"
ROLLED_BACK_FILE = "metrics.rolled_back.jsonl"


class Sink(Protocol):
    """One place that takes the numbers of a step."""

    required: bool  # whether a failure stops the run

    def log(self, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a metrics file, in order. A torn last line (a killed writer) is left out."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


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
            if not isinstance(json.loads(line), dict):
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
        past = [line for line in lines if resume_step is not None and json.loads(line).get("step", 0) > resume_step]
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


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a dashboard can draw."""
    return {
        key: value
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoardSink:
    """Scalars by step under `directory`. Steps after `resume_step` that an earlier process wrote are purged."""

    required = False

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        self.directory, self.resume_step = Path(directory), resume_step
        self._writer: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self.resume_step is None else self.resume_step + 1
            self._writer = SummaryWriter(str(self.directory), purge_step=purge)
        for key, value in _scalars(values).items():
            self._writer.add_scalar(key, value, global_step=values["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """Weights & Biases. `run_id` is stable over restarts, so that a resumed run goes on in the same page; the mode
    (online, offline, disabled) and the key are wandb's own environment variables."""

    required = False

    def __init__(
        self, project: str, directory: str | Path, name: str, run_id: str | None = None, config: Mapping | None = None
    ):
        self.project, self.directory, self.name = project, Path(directory), name
        self.run_id, self.config = run_id, dict(config or {})
        self._run: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            import wandb

            self.directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=self.project,
                name=self.name,
                id=self.run_id,
                resume="allow",
                dir=str(self.directory),
                config=self.config,
                settings=wandb.Settings(init_timeout=60, x_disable_stats=True, console="off"),
            )
        self._run.log(_scalars(values), step=values["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class FanOut:
    """Hands each step's numbers to every sink; one that is not required and fails is switched off."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def log(self, values: Mapping[str, Any]) -> None:
        for sink in list(self.sinks):
            self._ask(sink, sink.log, values)

    def close(self) -> None:
        for sink in list(self.sinks):
            self._ask(sink, sink.close)

    def _ask(self, sink: Sink, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            if sink.required:
                raise
            self.sinks.remove(sink)
            warnings.warn(
                f"{type(sink).__name__} is switched off: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3
            )
