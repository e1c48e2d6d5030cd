"""Read metrics.jsonl as one column of numbers for each key, so that a million steps fit in memory."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.metrics.record import iter_metrics

Column = npt.NDArray[np.float64]
MOST_HOSTS = 10_000
# largest number of columns; numbers of further keys are skipped
MOST_COLUMNS = 500


@dataclass
class MetricColumns:
    """Columns of metrics.jsonl: a number for each step, NaN if the step's line has none."""

    columns: dict[str, Column] = field(default_factory=dict)
    bad_steps: dict[int, str] = field(default_factory=dict)
    """Bad step -> the reason in its line. A step whose loss is not a number is bad too."""
    slowest_hosts: Counter[str] = field(default_factory=Counter)
    """Host -> number of lines that name it as the slowest host."""
    unreadable_lines: int = 0

    @classmethod
    def read(cls, path: Path) -> MetricColumns:
        """Read a file (100,000 steps take a second or two). A missing file gives no steps."""
        metrics, damaged, count = cls(), list[tuple[int, bytes]](), 0
        columns = {"step": array("d")}
        for _, line in iter_metrics(path, damaged, missing_ok=True):
            step = line.get("step")
            if step is None or not 0 <= step < 2**31:
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
        metrics.unreadable_lines = len(damaged)
        for column in columns.values():
            column.extend([math.nan] * (count - len(column)))
        metrics.columns = _by_step({key: np.array(column) for key, column in columns.items()})
        return metrics

    @property
    def steps(self) -> Column:
        """Return the steps, ascending, each once."""
        return self.columns.get("step", np.empty(0))

    def known(self, key: str) -> Column:
        """Return the numbers of a column, without the steps that have none."""
        column = self.columns.get(key, np.empty(0))
        return column[~np.isnan(column)]

    def last(self, key: str) -> float | None:
        """Return the last number of a column; None if it has none."""
        known = self.known(key)
        return float(known[-1]) if len(known) else None


def _by_step(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Return the columns with each step once, ascending. If a step has several lines, the last number counts."""
    steps, rows = np.unique(columns["step"], return_inverse=True)
    merged = {}
    for key, column in columns.items():
        known = np.isfinite(column)
        merged[key] = np.full(len(steps), np.nan)
        merged[key][rows[known]] = column[known]
    return merged
