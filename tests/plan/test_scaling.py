"""Scaling against published curves, and goodput against its simulation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.plan.pipeline import simulate
from megatron_ettin.plan.scaling import (
    FailureModel,
    ScalingCurve,
    best_interval,
    fit_curve,
    goodput,
    simulated_seconds,
)

# published tokens/s per GPU, by number of GPUs: llm-foundry's MPT-1B; torchtitan's Llama 3.1 8B in bf16, relative
MOSAIC = {8: 45.5, 32: 45.1, 64: 44.4, 128: 44.1, 256: 42.6, 512: 39.8}
TORCHTITAN = {8: 1.0, 128: 0.977}


@pytest.mark.parametrize("others", [{}, {16: 46.04}])
def test_fit_of_curve_to_64_gpus_predicts_512(others: dict[int, float]) -> None:
    curve = fit_curve({n: speed for n, speed in MOSAIC.items() if n <= 64} | others)
    assert curve.latency >= 0
    assert curve.slowest >= 0
    errors = {n: 100 * (1 / curve.factor(n) - speed / MOSAIC[8]) for n, speed in MOSAIC.items()}
    assert errors[8] == 0, errors
    assert all(abs(error) <= 3 for error in errors.values()), errors
    assert curve.factor(4096) > curve.factor(512) > curve.factor(64) > 1


def scale(capsys: pytest.CaptureFixture[str], *arguments: str, size: str = "1b") -> dict[int, dict[str, float]]:
    assert main(["plan", "--size", size, "--gpu", "h100", "--json", "--scale", *arguments]) == 0
    return {row["gpus"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_plan_scale_with_curve_extrapolates_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = {str(n): speed for n, speed in MOSAIC.items() if n <= 64}
    (tmp_path / "curve.json").write_text(json.dumps({**few, "step_seconds": 0.9}))
    more = ["--curve", str(tmp_path / "curve.json"), "--picture", str(tmp_path / "a.png")]
    rows = scale(capsys, "8,64,512", *more, size="17m")
    assert list(rows) == [8, 64, 512]
    for gpus, row in rows.items():
        assert 100 * row["weak_efficiency"] == pytest.approx(100 * MOSAIC[gpus] / MOSAIC[8], abs=3), gpus
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plan_scale_without_curve_gives_falling_efficiency(capsys: pytest.CaptureFixture[str]) -> None:
    rows = scale(capsys, "8,128,4096")
    assert list(rows) == [8, 128, 4096]
    assert 100 * rows[128]["weak_efficiency"] == pytest.approx(100 * TORCHTITAN[128], abs=3)
    for column in ("weak_efficiency", "strong_efficiency", "goodput"):
        values = [row[column] for row in rows.values()]
        assert values == sorted(values, reverse=True), column
        assert 0 < values[-1] < values[0] <= 1, column
    assert rows[4096]["strong_efficiency"] < rows[4096]["weak_efficiency"]
    for row in rows.values():
        speed = row["strong_tokens_per_second_per_gpu"] * row["gpus"]
        assert row["phase_days"] == pytest.approx(1.7e12 / speed / row["goodput"] / 86_400, rel=0.01)
        assert row["gpu_hours"] == pytest.approx(24 * row["phase_days"] * row["gpus"])
        assert row["cost"] is None


def test_plan_scale_with_price_gives_cost_of_first_to_last_by_doubling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "17m", "--scale", "4:32", "--price", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("cost")
    lines = [line for line in lines if not line.startswith("calibration: ")]
    assert [line.split()[0] for line in lines] == ["4", "8", "16", "32"]
    hours, cost = (float(word.replace(",", "")) for word in lines[0].split()[-2:])
    assert cost == pytest.approx(2 * hours, rel=1e-2)


def test_plan_scale_with_calibration_prints_its_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = {"size": "1b", "gpus": 8, "tokens_per_second_per_gpu": 70e3}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["plan", "--size", "17m", "--scale", "8,16", "--calibrate", str(tmp_path / "runs.jsonl")]) == 0
    assert "calibration: 1b mlm on 8: 70,000 predicted" in capsys.readouterr().out


def test_plan_scale_of_175b_matches_published_strong_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron-LM's published curve, 96 to 4,608 H100 with the batch as it is: MFU 47 -> 42 %. A gated layer of 32,768
    has as many weights as a plain one of 49,152."""
    shape = ["hidden_size=12288", "num_layers=96", "num_attention_heads=96", "ffn_hidden_size=32768"]
    arguments = [f"model.{one}" for one in [*shape, "global_attention_every=1"]]
    arguments += [
        "data.seq_len=2048",
        "batch.global_batch_rows=1152",
        "batch.micro_batch_rows=1",
        "batch.warmup_tokens=0",
    ]
    arguments += ["parallel.tp=8", "parallel.pp=12", "parallel.vpp=8", "precision.gradients=bf16"]
    rows = scale(capsys, "96,4608", "--objective", "clm", "--chunk-tokens", "2048", *arguments)
    # Megatron-LM overlaps the gathering of weights with the next step; with pipeline stages we do not
    assert 100 * (rows[4608]["strong_efficiency"] - 42 / 47) == pytest.approx(-3, abs=3)


