"""Read what a run directory holds for its page; what is missing, torn or damaged is counted and skipped.

A run may be training meanwhile, or never have begun: only a readable config.yaml is needed.
"""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json, read_json_lines
from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.config.tables import short_name
from megatron_ettin.metrics import METRICS_FILE, ROLLED_BACK_FILE
from megatron_ettin.runs.history import HISTORY

Column = npt.NDArray[np.float64]
PHASE_ORDER = {"pretrain": 0, "extend": 1, "decay": 2, "cross": 3}
# the final loss is the mean over so many steps
LAST_STEPS = 20
# folders below a folder in which runs are looked for: MODEL/PHASE, and a folder of models
DEPTH = 3
MOST_LAUNCHES = 10_000
MOST_HOSTS = 10_000
# further keys of metrics.jsonl are skipped
MOST_COLUMNS = 500


@dataclass
class MetricColumns:
    """The columns of metrics.jsonl: a number for each step, NaN where a line has none."""

    columns: dict[str, Column] = field(default_factory=dict)
    bad_steps: dict[int, str] = field(default_factory=dict)
    """Step -> the reason in its line; steps whose loss is not a number are among them."""
    slowest_hosts: Counter[str] = field(default_factory=Counter)
    """Host -> how often its rank was the slowest."""
    unreadable_lines: int = 0

    @property
    def steps(self) -> Column:
        """Numbers of the steps."""
        return self.columns.get("step", np.empty(0))

    def known(self, key: str) -> Column:
        """Return the numbers of a column."""
        column = self.columns.get(key, np.empty(0))
        return column[~np.isnan(column)]

    def last(self, key: str) -> float | None:
        """Return the last number of a column, or None."""
        known = self.known(key)
        return float(known[-1]) if len(known) else None


@dataclass
class RunRecord:
    """One run directory."""

    path: Path
    config: dict[str, Any]
    metrics: MetricColumns
    launches: list[dict[str, Any]]
    order: dict[str, Any]
    bad_steps: dict[int, dict[str, Any]]
    """Entries of bad_steps.jsonl by step, without those of steps that were taken back."""
    rolled_back_lines: int

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run. Raises UserError where `path` has no config.yaml that can be read."""
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: no run directory (it has no config.yaml)")
        rolled_back = sum(1 for _ in read_json_lines(path / ROLLED_BACK_FILE))
        launches = [launch for _, launch in zip(range(MOST_LAUNCHES), read_json_lines(path / HISTORY))]
        metrics = read_metrics(path / METRICS_FILE)
        bad_steps = standing_bad_steps(path / "bad_steps.jsonl", metrics, launches)
        return cls(path, read_config(path), metrics, launches, read_json(path / "order.json"), bad_steps, rolled_back)

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Launches after the first that began before the last recorded step, so trained something."""
        last = int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0
        return [
            launch
            for launch in self.launches[1:]
            if not (isinstance(launch.get("step"), int) and launch["step"] >= last)
        ]

    def setting(self, group: str, key: str) -> Any:
        """Return a value of the configuration, or None."""
        settings = self.config.get(group)
        return settings.get(key) if isinstance(settings, dict) else None

    def named(self, key: str) -> str:
        """Return the run's `size`, `objective` or `phase`."""
        return str(self.setting("run", key) or "?")

    @property
    def model_name(self) -> str:
        """The model's size, or its parameter count where it has another shape."""
        return short_name(self.setting("run", "size"), self.config.get("model"))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        known = self.metrics.known("tokens")
        return int(known.max()) if len(known) else 0


def standing_bad_steps(path: Path, metrics: MetricColumns, launches: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the entries of bad_steps.jsonl by step, without those of steps that were taken back.

    A step that a launch trained again is bad if its new line in metrics.jsonl says so. One that ended its launch has no
    line there; it stands until a later launch has begun before it.
    """
    steps, found = set(metrics.steps.astype(int).tolist()), {}
    began = [(seconds_of(launch.get("time")), launch.get("step")) for launch in launches]
    for entry in read_json_lines(path):
        step, at = entry.get("step"), entry.get("time")
        if not isinstance(step, int) or (step in steps and step not in metrics.bad_steps):
            continue
        later = [first for seconds, first in began if isinstance(at, int | float) and seconds > at]
        if step in metrics.bad_steps or not any(isinstance(first, int) and first < step for first in later):
            found[step] = entry
    return found


def seconds_of(time: Any) -> float:
    """Return the seconds since 1970 of a launch's time; 0 where it is none."""
    try:
        return datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the run directory itself, or those in the folders below."""
    try:
        if (folder / "config.yaml").is_file():
            yield folder
            return
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if depth and folder.is_dir() else []
    except OSError as error:
        # another user's folder among one's own
        log_warning(f"warning: {folder}: {error.strerror}; skipped")
        return
    for below in inside:
        if not below.name.startswith("."):
            yield from find_runs(below, depth - 1)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one where none can be read."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(path: Path) -> MetricColumns:
    """Read metrics.jsonl as columns, which keep a million steps in memory (100,000 steps take a second or two)."""
    columns = {"step": array("d")}
    metrics, unreadable, count = MetricColumns(), list[int](), 0
    for line in read_json_lines(path, unreadable):
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
            host in metrics.slowest_hosts or len(metrics.slowest_hosts) < MOST_HOSTS
        ):
            metrics.slowest_hosts[host] += 1
        if line.get("bad") or line.get("loss", 0.0) is None:
            metrics.bad_steps[step] = str(line.get("bad") or "its loss is not a number")
    metrics.unreadable_lines = len(unreadable)
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))
    metrics.columns = by_step({key: np.array(column) for key, column in columns.items()})
    return metrics


def by_step(columns: dict[str, Column]) -> dict[str, Column]:
    """Return each step once, in order; for a step that was written twice the later number counts."""
    if not columns:
        return {}
    steps, rows = np.unique(columns["step"], return_inverse=True)
    found = {}
    for key, column in columns.items():
        known = np.isfinite(column)
        found[key] = np.full(len(steps), np.nan)
        found[key][rows[known]] = column[known]
    return found


def final_loss(losses: Sequence[float]) -> float | None:
    """Return the mean of the last losses, or None where there is none."""
    return statistics.fmean(losses[-LAST_STEPS:]) if losses else None


def make_names_distinct(models: Sequence[Any]) -> None:
    """Add their folder's name, or a number, to models of one size and objective."""
    for name in {model.name for model in models}:
        same = [model for model in models if model.name == name]
        for model in same if len(same) > 1 else []:
            model.name = f"{name} ({model.runs[0].path.resolve().name})"
    if len({model.name for model in models}) < len(models):
        for number, model in enumerate(models, start=1):
            model.name = f"{number}: {model.name}"
