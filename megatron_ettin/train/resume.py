"""Choose the checkpoint or weights that a run continues from, and load them into this rank's part of the model.

A run begins from its own newest checkpoint, from another run's (`--init-from`: the next phase keeps the optimizer,
another objective starts it fresh), or from initial weights. Its position in the data follows from the step alone.

The files that describe a checkpoint are small and are checked before anything is loaded. Its data are hashed in threads
during the load, which waits for the disk and copies; every rank hashes a share of the blocks. No rank goes on before
the hashes agree, and a run that finds damage loads the checkpoint before that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import Block, blocks_of
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint import directory, state
from megatron_ettin.checkpoint.directory import read_config, read_progress
from megatron_ettin.checkpoint.integrity import read_entries, verify, verify_blocks
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config, ModelConfig, OptimConfig
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.tokenizer import load_tokenizer
from megatron_ettin.optim.adamw import stored_share
from megatron_ettin.parallel.collectives import all_gather_object, broadcast_object, run_on_rank_zero
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.platform.fp8 import is_fp8
from megatron_ettin.runs.launches import check_checkpoint, roll_back
from megatron_ettin.train.job import TrainArgs
from megatron_ettin.train.progress import Progress
from megatron_ettin.train.setup import TrainState


def begin(train_state: TrainState, args: TrainArgs, corpus: BlendedDataset) -> tuple[Progress, str]:
    """Load the checkpoint or weights that the run continues from (collective).

    Args:
        train_state: The model and optimizer to load into.
        args: The run directory, whose newest checkpoint is used if it has one, and what a new run begins from.
        corpus: The rows that the run trains on, whose tokenizer `args.init_from` must have.

    Returns:
        Progress from which the run continues, and a text for the log that names what was loaded.
    """
    config, run_dir, step = train_state.config, args.run_dir, args.from_step
    goes_back = step is not None and args.init_from is None
    if step is not None and goes_back:
        run_on_rank_zero(lambda: roll_back(run_dir, step, config.data.skip), UserError)
    own = load_newest(train_state, run_dir)
    if own is not None:
        name, progress = own
        checkpoint = directory.checkpoints_folder(run_dir) / name
        run_on_rank_zero(lambda: check_checkpoint(checkpoint, run_dir, config, args.allow_change), UserError)
        note = moment_change(checkpoint, config.optim).note
        origin = f"{'went back to' if goes_back else 'resumed'} {name} ({progress.tokens:,} tokens)"
        return progress, f"{origin}; {note}" if note else origin
    if args.init_from is None:
        return Progress(), "initial weights"
    source = directory.resolve(args.init_from) if step is None else directory.at_step(args.init_from, step)
    check_tokenizer(source, corpus)
    keep = keeps_optimizer(source, source_config(source, config.model), config, args.keep_optimizer)
    progress = load(train_state, source, with_optimizer=keep)
    updates = progress.updates if keep else 0
    return Progress(updates=updates), f"weights {'and optimizer ' if keep else ''}of {source}"


def source_config(source: Path, expected: ModelConfig) -> dict[str, Any]:
    """Return the groups of a checkpoint's config. Raises UserError if its model has another shape."""
    groups = directory.read_config(source)
    stored = groups.get("model") or {}
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
        ours, theirs = getattr(expected, key), stored.get(key)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"--init-from {source}: has model.{key}={theirs}, this run {ours}; the shapes must be equal"
            )
    return groups


def check_tokenizer(checkpoint: Path, corpus: BlendedDataset) -> None:
    """Raise UserError if the checkpoint has a tokenizer and `corpus` was made with another one."""
    folder = checkpoint / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        # weights from elsewhere may come without one; the vocabulary's size is checked anyway
        return
    theirs = load_tokenizer(folder).fingerprint
    if theirs != corpus.tokenizer_fingerprint:
        raise UserError(
            f"{checkpoint}: was trained with tokenizer {theirs[:12]}, dataset {corpus.datasets[0].path} was made with"
            f" {corpus.tokenizer_fingerprint[:12]}; prepare the data with --tokenizer {folder}"
        )


