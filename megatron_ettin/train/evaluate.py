"""Loss on held-out rows: the same rows and, for the encoder, the same masks (15 %, whatever the run trains with) at
every evaluation, so that numbers compare over a run, over phases and between checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ettin.config.objectives import IGNORE
from megatron_ettin.data.batch_sizes import BatchSizes
from megatron_ettin.data.mixture import MixtureEntry
from megatron_ettin.data.order import Corpus, open_corpus
from megatron_ettin.objectives.labels import corpus_labeller
from megatron_ettin.train.assembly import Machine
from megatron_ettin.train.batches import Batches, MicroBatch
from megatron_ettin.train.step import Totals, run_micro_batches

VALIDATION_MLM_PROBABILITY = 0.15
VALIDATION_SEED, VALIDATION_PHASE = 0, "validation"


@dataclass(frozen=True)
class Evaluated:
    """Mean loss over predicted tokens; accuracy of the likeliest token (masked positions of an encoder)."""

    objective: str
    loss: float
    labels: int
    rows: int
    accuracy: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        measure = f"perplexity {self.perplexity:.2f}" if self.objective == "clm" else f"accuracy {self.accuracy:.4f}"
        return f"loss {self.loss:.4f} {measure} ({self.labels:,} predicted tokens in {self.rows:,} rows)"


def validation_batches(machine: Machine, dataset: str, seq_len: int | None = None) -> Batches:
    """Batches over `dataset` in an order of its own that no run's seed changes."""
    data = machine.config.data
    corpus = open_corpus(
        [MixtureEntry(dataset)], seq_len or data.seq_len, data.batching, VALIDATION_SEED, VALIDATION_PHASE
    )
    run = dataclasses.replace(machine.config.run, seed=VALIDATION_SEED, phase=VALIDATION_PHASE)
    config = dataclasses.replace(machine.config, run=run, data=dataclasses.replace(data, seq_len=corpus.seq_len))
    label = corpus_labeller(config, corpus, VALIDATION_MLM_PROBABILITY)
    sizes = BatchSizes((config.batch.global_batch_rows,), (0,))
    return Batches(config, corpus, sizes, label, machine.layout, machine.platform.device)


def evaluate(machine: Machine, batches: Batches, max_rows: int | None = None) -> Evaluated:
    """Forward over the first `max_rows` rows (all by default). Collective; equal on every rank and layout."""
    rows = batches.corpus.num_rows if max_rows is None else min(max_rows, batches.corpus.num_rows)
    machine.refresh_weights()
    for chunk in machine.chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            totals = Totals()
            for group in groups_in_order(batches, rows):
                totals += run_micro_batches(machine, group, len(group), batches.row_tokens, training=False)
    finally:
        for chunk in machine.chunks:
            chunk.train()
    figures = [totals.loss, totals.labels, totals.correct]
    loss, labels, correct = machine.layout.sum_over_world(figures, machine.platform.device)
    objective = machine.config.run.objective
    return Evaluated(objective, loss / max(labels, 1), int(labels), rows, correct / max(labels, 1))


def groups_in_order(batches: Batches, rows: int) -> Iterator[list[MicroBatch]]:
    """This rank's share of the first `rows` rows, the same number of micro-batches on every rank, a few at a time."""
    topology, size = batches.layout.topology, batches.config.batch.micro_batch_rows
    together = 2 * topology.pp
    count = -(-rows // (topology.dp * size))
    for begin in range(0, count, together):
        group = []
        for index in range(begin, begin + together):
            start = (index * topology.dp + batches.layout.dp_rank) * size
            chosen = [batches.corpus.row(i) if i < rows else None for i in range(start, start + size)]
            group.append(batches.micro_batch(chosen, list(range(size))))
        yield group


def unigram_loss(train: Corpus, batches: Batches, max_rows: int | None = None) -> float:
    """Cross entropy, on the positions that `evaluate` predicts, of the training corpus's token frequencies with one
    added to each: what a model that ignores all context can reach."""
    counts = np.ones(train.vocab_size, dtype=np.float64)
    together = 4096  # chunks counted at once: a count over the vocabulary for each would cost more than reading it
    for dataset in train.datasets:
        for begin in range(0, dataset.num_chunks, together):
            chunks = [dataset.chunk(i) for i in range(begin, min(begin + together, dataset.num_chunks))]
            counts += np.bincount(np.concatenate(chunks), minlength=train.vocab_size)
    log_probabilities = np.log(counts / counts.sum())
    rows = batches.corpus.num_rows if max_rows is None else min(max_rows, batches.corpus.num_rows)
    total, labels = 0.0, 0
    for position in range(rows):
        row = batches.corpus.row(position)
        _, targets = batches.label(row.tokens, row.lengths, row.position)
        targets = targets[targets != IGNORE]
        total -= float(log_probabilities[targets].sum())
        labels += len(targets)
    return total / max(labels, 1)
