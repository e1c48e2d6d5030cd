"""Join runs to models: the phases of one model follow each other as each recorded where it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin.base.errors import UserError
from megatron_ettin.report.compare import PhaseChain
from megatron_ettin.report.record import PHASE_ORDER, Column, RunRecord, find_runs, make_names_distinct

# more curves cannot be told apart
MOST_MODELS = 12
SECONDS_AN_HOUR = 3_600.0


@dataclass
class ModelRuns:
    """The phases of one model, in order."""

    name: str
    runs: list[RunRecord]

    @property
    def phases(self) -> list[str]:
        """Names of the phases."""
        return [run.named("phase") for run in self.runs]

    def axes(self) -> list[dict[str, Column]]:
        """Return the x of each run's steps since the model's start: `steps`, `tokens`, and `hours` spent in steps.

        An axis that a run does not know is left out.
        """
        found, before = [], {"steps": 0.0, "tokens": 0.0, "hours": 0.0}
        for run in self.runs:
            own = {name: before[name] + values for name, values in _axes_of(run).items()}
            before |= {name: float(values[-1]) for name, values in own.items() if len(values)}
            found.append(own)
        return found


def _axes_of(run: RunRecord) -> dict[str, Column]:
    columns = run.metrics.columns
    steps = run.metrics.steps
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


def read_models(paths: Sequence[Path]) -> list[ModelRuns]:
    """Read the models in run directories and in folders of them. Raises UserError where a path has none."""
    found: dict[Path, RunRecord] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run directory")
        runs = list(find_runs(path))
        if not runs:
            raise UserError(f"{path}: no run directory (no config.yaml in it or in the folders below)")
        for run in runs:
            found.setdefault(run.resolve(), RunRecord.read(run))
    models = join(list(found.values()))
    if len(models) > MOST_MODELS:
        raise UserError(f"{len(models)} models; one page shows at most {MOST_MODELS}: name fewer runs")
    return models


def join(runs: Sequence[RunRecord]) -> list[ModelRuns]:
    """Join runs to models.

    A run continues where the one it began from ended, if that one is here, has the same size and objective, and no
    other run continues it. Where nothing is recorded, the order of phases decides.
    """
    models: list[ModelRuns] = []
    known = {run.path.resolve(): run for run in runs}
    for run in sorted(runs, key=lambda run: PHASE_ORDER.get(run.named("phase"), 9)):
        name = f"{run.model_name} {run.named('objective')}"
        parent = began_from(run, known)
        model = next((model for model in models if model.name == name and continues(run, parent, model)), None)
        if model is None:
            models.append(ModelRuns(name, [run]))
        else:
            model.runs.append(run)
    order = {id(run): index for index, run in enumerate(runs)}
    models.sort(key=lambda model: min(order[id(run)] for run in model.runs))
    make_names_distinct(models)
    return models


def models_of(chains: Sequence[PhaseChain]) -> list[ModelRuns]:
    """Return the models of a comparison."""
    return [ModelRuns(chain.name, [RunRecord.read(run.path) for run in chain.runs]) for chain in chains]


def began_from(run: RunRecord, known: dict[Path, RunRecord]) -> RunRecord | None:
    """Return the run among `known` whose weights a run started from."""
    first = run.launches[0] if run.launches else {}
    for key, base in (("init_from", Path()), ("init_from_relative", run.path)):
        if isinstance(first.get(key), str):
            source = (base / first[key]).resolve()
            for folder in (source, *source.parents):
                if folder in known and known[folder] is not run:
                    return known[folder]
    return None


def continues(run: RunRecord, parent: RunRecord | None, model: ModelRuns) -> bool:
    """Return whether a run continues a model that is joined so far."""
    last = model.runs[-1]
    later = PHASE_ORDER.get(run.named("phase"), 9) > PHASE_ORDER.get(last.named("phase"), 9)
    recorded = bool(run.launches and run.launches[0].get("init_from"))
    return later and (last is parent if parent is not None else not recorded and last.path.parent == run.path.parent)
