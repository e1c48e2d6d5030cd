"""A tiny corpus, and runs on it that take seconds."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from tests.conftest import make_corpus, make_tokenizer
from tests.train.runs import command

STEPS, EVERY = 14, 3
SHAPE = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=2",
    "metrics.every_steps=1",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=3",
    "model.attention_output_dropout=0.1",
]
# of four ranks
LAYOUTS = {
    "tp2 pp2": ["parallel.tp=2", "parallel.pp=2"],
    "tp2 dp2": ["parallel.tp=2"],
    "dp4": [],
}


def corpus_in(folder: Path) -> Path:
    """Return the dataset of all runs, made once."""
    if not (folder / "corpus" / "dataset" / "manifest.json").exists():
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(folder / "tokenizer", range(20))
        with contextlib.redirect_stdout(io.StringIO()):
            make_corpus(folder / "corpus", tokenizer)
    return folder / "corpus" / "dataset"


def train_arguments(run_dir: Path, corpus: Path, *overrides: str, steps: int = STEPS) -> list[str]:
    """Return the command line of a run, without `ettin`."""
    return command(run_dir, corpus, "mlm", [*SHAPE, f"run.steps={steps}", *overrides])
