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

from megatron_ettin.attempt import HEARTBEAT
from megatron_ettin.config.errors import UserError
from megatron_ettin.config.file_names import Links, path_in
from megatron_ettin.config.json_reading import load_json
from megatron_ettin.config.model_names import short_name
from megatron_ettin.config.yaml_reading import load_yaml

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
    if (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file():
        yield folder
        return
    if depth and folder.is_dir():
        for below in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "slurm"):
            yield from runs_below(below, depth - 1)


def run_state(run: Path) -> RunState:
    """Of one run; what has not begun has None in most fields."""
    lines = tail_lines(run / "metrics.jsonl")
    compared: dict[str, Any] = next((line for line in reversed(lines) if "slowest_rank" in line), {})
    last = lines[-1] if lines else {}
    groups = _groups(run)
    settings = groups.get("run") or {}
    folder, job, task = submission_of(run)
    events = [event for event in read_events(folder) if event.get("job") == task] if folder else []
    checkpoint = _newest_checkpoint(run)
    beat, beat_time = _heartbeat(folder, task)
    signs = [path_time for path_time in (beat_time, _time_of(run / "metrics.jsonl")) if path_time is not None]
    return RunState(
        run=run,
        model=_model(settings, groups.get("model")),
        step=last.get("step"),
        tokens=last.get("tokens"),
        total_tokens=settings.get("tokens"),
        total_steps=settings.get("steps"),
        tokens_per_second=_median(lines, "tokens_per_second"),
        seconds_left=_seconds_left(lines, settings),
        loss=last.get("loss"),
        checkpoint_step=None if checkpoint is None else int(checkpoint.name.rpartition("_")[2]),
        checkpoint_age_seconds=None if checkpoint is None else time.time() - checkpoint.stat().st_mtime,
        silent_seconds=time.time() - max(signs) if signs else None,
        doing=beat.get("doing"),
        job=task or job,
        failures=sum(event["event"] == "failed" for event in events),
        launches=sum(event["event"] == "started" for event in events),
        last_event=events[-1]["event"] if events else None,
        slowest_rank=compared.get("slowest_rank"),
        slowest_host=compared.get("slowest_host"),
        slowest_ratio=compared.get("slowest_ratio"),
        last_stall=_last_stall(run),
    )


def _last_stall(run: Path) -> str | None:
    """RUN/watch/stall-TIME/report.json of the newest (train/watchdog.py)."""
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
        text = (folder / "events.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(load_json(line))
        except ValueError:
            continue
    return [event for event in found if isinstance(event, dict) and "event" in event]


def submission_of(run: Path) -> tuple[Path | None, str | None, str | None]:
    """Folder of the latest submission that has this run, its job, and the job or the array's task that trains it."""
    run = run.absolute()
    for above in (run, *list(run.parents)[:2]):
        folder = above / "slurm"
        for event in reversed(read_events(folder)):
            if event["event"] == "submitted" and str(run) in event.get("runs", []):
                job = str(event["job"])
                many = len(event["runs"]) > 1
                return folder, job, f"{job}_{event['runs'].index(str(run))}" if many else job
    return None, None, None


def _groups(run: Path) -> dict[str, dict[str, Any]]:
    """The groups of its configuration."""
    try:
        found = load_yaml((run / "config.yaml").read_text(encoding="utf-8"))
        return {name: dict(group) for name, group in found.items() if isinstance(group, dict)}
    except (OSError, AttributeError, yaml.YAMLError):
        return {}


def _model(settings: dict[str, Any], model: object) -> str | None:
    if not settings.get("size"):
        return None
    return f"{short_name(settings['size'], model)} {settings.get('objective')} {settings.get('phase')}"


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines[-SPEED_STEPS:] if isinstance(line.get(key), (int, float))]
    return statistics.median(values) if values else None


def _seconds_left(lines: list[dict[str, Any]], settings: dict[str, Any]) -> float | None:
    """By tokens, or by steps where they end the run."""
    if not lines:
        return None
    steps, seconds = settings.get("steps"), _median(lines, "step_seconds")
    by_steps = (steps - lines[-1]["step"]) * seconds if steps and seconds else None
    total, speed = settings.get("tokens"), _median(lines, "tokens_per_second")
    by_tokens = (total - lines[-1]["tokens"]) / speed if total and speed else None
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
    found = [(path.stat().st_mtime, path) for path in (folder / "attempts").glob(f"{task}.*/{HEARTBEAT}")]
    if not found:
        return {}, None
    when, path = max(found)
    try:
        return load_json(path.read_text(encoding="utf-8")), when
    except (OSError, ValueError):
        return {}, when
