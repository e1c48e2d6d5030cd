"""Transformer Engine's layers in bf16: their losses follow the local layers, on every axis of parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_te.runs import apart, same_weights, train
from tests.pool import Pool
from tests.train.runs import command

pytestmark = pytest.mark.ranks
# bf16 rounding over four steps
ROUNDING = 5e-4


@pytest.mark.parametrize(
    "objective", ["mlm", *(pytest.param(one, marks=pytest.mark.full) for one in ("clm", "hybrid"))]
)
def test_te_layers_losses_follow_local_layers(
    pool: Pool, te_pool: Pool, corpus: Path, tmp_path: Path, objective: str
) -> None:
    overrides = "runtime.attention=te-fused model.attention_output_dropout=0.1"
    actual = train(te_pool, 1, tmp_path / "te", corpus, objective, overrides)
    expected = train(pool, 1, tmp_path / "local", corpus, objective, overrides.replace("te-fused", "sdpa"))
    assert 0 < apart(actual, expected) < ROUNDING
    # no bias of a norm and no pickled state
    assert actual.weights().keys() == expected.weights().keys()
    assert actual.column("loss")[0] - actual.column("loss")[-1] > 0.5


def test_te_layers_are_reported_and_mxfp8_on_hopper_is_refused(te_pool: Pool, corpus: Path, tmp_path: Path) -> None:
    (done,) = te_pool.run(1, command(tmp_path, corpus, "clm", ["precision.name=bf16", "run.steps=1"]))
    assert "transformer_engine layers" in done.output
    assert "attention by te-fused (the first choice)" in done.output
    (done,) = te_pool.run(1, command(tmp_path, corpus, "clm", ["precision.name=mxfp8"]))
    assert done.status == 2
    assert "capability 10.0 or higher" in done.output
    assert "nearest that runs" in done.output


@pytest.mark.full
@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tp=2 parallel.sequence_parallel=true",
        "model.num_layers=4 parallel.pp=2 parallel.vpp=2",
        "parallel.cp=2",
        "parallel.overlap=true precision.gradients=bf16",
        "parallel.engine=deepspeed",
        "parallel.engine=deepspeed parallel.zero_stage=3",
    ],
)
def test_te_layers_on_layout_follow_one_process(
    te_pool: Pool, corpus: Path, tmp_path: Path, trained, overrides: str
) -> None:
    expected = trained("bf16", "model.num_layers=4") if "num_layers" in overrides else trained("bf16")
    assert apart(train(te_pool, 2, tmp_path, corpus, "mlm", overrides), expected) < ROUNDING


@pytest.mark.full
def test_te_attention_after_sdpa_in_one_process_is_identical(
    te_pool: Pool, corpus: Path, tmp_path: Path, trained
) -> None:
    """Switch in one process, as in a sweep: torch's attention between TE's linears, then TE's own again."""
    for kernel in ("sdpa", "te-fused"):
        actual = train(
            te_pool, 1, tmp_path / kernel, corpus, "mlm", f"runtime.attention={kernel} runtime.deterministic=true"
        )
        assert (actual.column("loss") == trained("bf16").column("loss")) == (kernel == "te-fused")
        assert apart(actual, trained("bf16")) < ROUNDING


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.recompute=full",
        pytest.param("parallel.recompute=selective", marks=pytest.mark.full),
        pytest.param("parallel.offload_layers=1", marks=pytest.mark.full),
    ],
)
def test_te_layers_recompute_or_offload_changes_no_bit(
    te_pool: Pool, corpus: Path, tmp_path: Path, trained, overrides: str
) -> None:
    actual = train(te_pool, 1, tmp_path, corpus, "mlm", overrides)
    assert actual.column("loss") == trained("bf16").column("loss")
    assert same_weights(actual, trained("bf16"))


@pytest.mark.full
def test_te_layers_captured_graph_follows_uncaptured(te_pool: Pool, corpus: Path, tmp_path: Path, trained) -> None:
    """`runtime.cuda_graph` has fixed shapes: boundaries are padded with empty chunks, which TE's attention accepts."""
    overrides = "runtime.cuda_graph=true data.max_chunks_per_row=12"
    actual = train(te_pool, 1, tmp_path, corpus, "mlm", overrides, mutation="replayed_on_a_cpu")
    assert apart(actual, trained("bf16")) < ROUNDING
