"""Anomalous steps are skipped, reported and recorded, and a resumed run decides like an uninterrupted one."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from megatron_ettin.checkpoint.directory import latest, list_checkpoints, list_milestones
from megatron_ettin.cli.main import main
from megatron_ettin.train.progress import Progress
from tests.pool import Pool
from tests.train.runs import command, read, tiered, train
from tests.train.test_resume import ResumedRuns

pytestmark = pytest.mark.ranks
# steps of a run whose rate is so high that gradient norms rise, so updates are skipped before and after a resume
STEPS = 20
DIVERGING = ["optim.lr=1e-2", "optim.weight_decay_reference_lr=1e-2"]
# with these keys every norm above the median of the last four is a spike
NERVOUS = [
    "resilience.spike_window=4",
    "resilience.spike_sigmas=1e-6",
    "resilience.spike_ratio=1",
    "resilience.max_skips_in_row=50",
]
SKIPPING = [*NERVOUS, "resilience.on_spike=skip"]


def progress_of(directory: Path) -> dict:
    checkpoint = latest(directory)
    assert checkpoint is not None
    return json.loads((checkpoint / "progress.json").read_text())


def bad(run: object) -> dict[int, str]:
    return {line["step"]: line["bad"] for line in run.metrics if "bad" in line}  # type: ignore[attr-defined]


def test_progress_of_an_older_checkpoint_keeps_its_gradient_norms() -> None:
    saved = {"step": 3, "tokens": 9, "updates": 3, "recent": [[4.5, 1.5], [4.0, 1.25]], "skipped": 0}
    assert Progress.restored(saved).recent == (1.5, 1.25)
    assert Progress.restored({"step": 3, "tokens": 9, "recent": [1.5]}).recent == (1.5,)


def test_compare_pair_with_one_update_left_out_is_not_paired(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(pool, 1, tmp_path / "mlm", corpus, "mlm", ["run.steps=4"])
    train(pool, 1, tmp_path / "clm", corpus, "clm", ["run.steps=4"], mutation="nan_gradients_in_step_3")
    arguments = ["compare", str(tmp_path / "mlm"), str(tmp_path / "clm"), "--out", str(tmp_path / "pair.html")]
    assert main([*arguments, "--require-paired"]) == 1
    output = capsys.readouterr().out
    assert "differs: updates of every step (pretrain): left out in mlm: none; in clm: 3\n" in output
    assert "NOT PAIRED: 165K mlm / 165K clm (updates left out: 165K mlm none; 165K clm pretrain 3)\n" in output


LEFT_OUT = list(itertools.product(("", "nan_gradients_in_step_3"), ("skip", "ignore"), ("skip", "warn", "ignore")))
FIRST = [("", "skip", "warn"), ("", "ignore", "skip"), ("nan_gradients_in_step_3", "ignore", "skip")]


@pytest.mark.parametrize(("fault", "on_nonfinite", "on_spike"), tiered(LEFT_OUT, FIRST))
def test_updates_are_left_out_by_skip_settings_only(
    pool: Pool, corpus: Path, tmp_path: Path, fault: str, on_nonfinite: str, on_spike: str
) -> None:
    overrides = [*NERVOUS, "run.steps=7", f"resilience.on_nonfinite={on_nonfinite}", f"resilience.on_spike={on_spike}"]
    results = pool.run(1, command(tmp_path, corpus, "mlm", [*overrides, "checkpoint.every_steps=1"]), fault or None)
    outcomes = bad(read(tmp_path))
    spikes = {step for step, text in outcomes.items() if "nan" not in text}
    left_out = spikes if on_spike == "skip" else set()
    if fault:
        assert outcomes[3].endswith("gradient norm is nan")
        left_out |= {3} if on_nonfinite == "skip" else set()
    assert bool(spikes) == (on_spike != "ignore" and (not fault or on_nonfinite == "skip"))
    progress = progress_of(tmp_path)
    # nothing is saved while updates are skipped
    assert results[0].status == int(7 in left_out), results[0].output[-2000:]
    counted = {step for step in left_out if step <= progress["step"]}
    assert progress["skipped"] == len(counted)
    assert progress["updates"] == progress["step"] - len(counted)
    assert progress["step"] == max(set(range(1, 8)) - left_out)
    assert {line["step"] for line in read(tmp_path).metrics if not line["updated"]} == left_out
    assert results[0].output.count("trained on all the same") == len(outcomes.keys() - left_out)
    assert results[0].output.count("note: step ") == len(spikes - left_out)


@pytest.fixture(scope="module")
def nervous(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ResumedRuns:
    return ResumedRuns(pool, corpus, tmp_path_factory.mktemp("nervous"), steps=STEPS)


@pytest.mark.parametrize("second", ["dp2 sharded", pytest.param("tp2 pp2", marks=pytest.mark.full)])
def test_resume_with_skipped_steps_matches_uninterrupted_run(nervous: ResumedRuns, second: str) -> None:
    """On the same layout the run is bit-identical. On another it skips the same steps, and its losses are close."""
    uninterrupted, resumed = nervous.pair("dp2 sharded", second, [*SKIPPING, *DIVERGING])
    assert 2 <= len(bad(uninterrupted)) < STEPS - 3
    assert bad(resumed).keys() == bad(uninterrupted).keys()
    assert min(bad(uninterrupted)) <= STEPS // 2 < max(bad(uninterrupted))
    assert all(text.startswith("skipped: ") for text in bad(uninterrupted).values())
    progress = progress_of(uninterrupted.directory)
    assert progress["updates"] == STEPS - len(bad(uninterrupted))
    assert progress["skipped"] == len(bad(uninterrupted))
    assert len(progress["recent"]) == 4
    if second == "dp2 sharded":
        assert resumed.column("loss") == uninterrupted.column("loss")
        assert progress_of(resumed.directory) == progress
        ours, theirs = resumed.weights(), uninterrupted.weights()
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
    else:
        assert resumed.column("loss") == pytest.approx(uninterrupted.column("loss"), rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        pytest.param("parallel.distributed_optimizer=false", marks=pytest.mark.full),
        pytest.param("parallel.overlap=true", marks=pytest.mark.full),
    ],
)
def test_nonfinite_gradient_step_is_skipped_without_changing_weights(
    pool: Pool, corpus: Path, tmp_path: Path, overrides: str
) -> None:
    more = ["run.steps=4", "model.attention_output_dropout=0", *overrides.split()]
    without = train(pool, 2, tmp_path / "without", corpus, "clm", [*more, "run.steps=3", "data.skip=16:24"])
    results = pool.run(2, command(tmp_path / "run", corpus, "clm", more), "nan_gradients_in_step_3")
    assert [result.status for result in results] == [0, 0], results[0].output[-2000:]
    run = read(tmp_path / "run")
    assert run.column("loss")[:2] + run.column("loss")[3:] == without.column("loss")
    assert run.column("grad_norm")[2] is None
    ours, theirs = run.weights(), without.weights()
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
    assert progress_of(run.directory)["updates"] == 3
    message = "warning: step 3: gradient norm is nan; the update is left out (1 in a row); rows 16 to 23, documents in "
    (line,) = [line for result in results for line in result.output.splitlines() if line.startswith(message)]
    table = parquet.read_table(line.removeprefix(message)).to_pylist()
    assert {row["step"] for row in table} == {3}
    assert {row["position"] for row in table} == set(range(16, 24))
    (entry,) = map(json.loads, (run.directory / "bad_steps.jsonl").read_text().splitlines())
    assert entry["outcome"] == "skipped"
    assert entry["grad_norm"] is None
    assert entry["rows"] == [16, 24]


@pytest.mark.parametrize(
    ("overrides", "message", "steps"),
    [
        ("resilience.on_nonfinite=stop", "gradient norm is nan; the run stops. Nothing of this step was saved", 2),
        pytest.param(
            "resilience.max_skips_in_row=0",
            "the run stops after 1 in a row. Nothing of this step was saved",
            2,
            marks=pytest.mark.full,
        ),
        ("resilience.on_nonfinite=ignore", "gradient norm is nan; trained on all the same", 3),
    ],
)
def test_nonfinite_gradient_stops_or_is_ignored_as_configured(
    pool: Pool, corpus: Path, tmp_path: Path, overrides: str, message: str, steps: int
) -> None:
    more = ["run.steps=3", "checkpoint.every_steps=2", overrides]
    results = pool.run(2, command(tmp_path, corpus, "mlm", more), "nan_gradients_in_step_3")
    assert [result.status for result in results] == [int(steps == 2)] * 2
    assert any(message in result.output for result in results), results[0].output[-2000:]
    assert read(tmp_path).column("step") == list(range(1, steps + 1))
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == f"step_{steps:09d}"


def test_resume_with_changed_spike_rule_is_refused_unless_run_is_older(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    """The first launch fixes the keys that decide which updates are made; older runs did not record all of them."""
    train(pool, 1, tmp_path, corpus, "mlm", ["run.steps=2"])
    (refused,) = pool.run(1, command(tmp_path, corpus, "mlm", ["run.steps=3", "resilience.on_spike=skip"]))
    assert refused.status == 2
    assert "was started with resilience.on_spike=warn, now resilience.on_spike=skip" in refused.output
    path = tmp_path / "config.yaml"
    older = path.read_text().replace("  spike_ratio: 5.0\n", "").replace("on_spike: warn", "on_spike: skip")
    assert older != path.read_text()
    path.write_text(older)
    (result,) = pool.run(1, command(tmp_path, corpus, "mlm", ["run.steps=3"]))
    assert result.status == 0, result.output[-2000:]
    message = (
        "this run began under an older rule for spikes (resilience.on_spike=skip); from here on it is on_spike=warn"
    )
    assert message in result.output
    assert progress_of(tmp_path)["updates"] == 3
    (again,) = pool.run(1, command(tmp_path, corpus, "mlm", ["run.steps=4"]))
    assert again.status == 0
    assert "older rule" not in again.output


def test_deepspeed_anomaly_is_reported_but_update_is_kept(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed updates the weights before the loss and gradient norm are known."""
    overrides = ["parallel.engine=deepspeed", "run.steps=6", *NERVOUS]
    (result,) = pool.run(1, command(tmp_path, corpus, "mlm", overrides))
    assert result.status == 0
    assert "parallel.engine=deepspeed updates before figures are known" in result.output
    assert bad(read(tmp_path))
    assert all(text.startswith("warned: ") for text in bad(read(tmp_path)).values())
    assert progress_of(tmp_path)["updates"] == 6


