"""Measure the loss on held-out rows, in total and by source.

Every evaluation has the same rows and, for the encoder, the same masks (15 %, whatever the run trains with), so that
figures can be compared within a run, between phases and between checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import counted
from megatron_ettin.batching.batches import Batches, MicroBatch
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.data.blended_dataset import BlendedDataset, open_by_source
from megatron_ettin.data.mixture import largest_remainder
from megatron_ettin.parallel.collectives import all_reduce_sum
from megatron_ettin.train.setup import TrainState
from megatron_ettin.train.step import run_micro_batches

VALIDATION_MLM_PROBABILITY = 0.15
VALIDATION_SEED, VALIDATION_PHASE = 0, "validation"


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of held-out rows."""

    objective: str
    """Row objective with which the rows were read."""
    loss: float
    """Mean loss over predicted tokens, in nats."""
    labels: int
    """Number of predicted tokens."""
    rows: int
    """Number of rows."""
    accuracy: float
    """Share of predicted tokens for which the likeliest token is the right one."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        measure = f"perplexity {self.perplexity:.2f}" if self.objective == "clm" else f"accuracy {self.accuracy:.4f}"
        return (
            f"loss {self.loss:.4f} {measure} ({counted(self.labels, 'predicted token')} in {counted(self.rows, 'row')})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the perplexity for a decoder only."""
        perplexity = {"perplexity": self.perplexity} if self.objective == "clm" else {}
        return {**dataclasses.asdict(self), **perplexity}


@dataclass(frozen=True)
class EvalResult(EvalMetrics):
    """Metrics of all rows and of each source.

    The labels of the sources, and their losses times labels, sum to those of all rows.
    """

    sources: dict[str, EvalMetrics]
    """Metrics by the name of the source."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with those of each source under "sources"."""
        parts = {name: part.to_json() for name, part in self.sources.items()}
        for part in parts.values():
            del part["objective"]
        return {**super().to_json(), "sources": parts}

    def lines(self) -> list[str]:
        """Return a line with the metrics of all rows and, if there are several sources, a line for each."""
        parts = [f"  {name}: {part}" for name, part in self.sources.items()]
        return [str(self), *(parts if len(parts) > 1 else [])]


@dataclass(frozen=True)
class EvalDataset:
    """Rows to evaluate on, by source, all read with one row objective."""

    sources: dict[str, Batches]
    """Rows by the name of their source."""
    row_objective: str
    """Row objective with which they are read."""

    @property
    def corpus(self) -> BlendedDataset:
        """Rows of the first source; all sources share tokenizer, vocabulary and row length."""
        return next(iter(self.sources.values())).corpus

    def rows(self, most: int | None) -> list[int]:
        """Return how many rows of each source to read: all, or about `most` in proportion, at least one of each."""
        available = [batches.corpus.num_rows for batches in self.sources.values()]
        total = sum(available)
        if most is None or most >= total:
            return available
        shares = largest_remainder([rows / total for rows in available], most)
        return [max(1, min(share, rows)) for share, rows in zip(shares, available, strict=True)]


def build_eval_dataset(
    train_state: TrainState, datasets: Mapping[str, str], row_objective: str, seq_len: int | None = None
) -> EvalDataset:
    """Open held-out rows, in an order that does not depend on the run's seed.

    A source is a dataset, or `DATASET/INPUT` within a dataset that `ettin prepare` made from several INPUTs.

    Args:
        train_state: the model that is evaluated.
        datasets: paths of the datasets by name.
        row_objective: the objective with which the rows are read.
        seq_len: tokens of a row; None: as in training.

    Raises:
        UserError: the row length does not fit the model, or a dataset cannot be used.
    """
    data = train_state.config.data
    length = data.seq_len if seq_len is None else seq_len
    if not 8 <= length <= train_state.config.model.max_position_embeddings:
        most = train_state.config.model.max_position_embeddings
        raise UserError(f"--seq-len {length}: a row of this model has from 8 to {most} tokens")
    names = {"run.seed": VALIDATION_SEED, "run.phase": VALIDATION_PHASE, "run.objective": row_objective}
    rows = {"data.seq_len": length, "data.mlm_probability": VALIDATION_MLM_PROBABILITY}
    config = train_state.config.with_keys({**names, **rows})
    sources = {}
    for name, path in datasets.items():
        parts = open_by_source(path, length, data.batching, VALIDATION_SEED, VALIDATION_PHASE)
        for part, corpus in parts.items():
            label = name if not part else part if len(datasets) == 1 else f"{name}/{part}"
            sources[label] = Batches.of(config, corpus, train_state.layout, train_state.platform.device)
    return EvalDataset(sources, row_objective)


