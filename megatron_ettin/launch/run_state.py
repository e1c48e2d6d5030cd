"""Where a run stands, from the files in its directory and the events of its jobs; no torch, for it is asked often."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json, load_yaml
from megatron_ettin.base.paths import Links, path_in
from megatron_ettin.config.tables import short_name
from megatron_ettin.parallel.failure_report import HEARTBEAT

TAIL_BYTES = 64 << 10
SPEED_STEPS = 20  # the speed is their median
DEPTH = 3  # how far below a folder runs are looked for: MEMBER/PHASE


@dataclass(frozen=True)
class RunState:
    """`fraction`: of the phase's tokens or steps. `seconds_left`: at the speed of the latest steps."""

    run: Path
    model: str | None  # what is trained: `17m mlm pretrain`
    step: int | None
    tokens: int | None
    total_tokens: int | None
    total_steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    loss: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    silent_seconds: float | None  # since the last step or sign of life
    doing: str | None
    job: str | None  # the latest that was submitted for it
    failures: int
    launches: int  # of the job's script: one more than it was requeued
    last_event: str | None  # of the job: started, failed, saved, requeued, done, mistake
    slowest_rank: int | None  # when ranks were last compared (metrics.ranks_every_steps)
    slowest_host: str | None
    slowest_ratio: float | None  # of its seconds to the median of the others
    last_stall: str | None  # what the ranks' watchdogs said of the latest stall

    @property
    def fraction(self) -> float | None:
        if self.total_steps and self.step is not None:
            return min(1.0, self.step / self.total_steps)
        return min(1.0, self.tokens / self.total_tokens) if self.total_tokens and self.tokens is not None else None