# a rate that wrecks every weight by its first update
WRECKING = ["optim.lr=1e30", "optim.weight_decay_reference_lr=1e30", "optim.weight_decay=0"]


@pytest.fixture(scope="module")
def healthy(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with checkpoints of steps 3 and 6."""
    directory = tmp_path_factory.mktemp("healthy") / "run"
    train(pool, 1, directory, corpus, "mlm", ["run.steps=6", "checkpoint.every_steps=3"])
    return directory


def wrecked(pool: Pool, corpus: Path, healthy: Path, directory: Path, overrides: list[str]) -> tuple[int, str]:
    """Resume a copy of the healthy run at a rate that makes its weights useless; return its exit status and output."""
    shutil.copytree(healthy, directory)
    options = [
        word
        for key in ("optim.lr", "optim.weight_decay_reference_lr", "optim.weight_decay")
        for word in ("--allow-change", key)
    ]
    (result,) = pool.run(1, command(directory, corpus, "mlm", [*WRECKING, *overrides], options))
    return result.status, result.output


def names(directory: Path) -> list[str]:
    return [path.name for path in list_checkpoints(directory)]


def test_checkpoints_are_kept_while_updates_are_left_out(
    pool: Pool, corpus: Path, healthy: Path, tmp_path: Path
) -> None:
    """Weights with a NaN loss are not saved, nothing is pruned, and the run can resume from the last good
    checkpoint."""
    run = tmp_path / "run"
    overrides = ["run.steps=60", "checkpoint.every_steps=2", "checkpoint.keep=1", "checkpoint.weights_every_tokens=1"]
    overrides += ["resilience.max_skips_in_row=3"]
    status, output = wrecked(pool, corpus, healthy, run, overrides)
    assert status == 1
    assert names(run) == ["step_000000003", "step_000000006"]
    assert latest(run) == run / "checkpoints" / "step_000000006"
    assert [path.name for path in list_milestones(run)] == ["step_000000007"]
    assert "step 11: loss is nan; the run stops after 4 in a row. Nothing of this step was saved" in output
    assert "the last good checkpoint is step_000000006, from which the same command goes on" in output
    options = [
        word
        for key in ("optim.lr", "optim.weight_decay_reference_lr", "optim.weight_decay")
        for word in ("--allow-change", key)
    ]
    (again,) = pool.run(1, command(run, corpus, "mlm", ["run.steps=8"], options))
    assert again.status == 0, again.output[-2000:]


def test_train_names_checkpoint_with_bad_figures_and_the_one_before(
    pool: Pool, corpus: Path, healthy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = ["run.steps=60", "checkpoint.every_steps=1", "resilience.max_skips_in_row=1"]
    status, output = wrecked(pool, corpus, healthy, run, overrides)
    assert status == 1
    assert "the weights of step_000000007 gave these figures; the last good checkpoint is step_000000006" in output
    assert "add --from-step 6" in output


def test_train_ending_with_updates_left_out_exits_1(pool: Pool, corpus: Path, healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = wrecked(pool, corpus, healthy, run, ["run.steps=9", "checkpoint.every_steps=1000"])
    assert status == 1
    assert "the run ends with the updates of its last 2 steps left out; nothing of them was saved" in output
    assert names(run) == ["step_000000003", "step_000000006"]
    assert progress_of(run)["step"] == 6