def evaluate(train_state: TrainState, held_out: EvalDataset, max_rows: int | None = None) -> EvalResult:
    """Run the model on held-out rows (collective); the result is equal on every rank and layout.

    Args:
        train_state: the model that is evaluated.
        held_out: the rows by source.
        max_rows: number of rows, shared out over the sources; by default all.
    """
    rows = held_out.rows(max_rows)
    train_state.finish_param_sync()
    for chunk in train_state.model_chunks:
        chunk.eval()
    figures: list[float] = []
    try:
        with torch.no_grad():
            for batches, count in zip(held_out.sources.values(), rows, strict=True):
                totals = dict.fromkeys(("loss", "labels", "correct"), 0.0)
                for group in groups_in_order(batches, count):
                    own = run_micro_batches(train_state, group, len(group), training=False).read()
                    totals = {name: total + own.get(name, 0.0) for name, total in totals.items()}
                figures += totals.values()
    finally:
        for chunk in train_state.model_chunks:
            chunk.train()
    sums = np.array(all_reduce_sum(figures, train_state.platform.device)).reshape(-1, 3)
    objective = held_out.row_objective
    parts = {name: mean(objective, part, n) for name, part, n in zip(held_out.sources, sums, rows, strict=True)}
    return EvalResult(**dataclasses.asdict(mean(objective, sums.sum(axis=0), sum(rows))), sources=parts)


def mean(objective: str, sums: np.ndarray, rows: int) -> EvalMetrics:
    """Return the metrics of `rows` rows from their `sums` [3]: of losses, labels and correct predictions."""
    loss, labels, correct = sums.tolist()
    return EvalMetrics(objective, loss / max(labels, 1), int(labels), rows, correct / max(labels, 1))


def groups_in_order(batches: Batches, rows: int) -> Iterator[list[MicroBatch]]:
    """Yield this rank's share of the first `rows` rows in groups of a few micro-batches, equally many on every rank."""
    host, together = batches.host, 2 * batches.config.parallel.pp
    split = host.split(rows)
    for begin in range(0, split.count, together):
        indices = range(begin, min(begin + together, split.count))
        min_tokens = host.longest(split, indices) if host.equal_lengths else 0
        yield [batches.on_device(host.make_held_out(split, index, min_tokens)) for index in indices]


def unigram_loss(train: BlendedDataset, held_out: EvalDataset, max_rows: int | None = None) -> float:
    """Return the loss, in nats, of predicting the labels of `evaluate` from token frequencies of the training data.

    A model that ignores all context can reach this loss. One is added to the count of each token.
    """
    counts = np.ones(train.vocab_size, dtype=np.float64)
    # chunks at once, because a count over the vocabulary costs more than reading one chunk
    together = 4096
    for dataset in train.datasets:
        for begin in range(0, dataset.num_chunks, together):
            chunks = [dataset.chunk(i) for i in range(begin, min(begin + together, dataset.num_chunks))]
            counts += np.bincount(np.concatenate(chunks), minlength=train.vocab_size)
    log_probabilities = np.log(counts / counts.sum())
    total, labels = 0.0, 0
    for batches, rows in zip(held_out.sources.values(), held_out.rows(max_rows), strict=True):
        for order_index in range(rows):
            row = batches.corpus.row(order_index)
            _, targets = batches.host.collator(row.tokens, row.lengths, row.order_index)
            targets = targets[targets != IGNORE]
            total -= float(log_probabilities[targets].sum())
            labels += len(targets)
    return total / max(labels, 1)
