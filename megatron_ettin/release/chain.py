"""What there is to release: the phases of one model, each a run directory, and the checkpoints of each.

A run records the checkpoint that it began from; following these records leads from a decay run over the extension to
pre-training. Runs that were moved together are found by the recorded relative path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import list_for_release, read_progress, step_of
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.runs.history import first_launch

# phase -> what its revisions are called before the step, as in the published repositories
PREFIXES = {"pretrain": "step", "extend": "ext", "decay": "decay", "cross": "cross"}


@dataclass(frozen=True)
class PhaseRun:
    """One run directory. `began_from`: the checkpoint that it started from; None: initial weights."""

    path: Path
    config: Config
    began_from: Path | None

    @property
    def phase(self) -> str:
        return self.config.run.phase

    @classmethod
    def read(cls, path: Path) -> PhaseRun:
        """Raises UserError for a folder that is no run directory."""
        if not path.is_dir():
            raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run directory")
        if not (path / "config.yaml").is_file() or not (path / "checkpoints").is_dir():
            raise UserError(f"{path}: no run directory (it wants config.yaml and checkpoints/)")
        run = cls(path, from_yaml(path / "config.yaml"), _began_from(path))
        if run.phase not in PREFIXES:
            raise UserError(f"{path}: its phase is {run.phase!r}; allowed: {', '.join(PREFIXES)}")
        return run


def _began_from(run_dir: Path) -> Path | None:
    """What the first launch recorded, at its place or beside the run as it was then."""
    record = first_launch(run_dir) or {}
    recorded, relative = record.get("init_from"), record.get("init_from_relative")
    if recorded is None:
        return _told(record, run_dir)
    for place in (Path(recorded), (run_dir / str(relative)).resolve()):
        if place.is_dir():
            return place
    return Path(recorded)


def _told(record: dict[str, Any], run_dir: Path) -> Path | None:
    """Runs of before 0.2 wrote it as a sentence: `weights [and optimizer] of PATH`."""
    _, of, path = str(record.get("from", "")).partition(" of ")
    return Path(path) if of else None


@dataclass(frozen=True)
class Revision:
    """A checkpoint under the name that it is released by. `tokens` counts this phase's, `total_tokens` all before it
    too. `checkpoint` None: the initial weights, which are drawn anew."""

    name: str
    phase: str
    step: int
    tokens: int
    total_tokens: int
    checkpoint: Path | None
    run: PhaseRun


@dataclass(frozen=True)
class Chain:
    """Phases, oldest first, and what to tell of where they came from."""

    runs: list[PhaseRun]
    notes: list[str]

    def revisions(self) -> list[Revision]:
        """Oldest first. Raises UserError where there is no checkpoint at all."""
        found: list[Revision] = []
        before = 0
        for number, run in enumerate(self.runs):
            if number:
                before = self._tokens_before(run, found)
            elif run.began_from is None and run.phase == "pretrain":
                found.append(Revision("step0", run.phase, 0, 0, 0, None, run))
            for checkpoint in list_for_release(run.path):
                found.append(_revision(run, checkpoint, before))
        if not any(revision.checkpoint for revision in found):
            raise UserError(f"{self.runs[-1].path}: the run has no checkpoint yet")
        if found[-1].run is not self.runs[-1]:
            raise UserError(f"{self.runs[-1].path}: the run has no checkpoint yet; `main` would be an earlier phase")
        return found

    def _tokens_before(self, run: PhaseRun, found: Sequence[Revision]) -> int:
        """Of the phases that `run` goes on from, up to the very checkpoint that it began from."""
        origin = run.began_from
        for revision in found:
            if (
                origin is not None
                and revision.checkpoint is not None
                and revision.checkpoint.resolve() == origin.resolve()
            ):
                return revision.total_tokens
        return max((revision.total_tokens for revision in found), default=0)


def _revision(run: PhaseRun, checkpoint: Path, before: int) -> Revision:
    step = step_of(checkpoint)
    try:
        tokens = int(read_progress(checkpoint).get("tokens") or 0)
    except (UserError, ValueError, TypeError):
        tokens = 0  # damaged: told when it is converted
    return Revision(f"{PREFIXES[run.phase]}{step}", run.phase, step, tokens, before + tokens, checkpoint, run)


def find_chain(paths: Sequence[Path], alone: bool = False) -> Chain:
    """The runs given or, of a single one, it and all that it goes on from. Raises UserError."""
    runs = [PhaseRun.read(Path(path)) for path in paths]
    notes: list[str] = []
    if len(runs) == 1 and not alone:
        while (earlier := _earlier(runs[0], notes)) is not None:
            if any(run.path.resolve() == earlier.path.resolve() for run in runs):
                raise UserError(f"{earlier.path}: goes on from itself, says history.jsonl")
            runs.insert(0, earlier)
    _check(runs)
    return Chain(runs, notes)


def _earlier(run: PhaseRun, notes: list[str]) -> PhaseRun | None:
    """The run whose checkpoint `run` began from; None where it began from no run of this model."""
    origin = run.began_from
    if origin is None:
        return None
    folder = origin.parent.parent if origin.parent.name == "checkpoints" else origin
    if not folder.is_dir():
        raise UserError(
            f"{run.path}: began from {origin}, which is not there; name the runs of the chain in order (`ettin release"
            " PRETRAIN EXTEND DECAY`), or release this one --alone"
        )
    if not (folder / "checkpoints").is_dir():
        notes.append(f"{run.phase} began from imported weights ({origin.name})")
        return None
    earlier = PhaseRun.read(folder)
    if earlier.config.run.objective != run.config.run.objective:
        notes.append(f"{run.phase} began from weights trained as {earlier.config.run.objective} ({earlier.phase})")
        return None
    return earlier


def _check(runs: Sequence[PhaseRun]) -> None:
    """One model, and no two phases whose revisions would have the same names."""
    first = runs[0]
    for i, run in enumerate(runs):
        if run.config.model != first.config.model and _shape(run) != _shape(first):
            raise UserError(f"{run.path}: another shape than {first.path}; a release is of one model")
        if run.config.run.objective != first.config.run.objective:
            raise UserError(
                f"{run.path}: trained as {run.config.run.objective}, {first.path} as {first.config.run.objective};"
                " release each by itself"
            )
        for other in runs[:i]:
            if other.phase == run.phase:
                raise UserError(f"{run.path} and {other.path}: both are {run.phase}; release each by itself")


def _shape(run: PhaseRun) -> tuple[int, ...]:
    model = run.config.model
    return (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.vocab_size)
