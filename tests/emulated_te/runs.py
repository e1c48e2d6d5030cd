"""Tiny runs over the emulated Transformer Engine, of a shape that every FP8 recipe takes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.pool import Pool
from tests.train.runs import Trained, train as train_tiny

SHAPE = ["model.hidden_size=128", "model.ffn_hidden_size=256", "run.steps=8"]


def train(
    pool: Pool, world: int, folder: Path, corpus: Path, objective: str, words: str, mutation: str | None = None, **named
) -> Trained:
    """`words`: keys and values with spaces between; bf16 where they name no precision."""
    line = [*SHAPE, "precision.name=bf16", *words.split()]
    return train_tiny(pool, world, folder, corpus, objective, line, mutation=mutation, **named)


def apart(found: Trained, expected: Trained) -> float:
    """Largest relative difference of the losses of a step; the rows have to be the same."""
    assert found.column("rows") == expected.column("rows")
    return max(abs(a - b) / b for a, b in zip(found.column("loss"), expected.column("loss"), strict=True))


def weights(run: Trained) -> dict[str, torch.Tensor]:
    """The checkpoint's, without the state of FP8."""
    return {key: tensor for key, tensor in run.weights().items() if not key.startswith("fp8_scales.")}


def same_weights(found: Trained, expected: Trained) -> bool:
    """Whether checkpoints hold the same names, types and bits of the model."""
    ours, theirs = weights(found), weights(expected)
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


def like_weights(found: Trained, expected: Trained) -> bool:
    """The same but for a third of one update at most: ranks add squares in another order, which FP8 rounds otherwise
    here and there, and gradients of nearly nothing have steps as large as others."""
    ours, theirs = weights(found), weights(expected)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[key].float(), theirs[key].float(), rtol=2**-7, atol=1e-3) for key in ours
    )
