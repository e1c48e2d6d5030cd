"""Predicted memory against the tensors of real ranks: the sum of live storages at a step's peak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ettin.bench import results
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import layer_parameter_count, parameter_count
from megatron_ettin.plan.memory import estimate, fp8_parameters, rank_memory, rank_parameters
from megatron_ettin.plan.step_time import data_bytes
from megatron_ettin.platform.trackers import PeakMemoryTracker
from tests.pool import Pool

SHAPE = ["model.num_layers=4", "model.vocab_size=16384", "data.seq_len=512", "batch.micro_batch_rows=2"]
SMALL = ["model.num_layers=4", "model.vocab_size=4096", "data.seq_len=256", "batch.micro_batch_rows=2"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Start workers for this file alone, because tensors left by another file's job would be counted."""
    own = Pool()
    yield own
    own.close()


def check_prediction(pool: Pool, folder: Path, world: int, objective: str, *arguments: str) -> None:
    """Check that `ettin bench` predicts the peak of its tensors' bytes within 2 %."""
    out = folder / "b.jsonl"
    line = ["bench", "--size", "17m", "--objective", objective, "--quick", "--out", str(out), "--chunk-tokens", "150"]
    ranks = pool.run(world, [*line, "runtime.device=cpu", *arguments])
    assert [one.status for one in ranks] == [0] * world, "\n".join(one.output[-2000:] for one in ranks)
    (row,) = results.read(out).values()
    assert row["predicted_memory_bytes"] == pytest.approx(row["peak_tensor_bytes"], rel=0.02)
    # the peak of the whole process is larger
    assert row["peak_memory_bytes"] > row["peak_tensor_bytes"]
    assert "tensors at its fullest" in ranks[0].output
    assert "as predicted" in ranks[0].output


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "objective", "arguments"),
    [
        (1, "mlm", []),
        pytest.param(1, "mlm", ["parallel.recompute=full"], marks=pytest.mark.full),
        (2, "clm", ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    ],
)
def test_bench_predicted_memory_of_small_shape_matches_peak_tensor_bytes(
    pool: Pool, tmp_path: Path, world: int, objective: str, arguments: list[str]
) -> None:
    check_prediction(pool, tmp_path, world, objective, "--warm-up", "0", "--steps", "1", *SMALL, *arguments)


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "objective", "arguments"),
    [
        (1, "clm", ["precision.name=fp32"]),
        (1, "mlm", ["parallel.recompute=selective", "parallel.recompute_modules=core_attn"]),
        (2, "mlm", []),
        (2, "mlm", ["parallel.distributed_optimizer=false", "precision.gradients=bf16"]),
        (2, "mlm", ["parallel.tp=2"]),
        (2, "mlm", ["parallel.cp=2", "batch.micro_batch_rows=4"]),
        (2, "mlm", ["parallel.pp=2"]),
    ],
)
def test_bench_predicted_memory_matches_peak_tensor_bytes(
    pool: Pool, tmp_path: Path, world: int, objective: str, arguments: list[str]
) -> None:
    # with context parallelism a rank's number of labels varies between steps
    steps = "3" if "parallel.cp=2" in arguments else "1"
    check_prediction(pool, tmp_path, world, objective, "--warm-up", "0", "--steps", steps, *SHAPE, *arguments)


def test_rank_parameters_of_all_stages_sum_to_the_model() -> None:
    config = parse("150m", "mlm", "pretrain")
    assert rank_parameters(config, 0)[0] == parameter_count(config.model, config.model.vocab_size)
    piped = parse("150m", "mlm", "pretrain", overrides=["parallel.pp=4"])
    shared = config.model.vocab_size * config.model.hidden_size  # the embedding, of which the last stage has a copy
    all_stages = sum(rank_parameters(piped, rank)[0] for rank in range(4))
    assert all_stages == parameter_count(config.model, config.model.vocab_size) + shared


def test_fp8_weights_replace_the_copies_in_memory_and_traffic() -> None:
    """FP8 weights are copies in addition to the 16-bit weights, or replace them; layers that stay in bf16, norms and
    embedding have none. (The saving on a real rank is tested in tests/emulated_te.)"""
    arguments = ["precision.name=fp8-current", "precision.bf16_first_layers=2", "parallel.pp=2", "parallel.tp=2"]
    plain, kept = (
        parse("1b", "mlm", "pretrain", overrides=[*arguments, f"precision.fp8_weights={on}"]) for on in (False, True)
    )
    inside = layer_parameter_count(plain.model) // 2
    assert [fp8_parameters(plain, rank) for rank in range(2)] == [12 * inside, 14 * inside]
    assert fp8_parameters(parse("1b", "mlm", "pretrain"), 0) == 0
    copies, weights = (rank_memory(config, 4, 1).weights_bytes for config in (plain, kept))
    assert copies - weights == 2 * 14 * inside
    assert weights == 2 * rank_parameters(kept, 1)[0]
    gathered = [data_bytes(config, 1)[1] for config in (plain, kept)]
    assert gathered[0] - gathered[1] == 14 * inside


def test_estimate_takes_the_fullest_pipeline_stage() -> None:
    """Take the stage with the highest sum: early stages hold more micro-batches, only the last one holds the logits."""
    large = parse("1b", "mlm", "pretrain", overrides=["parallel.pp=4", "batch.micro_batch_rows=32"])
    small = parse("17m", "clm", "pretrain", overrides=["parallel.pp=2", "batch.micro_batch_rows=1"])
    assert estimate(large, 4) == rank_memory(large, 4, 0)
    assert estimate(large, 4).total_bytes > rank_memory(large, 4, 3).total_bytes
    assert estimate(large, 4).logits_bytes == 0
    assert estimate(small, 4) == rank_memory(small, 4, 1)
    assert estimate(small, 4).total_bytes > rank_memory(small, 4, 0).total_bytes
    assert estimate(small, 4).logits_bytes > 0


def test_peak_memory_tracker_counts_saved_tensors_and_peak() -> None:
    before = torch.zeros(1000)
    with PeakMemoryTracker() as live:
        start = live.bytes
        assert start >= before.nbytes
        a = torch.ones(5000, requires_grad=True)
        b = (a * 2).exp()  # exp keeps its result, the product is freed
        assert live.bytes - start == 2 * a.nbytes
        assert live.peak_bytes - start == 3 * a.nbytes
        view = b[:10]
        del b, a
        assert live.bytes - start == 40_000  # the view holds exp's storage, the graph its own inputs
        del view
        assert live.bytes == start
