"""Train tiny runs in the pool and read their metrics and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest
from megatron_ettin.checkpoint.reader import CheckpointReader
from tests.pool import Pool

TINY = [
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.vocab_size=320",
    "model.encoder_window=8",
    "model.decoder_window_keys=8",
    "data.seq_len=64",
    "batch.global_batch_rows=8",
    "batch.micro_batch_rows=2",
    "batch.warmup_tokens=0",
    "precision.name=fp32",
    "optim.lr=3e-3",
    "schedule.name=constant",
    "schedule.warmup_tokens=0",
    "runtime.device=cpu",
    "metrics.tensorboard=false",
    "checkpoint.every_tokens=null",
]


@dataclass(frozen=True)
class Trained:
    """metrics.jsonl and the last checkpoint of a run."""

    metrics: list[dict]
    directory: Path

    def column(self, key: str) -> list:
        return [line[key] for line in self.metrics]

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the model's full tensors by canonical name, without the optimizer's."""
        checkpoint = latest(self.directory)
        assert checkpoint is not None
        reader = CheckpointReader(checkpoint)
        return {key: reader.read(key) for key in reader.keys() if not key.startswith("optimizer.")}  # noqa: SIM118


def pairs(layouts: Iterable[str], options: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each layout with two of the options: the first layout with the first and the last option, the second with
    the second and the last but one, and so on. If ETTIN_WHOLE_TABLES is set (tests/nightly.sh), pair it with all of
    them.

    Args:
        layouts: names of layouts.
        options: all combinations of two-valued choices, in the order of `itertools.product`. Two options at the same
            distance from the ends differ in every choice, so each layout is run with every value of each choice.
    """
    if os.environ.get("ETTIN_WHOLE_TABLES"):
        return [(layout, option) for layout in layouts for option in options]
    last = len(options) - 1
    return [
        (layout, option)
        for number, layout in enumerate(layouts)
        for index, option in enumerate(options)
        if min(index, last - index) == number % (len(options) // 2)
    ]


def tiered(cases: Iterable[str | tuple[str, ...]], first: Sequence[str | tuple[str, ...]]) -> list[Any]:
    """Return the cases for `pytest.mark.parametrize`; those that are not in `first` are marked `full`."""
    cases = list(cases)
    assert set(first) <= set(cases), set(first) - set(cases)
    tuples = [(case,) if isinstance(case, str) else case for case in cases]
    return [
        pytest.param(*word, marks=() if case in first else pytest.mark.full)
        for case, word in zip(cases, tuples, strict=True)
    ]


def command(
    directory: Path, corpus: Path, objective: str, overrides: list[str], options: list[str] | None = None
) -> list[str]:
    start = ["train", "--size", "17m", "--objective", objective, "--phase", "pretrain", "--run-dir", str(directory)]
    return [*start, *(options or []), *TINY, f"data.mixture={corpus}", *overrides]


def read(directory: Path) -> Trained:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return Trained([json.loads(line) for line in lines], directory)


def train(
    pool: Pool,
    world: int,
    directory: Path,
    corpus: Path,
    objective: str,
    overrides: list[str],
    options: list[str] | None = None,
    mutation: str | None = None,
    status: int = 0,
) -> Trained:
    """Train to the end on `world` ranks, assert that every rank exits with `status`, and return the run."""
    results = pool.run(world, command(directory, corpus, objective, overrides, options), mutation)
    assert [result.status for result in results] == [status] * world, "\n".join(r.output[-3000:] for r in results)
    return read(directory)
