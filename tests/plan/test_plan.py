"""`ettin plan`: published runs, layouts and refusals; its step-time model against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import parse
from megatron_ettin.plan import calibration
from megatron_ettin.plan.hardware import find_gpu
from megatron_ettin.plan.step_time import LINK_SHARE, PUBLISHED, buckets, predict


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_constants_are_the_fit_of_all_six_sizes() -> None:
    runs = calibration.published_runs()
    assert [run.config.run.size for run in runs] == ["17m", "32m", "68m", "150m", "400m", "1b"]
    constants = calibration.fit_constants(runs)
    assert constants.operations == pytest.approx(PUBLISHED.operations, rel=0.01)
    assert constants.token_layer_seconds == pytest.approx(PUBLISHED.token_layer_seconds, rel=0.01)
    assert constants.micro_batch_seconds == pytest.approx(PUBLISHED.micro_batch_seconds, rel=0.01)
    errors = [row["error_percent"] for row in calibration.prediction_errors(runs, PUBLISHED)]
    assert max(map(abs, errors)) < 3.2, errors


def test_calibration_on_five_sizes_predicts_the_sixth() -> None:
    runs = calibration.published_runs()
    for left_out in runs:
        constants = calibration.fit_constants([run for run in runs if run != left_out])
        (row,) = calibration.prediction_errors([left_out], constants)
        assert abs(row["error_percent"]) < 10, row


def test_plan_prints_residuals_of_all_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "17m", "--gpus", "8", "--top", "1"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("17m mlm pretrain on 8 GPUs: h100-sxm, 989")
    assert output[0].endswith("predicted, not measured")
    lines = [line for line in output if line.startswith("calibration: ")]
    assert [line.split()[1] for line in lines] == ["17m", "32m", "68m", "150m", "400m", "1b"]


def test_plan_small_micro_batches_are_slower(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = []
    for rows in ("1", "88"):
        words = ("parallel.pp=1", "parallel.tp=1", f"batch.micro_batch_rows={rows}")
        (one,) = plan(capsys, "--size", "17m", "--gpus", "4", *words)["layouts"]
        assert one["micro_batch_rows"] == int(rows)
        speeds.append(one["tokens_per_second_per_gpu"])
    assert speeds[1] > 10 * speeds[0]


def test_plan_keys_given_at_their_defaults_are_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What a script will do can be asked, though it sets what the recipe has anyway."""
    site = tmp_path / "site.yaml"
    site.write_text("parallel: {overlap: false, pp: 1}\nbatch: {micro_batch_rows: 16}\n")
    words = ("parallel.tp=1", "parallel.cp=1", "parallel.recompute=none", "--config", str(site))
    (one,) = plan(capsys, "--size", "1b", "--gpus", "512", *words)["layouts"]
    assert (one["tp"], one["pp"], one["micro_batch_rows"], one["overlap"]) == (1, 1, 16, False)


