"""From a step number to micro-batches: which rows it trains on, their labels and boundaries, as this rank needs them.

Everything is a pure function of (config, data, step): each data-parallel rank and each pipeline stage makes its own
without talking. Batch warm-up counts nominal tokens (rows x the mean tokens a row), so its row counts are a closed
form. Rows that a layout's micro-batches have too many are empty: all padding, no labels, not counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ettin.config.flops import attended_pairs
from megatron_ettin.config.objectives import IGNORE
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.data.batch_sizes import BatchSizes
from megatron_ettin.data.order import Corpus, Row
from megatron_ettin.model.dropout import step_key
from megatron_ettin.model.packed import PackedRows, pack_rows
from megatron_ettin.objectives.labels import Labeller, corpus_labeller
from megatron_ettin.parallel import Layout, Topology


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on this rank; tensors [rows, buffer tokens]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    packed: PackedRows
    tokens: int  # that are no padding
    pairs: tuple[int, int]  # attended (query, key) pairs of one global and of one local layer


def buffer_tokens(seq_len: int, topology: Topology, precision_multiple: int = 1) -> int:
    """Row length on the device: seq_len rounded up so that every axis divides it, and each tensor-parallel slice of
    it what the precision quantises in blocks."""
    blocks = 16 if precision_multiple == 1 else math.lcm(16, precision_multiple) * topology.tp
    multiple = math.lcm(blocks, topology.tp, 2 * topology.cp)
    return -(-seq_len // multiple) * multiple


@dataclass(frozen=True)
class Batches:
    """Micro-batches of any step for one data-parallel rank."""

    config: Config
    corpus: Corpus
    sizes: BatchSizes
    label: Labeller
    layout: Layout
    device: torch.device

    @classmethod
    def of(cls, config: Config, corpus: Corpus, layout: Layout, device: torch.device) -> Batches:
        sizes = BatchSizes.of(config.batch, corpus.mean_tokens_per_row)
        return cls(config, corpus, sizes, corpus_labeller(config, corpus), layout, device)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row on the device, padding included."""
        multiple = PRECISIONS[self.config.precision.name].multiple
        return buffer_tokens(self.config.data.seq_len, self.layout.topology, multiple)

    def micro_batch_count(self, step: int) -> int:
        """Micro-batches a rank runs at `step`; whole groups of pipeline ranks under the interleaved schedule."""
        topology = self.layout.topology
        count = -(-self.sizes.size_at(step) // (topology.dp * self.config.batch.micro_batch_rows))
        return -(-count // topology.pp) * topology.pp if topology.vp > 1 else count

    def step(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of `step` in order."""
        first, end = self.sizes.span(step)
        rows, dp = self.config.batch.micro_batch_rows, self.layout.topology.dp
        key = step_key(self.config.run.seed, self.config.run.phase, step)
        for index in range(self.micro_batch_count(step)):
            start = (index * dp + self.layout.dp_rank) * rows
            slots = range(start, start + rows)
            chosen = [self.corpus.row(first + slot) if first + slot < end else None for slot in slots]
            yield self.micro_batch(chosen, list(slots), key)

    def micro_batch(self, rows: list[Row | None], slots: list[int], dropout_key: int = 0) -> MicroBatch:
        """Label rows and lay them out; None is an empty row."""
        length = self.row_tokens
        padding = self.corpus.pad_id
        input_ids = np.full((len(rows), length), padding, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        for i, row in enumerate(rows):
            if row is not None:
                n = len(row.tokens)
                input_ids[i, :n], labels[i, :n] = self.label(row.tokens, row.lengths, row.position)
        lengths = [row.lengths.tolist() if row is not None else [] for row in rows]
        real = np.array([n for row in lengths for n in row], dtype=np.int64)
        causal, window = self.config.causal, self.config.window
        return MicroBatch(
            torch.from_numpy(input_ids).to(self.device),
            torch.from_numpy(labels).to(self.device),
            pack_rows(lengths, length, self.device, slots, dropout_key),
            int(real.sum()),
            (int(attended_pairs(real, causal, None).sum()), int(attended_pairs(real, causal, window).sum())),
        )
