"""Resuming: bit-identical on the same layout, within 1e-5 on another; after a signal, and from damaged checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, list_checkpoints, read_progress, step_name
from megatron_ettin.checkpoint.reader import CheckpointReader, SafeReader
from tests.forkserver import program
from tests.pool import Pool
from tests.train.runs import Trained, command, read, train

pytestmark = pytest.mark.ranks
BASE = "model.attention_output_dropout=0.1 optim.name={optim}"
LAYOUTS = {
    "1": (1, ""),
    "tp2 pp2": (4, "parallel.tp=2 parallel.pp=2"),
    "dp2": (2, "parallel.distributed_optimizer=false"),
    "dp2 sharded": (2, ""),
    "tp2 sp": (2, "parallel.tp=2 parallel.sequence_parallel=true"),
    "pp2 vp2": (2, "parallel.pp=2 parallel.vpp=2"),
    "cp2": (2, "parallel.cp=2"),
}


class ResumedRuns:
    """Cache of uninterrupted runs and of runs that stop halfway and resume, for several tests.

    Args:
        root: the folder of all runs.
        steps: number of steps of a whole run.
    """

    def __init__(self, pool: Pool, corpus: Path, root: Path, steps: int = 6) -> None:
        self.pool, self.corpus, self.root, self.steps = pool, corpus, root, steps
        self.made: dict[tuple, Trained] = {}

    def run(self, layout: str, steps: int, overrides: list[str], mutation: str | None, folder: Path) -> Trained:
        world, parallel = LAYOUTS[layout]
        more = [*overrides, *parallel.split(), f"run.steps={steps}"]
        return train(self.pool, world, folder, self.corpus, "mlm", more, mutation=mutation)

    def once(self, layout: str, steps: int, overrides: list[str], mutation: str | None) -> Trained:
        key = (layout, steps, *overrides, mutation)
        if key not in self.made:
            self.made[key] = self.run(layout, steps, overrides, mutation, self.root / f"made{len(self.made)}")
        return self.made[key]

    def pair(
        self, first: str, second: str, overrides: list[str], mutation: str | None = None
    ) -> tuple[Trained, Trained]:
        """Return an uninterrupted run on the layout `first`, and one that resumes halfway on the layout `second`."""
        uninterrupted = self.once(first, self.steps, overrides, mutation)
        half = self.once(first, self.steps // 2, overrides, mutation)
        folder = Path(tempfile.mkdtemp(dir=self.root))
        shutil.copytree(half.directory, folder, dirs_exist_ok=True)
        return uninterrupted, self.run(second, self.steps, overrides, mutation, folder)


@pytest.fixture(scope="module")
def runs(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ResumedRuns:
    return ResumedRuns(pool, corpus, tmp_path_factory.mktemp("halves"))


@pytest.mark.parametrize(
    ("layout", "optim"),
    [
        ("1", "stable_adamw"),
        ("tp2 pp2", "stable_adamw"),
        ("dp2 sharded", "adamw"),
        ("dp2", "muon"),
        pytest.param("1", "adamw", marks=pytest.mark.full),
        pytest.param("dp2", "stable_adamw", marks=pytest.mark.full),
        pytest.param("dp2 sharded", "stable_adamw", marks=pytest.mark.full),
        pytest.param("tp2 sp", "stable_adamw", marks=pytest.mark.full),
        pytest.param("pp2 vp2", "stable_adamw", marks=pytest.mark.full),
        pytest.param("cp2", "stable_adamw", marks=pytest.mark.full),
    ],
)
def test_resume_on_same_layout_is_bit_identical(runs: ResumedRuns, layout: str, optim: str) -> None:
    uninterrupted, resumed = runs.pair(layout, layout, BASE.format(optim=optim).split())
    for key in ("step", "tokens", "loss", "grad_norm", "lr", "rows"):
        assert resumed.column(key) == uninterrupted.column(key), key
    ours, theirs = resumed.weights(), uninterrupted.weights()
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp2 pp2", "dp2 sharded"),
        ("1", "pp2 vp2"),
        pytest.param("dp2 sharded", "tp2 pp2", marks=pytest.mark.full),
        pytest.param("dp2", "tp2 sp", marks=pytest.mark.full),
        pytest.param("pp2 vp2", "dp2", marks=pytest.mark.full),
        pytest.param("tp2 sp", "cp2", marks=pytest.mark.full),
        pytest.param("cp2", "1", marks=pytest.mark.full),
    ],
)
def test_resume_on_another_layout_matches_losses_and_norms(runs: ResumedRuns, first: str, second: str) -> None:
    uninterrupted, resumed = runs.pair(first, second, BASE.format(optim="stable_adamw").split())
    assert resumed.column("rows") == uninterrupted.column("rows")
    for key in ("loss", "grad_norm"):
        pairs = zip(resumed.column(key), uninterrupted.column(key), strict=True)
        assert max(abs(a - b) / abs(b) for a, b in pairs) <= 1e-5, key


@pytest.mark.full
def test_resume_with_muon_on_same_and_other_layout_matches_losses(runs: ResumedRuns) -> None:
    overrides = [*BASE.format(optim="muon").split(), "parallel.distributed_optimizer=false"]
    uninterrupted, resumed = runs.pair("tp2 pp2", "tp2 pp2", overrides, "fp32_orthogonal")
    assert resumed.column("loss") == uninterrupted.column("loss")
    uninterrupted, resumed = runs.pair("tp2 pp2", "dp2", overrides, "fp32_orthogonal")
    pairs = zip(resumed.column("loss"), uninterrupted.column("loss"), strict=True)
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-5


BF16 = [*BASE.format(optim="stable_adamw").split(), "precision.name=bf16"]


def test_resume_with_bf16_on_same_layout_is_bit_identical(runs: ResumedRuns) -> None:
    uninterrupted, resumed = runs.pair("dp2 sharded", "dp2 sharded", BF16)
    assert resumed.column("loss") == uninterrupted.column("loss")
    ours, theirs = resumed.weights(), uninterrupted.weights()
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


@pytest.mark.full
def test_resume_with_bf16_on_another_layout_matches_losses(runs: ResumedRuns) -> None:
    """The checkpoint holds fp32 master weights, so another layout differs only by the bf16 rounding of activations."""
    uninterrupted, resumed = runs.pair("dp2 sharded", "tp2 pp2", BF16)
    assert (
        max(abs(a - b) / b for a, b in zip(resumed.column("loss"), uninterrupted.column("loss"), strict=True)) <= 5e-3
    )


@pytest.mark.parametrize(
    ("first", "second"), [("pp2 vp2", "1"), pytest.param("tp2 pp2", "pp2 vp2", marks=pytest.mark.full)]
)
def test_resume_delayed_fp8_scales_are_restored_on_another_layout(
    pool: Pool, corpus: Path, runs: ResumedRuns, first: str, second: str
) -> None:
    """FP8 scales are saved once, as plain tensors, and another layout continues with the same ones."""

    def scales(run: Trained) -> dict[str, list[float]]:
        checkpoint = latest(run.directory)
        assert checkpoint is not None
        reader = CheckpointReader(checkpoint)
        assert set(SafeReader(checkpoint).read_metadata().state_dict_metadata) == set(reader.keys())
        return {key: reader.read(key).tolist() for key in reader.keys() if key.startswith("fp8_scales.")}  # noqa: SIM118

    uninterrupted, resumed = runs.pair(first, second, [], "delayed_scales")
    actual = scales(resumed)
    assert actual == scales(uninterrupted)
    # 4 layers with 2 linears each, 4 tensors per linear
    assert len(actual) == 4 * 2 * 4
    assert actual["fp8_scales.transformer.layers.3.mlp.linear_fc2.backward.amax_history"] == [[6.0 * 4] * 2]
    # another precision ignores the scales; a run that resumes without scales starts with new ones
    train(pool, 1, resumed.directory, corpus, "mlm", ["run.steps=7"])
    again = train(pool, 1, resumed.directory, corpus, "mlm", ["run.steps=8"], mutation="delayed_scales")
    assert again.column("step")[-1] == 8
    assert scales(again)["fp8_scales.transformer.layers.0.mlp.linear_fc2.forward.amax_history"] == [[4.0] * 3]


def test_checkpoint_keep_retains_newest_and_updates_latest(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    overrides = ["run.steps=5", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    train(pool, 1, tmp_path, corpus, "mlm", overrides)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000004", "step_000000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_000000005"


def test_checkpoint_interrupted_pruning_is_completed_by_next_launch(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """A leftover of pruning that was killed after the last step is removed, although the next launch trains nothing."""
    overrides = ["run.steps=2", "checkpoint.every_steps=1"]
    train(pool, 2, tmp_path, corpus, "mlm", overrides)
    folder = tmp_path / "checkpoints"
    os.rename(folder / step_name(1), folder / f".tmp-pruned-{step_name(1)}")
    train(pool, 2, tmp_path, corpus, "mlm", overrides)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", step_name(2)]


def test_checkpoint_every_tokens_saves_at_each_crossing(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    overrides = ["run.steps=6", "checkpoint.every_tokens=1000", "checkpoint.keep=0"]
    done = train(pool, 1, tmp_path, corpus, "mlm", overrides)
    crossed = [
        line["step"]
        for before, line in zip([{"tokens": 0}, *done.metrics], done.metrics)
        if line["tokens"] // 1000 > before["tokens"] // 1000
    ]
    assert 1 < len(crossed) < 5
    expected = sorted({*crossed, 6})
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == expected


def test_checkpoint_every_minutes_saves_on_all_ranks_by_the_clock_of_rank_0(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    """With a very short interval a save is due at every step; rank 0 requests it with the step's totals."""
    overrides = ["run.steps=4", "checkpoint.every_minutes=1e-9", "checkpoint.keep=0", "checkpoint.asynchronous=false"]
    train(pool, 2, tmp_path, corpus, "mlm", overrides)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [2, 3, 4]
    # a run of a version without this key resumes
    recorded = tmp_path / "config.yaml"
    recorded.write_text("".join(line for line in recorded.open() if "every_minutes" not in line))
    train(pool, 2, tmp_path, corpus, "mlm", ["run.steps=5"])


