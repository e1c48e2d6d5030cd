"""What each step trained on or will train on: documents and spans as a table, or the very arrays the model saw.

A pure function of the run's configuration and its datasets; no torch, no run needed. Steps are numbered as in
metrics.jsonl: the first is 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.config.errors import UserError
from megatron_ettin.config.objectives import IGNORE
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.data.batch_sizes import BatchSizes
from megatron_ettin.data.mixture import parse_mixture
from megatron_ettin.data.order import Corpus, Row, open_corpus
from megatron_ettin.objectives.labels import corpus_labeller

COLUMNS = (
    "step", "slot", "position", "dataset", "row", "chunk", "source", "document", "document_index", "start_token",
    "end_token", "row_start",
)  # fmt: skip


def open_run(path: Path) -> tuple[Config, Corpus]:
    """Configuration and data of a run directory, a checkpoint or a config.yaml. Raises UserError."""
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no config.yaml; give a run directory, a checkpoint or a resolved config")
    config = from_yaml(file)
    data = config.data
    mixture = parse_mixture(data.mixture)
    return config, open_corpus(mixture, data.seq_len, data.batching, config.run.seed, config.run.phase)


def parse_steps(text: str) -> range:
    """`A:B` as steps A to B - 1, `A` as step A alone. Raises UserError."""
    first, colon, end = text.partition(":")
    try:
        steps = range(int(first), int(end) if colon else int(first) + 1)
    except ValueError:
        raise UserError(f"--steps: {text!r} is not A:B (steps A to B - 1) or a single step") from None
    if steps.start < 1 or not steps:
        raise UserError(f"--steps: {text!r} is empty or begins before 1, the first step of metrics.jsonl")
    return steps


def step_rows(config: Config, corpus: Corpus, steps: range) -> Iterator[tuple[int, int, Row]]:
    """(step, slot, row) of every row of `steps` in order."""
    sizes = BatchSizes.of(config.batch, corpus.mean_tokens_per_row)
    for step in steps:
        positions = range(*sizes.span(step - 1))
        for slot, row in enumerate(corpus.rows(list(positions))):
            yield step, slot, row


def spans(config: Config, corpus: Corpus, steps: range) -> Iterator[dict[str, Any]]:
    """One record a chunk: which tokens of which document stood where. `end_token` is exclusive and, like
    `start_token`, counts the document's own tokens: [CLS] and [SEP] of the chunk are in `row_start` only."""
    for step, slot, row in step_rows(config, corpus, steps):
        dataset, begin = corpus.datasets[row.source], 0
        for chunk, length in zip(row.chunks.tolist(), row.lengths.tolist(), strict=True):
            source, document, start, index = dataset.document_of(chunk)
            values = (
                step, slot, row.position, str(dataset.path), row.row, chunk, source, document, index, start,
                start + length - 2, begin,
            )  # fmt: skip
            yield dict(zip(COLUMNS, values, strict=True))
            begin += length


def write_parquet(out: Path, config: Config, corpus: Corpus, steps: range) -> int:
    """Write the table of `spans`; returns its rows. Written beside and renamed."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    records = list(spans(config, corpus, steps))
    table = pa.table({name: [record[name] for record in records] for name in COLUMNS})
    beside = out.with_name(f".tmp-{out.name}")
    parquet.write_table(table, beside)
    beside.replace(out)
    return len(records)


def write_batches(out: Path, config: Config, corpus: Corpus, steps: range) -> int:
    """Write what the model sees, exactly, as .npz; returns the number of rows n.

    step [n]; input_ids and labels [n, seq_len] (-100 where nothing is predicted, shifted already for clm); spans
    [m, 3]: row among the n, first token, end of every chunk."""
    label = corpus_labeller(config, corpus)
    rows = list(step_rows(config, corpus, steps))
    input_ids = np.full((len(rows), config.data.seq_len), corpus.pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE)
    boundaries = []
    for i, (_, _, row) in enumerate(rows):
        n = len(row.tokens)
        input_ids[i, :n], labels[i, :n] = label(row.tokens, row.lengths, row.position)
        ends = np.cumsum(row.lengths)
        boundaries += [(i, int(end - length), int(end)) for end, length in zip(ends, row.lengths, strict=True)]
    beside = out.with_name(f".tmp-{out.name}")
    with open(beside, "wb") as file:
        step = np.array([step for step, _, _ in rows])
        np.savez(file, step=step, input_ids=input_ids, labels=labels, spans=np.array(boundaries))
    beside.replace(out)
    return len(rows)
