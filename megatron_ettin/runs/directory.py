"""Read a run directory, and find run directories in folders: the one reader for all commands.

A run directory has config.yaml (the resolved configuration), order.json (the data order), history.jsonl (an object for
each launch; the first names the weights that the run began from), metrics.jsonl (an object for each step),
bad_steps.jsonl and checkpoints/. The folder of `--phase all` holds a run directory for each phase and is none itself.

The run may be training while its directory is read, or may never have begun. `ettin status` starts often, so this
module imports neither torch nor numpy nor OmegaConf; functions that need them import them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_json, load_object, read_json_lines, read_json_object
from megatron_ettin.checkpoint.directory import (
    list_checkpoints,
    named_latest,
    read_progress,
    read_stored_config,
    step_of,
)
from megatron_ettin.config.tables import short_name
from megatron_ettin.metrics.record import METRICS_FILE, ROLLED_BACK_FILE, read_last_metrics, read_metrics

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config
    from megatron_ettin.metrics.columns import MetricColumns

CONFIG, ORDER, HISTORY, ROLLED_BACK = "config.yaml", "order.json", "history.jsonl", "rolled_back.json"
# the phases in the order in which a model is trained; `--phase all` trains the first three
PHASE_ORDER = ("pretrain", "extend", "decay", "cross")
CHAIN = PHASE_ORDER[:3]
# name of the folder that `ettin launch` writes, in a run directory or above it
SUBMISSIONS = "slurm"
# number of levels below a folder that are searched for runs: a folder of models, MODEL, PHASE
DEPTH = 3
# keys whose values in a step's line must be numbers
NUMBERS = ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "updates")


class RunDirectory:
    """One run directory. Each file is read when it is first needed, and cached; a new object reads it again.

    A property that raises UserError says so. All others leave out data that is missing, torn or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def has_begun(self) -> bool:
        """Return whether the first launch has recorded its configuration."""
        return (self.path / CONFIG).exists()

    def check_begun(self) -> None:
        """Raise UserError if the folder has no config.yaml."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path}: no run directory (it has no config.yaml)")

    @cached_property
    def config(self) -> Config:
        """Return the resolved configuration. Raises UserError."""
        from megatron_ettin.config.resolve import from_yaml

        return from_yaml(self.path / CONFIG)

    @property
    def recorded_config(self) -> Config | None:
        """Return the resolved configuration; None before the first launch. Raises UserError."""
        return self.config if self.has_begun else None

    @cached_property
    def stored_groups(self) -> dict[str, Any]:
        """Return the groups of config.yaml, with the key names of the version that wrote it. Raises UserError."""
        return read_stored_config(self.path)

    @cached_property
    def groups(self) -> dict[str, Any]:
        """Return the groups of config.yaml, with the current key names. Raises UserError."""
        from megatron_ettin.config.overrides import upgrade_keys

        groups = copy.deepcopy(self.stored_groups)
        upgrade_keys(groups)
        return groups

    def setting(self, group: str, key: str) -> Any:
        """Return the value of a key in config.yaml; None if it is absent. Raises UserError."""
        settings = self.groups.get(group)
        return settings.get(key) if isinstance(settings, dict) else None

    @property
    def objective(self) -> str:
        """Return the name of the objective. Raises UserError."""
        return str(self.setting("run", "objective") or "?")

    @property
    def phase(self) -> str:
        """Return the name of the phase. Raises UserError."""
        return str(self.setting("run", "phase") or "?")

    @property
    def model_name(self) -> str:
        """Return the model's published size, or its parameter count if it has another shape. Raises UserError."""
        return short_name(self.setting("run", "size"), self.groups.get("model"))

    @cached_property
    def science(self) -> dict[str, object]:
        """Return the science keys that config.yaml fixes. Raises UserError.

        The keys of the anomaly detector are left out if the version that wrote the file did not fix them.
        """
        from megatron_ettin.config.schema import GUARD_KEYS, science_keys

        keys = science_keys(self.config)
        if fixes_guard(self.stored_groups):
            return keys
        return {key: value for key, value in keys.items() if key not in GUARD_KEYS}

    @cached_property
    def _history(self) -> tuple[list[dict[str, Any]], list[int]]:
        torn: list[int] = []
        launches = [one for one in read_json_lines(self.path / HISTORY, torn) if one]
        return launches, torn

    @property
    def launches(self) -> list[dict[str, Any]]:
        """Return every launch's record, oldest first."""
        return self._history[0]

    @property
    def torn_launches(self) -> list[int]:
        """Return the line numbers of the torn lines in history.jsonl, which a full disk or a kill leaves."""
        return self._history[1]

    @property
    def first_launch(self) -> dict[str, Any] | None:
        """Return the first launch's record; None if the run has not begun or the record cannot be read."""
        return self.launches[0] if self.launches and 1 not in self.torn_launches else None

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Return the launches after the first that have trained a step: they began before the last recorded step."""
        last = int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0
        return [one for one in self.launches[1:] if not (isinstance(one.get("step"), int) and one["step"] >= last)]

    @property
    def changes(self) -> list[str]:
        """Return the science keys that launches were allowed to change, in the order of the launches."""
        from megatron_ettin.config.key_names import current_name

        recorded = [one["changes"] for one in self.launches if isinstance(one.get("changes"), list)]
        return [current_name(key) for keys in recorded for key in keys if isinstance(key, str)]

    @property
    def origins(self) -> list[Path]:
        """Return the paths at which the run or checkpoint may be that this run began from.

        They are the recorded absolute path, and the path relative to this run, which is right if both were moved.
        """
        first = self.first_launch or {}
        recorded, relative = first.get("init_from"), first.get("init_from_relative")
        if not isinstance(recorded, str):
            return []
        return [Path(recorded), (self.path / relative).resolve()] if isinstance(relative, str) else [Path(recorded)]

    @property
    def began_from(self) -> Path | None:
        """Return the run or checkpoint that this one began from, which may be gone; None for initial weights."""
        if self.origins:
            return next((path for path in self.origins if path.is_dir()), self.origins[0])
        # before version 0.2 a run recorded a sentence: `weights [and optimizer] of PATH`
        _, separator, path = str((self.first_launch or {}).get("from", "")).partition(" of ")
        return Path(path) if separator else None

    @cached_property
    def order(self) -> dict[str, Any]:
        """Return order.json: the fingerprints of data order and tokenizer."""
        return read_json_object(self.path / ORDER)

    def check_order(self) -> None:
        """Raise UserError if order.json exists and cannot be read."""
        path = self.path / ORDER
        if not self.order and path.exists():
            load_object(path)

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the data order before `data.skip` is applied; None if none is recorded."""
        known = self.order.get("unskipped_fingerprint", self.order.get("fingerprint"))
        return known if isinstance(known, str) else None

    @cached_property
    def metrics(self) -> MetricColumns:
        """Return the columns of metrics.jsonl."""
        from megatron_ettin.metrics.columns import MetricColumns

        return MetricColumns.read(self.path / METRICS_FILE)

    @cached_property
    def last_metrics(self) -> list[dict[str, Any]]:
        """Return the last lines of metrics.jsonl, without reading those before them."""
        return read_last_metrics(self.path / METRICS_FILE)

    @cached_property
    def steps(self) -> dict[int, dict[str, Any]]:
        """Return the line of each step in metrics.jsonl by step, ascending, without evaluations. Raises UserError.

        For the keys in NUMBERS, a value that is not a number (or null) is left out, as if it had not been recorded.
        """
        lines = [line for line in read_metrics(self.path / METRICS_FILE) if _is_count(line.get("step"))]
        steps = {line["step"]: _without_wrong_numbers(line) for line in lines if _is_count(line.get("tokens"), least=1)}
        return dict(sorted(steps.items()))

    @property
    def tokens(self) -> int:
        """Return the number of tokens trained on."""
        known = self.metrics.known("tokens")
        return int(known.max()) if len(known) else 0

    @cached_property
    def skipped_updates(self) -> list[int]:
        """Return the steps whose updates were skipped. Raises UserError.

        A line of an older version has no `updated`; there, `bad` begins with "skipped".
        """
        return [
            step
            for step, line in self.steps.items()
            if line.get("updated") is False or str(line.get("bad", "")).startswith("skipped")
        ]

    @property
    def newest_checkpoint(self) -> Path | None:
        """Return the checkpoint that `latest` names, from which the run resumes; it may be damaged."""
        return named_latest(self.path, warn=lambda reason: None)

    @property
    def saved_skips(self) -> tuple[int, int] | None:
        """Return (step, skipped updates) of the newest checkpoint that records their number; None if none does."""
        for checkpoint in reversed(list_checkpoints(self.path)):
            try:
                count = read_progress(checkpoint).get("skipped")
            except UserError:
                continue
            if isinstance(count, int):
                return step_of(checkpoint), count
        return None

    @cached_property
    def bad_steps(self) -> dict[int, dict[str, Any]]:
        """Return the entries of bad_steps.jsonl by step, without those of steps that were rolled back.

        A step that was trained again is bad only if its new line in metrics.jsonl says so. A step that ended its launch
        has no line there; its entry counts until a later launch has begun at an earlier step.
        """
        bad, recorded = self.metrics.bad_steps, set(self.metrics.steps.astype(int).tolist())
        began = [(_seconds_of(launch.get("time")), launch.get("step")) for launch in self.launches]
        standing = {}
        for entry in read_json_lines(self.path / "bad_steps.jsonl"):
            step, at = entry.get("step"), entry.get("time")
            if not isinstance(step, int) or (step in recorded and step not in bad):
                continue
            later = [first for seconds, first in began if isinstance(at, int | float) and seconds > at]
            if step in bad or not any(isinstance(first, int) and first < step for first in later):
                standing[step] = entry
        return standing

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """Return the record of each rollback (`--from-step`), oldest first. Raises UserError."""
        path = self.path / ROLLED_BACK
        if not path.exists():
            return []
        try:
            entries = load_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: unreadable ({error})") from None
        return entries if isinstance(entries, list) else []

    @property
    def dataset_shares(self) -> list[tuple[str, float | None]]:
        """Return each dataset's path and its share of the run's tokens; the share is None if it is not known.

        Shares are those of the configuration. If it has none, they follow from the sizes of the datasets.

        Raises:
            UserError: the configuration cannot be read.
        """
        mixture = self.setting("data", "mixture")
        items = [mixture] if isinstance(mixture, str | dict) else mixture if isinstance(mixture, list) else []
        entries = [item if isinstance(item, dict) else {"path": item} for item in items]
        paths = [str(entry.get("path")) for entry in entries]
        if len(paths) == 1:
            return [(paths[0], 1.0)]
        weights = [entry.get("weight") or entry.get("tokens") for entry in entries]
        if not any(weights):
            weights = [read_json_object(Path(path) / "manifest.json").get("tokens") for path in paths]
        numbers = [float(weight) for weight in weights if isinstance(weight, int | float) and weight > 0]
        if len(numbers) < len(paths):
            return [(path, None) for path in paths]
        return [(path, number / sum(numbers)) for path, number in zip(paths, numbers, strict=True)]

    @property
    def submission_folders(self) -> list[Path]:
        """Return the folders that may hold the records of `ettin launch` about this run's jobs, nearest first."""
        path = self.path.absolute()
        return [above / SUBMISSIONS for above in (path, *path.parents[:2])]

    @property
    def rolled_back_lines(self) -> int:
        """Return the number of steps whose lines a rollback or a restart has moved out of metrics.jsonl."""
        return sum(1 for _ in read_json_lines(self.path / ROLLED_BACK_FILE))


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 63


