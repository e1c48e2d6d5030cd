"""`ettin bench` on real ranks: results, resuming a sweep, refusals, comparison and picture. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin.bench import results
from megatron_ettin.bench.picture import LAYOUT, draw, heat_sides, in_order, label
from megatron_ettin.bench.results import combinations
from megatron_ettin.bench.synthetic import SyntheticRows, attended_chunk_tokens
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import parse
from tests.plan.volumes import volumes
from tests.pool import Pool
from tests.train.runs import TINY

pytestmark = pytest.mark.ranks
SHAPE = [word for word in TINY if not word.startswith(("batch.", "metrics.", "checkpoint."))]


def bench(pool: Pool, world: int, out: Path, *arguments: str) -> str:
    line = ["bench", "--size", "17m", "--quick", "--out", str(out), *arguments, *SHAPE]
    actual = pool.run(world, line)
    assert [one.status for one in actual] == [0] * world, "\n".join(one.output[-2000:] for one in actual)
    return actual[0].output


def test_bench_sweep_records_each_layout_and_rerun_measures_nothing(pool: Pool, tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.jsonl", tmp_path / "bench.png"
    arguments = ["--layouts", "dp,tp2,tp3", "--sweep", "batch.micro_batch_rows=1,2", "--picture", str(picture)]
    output = bench(pool, 2, out, *arguments)
    rows = results.read(out)
    states = {results.name_of(row).partition("parallel.tp")[2]: row["state"] for row in rows.values()}
    assert states == {
        **{f"={tp} batch.micro_batch_rows={rows}": "done" for tp in (1, 2) for rows in (1, 2)},
        **{f"=3 batch.micro_batch_rows={rows}": "invalid" for rows in (1, 2)},
    }
    for row in rows.values():
        if row["state"] == "invalid":
            assert "parallel.tp: 3 does not divide 4 heads" in row["reason"]
            continue
        tp = int(next(word for word in row["words"] if "tp=" in word)[-1])
        assert row["layout"] == ("dp 2" if tp == 1 else "tp 2 dp 1")
        assert row["gpus"] == 2
        assert row["global_batch_rows"] == row["micro_batch_rows"] * 2 * (2 // tp)
        assert len(row["step_seconds"]) == 3
        low, high = row["tokens_per_second_range"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert row["mfu"] * row["peak_flops"] == pytest.approx(row["tflops_per_second_per_gpu"] * 1e12)
        assert "measured here" in row["peak_source"]
        assert row["peak_memory_bytes"] > 2**20
        phases = row["phase_seconds"]
        assert phases["forward"] > 0
        assert phases["backward"] > 0
        assert phases["optimizer"] > 0
        assert phases["communication dp" if tp == 1 else "communication tp"] > 0
        batch = [f"batch.{key}={row[key]}" for key in ("micro_batch_rows", "global_batch_rows")]
        config = parse("17m", "mlm", "pretrain", overrides=[*SHAPE, *row["words"], *batch, "batch.warmup_tokens=0"])
        sent = volumes(config, 2 // tp, 0)["dp" if tp == 1 else "tp"]
        # the planner counts neither the sums of labels, the gradients of norms nor the alignment of buckets
        assert sent <= row["communication_bytes"]["dp" if tp == 1 else "tp"] <= 1.6 * sent
    assert "MFU: of" in output
    assert "a step of the fastest" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    # the second launch measures nothing and prints the table again
    before = out.read_text()
    assert "tokens/s/GPU  slowest" in bench(pool, 2, out, *arguments)
    assert out.read_text() == before
    # an entry whose process died while it was measured is not started again on its own
    key, row = next(iter(rows.items()))
    began = {name: row[name] for name in results.IDENTITY_KEYS} | {"state": "began"}
    out.write_text(json.dumps(began) + "\n")
    assert "it ended the process" in bench(
        pool, 2, out, "--sweep", "parallel.tp=1", "--sweep", "batch.micro_batch_rows=1"
    )
    assert results.read(out).keys() == {key}


def test_bench_real_rows_with_pipeline_reports_pp_communication(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    output = bench(pool, 2, tmp_path / "b.jsonl", "--data", str(corpus), "parallel.pp=2", "parallel.vpp=2")
    (row,) = results.read(tmp_path / "b.jsonl").values()
    assert row["chunk_tokens"] is None
    assert 1 <= row["attended_chunk_tokens"] <= 64
    assert row["data"] == str(corpus)
    assert row["layout"].startswith("pp 2 ")
    assert row["phase_seconds"]["communication pp"] > 0
    assert "communication pp" in output
    assert row["communication_bytes"]["pp"] > 0
    assert "it hands to collectives and transfers" in output


def test_bench_on_one_rank_reports_no_communication_and_one_peak(pool: Pool, tmp_path: Path) -> None:
    out, site = tmp_path / "b.jsonl", tmp_path / "site.yaml"
    site.write_text("batch: {micro_batch_rows: 4}\n")
    bench(pool, 1, out, "--config", str(site), "--sweep", "data.seq_len=64,128")
    rows = list(results.read(out).values())
    assert len({row["peak_flops"] for row in rows}) == 1
    for row in rows:
        assert not [phase for phase in row["phase_seconds"] if phase.startswith("communication")]
        assert row["communication_bytes"] == {}
        # --quick does not override what the user config sets
        assert row["micro_batch_rows"] == 4


def test_bench_steps_run_anomaly_detector_before_update(pool: Pool, tmp_path: Path) -> None:
    """Run the anomaly detector as training does, because the update's wait for it is part of the measured time."""
    line = ["bench", "--size", "17m", "--quick", "--out", str(tmp_path / "b.jsonl"), *SHAPE, "batch.micro_batch_rows=1"]
    (actual,) = pool.run(1, line, mutation="late_updates_are_printed")
    assert actual.status == 0, actual.output[-2000:]
    # a warm-up step, three that count, two with timers, one whose tensors are counted
    assert actual.output.count("updated after its figures were judged") == 7


