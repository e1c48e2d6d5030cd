"""`ettin order` lists what a run trained on, which is enough to repeat a step in plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.data.dataset import open_dataset
from tests.pool import Pool
from tests.train.runs import Trained, tiered, train

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def stills(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a run of three steps without learning and dropout, so that its losses are those of the checkpoint's
    weights."""
    made: dict[str, Trained] = {}

    def get(objective: str) -> Trained:
        if objective not in made:
            overrides = ["run.steps=3", "optim.lr=1e-30", "optim.weight_decay=0", "model.attention_output_dropout=0"]
            # the exported class only supports the published windows, which are longer than these rows
            overrides += ["model.encoder_window=64", "model.decoder_window_keys=64", "parallel.tp=2"]
            made[objective] = train(pool, 2, tmp_path_factory.mktemp("still"), corpus, objective, overrides)
        return made[objective]

    return get


@pytest.fixture(scope="module")
def still(stills) -> Trained:
    return stills("hybrid")


# the hybrid objective has rows of clm and of mlm
@pytest.mark.parametrize("objective", tiered(["mlm", "clm", "mntp", "hybrid"], first=["mntp", "hybrid"]))
def test_order_batches_in_plain_pytorch_reproduce_logged_losses(stills, tmp_path: Path, objective: str) -> None:
    """Compute the losses of metrics.jsonl from the exported `transformers` models and `order --batches` alone."""
    import torch

    still = stills(objective)
    assert main(["order", str(still.directory), "--steps", "1:4", "--batches", str(tmp_path / "seen.npz")]) == 0
    seen = np.load(tmp_path / "seen.npz")
    models = {bool(causal): exported(still.directory, tmp_path, causal) for causal in np.unique(seen["causal"])}
    assert len(models) == (2 if objective == "hybrid" else 1)
    sums, counts = np.zeros(4), np.zeros(4)
    with torch.no_grad():
        for row, start, end in seen["spans"].tolist():
            logits = models[bool(seen["causal"][row])](
                input_ids=torch.from_numpy(seen["input_ids"][row : row + 1, start:end])
            ).logits[0]
            labels = torch.from_numpy(seen["labels"][row, start:end])
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            sums[seen["step"][row]] += loss.item()
            counts[seen["step"][row]] += int((labels != -100).sum())
    assert counts[1:].tolist() == still.column("labels")
    assert (sums[1:] / counts[1:]) == pytest.approx(still.column("loss"), rel=1e-5)


def exported(run: Path, folder: Path, causal: bool):
    """Export the run's weights and load them as the causal or masked `transformers` class."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    objective, loader = ("clm", AutoModelForCausalLM) if causal else ("mlm", AutoModelForMaskedLM)
    out = folder / objective
    assert main(["convert", "to-hf", str(run), str(out), "--objective", objective]) == 0
    return loader.from_pretrained(out).eval()


def test_order_table_matches_documents_and_token_spans(still: Trained, corpus: Path, tmp_path: Path) -> None:
    """Check source, document and span of every chunk of every step, and the token count of each step."""
    import pyarrow.parquet as parquet

    assert main(["order", str(still.directory), "--steps", "1:4", "--out", str(tmp_path / "order.parquet")]) == 0
    records = parquet.read_table(tmp_path / "order.parquet").to_pylist()
    rows = {(line["step"], line["rows"][0]) for line in still.metrics}
    assert {(record["step"], record["position"] - record["slot"]) for record in records} == rows
    tokens = {step: 0 for step in (1, 2, 3)}
    dataset = open_dataset(corpus)
    for record in records:
        chunk = dataset.chunk(record["chunk"])
        assert record["end_token"] - record["start_token"] == len(chunk) - 2
        assert dataset.document_of(record["chunk"])[:3] == (record["source"], record["document"], record["start_token"])
        tokens[record["step"]] += len(chunk)
    assert np.cumsum(list(tokens.values())).tolist() == still.column("tokens")


def test_order_from_config_alone_matches_recorded_fingerprint(
    still: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml alone gives the fingerprint that the run recorded, and also a step far past the end of the run."""
    config = str(still.directory / "config.yaml")
    assert main(["order", config, "--fingerprint"]) == 0
    assert capsys.readouterr().out.strip() == json.loads((still.directory / "order.json").read_text())["fingerprint"]
    assert main(["order", config, "--steps", "1000000", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["step"] for line in lines} == {1_000_000}
    assert {line["slot"] for line in lines} == set(range(8))


def test_order_of_encoder_and_decoder_is_identical(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    runs = [train(pool, 1, tmp_path / objective, corpus, objective, ["run.steps=2"]) for objective in ("mlm", "clm")]
    orders = [json.loads((run.directory / "order.json").read_text()) for run in runs]
    assert orders[0] == orders[1]
    assert runs[0].column("tokens") == runs[1].column("tokens")
    arguments = [str(run.directory) for run in runs]
    assert main(["compare", *arguments, "--out", str(tmp_path / "pair.html"), "--require-paired"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5:2"], "'5:2' is empty"),
        (["--steps", "0:2"], "begins before 1"),
        (["--steps", "a:b"], "is not A:B"),
        (["--steps", "1:99999999999999999999999"], "no run has so many steps"),
        ([], "--steps A:B or --fingerprint"),
        (["--steps", "1:2", "--out", "/nowhere/order.parquet"], "/nowhere does not exist"),
    ],
)
def test_order_invalid_arguments_are_refused(
    still: Trained, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["order", str(still.directory), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_order_without_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", str(tmp_path), "--fingerprint"]) == 2
    assert "no config.yaml" in capsys.readouterr().err