def test_resume_metrics_after_checkpoint_move_to_rolled_back_file(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """A run that crashed after its checkpoint repeats the later steps, and metrics.jsonl has each step once."""
    uninterrupted = train(pool, 1, tmp_path / "whole", corpus, "clm", ["run.steps=3"])
    train(pool, 1, tmp_path / "run", corpus, "clm", ["run.steps=2"])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "loss": 0.0}) + "\n" + '{"step": 4, "lo')
    resumed = train(pool, 1, tmp_path / "run", corpus, "clm", ["run.steps=3"])
    assert resumed.column("loss") == uninterrupted.column("loss")
    assert json.loads((tmp_path / "run" / "metrics.rolled_back.jsonl").read_text())["step"] == 3


def test_resume_truncated_checkpoint_falls_back_to_previous(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    uninterrupted = train(pool, 1, tmp_path / "whole", corpus, "mlm", ["run.steps=4"])
    train(pool, 1, tmp_path / "run", corpus, "mlm", ["run.steps=3", "checkpoint.every_steps=2"])
    newest = latest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_000000003"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    resumed = train(pool, 2, tmp_path / "run", corpus, "mlm", ["run.steps=4", "parallel.tp=2"])
    assert resumed.column("rows") == uninterrupted.column("rows")
    assert resumed.column("loss") == pytest.approx(uninterrupted.column("loss"), rel=1e-5)


def test_resume_intact_checkpoint_of_other_shape_is_refused(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The refusal names the tensor that does not fit, and earlier checkpoints are not tried."""
    often = ["checkpoint.every_steps=1", "checkpoint.keep=0"]
    train(pool, 2, tmp_path / "run", corpus, "mlm", ["run.steps=2", *often])
    wider = ["run.steps=3", *often, "model.ffn_hidden_size=128"]
    results = pool.run(2, command(tmp_path / "run", corpus, "mlm", wider, ["--allow-change", "model.ffn_hidden_size"]))
    assert [result.status for result in results] == [2, 2]
    output = results[0].output + results[1].output
    assert "step_000000002: " in output
    assert "transformer.layers.0.mlp.linear_fc1.weight" in output
    assert "step_000000001" not in output
    assert "no checkpoint is whole" not in output


def test_sigterm_saves_last_step_and_exits_75(corpus: Path, tmp_path: Path) -> None:
    """A process that gets SIGTERM finishes its step, saves it and exits with 75."""
    overrides = command(tmp_path / "run", corpus, "mlm", ["run.steps=100000"])
    process = subprocess.Popen(program("ettin", *overrides), env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while (not metrics.exists() or metrics.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    steps = read(tmp_path / "run").column("step")
    saved = latest(tmp_path / "run")
    assert saved is not None
    assert saved.name == f"step_{steps[-1]:09d}"


def test_init_from_next_phase_keeps_optimizer_and_cross_starts_fresh(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The next phase keeps the optimizer state and restarts the step count; another objective keeps weights only."""
    train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=3"])
    chained = command(
        tmp_path / "second",
        corpus,
        "mlm",
        ["run.steps=2", "optim.lr=1e-30", "optim.weight_decay=0"],
        ["--init-from", str(tmp_path / "first")],
    )
    chained[chained.index("pretrain")] = "extend"
    assert [result.status for result in pool.run(2, [*chained, "parallel.tp=2"])] == [0, 0]
    second = read(tmp_path / "second")
    progress = json.loads((latest(tmp_path / "second") / "progress.json").read_text())
    assert second.column("step") == [1, 2]
    assert progress["updates"] == 5
    ours, theirs = second.weights(), read(tmp_path / "first").weights()
    # at a learning rate of 1e-30 the weights stay as they were
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) <= 1e-25
    crossed = command(tmp_path / "third", corpus, "clm", ["run.steps=1"], ["--init-from", str(tmp_path / "first")])
    crossed[crossed.index("pretrain")] = "cross"
    assert pool.run(1, crossed)[0].status == 0
    assert json.loads((latest(tmp_path / "third") / "progress.json").read_text())["updates"] == 1


# the weights stay, so gradients and moments do not depend on the optimizer
STILL = ["optim.lr=1e-12", "optim.weight_decay_reference_lr=1", "optim.weight_decay=0", "optim.beta2=0.9"]


def moments(run: Trained) -> dict[str, torch.Tensor]:
    """Return the moments in the last checkpoint of a run."""
    checkpoint = latest(run.directory)
    assert checkpoint is not None
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(key) for key in reader.keys() if ".state.exp_avg" in key}  # noqa: SIM118