def test_simulated_seconds_of_equal_stages_match_the_simulation() -> None:
    for count in (48, 480, 482):
        simulated, _ = simulate([1 / 3] * 4, [2 / 3] * 4, count, 4)
        assert simulated_seconds([1.0] * 4, count, 4, False, 0.0) == pytest.approx(simulated)


def test_growth_slowest_rank_matches_random_draws() -> None:
    drawn = np.random.default_rng(0)
    means = {n: np.max(drawn.standard_normal((400, n)), axis=1).mean() for n in (8, 64, 4096)}
    share = (means[4096] - means[8]) / (means[64] - means[8])
    assert ScalingCurve(8).slowest_at(4096) / ScalingCurve(8).slowest_at(64) == pytest.approx(share, rel=0.1)


def test_fit_of_invalid_curve_is_refused() -> None:
    nan = float("nan")
    for wrong in ({}, {8: 1.0}, {64: 1.0, 128: 0.9}, {8: 1.0, 16: 0.0}, {8: nan, 16: 1.0}, {0: 1.0, 8: 1.0}):
        with pytest.raises(ValueError, match="a curve has two numbers"):
            fit_curve(wrong)
    with pytest.raises(ValueError, match="step_seconds: nan is not a number above 0"):
        fit_curve({8: 1.0, 16: 1.0}, nan)


def simulate_goodput(failures: FailureModel, gpus: int, interval: float, hours: float) -> float:
    """Simulate failures at random times over `hours` of wall clock, and return the share of the time that is kept.

    What is not in a checkpoint is trained again, and a restart that is interrupted begins anew.
    """
    drawn, end, rate = random.Random(0), hours * 3600, 1 / failures.mean_seconds(gpus)
    now = kept = 0.0
    failure = drawn.expovariate(rate)
    while now < end:
        saved = now + interval + failures.checkpoint_seconds
        if saved <= failure:
            now, kept = saved, kept + interval
            continue
        now = failure
        while failure <= now:
            now = failure + failures.restart_seconds
            failure += drawn.expovariate(rate)
    return kept / now


@pytest.mark.parametrize("gpus", [64, 1024, 16_384])
def test_goodput_matches_event_simulation_and_peaks_at_best_interval(gpus: int) -> None:
    failures = FailureModel(checkpoint_seconds=60)
    interval = best_interval(failures, gpus)
    hours = 2_000 * failures.mean_seconds(gpus) / 3600
    assert simulate_goodput(failures, gpus, interval, hours) == pytest.approx(goodput(failures, gpus), abs=0.01)
    for other in (interval / 3, interval * 3):
        assert goodput(failures, gpus, other) < goodput(failures, gpus)


def test_goodput_falls_with_more_gpus_and_interval_follows_young() -> None:
    failures = FailureModel()
    shares = [goodput(failures, gpus) for gpus in (8, 512, 4096, 65_536)]
    assert shares == sorted(shares, reverse=True)
    assert 0.99 < shares[0] < 1
    # Young's formula (1974), of which Daly's is a refinement
    young = (2 * failures.checkpoint_seconds * failures.mean_seconds(512)) ** 0.5
    assert best_interval(failures, 512) == pytest.approx(young, rel=0.05)
