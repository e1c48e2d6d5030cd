"""The functions between the command `ettin train` and a training step."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.train import trainer
from tests.train.runs import command


def test_train_step_is_at_most_five_frames_from_the_command(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read the stack inside a step; it holds the functions that docs/decisions.md 82 lists."""
    stacks: list[list[str]] = []
    real = trainer.train_step

    def train_step(*arguments):
        frames = [frame.function for frame in inspect.stack() if "/megatron_ettin/" in frame.filename]
        stacks.append(["train_step", *frames][::-1])
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", train_step)
    assert main(command(tmp_path / "run", corpus, "mlm", ["run.steps=1"])) == 0
    assert stacks == [["main", "run", "run", "train", "train_step"]]
