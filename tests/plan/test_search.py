"""`ettin plan`: layouts, their order, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import parse


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_small_micro_batches_are_slower(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = []
    for rows in ("1", "88"):
        arguments = ("parallel.pp=1", "parallel.tp=1", f"batch.micro_batch_rows={rows}")
        (one,) = plan(capsys, "--size", "17m", "--gpus", "4", *arguments)["layouts"]
        assert one["micro_batch_rows"] == int(rows)
        speeds.append(one["tokens_per_second_per_gpu"])
    assert speeds[1] > 10 * speeds[0]


def test_plan_keys_given_at_their_defaults_are_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A key given at its default value counts as set, so that the plan fits a script that sets it."""
    site = tmp_path / "site.yaml"
    site.write_text("parallel: {overlap: false, pp: 1}\nbatch: {micro_batch_rows: 16}\n")
    arguments = ("parallel.tp=1", "parallel.cp=1", "parallel.recompute=none", "--config", str(site))
    (one,) = plan(capsys, "--size", "1b", "--gpus", "512", *arguments)["layouts"]
    assert (one["tp"], one["pp"], one["micro_batch_rows"], one["overlap"]) == (1, 1, 16, False)


def test_plan_with_low_efficiency_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "17m", "--gpus", "4096", "--top", "1"]) == 0
    assert "warning: efficiency: 1% of a GPU's speed on 8; 2,816 rows a step are few" in capsys.readouterr().out
    assert main(["plan", "--size", "1b", "--gpus", "64", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "efficiency: 9" in out
    assert "warning" not in out
    assert plan(capsys, "--size", "1b", "--gpus", "8")["efficiency"] is None


def test_plan_1b_on_512_gpus_ranks_plain_data_parallelism_first(capsys: pytest.CaptureFixture[str]) -> None:
    """A 1b fits one GPU: data parallelism with the distributed optimizer wins."""
    arguments = ("--size", "1b", "--gpus", "512", "--gpu", "h100", "--phase", "pretrain", "batch.warmup_tokens=0")
    answer = plan(capsys, *arguments)
    best = answer["layouts"][0]
    assert {key: best[key] for key in ("tp", "pp", "vpp", "cp", "dp")} == {
        "tp": 1,
        "pp": 1,
        "vpp": 1,
        "cp": 1,
        "dp": 512,
    }
    assert best["distributed_optimizer"]
    assert {one["tp"] for one in answer["layouts"]} <= {1, 2, 4}
    speeds = [one["tokens_per_second_per_gpu"] for one in answer["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for one in answer["layouts"]:
        assert one["tp"] * one["pp"] * one["cp"] * one["dp"] == 512
        assert one["step_seconds"] == pytest.approx(sum(one["seconds"].values()))
        assert one["peak_memory_bytes"] == sum(one["memory_bytes"].values()) <= 0.92 * 80 * 2**30
        assert 0 < one["mfu"] < 0.6
    assert all(one["reason"] for one in answer["rejected"])
    assert any("pp 7" in one["layout"] for one in answer["rejected"])
    cost = answer["phase"]
    assert cost["gpu_hours"] == pytest.approx(cost["tokens"] / (speeds[0] * 512) / 3600 * 512)


def test_plan_table_ends_with_a_pasteable_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--size", "1b", "--gpus", "512", "--price", "2", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "fastest: data parallelism with the distributed optimizer" in out
    assert "% ahead of tp 2 dp 256" in out
    assert out.split("\n")[1].split()[-6:] == ["bubble", "tp", "cp", "pp", "dp", "GiB"]
    assert ": 256 row slots of a step are empty (8.3% of the work)" in out
    assert "GPU-hours" in out
    assert " at 2 an hour" in out
    pasted = out[out.index("\nparallel:") :]
    (tmp_path / "site.yaml").write_text(pasted)
    assert yaml.safe_load(pasted)["batch"]["micro_batch_rows"] == 6
    config = parse("1b", "mlm", "pretrain", tmp_path / "site.yaml")
    assert config.parallel.overlap
    assert config.batch.micro_batch_rows == 6


def test_plan_phase_cost_counts_empty_row_slots_of_batch_warmup(capsys: pytest.CaptureFixture[str]) -> None:
    """On 64 GPUs a rank computes two row slots a step, whether the batch warm-up gives a step 96 rows or 128."""
    batch = ["batch.global_batch_rows=128", "batch.micro_batch_rows=2", "batch.warmup_min_rows=96", "run.tokens=10B"]
    hours = []
    for warmup in ("0", "10B"):
        answer = plan(capsys, "--size", "17m", "--gpus", "64", *batch, f"batch.warmup_tokens={warmup}", "parallel.pp=1")
        hours.append(answer["phase"]["gpu_hours"] * answer["layouts"][0]["tokens_per_second_per_gpu"])
    # levels of 96, 97, ... 127 rows take equally many tokens each
    expected = sum(128 / (96 + level) for level in range(32)) / 32
    assert hours[1] / hours[0] == pytest.approx(expected, rel=0.001)


def test_plan_given_parallel_degrees_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, "--size", "400m", "--gpus", "16", "--gpu", "a100", "parallel.tp=2", "parallel.pp=2")
    assert {(one["tp"], one["pp"]) for one in answer["layouts"]} == {(2, 2)}


def test_plan_given_recompute_is_kept_for_every_dividing_stage_count(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, "--size", "150m", "--gpus", "24", "parallel.recompute=selective", "parallel.tp=2")
    assert {(one["pp"], one["recompute"]) for one in answer["layouts"]} >= {
        (pp, "selective") for pp in (2, 3, 4, 6, 12)
    }
    assert {one["recompute"] for one in answer["layouts"]} == {"selective"}


def test_plan_chunk_tokens_are_capped_at_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    longer, row_length = (plan(capsys, "--size", "17m", "--gpus", "1", "--chunk-tokens", n) for n in ("99999", "1024"))
    assert longer["layouts"] == row_length["layouts"]


def test_plan_long_rows_on_small_gpu_use_context_parallelism_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(
        capsys, "--size", "1b", "--gpus", "8", "--gpu", "l40s", "--phase", "extend", "batch.micro_batch_rows=4"
    )
    assert any(one["cp"] > 1 for one in answer["layouts"])
    assert all(one["peak_memory_bytes"] <= 0.92 * 48 * 2**30 for one in answer["layouts"])


def test_plan_150m_on_8_gpus_needs_no_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of a 150m's operations are in its head, but its layers have a cost per token of their own."""
    answer = plan(capsys, "--size", "150m", "--gpus", "8")
    assert answer["layouts"][0]["pp"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 8 --gpu h1000", "--gpu h1000: not known (did you mean 'h100'?)"),
        (
            "--gpus 7 parallel.tp=2",
            "--gpus 7: no valid layout; the nearest: tp 2: parallel: tp 2 x pp 1 x cp 1 = 2"
            " does not divide 7 ranks; relax --gpus (6 or 8) or parallel.tp=2",
        ),
        (
            "--gpus 1 --gpu cpu",
            "does not fit: 17.9 GiB of 11.0 usable, with micro-batches of 1 and recompute=full;"
            " relax the memory (--gpu), --gpus or data.seq_len",
        ),
        ("--gpus 1000003", "more than the 2816 rows of a step; relax --gpus or batch.global_batch_rows"),
        ("--gpus 8 --price nan", "--price nan: must be above 0"),
        ("--gpus 8 --chunk-tokens inf", "--chunk-tokens inf: must be finite"),
        ("--gpus 8 --scale 8:64", "--gpus: cannot be used with --scale, which has its own numbers"),
        (
            "--size 17m --scale 8:8 --mtbf-hours 1e-9",
            "one of 8 GPUs fails every 4.5e-07 s, so nothing is kept; relax --mtbf-hours",
        ),
        ("--gpus 0", "--gpus 0: must be above 0"),
        (
            "--gpus 8 --gpu a100 precision.name=fp8-current",
            "fp8-current needs a GPU with FP8, which a100 has not; use bf16",
        ),
        ("--gpus 8 --calibrate /nowhere", "--calibrate /nowhere: "),
        ("--gpus 8 parallel.tp=8", "parallel.tp: 8 does not divide 28 heads"),
        ("", "--gpus: missing; give a number of GPUs, or --scale FIRST:LAST"),
        ("--scale 64:8", "--scale 64:8: write FIRST:LAST or N,N,..., rising, such as 8:4096, up to 65536"),
        ("--scale 8:64:9", "--scale 8:64:9: write FIRST:LAST"),
        ("--scale 8,x", "--scale 8,x: write FIRST:LAST"),
        ("--scale 8:100000", "--scale 8:100000: write FIRST:LAST"),
        ("--scale 1:1 --gpu cpu", "--scale: none of 1 to 1 GPUs has a valid layout; 1: tp 1: does not fit"),
        (
            "--gpus 4 parallel.tp=2 parallel.pp=4",
            "no valid layout; the nearest: tp 2 pp 4 cp 1: needs 8 GPUs, there are 4",
        ),
        ("--scale 8:64 --curve /nowhere", "--curve /nowhere: "),
        ("--scale 8:64 --mtbf-hours 0", "--mtbf-hours 0: must be above 0"),
        ("--size 17m --scale 8:8 --picture /nowhere/a.png", "--picture /nowhere/a.png: "),
        ("--gpus 8 --curve curve.json", "--curve: needs --scale"),
    ],
)
def test_plan_bad_request_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["plan", "--size", "1b", *arguments.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