def _without_wrong_numbers(line: dict[str, Any]) -> dict[str, Any]:
    def is_wrong(value: Any) -> bool:
        return value is not None and not (type(value) in (int, float) and -1e300 < value < 1e300)

    return {key: value for key, value in line.items() if key not in NUMBERS or not is_wrong(value)}


def _seconds_of(time: Any) -> float:
    """Return a launch's time in seconds since 1970; 0 if it is not a time."""
    try:
        return datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def fixes_guard(stored_groups: Mapping[str, Any]) -> bool:
    """Return whether the version that stored a configuration fixed the keys of the anomaly detector for a run.

    Older versions judged spikes by the mean and standard deviation of loss and gradient norm. A run that they
    began continues under the new rule, and only its record shows which of its updates were skipped.
    """
    return "spike_ratio" in (stored_groups.get("resilience") or {})


def find_runs(folder: Path, marks: Collection[str] = (CONFIG,), depth: int = DEPTH) -> Iterator[Path]:
    """Yield a folder that is a run directory, or the run directories below it, and warn of unreadable folders.

    Args:
        folder: folder to search.
        marks: names of files; a folder with at least one of them counts as a run directory.
        depth: number of levels below `folder` to search.
    """
    try:
        if any((folder / name).is_file() for name in marks):
            yield folder
            return
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if depth and folder.is_dir() else []
    except OSError as error:
        # only warn, so that an unreadable folder of another user does not hide the user's own runs
        log_warning(f"warning: {error.filename or folder}: {error.strerror or error}; skipped")
        return
    for below in inside:
        if below.name != SUBMISSIONS and not below.name.startswith("."):
            yield from find_runs(below, marks, depth - 1)


def phases_in(folder: Path) -> list[Path]:
    """Return the run directories of a chain's phases that have begun, in order; empty if `folder` holds no chain."""
    if (folder / CONFIG).exists() or (folder / "checkpoints").exists():
        return []
    return [folder / phase for phase in CHAIN if (folder / phase / CONFIG).is_file()]


def last_phase(path: Path) -> Path:
    """Return the last phase's run directory if `path` is a chain's folder, and log that; otherwise return `path`."""
    phases = phases_in(path)
    if not phases:
        return path
    log_warning(f"{path}: holds {', '.join(one.name for one in phases)}; reading {phases[-1]}")
    return phases[-1]
