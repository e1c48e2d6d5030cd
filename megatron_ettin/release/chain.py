"""Find the revisions of a release: the run directories of one model's phases, and their checkpoints.

A run records the checkpoint that it began from. These records lead from a decay run to its extension run and from
there to the pre-training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import list_for_release, read_progress, step_of
from megatron_ettin.runs.chain import PhaseChain
from megatron_ettin.runs.directory import PHASE_ORDER, RunDirectory

PREFIXES = dict(zip(PHASE_ORDER, ("step", "ext", "decay", "cross"), strict=True))
"""Phase -> prefix of its revisions' names before the step, as in the published repositories; phases in order."""


@dataclass(frozen=True)
class Revision:
    """A checkpoint and the name of its revision."""

    name: str
    phase: str
    step: int
    tokens: int
    """Tokens trained in this phase."""
    total_tokens: int
    """Tokens trained in this phase and all before it."""
    checkpoint: Path | None
    """Checkpoint folder. None: initial weights, made again from the seed."""
    run: RunDirectory


def revisions_of(chain: PhaseChain) -> list[Revision]:
    """Return all revisions of a model, oldest first. Raises UserError if the last run has no checkpoint."""
    revisions: list[Revision] = []
    tokens_before = 0
    for number, run in enumerate(chain.runs):
        if number:
            tokens_before = _tokens_before(run, revisions)
        elif run.began_from is None and run.phase == "pretrain":
            revisions.append(Revision("step0", run.phase, 0, 0, 0, None, run))
        revisions += [_revision(run, checkpoint, tokens_before) for checkpoint in list_for_release(run.path)]
    last = chain.runs[-1]
    if not any(revision.checkpoint for revision in revisions):
        raise UserError(f"{last.path}: the run has no checkpoint yet")
    if revisions[-1].run is not last:
        raise UserError(f"{last.path}: the run has no checkpoint yet; `main` would be an earlier phase")
    return revisions


def _tokens_before(run: RunDirectory, earlier: Sequence[Revision]) -> int:
    """Return the tokens trained before `run`: the total of the checkpoint it began from, else the largest total."""
    origin = run.began_from.resolve() if run.began_from is not None else None
    for revision in earlier:
        if origin is not None and revision.checkpoint is not None and revision.checkpoint.resolve() == origin:
            return revision.total_tokens
    return max((revision.total_tokens for revision in earlier), default=0)


def _revision(run: RunDirectory, checkpoint: Path, tokens_before: int) -> Revision:
    step = step_of(checkpoint)
    try:
        tokens = int(read_progress(checkpoint).get("tokens") or 0)
    except (UserError, ValueError, TypeError):
        # a damaged checkpoint is reported when it is converted
        tokens = 0
    return Revision(f"{PREFIXES[run.phase]}{step}", run.phase, step, tokens, tokens_before + tokens, checkpoint, run)


def find_release_chain(paths: Sequence[Path], alone: bool = False) -> PhaseChain:
    """Return the runs of a release as one chain.

    Args:
        paths: the run directories in order; if it is one, the runs that it began from are added before it.
        alone: add no runs before a single one.

    Raises:
        UserError: a folder is no run directory, an earlier run is missing, or the runs train different models.
    """
    runs = [_read_run(Path(path)) for path in paths]
    notes: list[str] = []
    if len(runs) == 1 and not alone:
        while (earlier := _earlier(runs[0], notes)) is not None:
            if any(run.path.resolve() == earlier.path.resolve() for run in runs):
                raise UserError(f"{earlier.path}: goes on from itself according to history.jsonl")
            runs.insert(0, earlier)
    _check_one_model(runs)
    return PhaseChain(f"{runs[-1].model_name} {runs[-1].objective}", runs, notes)


def _read_run(path: Path) -> RunDirectory:
    """Open a run directory. Raises UserError if it has no configuration, no checkpoints or an unknown phase."""
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run directory")
    run = RunDirectory(path)
    if not run.has_begun or not (path / "checkpoints").is_dir():
        raise UserError(f"{path}: no run directory (config.yaml or checkpoints/ is missing)")
    if run.config.run.phase not in PREFIXES:
        raise UserError(f"{path}: its phase is {run.phase!r}; allowed: {', '.join(PREFIXES)}")
    return run


def _earlier(run: RunDirectory, notes: list[str]) -> RunDirectory | None:
    """Return the run whose checkpoint `run` began from.

    None: it began from scratch, or, with a note in `notes`, from imported weights or another objective's run.

    Raises:
        UserError: the checkpoint's folder is missing.
    """
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
    earlier = _read_run(folder)
    if earlier.objective != run.objective:
        notes.append(f"{run.phase} began from weights trained as {earlier.objective} ({earlier.phase})")
        return None
    return earlier


def _check_one_model(runs: Sequence[RunDirectory]) -> None:
    """Raise UserError unless all runs train one model and no two phases would have the same revision names."""
    first = runs[0]
    for i, run in enumerate(runs):
        if _shape(run) != _shape(first):
            raise UserError(f"{run.path}: another shape than {first.path}; a release is of one model")
        if run.objective != first.objective:
            raise UserError(
                f"{run.path}: trained as {run.objective}, {first.path} as {first.objective}; release each by itself"
            )
        for other in runs[:i]:
            if other.phase == run.phase:
                raise UserError(f"{run.path} and {other.path}: both are {run.phase}; release each by itself")


def _shape(run: RunDirectory) -> tuple[int, ...]:
    model = run.config.model
    return (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.vocab_size)
