"""What a run goes on from: the three ways to begin.

A run begins from its own newest checkpoint, from another run's (`--init-from`: the next phase keeps the optimizer,
another objective starts it fresh), or from initial weights. Position in the data follows from the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint import directory
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.data.blended_dataset import Corpus
from megatron_ettin.data.tokenizer import load_tokenizer
from megatron_ettin.runs.directory import check_checkpoint
from megatron_ettin.runs.rollback import roll_back
from megatron_ettin.train.loading import agree, load, load_newest
from megatron_ettin.train.moments import moment_change
from megatron_ettin.train.progress import Progress
from megatron_ettin.train.setup import Machine


def begin(
    machine: Machine,
    run_dir: Path,
    init_from: Path | None,
    keep_optimizer: bool | None,
    corpus: Corpus,
    from_step: int | None = None,
    allow_change: Sequence[str] = (),
) -> tuple[Progress, str]:
    """Load what the run goes on from; returns its progress and a line that says so. Collective.

    `from_step`: of `init_from`, where the run has not begun; else it goes back to that step of its own, once."""
    back = from_step is not None and init_from is None
    if back:
        assert from_step is not None
        agree(machine.layout, lambda: roll_back(run_dir, from_step, machine.config.data.skip))
    own = load_newest(machine, run_dir)
    if own is not None:
        name, progress = own
        checkpoint = directory.checkpoints_folder(run_dir) / name
        agree(machine.layout, lambda: check_checkpoint(checkpoint, run_dir, machine.config, allow_change))
        note = moment_change(checkpoint, machine.config.optim).note
        origin = f"{'went back to' if back else 'resumed'} {name} ({progress.tokens:,} tokens)"
        return progress, f"{origin}; {note}" if note else origin
    if init_from is None:
        return Progress(), "initial weights"
    source = directory.resolve(init_from) if from_step is None else directory.at_step(init_from, from_step)
    check_tokenizer(source, corpus)
    config = source_config(source, machine.config)
    keep = keeps_optimizer(source, config, machine.config, keep_optimizer)
    progress = load(machine, source, with_optimizer=keep)
    updates = progress.updates if keep else 0
    return Progress(updates=updates), f"weights {'and optimizer ' if keep else ''}of {source}"


def source_config(source: Path, config: Config) -> dict[str, Any]:
    """The groups of the checkpoint's config. Raises UserError where its shape is not this run's."""
    groups = directory.read_config(source)
    model = groups.get("model") or {}
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
        ours, theirs = getattr(config.model, key), model.get(key)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"--init-from {source}: has model.{key}={theirs}, this run {ours}; the shapes must be equal"
            )
    return groups


def check_tokenizer(checkpoint: Path, corpus: Corpus) -> None:
    """Raise UserError where the checkpoint's tokenizer is not the one its new data was made with."""
    folder = checkpoint / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        return  # weights from elsewhere may come without one; the vocabulary's size is checked anyway
    theirs = load_tokenizer(folder).fingerprint
    if theirs != corpus.tokenizer_fingerprint:
        raise UserError(
            f"{checkpoint}: was trained with tokenizer {theirs[:12]}, dataset {corpus.datasets[0].path} was made with"
            f" {corpus.tokenizer_fingerprint[:12]}; prepare the data with --tokenizer {folder}"
        )


def keeps_optimizer(source: Path, theirs: dict[str, Any], config: Config, wanted: bool | None) -> bool:
    """Whether the optimizer's state comes along: between phases of one objective, unless told otherwise."""
    stored = directory.read_progress(source).get("optimizer")
    run = theirs.get("run") or {}
    same = run.get("objective") == config.run.objective and config.run.phase != "cross"
    keep = (same and stored is not None) if wanted is None else wanted
    if keep and stored is None:
        raise UserError(f"--init-optimizer keep: {source} holds weights alone; use --init-optimizer fresh")
    if keep and stored != config.optim.name:
        raise UserError(f"--init-optimizer keep: {source} was trained with {stored}, this run uses {config.optim.name}")
    return keep


def checkpoint_config(checkpoint: Path) -> Config:
    """The resolved configuration inside a checkpoint."""
    return from_yaml(checkpoint / "config.yaml")
