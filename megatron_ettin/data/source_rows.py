"""Rows for evaluation that hold chunks of one source each, so that a loss by source is exact.

A training row mixes the INPUTs of `ettin prepare`; here the chunks of each are packed by themselves, in memory and on
every process alike. It is meant for held-out sets: 24 bytes a chunk, and a document looked up for each. A dataset of
more than MOST_CHUNKS chunks is not told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.data.blended_dataset import Corpus
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.mixture import BLOCK_SLOTS
from megatron_ettin.data.packing import pack
from megatron_ettin.data.packing_index import PlanRecord, RowArrays, RowPlan, check_rows, ensure_row_plan
from megatron_ettin.data.sampler import KeyedOrder

MOST_CHUNKS = 1 << 24
CHUNKS_AT_ONCE = 1 << 16


def open_by_source(path: str, seq_len: int, batching: str, seed: int, phase: str) -> dict[str, Corpus]:
    """Rows of each INPUT of a dataset, by its name, in a keyed order of their own. A dataset of one INPUT, or of too
    many chunks, is one entry: its ordinary rows under the name "". Raises UserError."""
    dataset = open_dataset(path)
    check_rows(dataset, seq_len, batching)
    if len(dataset.manifest.sources) < 2 or dataset.num_chunks > MOST_CHUNKS:
        plans = {"": ensure_row_plan(dataset, seq_len, batching)}
    else:
        plans = {name: plan_of(dataset, name, chunks, seq_len, batching) for name, chunks in by_source(dataset).items()}
    return {name: one_source(dataset, plan, seed, phase) for name, plan in plans.items()}


def one_source(dataset: Dataset, plan: RowPlan, seed: int, phase: str) -> Corpus:
    order = KeyedOrder([BLOCK_SLOTS], [plan.num_rows], seed, phase)
    return Corpus([dataset], [plan], order, plan.seq_len, plan.batching)


def by_source(dataset: Dataset) -> dict[str, npt.NDArray[np.int64]]:
    """The chunks of each INPUT that has any, in the manifest's order: a document's file begins with its name."""
    names = [source.name for source in dataset.manifest.sources]
    number = {name: i for i, name in enumerate(names)}
    source_of = np.empty(dataset.num_chunks, np.int32)
    for first in range(0, dataset.num_chunks, CHUNKS_AT_ONCE):
        chunks = np.arange(first, min(first + CHUNKS_AT_ONCE, dataset.num_chunks))
        files = dataset.documents_of(chunks).source
        source_of[chunks] = [number.get(file.partition("/")[0], -1) for file in files]
    found = {name: np.flatnonzero(source_of == i) for name, i in number.items()}
    found["(other)"] = np.flatnonzero(source_of < 0)
    return {name: chunks for name, chunks in found.items() if len(chunks)}


def plan_of(dataset: Dataset, name: str, chunks: npt.NDArray[np.int64], seq_len: int, batching: str) -> RowPlan:
    """A row plan in memory over some of a dataset's chunks."""
    lengths = np.minimum(dataset.lengths_of(chunks), seq_len)
    if batching == "padded":
        order, counts = np.arange(len(chunks)), np.ones(len(chunks), np.int64)
    else:
        windows = list(pack(lengths, seq_len))
        order = np.concatenate([members for members, _ in windows])
        counts = np.concatenate([count for _, count in windows])
    ends = np.cumsum(counts)
    tokens = np.add.reduceat(lengths[order], ends - counts)
    fingerprint = f"{dataset.fingerprint}:{name}"
    record = PlanRecord(fingerprint, seq_len, batching, len(counts), int(tokens.sum()), {})
    return RowPlan(Path(), record, dataset, RowArrays(chunks[order], ends, tokens))