def runs_below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run itself, or those in the folders below."""
    try:
        if (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file():
            yield folder
            return
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "slurm") if depth else []
    except OSError as error:
        # others' runs beside one's own are no reason to show none
        log_warning(f"warning: {error.filename or folder}: {error.strerror or error}; passed over")
        return
    for below in inside:
        yield from runs_below(below, depth - 1)


def run_state(run: Path) -> RunState:
    """Of one run; what has not begun has None in most fields."""
    lines = tail_lines(run / "metrics.jsonl")
    is_compared = ("slowest_rank", "slowest_host", "slowest_ratio")
    compared: dict[str, Any] = next((line for line in reversed(lines) if all(key in line for key in is_compared)), {})
    if _number(compared.get("slowest_ratio")) is None:
        compared = {}
    last = lines[-1] if lines else {}
    groups = _groups(run)
    settings = groups.get("run") or {}
    folder, job, task = submission_of(run)
    events = [event for event in read_events(folder) if event.get("job") == task] if folder else []
    checkpoint = _newest_checkpoint(run)
    saved = None if checkpoint is None else _time_of(checkpoint)
    beat, beat_time = _heartbeat(folder, task)
    signs = [path_time for path_time in (beat_time, _time_of(run / "metrics.jsonl")) if path_time is not None]
    return RunState(
        run=run,
        model=_model(settings, groups.get("model")),
        step=_count(last.get("step")),
        tokens=_count(last.get("tokens")),
        total_tokens=_count(settings.get("tokens")),
        total_steps=_count(settings.get("steps")),
        tokens_per_second=_median(lines, "tokens_per_second"),
        seconds_left=_seconds_left(lines, settings),
        loss=_number(last.get("loss")),
        checkpoint_step=None if checkpoint is None else int(checkpoint.name.rpartition("_")[2]),
        checkpoint_age_seconds=None if saved is None else time.time() - saved,
        silent_seconds=time.time() - max(signs) if signs else None,
        doing=_text(beat.get("doing")),
        job=task or job,
        failures=sum(event["event"] == "failed" for event in events),
        launches=sum(event["event"] == "started" for event in events),
        last_event=events[-1]["event"] if events else None,
        slowest_rank=_count(compared.get("slowest_rank")),
        slowest_host=_text(compared.get("slowest_host")),
        slowest_ratio=_number(compared.get("slowest_ratio")),
        last_stall=_last_stall(run),
    )


def _count(value: Any) -> int | None:
    """A count, or None for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and -1e300 < value < 1e300 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _last_stall(run: Path) -> str | None:
    """RUN/watch/stall-TIME/report.json of the newest (faults/watchdog.py)."""
    for path in sorted((run / "watch").glob("stall-*/report.json"), reverse=True):
        try:
            return str(load_json(path.read_text(encoding="utf-8"))["line"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def tail_lines(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(load_json(line))
        except ValueError:
            continue  # the one being written
    return [line for line in found if isinstance(line, dict)]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Of a submission's folder, all of them."""
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(load_json(line))
        except ValueError:
            continue
    return [event for event in found if isinstance(event, dict) and isinstance(event.get("event"), str)]


def runs_of_event(event: dict[str, Any]) -> list[str]:
    """The run directories that a submission names."""
    runs = event.get("runs")
    return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []


def submission_of(run: Path) -> tuple[Path | None, str | None, str | None]:
    """Folder of the latest submission that has this run, its job, and the job or the array's task that trains it."""
    run = run.absolute()
    for above in (run, *list(run.parents)[:2]):
        folder = above / "slurm"
        for event in reversed(read_events(folder)):
            runs = runs_of_event(event)
            if event["event"] == "submitted" and str(run) in runs and re.fullmatch(r"\w+", str(event.get("job"))):
                job = str(event["job"])
                return folder, job, f"{job}_{runs.index(str(run))}" if len(runs) > 1 else job
    return None, None, None


def _groups(run: Path) -> dict[str, dict[str, Any]]:
    """The groups of its configuration."""
    try:
        found = load_yaml((run / "config.yaml").read_text(encoding="utf-8"))
        return {name: dict(group) for name, group in found.items() if isinstance(group, dict)}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def _model(settings: dict[str, Any], model: object) -> str | None:
    if not settings.get("size"):
        return None
    return f"{short_name(settings['size'], model)} {settings.get('objective')} {settings.get('phase')}"


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [value for line in lines[-SPEED_STEPS:] if (value := _number(line.get(key))) is not None]
    return statistics.median(values) if values else None


def _seconds_left(lines: list[dict[str, Any]], settings: dict[str, Any]) -> float | None:
    """By tokens, or by steps where they end the run."""
    if not lines:
        return None
    step, tokens = _count(lines[-1].get("step")), _count(lines[-1].get("tokens"))
    steps, seconds = _count(settings.get("steps")), _median(lines, "step_seconds")
    by_steps = (steps - step) * seconds if steps and seconds and step is not None else None
    total, speed = _count(settings.get("tokens")), _median(lines, "tokens_per_second")
    by_tokens = (total - tokens) / speed if total and speed and tokens is not None else None
    known = [left for left in (by_steps, by_tokens) if left is not None]
    return max(0.0, min(known)) if known else None


def _newest_checkpoint(run: Path) -> Path | None:
    """What `latest` names."""
    try:
        name = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    try:
        path = path_in(run / "checkpoints", name, "latest", links=Links.UNCHECKED)
        return path if re.fullmatch(r"step_\d{9,18}", name, re.ASCII) and path.is_dir() else None
    except (OSError, UserError):
        return None


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _heartbeat(folder: Path | None, task: str | None) -> tuple[dict[str, Any], float | None]:
    """The newest of the job's attempts, and when it was written."""
    if folder is None or task is None:
        return {}, None
    try:
        found = [(path.stat().st_mtime, path) for path in (folder / "attempts").glob(f"{task}.*/{HEARTBEAT}")]
    except OSError:
        return {}, None
    if not found:
        return {}, None
    when, path = max(found)
    try:
        beat = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, when
    return (beat if isinstance(beat, dict) else {}), when