@pytest.mark.parametrize(
    ("before", "after", "layout"),
    [
        ("stable_adamw", "adamw", "dp2 sharded"),
        pytest.param("adamw", "stable_adamw", "1", marks=pytest.mark.full),
    ],
)
def test_resume_with_another_optimizer_converts_its_moments(
    runs: ResumedRuns, tmp_path: Path, before: str, after: str, layout: str
) -> None:
    uninterrupted = runs.run(layout, 4, [*STILL, f"optim.name={after}"], None, tmp_path / "whole")
    runs.run(layout, 3, [*STILL, f"optim.name={before}"], None, tmp_path / "changed")
    world, parallel = LAYOUTS[layout]
    overrides = [*STILL, f"optim.name={after}", "run.steps=4", *parallel.split()]
    options = ["--allow-change", "optim.name"]
    results = runs.pool.run(world, command(tmp_path / "changed", runs.corpus, "mlm", overrides, options))
    assert [result.status for result in results] == [0] * world, results[0].output
    assert f"moments converted from {before} to {after}" in results[0].output
    expected, actual = moments(uninterrupted), moments(read(tmp_path / "changed"))
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        # tolerance for one of 4,096 elements near 0, which differs by 1.8e-9
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=3e-9)


@pytest.mark.full
def test_resume_with_muon_starts_with_fresh_moments(runs: ResumedRuns, tmp_path: Path) -> None:
    runs.run("1", 3, [], None, tmp_path)
    overrides = ["optim.name=muon", "parallel.distributed_optimizer=false", "run.steps=5"]
    options = ["--allow-change", "optim.name"]
    (result,) = runs.pool.run(1, command(tmp_path, runs.corpus, "mlm", overrides, options))
    assert result.status == 0, result.output
    assert "muon starts with fresh moments: those of stable_adamw are of another kind" in result.output
    assert read_progress(latest(tmp_path))["updates"] == 2  # type: ignore[arg-type]
