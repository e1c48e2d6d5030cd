"""Cross-training with the other objective keeps every tensor, and its first loss matches `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.cli.main import main
from megatron_ettin.config.tables import ROW_OBJECTIVES
from tests.convert.folders import load, tensors
from tests.pool import Pool
from tests.train.runs import Trained, command, read, train

pytestmark = pytest.mark.ranks
STILL = ["run.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "model.attention_output_dropout=0"]


@pytest.fixture(scope="module")
def encoder(pool: Pool, corpus: Path, tmp_path_factory) -> Trained:
    return train(pool, 1, tmp_path_factory.mktemp("encoder"), corpus, "mlm", ["run.steps=3"])


@pytest.fixture(scope="module")
def decoder(pool: Pool, corpus: Path, encoder: Trained, tmp_path_factory) -> Trained:
    """Train a decoder from the encoder's weights, without learning, on two ranks."""
    return cross(pool, corpus, tmp_path_factory.mktemp("decoder"), "clm", encoder.directory, world=2)


@pytest.fixture(scope="module")
def exported(encoder: Trained, tmp_path_factory) -> Path:
    """Export the encoder and return its Hugging Face folder."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["convert", "to-hf", str(encoder.directory), str(out)]) == 0
    return out


def cross(
    pool: Pool, corpus: Path, run: Path, objective: str, source: Path, *overrides: str, world: int = 1
) -> Trained:
    line = command(run, corpus, objective, [*STILL, *overrides], ["--init-from", str(source)])
    line[line.index("pretrain")] = "cross"
    results = pool.run(world, line)
    assert [result.status for result in results] == [0] * world, results[0].output[-2000:]
    return read(run)


def loss_of(folder: Path, objective: str, run: Path, room: Path) -> float:
    """Return the loss of the run's first step, computed by the `transformers` class from `ettin order --batches`."""
    assert main(["order", str(run), "--steps", "1:2", "--batches", str(room / "seen.npz")]) == 0
    seen, model = np.load(room / "seen.npz"), load(folder, objective)
    total, count = 0.0, 0
    with torch.no_grad():
        for row, start, end in seen["spans"].tolist():
            logits = model(input_ids=torch.from_numpy(seen["input_ids"][row : row + 1, start:end])).logits[0]
            labels = torch.from_numpy(seen["labels"][row, start:end])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("objective", ["clm", "mntp"])
def test_cross_training_first_loss_matches_transformers(
    pool: Pool, corpus: Path, encoder: Trained, decoder: Trained, tmp_path: Path, objective: str
) -> None:
    """Train a decoder from encoder weights, and an mntp encoder (predicting one position ahead) from a decoder."""
    source, trained = encoder.directory, decoder
    if objective == "mntp":
        source = decoder.directory
        trained = cross(pool, corpus, tmp_path / "run", objective, source, "run.seed=4", world=2)
    row_objective = "clm" if ROW_OBJECTIVES[objective].causal else "mlm"
    assert main(["convert", "to-hf", str(source), str(tmp_path / "hf"), "--objective", row_objective]) == 0
    assert loss_of(tmp_path / "hf", row_objective, trained.directory, tmp_path) == pytest.approx(
        trained.column("loss")[0], rel=1e-5
    )
    launch = json.loads((trained.directory / "history.jsonl").read_text().splitlines()[0])
    # the optimizer starts fresh
    assert launch["from"].startswith("weights of ")


def test_cross_training_round_trip_keeps_every_tensor(
    pool: Pool, corpus: Path, encoder: Trained, decoder: Trained, exported: Path, tmp_path: Path
) -> None:
    """Go from encoder to decoder to encoder through checkpoints, and through an exported Hugging Face folder."""
    back = cross(pool, corpus, tmp_path / "back", "mlm", decoder.directory)
    assert main(["convert", "to-hf", str(decoder.directory), str(tmp_path / "hf")]) == 0
    through = cross(pool, corpus, tmp_path / "through", "mlm", tmp_path / "hf", world=2)
    first = encoder.weights()
    for run in (decoder, back, through):
        weights = run.weights()
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[name], first[name]) for name in first)
    assert main(["convert", "to-hf", str(through.directory), str(tmp_path / "other")]) == 0
    one, other = tensors(exported), tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_config(through.directory)["run"]["seed"] == 210


def test_model_card_of_mntp_encoder_explains_shifted_prediction(
    pool: Pool, corpus: Path, encoder: Trained, tmp_path: Path
) -> None:
    cross(pool, corpus, tmp_path / "run", "mntp", encoder.directory)
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    card = " ".join((tmp_path / "hf/README.md").read_text().split())
    assert "position i holds the prediction of token i + 1" in card
    assert "logits[0, at - 1]" in card
    assert "pipeline_tag: feature-extraction" in card
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.hidden_size=128"], "has model.hidden_size=64, this run 128; the shapes must be equal"),
        (["model.vocab_size=640"], "model.vocab_size: 640, but the dataset's tokenizer has 320 entries"),
    ],
)
def test_cross_training_mismatched_shape_is_refused(
    pool: Pool, corpus: Path, encoder: Trained, tmp_path: Path, arguments: list[str], message: str
) -> None:
    line = command(tmp_path / "run", corpus, "clm", [*STILL, *arguments], ["--init-from", str(encoder.directory)])
    line[line.index("pretrain")] = "cross"
    (result,) = pool.run(1, line)
    assert result.status == 2, result.output[-500:]
    assert message in result.output.splitlines()[-1], result.output[-500:]


def test_eval_of_run_and_exported_folder_gives_same_loss(
    encoder: Trained, exported: Path, corpus: Path, capsys
) -> None:
    """A run and its exported folder have the same loss; another objective gives another loss."""
    losses = {}
    for name, arguments in {
        "run": [str(encoder.directory)],
        "folder": [str(exported), "--seq-len", "64"],
        "clm": [str(encoder.directory), "--objective", "clm"],
        "mntp": [str(encoder.directory), "--objective", "mntp"],
    }.items():
        capsys.readouterr()
        assert main(["eval", *arguments, "--data", str(corpus / "heldout"), "--json"]) == 0
        losses[name] = json.loads(capsys.readouterr().out)["loss"]
    assert losses["run"] == losses["folder"]
    assert len({losses["run"], losses["clm"], losses["mntp"]}) == 3
    for arguments, message in (
        (["--objective", "nsp"], "--objective: 'nsp' does not exist"),
        (["--seq-len", "9999"], "--seq-len 9999: a row"),
    ):
        assert main(["eval", str(encoder.directory), "--data", str(corpus / "heldout"), *arguments]) == 2
        assert message in capsys.readouterr().err
