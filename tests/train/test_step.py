"""`batch.loss_normalization=microbatch`, as in the original trainer: the scale of its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import command, train

pytestmark = pytest.mark.ranks
MEANS = "batch.loss_normalization=microbatch"
# with one micro-batch both normalisations are equal; the learning rate leaves the weights unchanged
WHOLE = [
    *("batch.global_batch_rows=9", "batch.micro_batch_rows=9", "batch.warmup_min_rows=1", "run.steps=4"),
    *("precision.name=bf16", "model.attention_output_dropout=0", "optim.lr=1e-30", "optim.weight_decay=0"),
]


def test_train_microbatch_normalization_in_bf16_has_the_gradients_of_the_global_one(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    """1 / labels must not be rounded to bf16, which would make it 0.26 % wrong in the second step."""
    means = train(pool, 1, tmp_path / "means", corpus, "clm", [*WHOLE, MEANS])
    expected = train(pool, 1, tmp_path / "mean", corpus, "clm", WHOLE)
    assert expected.column("labels")[1] == 441
    assert means.column("loss") == expected.column("loss")
    assert means.column("grad_norm") == pytest.approx(expected.column("grad_norm"), rel=1e-3)


def test_resume_microbatch_normalization_with_other_micro_batch_is_refused(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(pool, 1, tmp_path, corpus, "mlm", ["run.steps=1", MEANS])
    changed = command(tmp_path, corpus, "mlm", ["run.steps=2", MEANS, "batch.micro_batch_rows=4"])
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert "was started with batch.micro_batch_rows=2, now batch.micro_batch_rows=4" in error
    assert "--allow-change batch.micro_batch_rows" in error