def test_plan_calibrate_fits_every_bench_measurement(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.jsonl"
    bench(pool, 1, out, "--sweep", "batch.micro_batch_rows=1,4")
    arguments = ["--gpus", "1", "--gpu", "cpu", "--calibrate", str(out), "--json", *SHAPE]
    assert main(["plan", "--size", "17m", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["calibration"]) == 2
    assert answer["layouts"]
    # least squares with one positive column guarantees this, even if the two times disagree on a busy host
    assert all(abs(row["measured"] / row["predicted"] - 1) < 1 for row in answer["calibration"])


def test_bench_compare_marks_faster_and_slower_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"size": "17m", "objective": "mlm", "phase": "pretrain", "gpus": 1, "device": "cpu", "state": "done"}

    def write(name: str, speeds: dict[str, float]) -> Path:
        path = tmp_path / name
        for word, speed in speeds.items():
            around = [0.99 * speed, 1.01 * speed]
            results.append(
                path, common | {"words": [word], "tokens_per_second": speed, "tokens_per_second_range": around}
            )
        return path

    old = write("old", {"a=1": 100.0, "b=1": 100.0, "c=1": 100.0, "d=1": 1.0})
    new = write("new", {"a=1": 110.0, "b=1": 103.0, "c=1": 90.0})
    assert main(["bench", "--compare", str(old), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[2] for line in lines] == ["a=1", "b=1", "c=1"]
    assert lines[0].endswith("faster")
    assert lines[1].endswith("4.0%")
    assert lines[2].endswith("SLOWER")
    assert main(["bench", "--compare", str(old), str(new), "--json"]) == 0
    assert [row["moved"] for row in json.loads(capsys.readouterr().out)] == [True, False, True]
    assert main(["bench", "--compare", str(old), str(tmp_path / "none")]) == 2
    assert "none: no such file" in capsys.readouterr().err
    assert main(["bench", "--compare", str(old), str(write("other", {"e=1": 1.0}))]) == 2
    assert "no measurement is in both" in capsys.readouterr().err


def test_bench_table_lists_common_overrides_once() -> None:
    rows = [{"size": "17m", "objective": "mlm", "state": "invalid", "words": ["a=1", word]} for word in ("b=1", "b=2")]
    table = results.table(rows).splitlines()
    assert table[1].startswith("17m mlm b=1 ")
    assert table[-1] == "all with a=1"


def test_synthetic_rows_are_full_and_reproducible() -> None:
    source = SyntheticRows(1024, 300.0, 1000)
    rows = source.rows(range(400))
    assert all(len(row.tokens) == row.lengths.sum() == 1024 for row in rows)
    assert (source.row(7).tokens == rows[7].tokens).all()
    # the last chunk of a row is cut
    lengths = np.concatenate([row.lengths[:-1] for row in rows])
    assert 100 < lengths.mean() < 300
    assert min(row.tokens.min() for row in rows) >= 5
    assert attended_chunk_tokens(SyntheticRows(1024, 1e9, 1000)) == 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--size: missing"),
        (["--size", "17m", "--steps", "0"], "--steps 0: must be above 0"),
        (["--size", "17m", "--sweep", "parallel.tpp=1"], "no such key (did you mean 'parallel.tp'?)"),
        (["--size", "5b"], "size '5b' does not exist; it is one of 17m"),
        (["--size", "17m", "optim.lrr=1"], "unknown key 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["--size", "17m", "--warm-up", "-1"], "--warm-up -1: must be at least 0"),
        (["--size", "17m", "--chunk-tokens", "nan"], "--chunk-tokens nan: must be above 0"),
        (["--size", "17m", "--chunk-tokens", "inf"], "--chunk-tokens inf: must be finite"),
        (["--size", "17m", "--layouts", "dp,tpp2"], "--layouts: 'tpp2': write tp, pp, vpp or cp with a degree"),
        (["--size", "17m", "--layouts", "dp,"], "--layouts: '': write tp"),
        (["--size", "17m", "--layouts", "tp2", "--sweep", "parallel.tp=1"], "parallel.tp: --layouts sets it already"),
        (["--size", "17m", "--data", "/nowhere"], "/nowhere"),
        (["--size", "17m", "--picture", "/"], "--picture /: is a folder; expected a file"),
    ],
)
def test_bench_invalid_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--out", str(tmp_path / "b.jsonl"), *arguments, "runtime.device=cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("way", ["--config", "phase"])
def test_bench_device_of_config_or_phase_override_is_used(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "user.yaml").write_text("runtime: {device: gpu}\n")
    device = ["--config", str(tmp_path / "user.yaml")] if way == "--config" else ["pretrain.runtime.device=gpu"]
    line = ["bench", "--size", "17m", "--quick", "--out", str(tmp_path / "b.jsonl"), *device]
    assert main([*line, *(one for one in SHAPE if not one.startswith("runtime.device"))]) == 2
    assert "runtime.device=gpu: this host has no GPU" in capsys.readouterr().err


def test_bench_out_of_memory_on_one_rank_continues_the_sweep(pool: Pool, tmp_path: Path) -> None:
    """One rank runs out of memory while the other waits in the gradient all-reduce; both go on with the sweep."""
    line = ["bench", "--size", "17m", "--quick", "--out", str(tmp_path / "b.jsonl"), *SHAPE]
    actual = pool.run(2, [*line, "--sweep", "batch.micro_batch_rows=2,1"], mutation="memory_ends_on_rank_1")
    assert [one.status for one in actual] == [0, 0], actual[0].output + actual[1].output
    full, fits = results.read(tmp_path / "b.jsonl").values()
    assert full["state"] == "out of memory"
    assert full["reason"] == "rank 1: CUDA out of memory: all of it"
    assert fits["state"] == "done"
    assert "out of memory: rank 1: CUDA" in actual[0].output


def test_bench_invalid_result_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_text("nothing\n")
    assert main(["bench", "--size", "17m", "--out", str(tmp_path / "b.jsonl"), "runtime.device=cpu"]) == 2
    assert "b.jsonl:1: not a result of `ettin bench`" in capsys.readouterr().err
    assert main(["bench", "--size", "17m", "--out", str(tmp_path), "runtime.device=cpu"]) == 2
    assert "is a folder; expected a file" in capsys.readouterr().err


def test_bench_sweep_without_valid_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "17m", "--layouts", "tp3,tp5", "--out", str(tmp_path / "b.jsonl"), "runtime.device=cpu"]
    # the second time the results are read from the file
    for _ in range(2):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert "none of 2 combinations is valid; 17m mlm runtime.device=cpu parallel.tp=3: " in error
        assert "\n" not in error
    assert {row["state"] for row in results.read(tmp_path / "b.jsonl").values()} == {"invalid"}


