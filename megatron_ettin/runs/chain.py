"""Join the run directories of one model's phases, in the order in which the phases were trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.config.tables import long_name
from megatron_ettin.metrics.columns import Column
from megatron_ettin.runs.directory import PHASE_ORDER, RunDirectory

# number of last steps whose mean loss is the final loss
LAST_STEPS = 20
SECONDS_AN_HOUR = 3_600.0


@dataclass
class PhaseChain:
    """The phases of one model, in the order in which they are trained."""

    name: str
    """Size and objective, such as `17m mlm`, and the folder or a number if several models have these."""
    runs: list[RunDirectory]
    notes: list[str] = field(default_factory=list)
    """Lines about the origin of the first run's weights, if they were imported or trained with another objective."""

    @property
    def objective(self) -> str:
        """Return the objective of the model."""
        return self.runs[0].objective

    @property
    def phases(self) -> list[str]:
        """Return the names of the phases."""
        return [run.phase for run in self.runs]

    def skipped_updates(self) -> dict[str, list[int]]:
        """Return the steps whose updates were skipped, by phase; phases without any are left out. Raises UserError."""
        return {run.phase: run.skipped_updates for run in self.runs if run.skipped_updates}

    def axes(self) -> list[dict[str, Column]]:
        """Return, for each run, the `steps`, `tokens` and `hours` (spent in steps) since the first run, at each step.

        A column is left out for a run that has not recorded its values.
        """
        axes, before = [], {"steps": 0.0, "tokens": 0.0, "hours": 0.0}
        for run in self.runs:
            own = {name: before[name] + values for name, values in _axes_of(run).items()}
            before |= {name: float(values[-1]) for name, values in own.items() if len(values)}
            axes.append(own)
        return axes

    def summary(self) -> dict[str, Any]:
        """Return the figures of the model in types that JSON has. Raises UserError.

        Layout, micro-batch, precision and device are those of the last phase. They may differ between comparable runs.
        """
        last = self.runs[-1].config
        losses = self.runs[-1].metrics.known("loss").tolist()
        speeds = [speed for run in self.runs for speed in run.metrics.known("tokens_per_second").tolist() if speed]
        degrees = {axis: getattr(last.parallel, axis) for axis in ("tp", "pp", "vpp", "cp")}
        return {
            "name": self.name,
            "model": long_name(last.run.size, last.model),
            "runs": [str(run.path) for run in self.runs],
            "phases": self.phases,
            "steps": sum(len(run.steps) for run in self.runs),
            "tokens": sum(run.tokens for run in self.runs),
            "final_loss": final_loss(losses),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "updates_left_out": self.skipped_updates(),
            "layout": " ".join(f"{axis} {size}" for axis, size in degrees.items() if size > 1) or "data-parallel",
            "micro-batch rows": str(last.batch.micro_batch_rows),
            "precision": last.precision.name,
            "device": last.runtime.device,
        }


def _axes_of(run: RunDirectory) -> dict[str, Column]:
    columns, steps = run.metrics.columns, run.metrics.steps
    axes = {"steps": steps}
    if len(run.metrics.known("tokens")):
        axes["tokens"] = np.maximum.accumulate(np.nan_to_num(columns["tokens"]))
    tokens, speed = axes.get("tokens"), columns.get("tokens_per_second")
    seconds = columns.get("step_seconds")
    if seconds is None and tokens is not None and speed is not None:
        seconds = np.diff(tokens, prepend=0.0) / np.where(speed > 0, speed, np.nan)
    if seconds is not None:
        axes["hours"] = np.cumsum(np.maximum(np.nan_to_num(seconds), 0.0)) / SECONDS_AN_HOUR
    return axes


def final_loss(losses: Sequence[float]) -> float | None:
    """Return the mean of the last `LAST_STEPS` losses, or None if there are no losses."""
    return statistics.fmean(losses[-LAST_STEPS:]) if losses else None


def join_phases(runs: Sequence[RunDirectory], by_record: bool) -> list[PhaseChain]:
    """Join runs of one size and objective to chains, sorted by the position in `runs` of each chain's earliest run.

    Args:
        runs: the runs.
        by_record: True: a run continues the run that its history.jsonl names as its origin; without such a record, it
            continues an earlier phase in the same folder. False: a run continues the chain before it in `runs`; a
            phase that this chain has already starts another chain.

    Raises:
        UserError: the configuration of a run cannot be read.
    """
    chains: list[PhaseChain] = []
    known = {run.path.resolve(): run for run in runs}
    # a shell's pattern lists runs alphabetically, so phases are sorted: here, or else after the chains are made
    for run in sorted(runs, key=_phase_index) if by_record else runs:
        name = f"{run.model_name} {run.objective}"
        same = [chain for chain in chains if chain.name == name]
        if by_record:
            chain = next((chain for chain in same if _continues(run, chain.runs[-1], known)), None)
        else:
            chain = same[-1] if same and run.phase not in same[-1].phases else None
        if chain is None:
            chains.append(PhaseChain(name, [run]))
        else:
            chain.runs.append(run)
    given = {id(run): index for index, run in enumerate(runs)}
    chains.sort(key=lambda chain: min(given[id(run)] for run in chain.runs))
    for chain in chains:
        chain.runs.sort(key=_phase_index)
    _make_names_distinct(chains)
    return chains


def _phase_index(run: RunDirectory) -> int:
    return PHASE_ORDER.index(run.phase) if run.phase in PHASE_ORDER else len(PHASE_ORDER)


def _continues(run: RunDirectory, last: RunDirectory, known: Mapping[Path, RunDirectory]) -> bool:
    """Return whether a run continues a chain's `last` run, by its record or, if it has none, by its folder."""
    if _phase_index(run) <= _phase_index(last):
        return False
    for origin in run.origins:
        source = origin.resolve()
        for folder in (source, *source.parents):
            if folder in known and known[folder] is not run:
                return known[folder] is last
    return not run.origins and last.path.parent == run.path.parent


def _make_names_distinct(chains: Sequence[PhaseChain]) -> None:
    """Add the folder's name, or else a number, to the names of models of one size and objective."""
    for name in {chain.name for chain in chains}:
        same = [chain for chain in chains if chain.name == name]
        for chain in same if len(same) > 1 else []:
            chain.name = f"{name} ({chain.runs[0].path.resolve().name})"
    if len({chain.name for chain in chains}) < len(chains):
        for number, chain in enumerate(chains, start=1):
            chain.name = f"{number}: {chain.name}"
