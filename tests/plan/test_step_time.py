"""The step-time model against arithmetic by hand."""

from __future__ import annotations

import pytest

from megatron_ettin.config.resolve import parse
from megatron_ettin.plan.hardware import find_gpu
from megatron_ettin.plan.step_time import LINK_SHARE, StepModel, buckets


def test_predict_communication_matches_hand_calculation() -> None:
    """For 150m in bf16 on hosts of eight GPUs, time is a ring's bytes over the joint rate of a host's NICs."""
    arguments = [
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "batch.micro_batch_rows=4",
        "parallel.overlap=false",
    ]
    model, config = StepModel(find_gpu("h100"), 8, 615), parse("150m", "mlm", "pretrain", overrides=arguments)
    time = model.predict(config, 32)
    steps, hidden = 2816 // (32 * 4), 4 * 1024 * 768 * 2
    assert time.exposed_tp == pytest.approx(steps * (22 * 10 + 3) * (hidden / 2 / (450e9 * LINK_SHARE) + 3.4e-6))
    moved = 149_014_272 / 2 * (4 + 2) * 31 / 32
    around = 24 * 3.4e-6 + 7 * 14e-6  # eight hosts, four ranks in each
    assert time.exposed_dp == pytest.approx(moved / (4 * 50e9 * LINK_SHARE) + 2 * around, rel=0.01)
    unsharded = config.with_keys({"parallel.distributed_optimizer": False})
    reduced = model.predict(unsharded, 32).exposed_dp
    tree = 2 * (3 * 3.4e-6 + 3 * 14e-6)  # an all-reduce goes up and down a tree of eight hosts
    assert reduced == pytest.approx(moved * 8 / 6 / (4 * 50e9 * LINK_SHARE) + tree, rel=0.01)
    piped = parse("150m", "mlm", "pretrain", overrides=["parallel.pp=2", "batch.micro_batch_rows=4"])
    time = model.predict(piped, 32)
    assert time.bubble == pytest.approx(time.compute / steps)


def test_predict_overlap_hides_all_gradient_buckets_but_one() -> None:
    """1b on 32 GPUs: overlap hides all buckets but one per direction; on 4,096 Megatron Core has a single bucket."""
    model = StepModel(find_gpu("h100"), 8, 615)

    def exposed(dp: int, *arguments: str) -> float:
        arguments = (
            "batch.micro_batch_rows=16",
            f"batch.global_batch_rows={16 * dp}",
            "batch.warmup_tokens=0",
            *arguments,
        )
        config = parse("1b", "mlm", "pretrain", overrides=list(arguments))
        return model.predict(config, dp).exposed_dp

    for dp, pieces in ((32, 26), (4096, 1)):
        hidden = exposed(dp, "parallel.overlap=true")
        assert buckets(parse("1b", "mlm", "pretrain", overrides=["parallel.overlap=true"]), dp) == pieces
        plain, around = exposed(dp, "parallel.overlap=false"), model.gpu.ring_latency(dp, 1, 8)
        assert hidden == pytest.approx(plain / pieces + 2 * around * (1 - 1 / pieces), rel=0.01), dp
    # interleaving exposes no more of the reduction than stages of one model chunk
    deep = ("parallel.pp=4", "parallel.overlap=true")
    assert exposed(64, *deep, "parallel.vpp=2") < exposed(64, *deep) * 1.01