def test_bench_combinations_expand_layouts_precisions_and_sweeps() -> None:
    actual = combinations("dp, tp2sp,tp2pp2", "bf16,fp32", ["batch.micro_batch_rows=1,2"])
    assert len(actual) == 12
    layout = ["parallel.tp=2", "parallel.pp=1", "parallel.sequence_parallel=true"]
    assert actual[5].overrides == [*layout, "precision.name=bf16", "batch.micro_batch_rows=2"]
    assert combinations("dp", None, [])[0].overrides == ["parallel.tp=1"]
    assert combinations(None, None, [])[0].overrides == []


def test_bench_rerun_measures_stopped_or_changed_entries_only() -> None:
    """Repeat stopped measurements and those with other rows, but none that failed or ran out of memory."""
    row = dict.fromkeys(results.IDENTITY_KEYS)
    for other in ({"data": "a"}, {"quick": True}, {"micro_batches": 8}, {"chunk_tokens": 100.0}, {"config": "a.yaml"}):
        assert results.identity_key(row | other) != results.identity_key(row)
    states = {
        "out of memory": (torch.OutOfMemoryError("CUDA out of memory.\nmore"), MemoryError()),
        "failed": (RuntimeError("else"),),
        "stopped": (KeyboardInterrupt(),),
    }
    for state, errors in states.items():
        for error in errors:
            actual = results.failure(error)
            assert actual["state"] == state
            assert "\n" not in actual.get("reason", "")
            assert results.should_measure(actual, is_only=True) == (state == "stopped")
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert results.failure(full)["state"] == "out of memory"
    assert results.should_measure(None, is_only=False)
    assert not results.should_measure({"state": "invalid"}, is_only=False)


