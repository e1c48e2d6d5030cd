"""Micro-batches in host memory: every row once, spread evenly over ranks, complete with labels and boundaries."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ettin.batching.host import HostBatch, HostBatches
from megatron_ettin.batching.objectives import ObjectiveMix, make_collator
from megatron_ettin.config.schema import BatchConfig
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.mixture import MixtureEntry
from megatron_ettin.data.sampler import BatchSizes

BATCH = BatchConfig(8, 2, warmup_tokens=2_000, warmup_min_rows=3)


def host_batches(corpus_path: Path, dp: int = 2, dp_rank: int = 1, group: int = 1) -> HostBatches:
    """Return host batches of 64-token rows, 3 growing to 8 rows per step, so micro-batches of 2 are not always full."""
    corpus = open_blended_dataset([MixtureEntry(str(corpus_path))], 64, "packed", 17, "pretrain")
    sizes = BatchSizes.of(BATCH, corpus.mean_tokens_per_row)
    collator = make_collator("mlm", corpus, 0.3, 17, "pretrain")
    windows = {True: 8, False: 8}
    return HostBatches(corpus, sizes, collator, ObjectiveMix(("mlm",)), windows, 64, 2, dp, dp_rank, group=group)


def plain(value: Any) -> Any:
    """Return a dataclass as a tuple of its fields, arrays as lists."""
    if dataclasses.is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value.tolist() if isinstance(value, np.ndarray) else value


def real_rows(host: HostBatches, batch: HostBatch) -> list[bool]:
    """Return, for each row of the micro-batches, whether it holds tokens."""
    return (np.asarray(batch.input_ids) != host.corpus.pad_id).any(axis=1).tolist()


def test_host_batch_pinned_has_every_array_as_a_tensor_in_page_locked_memory(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked memory needs a GPU, so pinning is simulated by a mark on the tensor."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: setattr(tensor, "marked", True) or tensor)
    batch = host_batches(corpus).make(0, 0)
    pinned = batch.pin_memory()
    pairs = [(batch, pinned), (batch.boundaries, pinned.boundaries)]
    for before, after in pairs:
        for name, array in vars(before).items():
            if isinstance(array, np.ndarray):
                assert getattr(after, name).marked, name
                assert getattr(after, name).tolist() == array.tolist(), name
    assert plain(pinned)[3] == batch.causal_labels


def test_host_batches_of_data_parallel_ranks_partition_each_step(corpus: Path) -> None:
    """Two data-parallel ranks together hold the rows of a single rank, each row once."""
    alone = host_batches(corpus, dp=1, dp_rank=0)
    ranks = [host_batches(corpus, dp=2, dp_rank=rank) for rank in (0, 1)]
    for step in (0, 5, 40):
        missing: dict[int, tuple] = {}
        for host in (alone, *ranks):
            rows: dict[int, tuple] = {}
            for index in range(host.count(step)):
                batch = host.make(step, index)
                labels = np.full(batch.input_ids.size, IGNORE)
                labels[batch.label_positions] = batch.labels
                parts = zip(real_rows(host, batch), batch.input_ids, labels.reshape(-1, 64), strict=True)
                slots = batch.boundaries.slots.tolist()
                rows |= {slots[i]: (ids.tolist(), own.tolist()) for i, (real, ids, own) in enumerate(parts) if real}
            if host is alone:
                missing = rows
                assert len(rows) == host.sizes.size_at(step)
            else:
                assert rows.items() <= missing.items()
                missing = {slot: row for slot, row in missing.items() if slot not in rows}
        assert not missing


@pytest.mark.parametrize("dp", [3, 4])
def test_host_batches_during_batch_warmup_spread_rows_evenly(corpus: Path, dp: int) -> None:
    """Steps grow from 3 to 8 rows in micro-batches of at most 2; see that each rank gets its even share of rows."""
    ranks = [host_batches(corpus, dp=dp, dp_rank=rank) for rank in range(dp)]
    for step in (0, 5, 40):
        rows = ranks[0].sizes.size_at(step)
        computed, real = [], []
        for host in ranks:
            batches = [host.make(step, index) for index in range(host.count(step))]
            computed.append([len(batch.input_ids) for batch in batches])
            real.append(sum(sum(real_rows(host, batch)) for batch in batches))
        assert max(real) - min(real) <= 1, (step, real)
        assert all(sizes == computed[0] for sizes in computed), (step, computed)
        assert len(set(computed[0])) == 1, (step, computed)
        assert sum(computed[0]) - -(-rows // dp) < max(computed[0]), (step, computed)


def test_host_batches_import_no_torch() -> None:
    code = "import sys, megatron_ettin.batching.host; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
