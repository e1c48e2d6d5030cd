"""Find what there is to release: the phases of one model, each a run directory, and the checkpoints of each.

A run records the checkpoint that it began from. Following these records leads from a decay run over the extension to
pre-training. Runs that were moved together are found by the recorded relative path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import list_for_release, read_progress, step_of
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.runs.history import first_launch

PREFIXES = {"pretrain": "step", "extend": "ext", "decay": "decay", "cross": "cross"}
"""Phase -> prefix of its revisions' names before the step, as in the published repositories; phases in order."""


@dataclass(frozen=True)
class PhaseRun:
    """The run directory of one phase."""

    path: Path
    config: Config
    began_from: Path | None
    """The checkpoint that it started from; None for initial weights."""

    @property
    def phase(self) -> str:
        return self.config.run.phase

    @property
    def objective(self) -> str:
        return self.config.run.objective

    @classmethod
    def read(cls, path: Path) -> PhaseRun:
        """Read a run directory. Raises UserError for another folder."""
        if not path.is_dir():
            raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run directory")
        if not (path / "config.yaml").is_file() or not (path / "checkpoints").is_dir():
            raise UserError(f"{path}: no run directory (config.yaml or checkpoints/ is missing)")
        run = cls(path, from_yaml(path / "config.yaml"), _began_from(path))
        if run.phase not in PREFIXES:
            raise UserError(f"{path}: its phase is {run.phase!r}; allowed: {', '.join(PREFIXES)}")
        return run


def _began_from(run_dir: Path) -> Path | None:
    """Return what the first launch recorded, at its path or relative to the run as it was then."""
    record = first_launch(run_dir) or {}
    recorded, relative = record.get("init_from"), record.get("init_from_relative")
    if recorded is None:
        # runs of before 0.2 recorded a sentence: `weights [and optimizer] of PATH`
        _, separator, path = str(record.get("from", "")).partition(" of ")
        return Path(path) if separator else None
    candidates = (Path(recorded), (run_dir / str(relative)).resolve())
    return next((path for path in candidates if path.is_dir()), candidates[0])


@dataclass(frozen=True)
class Revision:
    """A checkpoint and the name that it is released by."""

    name: str
    phase: str
    step: int
    tokens: int
    """Tokens trained in this phase."""
    total_tokens: int
    """Tokens trained in this phase and all before it."""
    checkpoint: Path | None
    """Checkpoint folder; None for the initial weights, which are drawn again."""
    run: PhaseRun


@dataclass(frozen=True)
class ReleaseChain:
    """The runs of one model, one for each phase."""

    runs: list[PhaseRun]
    """Runs, oldest first."""
    notes: list[str]
    """Lines about weights of the first run that no run of the chain trained."""

    def revisions(self) -> list[Revision]:
        """Return all revisions, oldest first. Raises UserError where the last run has no checkpoint."""
        found: list[Revision] = []
        tokens_before = 0
        for number, run in enumerate(self.runs):
            if number:
                tokens_before = _tokens_before(run, found)
            elif run.began_from is None and run.phase == "pretrain":
                found.append(Revision("step0", run.phase, 0, 0, 0, None, run))
            found += [_revision(run, checkpoint, tokens_before) for checkpoint in list_for_release(run.path)]
        if not any(revision.checkpoint for revision in found):
            raise UserError(f"{self.runs[-1].path}: the run has no checkpoint yet")
        if found[-1].run is not self.runs[-1]:
            raise UserError(f"{self.runs[-1].path}: the run has no checkpoint yet; `main` would be an earlier phase")
        return found


def _tokens_before(run: PhaseRun, earlier: Sequence[Revision]) -> int:
    """Return the tokens of the phases before `run`, up to the very checkpoint that it began from."""
    origin = run.began_from.resolve() if run.began_from is not None else None
    for revision in earlier:
        if origin is not None and revision.checkpoint is not None and revision.checkpoint.resolve() == origin:
            return revision.total_tokens
    return max((revision.total_tokens for revision in earlier), default=0)


def _revision(run: PhaseRun, checkpoint: Path, tokens_before: int) -> Revision:
    step = step_of(checkpoint)
    try:
        tokens = int(read_progress(checkpoint).get("tokens") or 0)
    except (UserError, ValueError, TypeError):
        # damaged, which is reported when it is converted
        tokens = 0
    return Revision(f"{PREFIXES[run.phase]}{step}", run.phase, step, tokens, tokens_before + tokens, checkpoint, run)


def find_release_chain(paths: Sequence[Path], alone: bool = False) -> ReleaseChain:
    """Read the runs of a release.

    Args:
        paths: the run directories in order; for a single one, all runs that it began from are found.
        alone: release a single run without the runs before it.

    Raises:
        UserError: a folder is no run directory, or the runs train different models.
    """
    runs = [PhaseRun.read(Path(path)) for path in paths]
    notes: list[str] = []
    if len(runs) == 1 and not alone:
        while (earlier := _earlier(runs[0], notes)) is not None:
            if any(run.path.resolve() == earlier.path.resolve() for run in runs):
                raise UserError(f"{earlier.path}: goes on from itself according to history.jsonl")
            runs.insert(0, earlier)
    _check_one_model(runs)
    return ReleaseChain(runs, notes)


def _earlier(run: PhaseRun, notes: list[str]) -> PhaseRun | None:
    """Return the run whose checkpoint `run` began from; None where it began from no run of this model."""
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
    if earlier.objective != run.objective:
        notes.append(f"{run.phase} began from weights trained as {earlier.objective} ({earlier.phase})")
        return None
    return earlier


def _check_one_model(runs: Sequence[PhaseRun]) -> None:
    """Raise UserError unless all runs train one model and no two phases would have the same revision names."""
    first = runs[0]
    for i, run in enumerate(runs):
        if run.config.model != first.config.model and _shape(run) != _shape(first):
            raise UserError(f"{run.path}: another shape than {first.path}; a release is of one model")
        if run.objective != first.objective:
            raise UserError(
                f"{run.path}: trained as {run.objective}, {first.path} as {first.objective}; release each by itself"
            )
        for other in runs[:i]:
            if other.phase == run.phase:
                raise UserError(f"{run.path} and {other.path}: both are {run.phase}; release each by itself")


def _shape(run: PhaseRun) -> tuple[int, ...]:
    model = run.config.model
    return (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.vocab_size)