def test_bench_picture_of_swept_keys_chooses_axes_and_labels() -> None:
    layouts = ["parallel.tp=1", "parallel.tp=2"]
    names = [[a, f"batch.micro_batch_rows={n}", f"precision.name={p}"] for a in layouts for n in (2, 16) for p in "xy"]
    rows = [{"size": "17m", "objective": "mlm", "gpus": 1, "state": "done", "words": one, "mfu": 0.4} for one in names]
    rows = [row | {"tokens_per_second_per_gpu": 9.0, "tokens_per_second_range": [8.0, 10.0]} for row in rows]
    assert draw(rows).startswith(b"\x89PNG")
    assert heat_sides(["parallel.tp", "a", "b"]) == (["parallel.tp"], ["a", "b"])
    assert heat_sides(["a", "b"]) == (["a"], ["b"])
    assert heat_sides(["a"]) is None
    assert heat_sides(["parallel.tp", "parallel.pp"]) == (["parallel.tp"], ["parallel.pp"])
    assert sorted(["16", "2", "-"], key=lambda value: in_order([value])) == ["2", "16", "-"]
    values = {"parallel.tp": "2", "parallel.pp": "1", "parallel.sequence_parallel": "true", "precision.name": "bf16"}
    assert label(values, [*LAYOUT, "precision.name"]) == "tp 2 sp, precision bf16"
    assert label({}, LAYOUT) == "dp"