def keeps_optimizer(source: Path, theirs: dict[str, Any], config: Config, wanted: bool | None) -> bool:
    """Return whether a new run keeps the optimizer's state of `source`, whose config has the groups `theirs`.

    `wanted` decides. If it is None, the state is kept if it is stored, the objectives are equal, and this phase is not
    "cross". Raises UserError if it is to be kept, and there is none or that of another optimizer.
    """
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
    """Return the resolved configuration inside a checkpoint."""
    return from_yaml(checkpoint / "config.yaml")


# optimizers whose state is the same two moments of each weight, debiased or raw
ALIKE = ("stable_adamw", "adamw")


@dataclass(frozen=True)
class MomentChange:
    """Change of a checkpoint's moments when a run loads them."""

    kept: bool = True
    """False: the optimizer starts fresh, as after `--init-optimizer fresh`."""
    first: float = 1.0
    """Factor of the first moments."""
    second: float = 1.0
    """Factor of the second moments."""
    note: str = ""
    """Text about the change, for the log line that names the loaded checkpoint; empty if nothing changes."""


def moment_change(checkpoint: Path, optim: OptimConfig) -> MomentChange:
    """Return how the run's optimizer takes over the moments of a checkpoint that has an optimizer's state.

    StableAdamW keeps debiased moments and AdamW raw ones, so that what one wrote is scaled for the other: unscaled, an
    update after t others would be off by 1 - beta^t. Muon keeps other tensors, so going to or from it starts afresh.

    Args:
        checkpoint: its folder.
        optim: the optimizer of the run that loads it.

    Raises:
        UserError: its config.yaml or progress.json cannot be read.
    """
    theirs = read_config(checkpoint).get("optim") or {}
    name = theirs.get("name", optim.name)
    betas = [float(theirs.get(key, getattr(optim, key))) for key in ("beta1", "beta2")]
    updates = int(read_progress(checkpoint).get("updates", 0))
    if name != optim.name and not (name in ALIKE and optim.name in ALIKE):
        return MomentChange(False, note=f"{optim.name} starts with fresh moments: those of {name} are of another kind")
    if name not in ALIKE or updates < 1:
        return MomentChange()
    first, second = (
        stored_share(optim.name, new, updates) / stored_share(name, old, updates)
        for new, old in zip((optim.beta1, optim.beta2), betas, strict=True)
    )
    if first == second == 1:
        return MomentChange()
    changed = f"from {name} to {optim.name}" if name != optim.name else f"to the betas of this run's {name}"
    return MomentChange(True, first, second, f"moments converted {changed}")


