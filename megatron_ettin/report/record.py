"""What a run directory holds, read for its page: whatever is missing, torn or damaged is told of and passed over.

A run may be training meanwhile, or never have begun: only a readable config.yaml is asked for."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json
from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.config.tables import short_name
from megatron_ettin.metrics import METRICS_FILE, ROLLED_BACK_FILE
from megatron_ettin.runs.history import HISTORY

Column = npt.NDArray[np.float64]
DEPTH = 3  # how far below a folder runs are looked for: MODEL/PHASE, and a folder of models
MOST_LAUNCHES = 10_000
MOST_HOSTS = 10_000
MOST_COLUMNS = 500  # further keys of metrics.jsonl are passed over


@dataclass
class Metrics:
    """The columns of metrics.jsonl: a number for each step, NaN where a line has none. `bad`: step -> what its line
    says; steps whose loss is no number are among them. `slow`: host -> how often its rank was the slowest."""

    columns: dict[str, Column] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    slow: Counter[str] = field(default_factory=Counter)
    unreadable_lines: int = 0

    @property
    def steps(self) -> Column:
        return self.columns.get("step", np.empty(0))

    def known(self, key: str) -> Column:
        """The numbers of a column."""
        column = self.columns.get(key, np.empty(0))
        return column[~np.isnan(column)]

    def last(self, key: str) -> float | None:
        known = self.known(key)
        return float(known[-1]) if len(known) else None


@dataclass
class RunRecord:
    """One run directory."""

    path: Path
    config: dict[str, Any]
    metrics: Metrics
    launches: list[dict[str, Any]]
    order: dict[str, Any]
    bad_steps: dict[int, dict[str, Any]]  # of bad_steps.jsonl, by step; those that the record still has
    rolled_back_lines: int

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Raises UserError where `path` has no config.yaml that can be read."""
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: no run directory (it has no config.yaml)")
        rolled_back = sum(1 for _ in objects(path / ROLLED_BACK_FILE))
        launches = [launch for _, launch in zip(range(MOST_LAUNCHES), objects(path / HISTORY))]
        metrics = read_metrics(path / METRICS_FILE)
        bad = standing_bad_steps(path / "bad_steps.jsonl", metrics, launches)
        return cls(path, read_config(path), metrics, launches, read_json(path / "order.json"), bad, rolled_back)

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Return the launches after the first that began before the last recorded step, so trained something."""
        last = int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0
        return [
            launch
            for launch in self.launches[1:]
            if not (isinstance(launch.get("step"), int) and launch["step"] >= last)
        ]

    def setting(self, group: str, key: str) -> Any:
        """A value of the configuration, or None."""
        settings = self.config.get(group)
        return settings.get(key) if isinstance(settings, dict) else None

    def named(self, key: str) -> str:
        """`size`, `objective` or `phase`."""
        return str(self.setting("run", key) or "?")

    @property
    def model_name(self) -> str:
        """What the model is called: its size, or its parameter count where it has another shape."""
        return short_name(self.setting("run", "size"), self.config.get("model"))

    @property
    def tokens(self) -> int:
        known = self.metrics.known("tokens")
        return int(known.max()) if len(known) else 0


def standing_bad_steps(path: Path, metrics: Metrics, launches: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the entries of bad_steps.jsonl by step, without those of steps that were taken back.

    A step that a launch trained again is bad if its new line in metrics.jsonl says so. One that ended its launch has no
    line there; it stands until a later launch has begun before it.
    """
    steps, found = set(metrics.steps.astype(int).tolist()), {}
    began = [(seconds_of(launch.get("time")), launch.get("step")) for launch in launches]
    for entry in objects(path):
        step, at = entry.get("step"), entry.get("time")
        if not isinstance(step, int) or (step in steps and step not in metrics.bad):
            continue
        later = [first for seconds, first in began if isinstance(at, int | float) and seconds > at]
        if step in metrics.bad or not any(isinstance(first, int) and first < step for first in later):
            found[step] = entry
    return found


def seconds_of(time: Any) -> float:
    """Return the seconds since 1970 of a launch's time; 0 where it is none."""
    try:
        return datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run directory itself, or those in the folders below."""
    try:
        if (folder / "config.yaml").is_file():
            yield folder
            return
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if depth and folder.is_dir() else []
    except OSError as error:
        # another user's folder among one's own
        log_warning(f"warning: {folder}: {error.strerror}; passed over")
        return
    for below in inside:
        if not below.name.startswith("."):
            yield from find_runs(below, depth - 1)


def read_json(path: Path) -> dict[str, Any]:
    """An object, or nothing where there is none that can be read."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def objects(path: Path, unreadable: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Numbers of lines that hold none go to `unreadable`, but for a torn last."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            try:
                found = load_json(line) if line.strip() else None
            except ValueError:
                found = () if line.endswith(b"\n") else None
            if isinstance(found, dict):
                yield found
            elif found is not None and unreadable is not None:
                unreadable.append(number)


def read_metrics(path: Path) -> Metrics:
    """A run of 100,000 steps takes a second or two; columns instead of objects keep a million in memory."""
    columns = {"step": array("d")}
    metrics, unreadable, count = Metrics(), list[int](), 0
    for line in objects(path, unreadable):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**31:
            continue
        for key, value in line.items():
            if (type(value) is float or type(value) is int) and (key in columns or len(columns) < MOST_COLUMNS):
                column = columns.setdefault(key, array("d"))
                column.extend([math.nan] * (count - len(column)))
                column.append(value if -1e300 < value < 1e300 else math.nan)
        count += 1
        if isinstance(host := line.get("slowest_host"), str) and (
            host in metrics.slow or len(metrics.slow) < MOST_HOSTS
        ):
            metrics.slow[host] += 1
        if line.get("bad") or line.get("loss", 0.0) is None:
            metrics.bad[step] = str(line.get("bad") or "its loss is no number")
    metrics.unreadable_lines = len(unreadable)
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))
    metrics.columns = by_step({key: np.array(column) for key, column in columns.items()})
    return metrics


def by_step(columns: dict[str, Column]) -> dict[str, Column]:
    """Each step once, in order; of a step written twice the later number stands."""
    if not columns:
        return {}
    steps, places = np.unique(columns["step"], return_inverse=True)
    found = {}
    for key, column in columns.items():
        known = np.isfinite(column)
        found[key] = np.full(len(steps), np.nan)
        found[key][places[known]] = column[known]
    return found
