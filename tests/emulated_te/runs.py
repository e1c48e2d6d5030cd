"""Tiny runs on the emulated Transformer Engine, of a shape that every FP8 recipe supports."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.pool import Pool
from tests.train.runs import Trained, train as train_tiny

WIDTHS = ["model.hidden_size=128", "model.ffn_hidden_size=256"]
# A layer with global and one with local attention. More steps or layers add more rounding than they add to the effect of
# an error: a local window off by one moved the losses of eight steps of four layers by half of what FP8 moves them, and
# of four steps of two by as much.
SHAPE = [*WIDTHS, "model.num_layers=2", "run.steps=4"]


def train(
    pool: Pool,
    world: int,
    folder: Path,
    corpus: Path,
    objective: str,
    overrides: str,
    mutation: str | None = None,
    **named,
) -> Trained:
    """Train a tiny run. `words` are overrides separated by spaces; the precision is bf16 unless one sets it."""
    line = [*SHAPE, "precision.name=bf16", *overrides.split()]
    return train_tiny(pool, world, folder, corpus, objective, line, mutation=mutation, **named)


def apart(actual: Trained, expected: Trained) -> float:
    """Return the largest relative difference of the losses of a step; assert that the rows are the same."""
    assert actual.column("rows") == expected.column("rows")
    return max(abs(a - b) / b for a, b in zip(actual.column("loss"), expected.column("loss"), strict=True))


def weights(run: Trained) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint, without the FP8 state."""
    return {key: tensor for key, tensor in run.weights().items() if not key.startswith("fp8_scales.")}


def same_weights(actual: Trained, expected: Trained) -> bool:
    """Return whether the checkpoints hold the same names, types and bits of the model."""
    ours, theirs = weights(actual), weights(expected)
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


def like_weights(actual: Trained, expected: Trained) -> bool:
    """Return whether weights agree within a third of one update.

    Ranks sum squares in another order, which FP8 may round differently, and even tiny gradients make full updates."""
    ours, theirs = weights(actual), weights(expected)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[key].float(), theirs[key].float(), rtol=2**-7, atol=1e-3) for key in ours
    )