def test_plan_of_little_efficiency_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "17m", "--gpus", "4096", "--top", "1"]) == 0
    assert "warning: efficiency: 1% of a GPU's speed on 8; 2,816 rows a step are few" in capsys.readouterr().out
    assert main(["plan", "--size", "1b", "--gpus", "64", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "efficiency: 9" in out
    assert "warning" not in out
    assert plan(capsys, "--size", "1b", "--gpus", "8")["efficiency"] is None


def test_plan_1b_on_512_gpus_ranks_plain_data_parallelism_first(capsys: pytest.CaptureFixture[str]) -> None:
    """A 1b fits one GPU: data parallelism with the distributed optimizer wins."""
    words = ("--size", "1b", "--gpus", "512", "--gpu", "h100", "--phase", "pretrain", "batch.warmup_tokens=0")
    found = plan(capsys, *words)
    best = found["layouts"][0]
    assert {key: best[key] for key in ("tp", "pp", "vpp", "cp", "dp")} == {
        "tp": 1,
        "pp": 1,
        "vpp": 1,
        "cp": 1,
        "dp": 512,
    }
    assert best["distributed_optimizer"]
    assert {one["tp"] for one in found["layouts"]} <= {1, 2, 4}
    speeds = [one["tokens_per_second_per_gpu"] for one in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for one in found["layouts"]:
        assert one["tp"] * one["pp"] * one["cp"] * one["dp"] == 512
        assert one["step_seconds"] == pytest.approx(sum(one["seconds"].values()))
        assert one["peak_memory_bytes"] == sum(one["memory_bytes"].values()) <= 0.92 * 80 * 2**30
        assert 0 < one["mfu"] < 0.6
    assert all(one["reason"] for one in found["rejected"])
    assert any("pp 7" in one["layout"] for one in found["rejected"])
    cost = found["phase"]
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


def test_plan_phase_cost_counts_empty_places_of_batch_warmup(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the run at 96 rows a step and then at 128, on 64 GPUs: a rank computes two rows in both."""
    batch = ["batch.global_batch_rows=128", "batch.micro_batch_rows=2", "batch.warmup_min_rows=96", "run.tokens=10B"]
    hours = []
    for warmup in ("0", "10B"):
        found = plan(capsys, "--size", "17m", "--gpus", "64", *batch, f"batch.warmup_tokens={warmup}", "parallel.pp=1")
        hours.append(found["phase"]["gpu_hours"] * found["layouts"][0]["tokens_per_second_per_gpu"])
    # levels of 96, 97, ... 127 rows take equally many tokens each
    expected = sum(128 / (96 + level) for level in range(32)) / 32
    assert hours[1] / hours[0] == pytest.approx(expected, rel=0.001)


def test_plan_given_parallel_degrees_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--size", "400m", "--gpus", "16", "--gpu", "a100", "parallel.tp=2", "parallel.pp=2")
    assert {(one["tp"], one["pp"]) for one in found["layouts"]} == {(2, 2)}


def test_plan_given_recompute_is_kept_for_every_dividing_stage_count(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--size", "150m", "--gpus", "24", "parallel.recompute=selective", "parallel.tp=2")
    assert {(one["pp"], one["recompute"]) for one in found["layouts"]} >= {(pp, "selective") for pp in (2, 3, 4, 6, 12)}
    assert {one["recompute"] for one in found["layouts"]} == {"selective"}


def test_plan_chunk_tokens_are_capped_at_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    long, whole = (plan(capsys, "--size", "17m", "--gpus", "1", "--chunk-tokens", n) for n in ("99999", "1024"))
    assert long["layouts"] == whole["layouts"]


def test_plan_long_rows_on_small_gpu_use_context_parallelism_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(
        capsys, "--size", "1b", "--gpus", "8", "--gpu", "l40s", "--phase", "extend", "batch.micro_batch_rows=4"
    )
    assert any(one["cp"] > 1 for one in found["layouts"])
    assert all(one["peak_memory_bytes"] <= 0.92 * 48 * 2**30 for one in found["layouts"])


def test_predict_communication_matches_hand_calculation() -> None:
    """150m in bf16 on hosts of eight GPUs: bytes of a ring over the joint rate of all NICs of a host."""
    words = ["parallel.tp=2", "parallel.sequence_parallel=true", "batch.micro_batch_rows=4", "parallel.overlap=false"]
    gpu, config = find_gpu("h100"), parse("150m", "mlm", "pretrain", overrides=words)
    found = predict(config, gpu, 32, 615, PUBLISHED, node=8)
    steps, hidden = 2816 // (32 * 4), 4 * 1024 * 768 * 2
    assert found.exposed_tp == pytest.approx(steps * (22 * 10 + 3) * (hidden / 2 / (450e9 * LINK_SHARE) + 3.4e-6))
    moved = 149_014_272 / 2 * (4 + 2) * 31 / 32
    around = 24 * 3.4e-6 + 7 * 14e-6  # eight hosts, four ranks in each
    assert found.exposed_dp == pytest.approx(moved / (4 * 50e9 * LINK_SHARE) + 2 * around, rel=0.01)
    whole = config.with_keys({"parallel.distributed_optimizer": False})
    reduced = predict(whole, gpu, 32, 615, PUBLISHED, node=8).exposed_dp
    tree = 2 * (3 * 3.4e-6 + 3 * 14e-6)  # an all-reduce goes up and down a tree of eight hosts
    assert reduced == pytest.approx(moved * 8 / 6 / (4 * 50e9 * LINK_SHARE) + tree, rel=0.01)
    piped = parse("150m", "mlm", "pretrain", overrides=["parallel.pp=2", "batch.micro_batch_rows=4"])
    time = predict(piped, gpu, 32, 615, PUBLISHED, node=8)
    assert time.bubble == pytest.approx(time.compute / steps)


def test_predict_overlap_hides_all_gradient_buckets_but_one() -> None:
    """1b on 32 GPUs: overlap hides all buckets but one per direction; on 4,096 Megatron Core has a single bucket."""
    gpu = find_gpu("h100")

    def exposed(dp: int, *words: str) -> float:
        words = ("batch.micro_batch_rows=16", f"batch.global_batch_rows={16 * dp}", "batch.warmup_tokens=0", *words)
        config = parse("1b", "mlm", "pretrain", overrides=list(words))
        return predict(config, gpu, dp, 615, PUBLISHED, node=8).exposed_dp

    for dp, pieces in ((32, 26), (4096, 1)):
        hidden = exposed(dp, "parallel.overlap=true")
        assert buckets(parse("1b", "mlm", "pretrain", overrides=["parallel.overlap=true"]), dp) == pieces
        plain, around = exposed(dp, "parallel.overlap=false"), gpu.ring_latency(dp, 1, 8)
        assert hidden == pytest.approx(plain / pieces + 2 * around * (1 - 1 / pieces), rel=0.01), dp
    # three stages have passed when the last one's gradients are there: interleaving hides more than a stage can
    deep = ("parallel.pp=4", "parallel.overlap=true")
    assert exposed(64, *deep, "parallel.vpp=2") < exposed(64, *deep) * 1.01


def test_plan_150m_on_8_gpus_needs_no_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of a 150m's operations are in its head, but its layers have a cost per token of their own."""
    found = plan(capsys, "--size", "150m", "--gpus", "8")
    assert found["layouts"][0]["pp"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
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
        ("--scale 8:64 --mtbf-hours 0", "--mtbf-hours 0.0: must be above 0"),
        ("--size 17m --scale 8:8 --picture /nowhere/a.png", "--picture /nowhere/a.png: "),
        ("--gpus 8 --curve curve.json", "--curve: needs --scale"),
    ],
)
def test_plan_bad_request_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(["plan", "--size", "1b", *words.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_gpus_file_defines_own_gpu_and_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    keys = (
        "fp8_tflops: 0, memory_gib: 96, memory_tb_per_s: 4, link_gb_per_s: 100, network_gb_per_s: 25, gpus_per_node: 4"
    )
    path.write_text(f"mine: {{bf16_tflops: 500, {keys}}}\n")
    found = plan(capsys, "--size", "17m", "--gpus", "4", "--gpu", "mine", "--gpus-file", str(path))
    assert found["gpu"]["memory_gib"] == 96
    assert found["layouts"]
    path.write_text(f"mine: {{bf16_tflops: fast, {keys}}}\n")
    with pytest.raises(UserError, match=r"mine\.bf16_tflops: 'fast' is not a number above 0"):
        find_gpu("mine", path)
    path.write_text("mine: {bf16_tflops: 500}\n")
    with pytest.raises(UserError, match="mine: needs bf16_tflops, fp8_tflops"):
        find_gpu("mine", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"size": "1b", "gpus": 4}, "run 1: needs the keys size, gpus, tokens_per_second_per_gpu"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 0}, "0 is not a number above 0"),
        (
            {"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 9, "tps": 1},
            "'tps' is not a key; the keys are size, gpus",
        ),
        ({"size": "9b", "gpus": 4, "tokens_per_second_per_gpu": 9}, "run 1: size '9b' does not exist"),
        ({"size": 1, "gpus": 4, "tokens_per_second_per_gpu": 9}, "run 1: size: 1 is not a name"),
        ({"size": "1b", "gpus": 0, "tokens_per_second_per_gpu": 9}, "run 1: gpus: 0 is not a number above 0"),
        ({"size": "1b", "gpus": 4.5, "tokens_per_second_per_gpu": 9}, "run 1: gpus: 4.5 is not a whole number"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": float("inf")}, "inf is not a number above 0"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 9, "words": [1]}, "is not a list of key=value"),
        ({"state": "done", "size": "1b"}, "run 1: is not a complete line of `ettin bench`: it has no objective"),
    ],
)
def test_read_runs_malformed_line_is_refused(tmp_path: Path, line: dict, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        calibration.read_runs(path, find_gpu("h100"))
