"""Loading a checkpoint into this rank's part of a machine, with every file's sha256 computed meanwhile.

What describes a checkpoint is small and is checked before anything is read of it. Its data are hashed in threads beside
the load, which waits for the disk and copies: nobody goes on from what was loaded before the hashes agree, and a run
that finds damage loads the checkpoint before that one over it. Every rank hashes a share of the blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import Block, blocks_of
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint import directory, fp8_state, state
from megatron_ettin.checkpoint.integrity import read_entries, verify, verify_blocks
from megatron_ettin.parallel.layout import Layout
from megatron_ettin.platform.fp8_weights import is_fp8
from megatron_ettin.train.moments import MomentChange, moment_change
from megatron_ettin.train.progress import Progress
from megatron_ettin.train.setup import Machine

DATA = ".distcp"


class Damaged(UserError):
    """A file of a checkpoint is not what was written."""


def load(machine: Machine, checkpoint: Path, with_optimizer: bool = True, verified: bool = False) -> Progress:
    """Put a checkpoint's weights (and optimizer) into this rank's part, whatever layout wrote it. Collective.

    Every sha256 is checked unless `verified`. Raises UserError naming the damaged file, on every rank."""
    if verified:
        return _load(machine, checkpoint, with_optimizer)
    agree(machine.layout, lambda: _check_description(checkpoint))
    return _load_hashing(machine, checkpoint, with_optimizer)


def load_newest(machine: Machine, run_dir: Path) -> tuple[str, Progress] | None:
    """`directory.latest` of a run, loaded: its name and progress, None where the run has no checkpoint. What killed
    saves left is put out of the way first. Collective; raises UserError where every checkpoint is damaged, and where
    a whole one does not fit this machine."""
    layout = machine.layout
    loaded: list[Progress] = []
    refused: list[UserError] = []

    def attempt(checkpoint: Path) -> None:
        """Raises Damaged on every rank alike; a checkpoint that is whole but does not fit is no reason to go back."""
        try:
            loaded.append(_load_hashing(machine, checkpoint))
        except Damaged:
            raise
        except UserError as error:
            refused.append(error)

    def attempt_together(checkpoint: Path) -> None:
        _check_description(checkpoint)  # before anyone reads
        layout.from_chief(checkpoint)
        attempt(checkpoint)

    if layout.rank == 0:
        directory.tidy(run_dir)
        found: Any
        try:
            found = (directory.latest(run_dir, checksums=True, check=attempt_together),)
        except UserError as error:
            found = error
        layout.from_chief(found)
    else:
        while isinstance(found := layout.from_chief(None), Path):
            with contextlib.suppress(Damaged):
                attempt(found)
    if isinstance(found, UserError):
        raise found
    if refused:
        raise refused[0]
    return (found[0].name, loaded[0]) if loaded else None


def agree(layout: Layout, ask: Callable[[], Any]) -> Any:
    """What rank 0 finds, once for all ranks; what it raises (UserError) is raised on each."""
    answer: Any = None
    if layout.rank == 0:
        try:
            answer = ask()
        except UserError as error:
            answer = error
    answer = layout.from_chief(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _check_description(checkpoint: Path) -> None:
    """Presence and size of every file, sha256 of all that say what the data are. Raises UserError."""
    verify(checkpoint, which=lambda name: not name.endswith(DATA))


def _share(layout: Layout, checkpoint: Path) -> list[Block]:
    """What this rank hashes of the data: an even share of all blocks in the order of the ranks that wrote them, which
    on the same layout is about what it reads, so that it reads ahead for itself."""
    entries = {name: entry for name, entry in read_entries(checkpoint).items() if name.endswith(DATA)}
    names = sorted(entries, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    blocks = [block for name in names for block in blocks_of(name, entries[name])]
    rank, world = layout.rank, layout.topology.world
    return blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]


def _check_share(layout: Layout, checkpoint: Path) -> str | None:
    """Hash this rank's share of the data; what is wrong with it."""
    try:
        verify_blocks(checkpoint, _share(layout, checkpoint), beside=True)
    except UserError as error:
        return str(error)
    return None


def _load_hashing(machine: Machine, checkpoint: Path, with_optimizer: bool = True) -> Progress:
    """`_load` while the data are hashed. Raises Damaged on every rank for what any rank found, which also explains
    most of what a load can die of."""
    layout, failed, progress = machine.layout, None, Progress()
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(_check_share, layout, checkpoint)
        try:
            progress = _load(machine, checkpoint, with_optimizer)
        except UserError as error:
            failed = error
        damage = hashed.result()
    outcomes = layout.gathered((damage, failed))
    for harmed, _ in outcomes:
        if harmed is not None:
            raise Damaged(harmed)
    for _, refused in outcomes:
        if refused is not None:
            raise refused
    return progress


def _load(machine: Machine, checkpoint: Path, with_optimizer: bool = True) -> Progress:
    metadata, scales = state.sharding_metadata(machine.layout.dp_group), {}
    change = moment_change(checkpoint, machine.config.optim) if with_optimizer else MomentChange(kept=False)
    starts_fresh = with_optimizer and not change.kept
    with_optimizer = change.kept
    with machine.whole_weights(writing=True):
        model, optimizer = state.model_state(machine.chunks, metadata), None
        if with_optimizer:
            assert machine.optimizer is not None
            optimizer = machine.optimizer.sharded_state(model, True, metadata)
        if fp8_state.keeps_scales(machine.config):
            scales = fp8_state.scales_in_use(machine.chunks, model, fp8_state.stored_scales(checkpoint))
            model["fp8_scales"] = fp8_state.sharded(scales, machine.layout)
        loaded = state.load_state(checkpoint, model, optimizer)
        state.put_model_state(machine.chunks, loaded)
        for key, tensor in scales.items():
            tensor.copy_(loaded["fp8_scales"][key])
    progress = Progress.restored(loaded.get("progress") or {})
    if with_optimizer:
        assert machine.optimizer is not None
        machine.optimizer.load_sharded_state(loaded["optimizer"], progress.updates)
        machine.optimizer.inner.scale_moments(change.first, change.second)
    elif machine.optimizer is not None:
        machine.optimizer.take_weights(_exact(machine, loaded))
    return dataclasses.replace(progress, updates=0) if starts_fresh else progress


def _exact(machine: Machine, loaded: dict[str, Any]) -> dict[int, Any]:
    """id of each weight in FP8 -> what a checkpoint has of it."""
    return {
        id(weight): loaded[f"model{number}"][name]
        for number, chunk in enumerate(machine.chunks)
        for name, weight in chunk.named_parameters()
        if is_fp8(weight)
    }