DATA = ".distcp"


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is not what was written."""


def load(train_state: TrainState, checkpoint: Path, with_optimizer: bool = True, verified: bool = False) -> Progress:
    """Load a checkpoint of any layout into this rank's part of the model (collective), and return its progress.

    The optimizer is loaded too if `with_optimizer`. Every sha256 is checked unless `verified`.

    Raises:
        UserError: on every rank, naming a damaged file.
    """
    if verified:
        return _load(train_state, checkpoint, with_optimizer)
    run_on_rank_zero(lambda: _check_description(checkpoint), UserError)
    return _load_hashing(train_state, checkpoint, with_optimizer)


def load_newest(train_state: TrainState, run_dir: Path) -> tuple[str, Progress] | None:
    """Load the newest good checkpoint of a run (collective).

    First the remains of killed saves are removed or restored (`directory.tidy`).

    Returns:
        (name of the checkpoint's folder, progress); None if the run has no checkpoint.

    Raises:
        UserError: every checkpoint is damaged, or one that is whole does not fit the run.
    """
    layout = train_state.layout
    loaded: list[Progress] = []
    refused: list[UserError] = []

    def attempt(checkpoint: Path) -> None:
        """Load a checkpoint, and raise DamagedCheckpointError on every rank alike.

        A checkpoint that is whole but does not fit is no reason to go back to an older one.
        """
        try:
            loaded.append(_load_hashing(train_state, checkpoint))
        except DamagedCheckpointError:
            raise
        except UserError as error:
            refused.append(error)

    def attempt_together(checkpoint: Path) -> None:
        # checked before any rank reads the checkpoint
        _check_description(checkpoint)
        broadcast_object(checkpoint)
        attempt(checkpoint)

    if layout.rank == 0:
        directory.tidy(run_dir)
        newest: Any
        try:
            newest = (directory.latest(run_dir, checksums=True, check=attempt_together),)
        except UserError as error:
            newest = error
        broadcast_object(newest)
    else:
        while isinstance(newest := broadcast_object(None), Path):
            with contextlib.suppress(DamagedCheckpointError):
                attempt(newest)
    if isinstance(newest, UserError):
        raise newest
    if refused:
        raise refused[0]
    return (newest[0].name, loaded[0]) if loaded else None


def _check_description(checkpoint: Path) -> None:
    """Check the size of every file and the sha256 of all but the data files. Raises UserError."""
    verify(checkpoint, which=lambda name: not name.endswith(DATA))


def _share(layout: Layout, checkpoint: Path) -> list[Block]:
    """Return the blocks that this rank hashes: an even share, in the order of the ranks that wrote them.

    On the same layout that is about what the rank loads, so that hashing reads ahead for it.
    """
    entries = {name: entry for name, entry in read_entries(checkpoint).items() if name.endswith(DATA)}
    names = sorted(entries, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    blocks = [block for name in names for block in blocks_of(name, entries[name])]
    rank, world = layout.rank, layout.topology.world
    return blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]


def _check_share(layout: Layout, checkpoint: Path) -> str | None:
    """Hash this rank's share of the data, and return an error message or None."""
    try:
        verify_blocks(checkpoint, _share(layout, checkpoint), background=True)
    except UserError as error:
        return str(error)
    return None


def _load_hashing(train_state: TrainState, checkpoint: Path, with_optimizer: bool = True) -> Progress:
    """Load a checkpoint while its data are hashed in a thread.

    Raises DamagedCheckpointError on every rank if any rank finds damage, because damage explains most other errors.
    """
    layout, failed, progress = train_state.layout, None, Progress()
    with ThreadPoolExecutor(1) as thread:
        hashed = thread.submit(_check_share, layout, checkpoint)
        try:
            progress = _load(train_state, checkpoint, with_optimizer)
        except UserError as error:
            failed = error
        damage = hashed.result()
    outcomes = all_gather_object((damage, failed))
    for harmed, _ in outcomes:
        if harmed is not None:
            raise DamagedCheckpointError(harmed)
    for _, refused in outcomes:
        if refused is not None:
            raise refused
    return progress


def _load(train_state: TrainState, checkpoint: Path, with_optimizer: bool = True) -> Progress:
    scales: dict[str, Any] = {}
    change = moment_change(checkpoint, train_state.config.optim) if with_optimizer else MomentChange(kept=False)
    starts_fresh = with_optimizer and not change.kept
    with_optimizer = change.kept
    with train_state.summon_full_params(writing=True):
        model, optimizer = state.model_state(train_state.model_chunks, train_state.layout.dp_group), None
        if with_optimizer:
            assert train_state.optimizer is not None
            optimizer = train_state.optimizer.sharded_state(model, True)
        if state.keeps_scales(train_state.config.precision):
            scales = state.scales_in_use(train_state.model_chunks, model, state.stored_scales(checkpoint))
            model["fp8_scales"] = state.sharded(scales, train_state.layout)
        loaded = state.load_state(checkpoint, model, optimizer)
        state.put_model_state(train_state.model_chunks, loaded)
        for key, tensor in scales.items():
            tensor.copy_(loaded["fp8_scales"][key])
    progress = Progress.restored(loaded.get("progress") or {})
    if with_optimizer:
        assert train_state.optimizer is not None
        train_state.optimizer.load_sharded_state(loaded["optimizer"], progress.updates)
        train_state.optimizer.inner.scale_moments(change.first, change.second)
    elif train_state.optimizer is not None:
        train_state.optimizer.reload_master_weights(_exact(train_state, loaded))
    return dataclasses.replace(progress, updates=0) if starts_fresh else progress


def _exact(train_state: TrainState, loaded: dict[str, Any]) -> dict[int, Any]:
    """Return, by id() of each weight that is stored in FP8, the weight's tensor in the checkpoint."""
    return {
        id(weight): loaded[f"model{number}"][name]
        for number, chunk in enumerate(train_state.model_chunks)
        for name, weight in chunk.named_parameters()
        if is_fp8(weight)
    }
