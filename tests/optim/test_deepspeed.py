"""DeepSpeed's ZeRO as the engine: same losses as the megatron engine, checkpoints that either resumes, and refusals."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import latest, list_milestones
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import Trained, command, pairs, read, tiered, train
from tests.train.test_invariance import CLIPPED, DROPOUT, MORE, OPTIONS, difference, equal

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"),
]
STEPS = ["run.steps=8"]
LAYOUTS = {
    "zero1": (2, "parallel.zero_stage=1"),
    "zero2": (2, "parallel.zero_stage=2"),
    "zero3": (2, "parallel.zero_stage=3"),
    "zero1 cp2": (4, "parallel.zero_stage=1 parallel.cp=2"),
    "zero2 tp2 sp": (4, "parallel.zero_stage=2 parallel.tp=2 parallel.sequence_parallel=true"),
    "zero3 tp2": (4, "parallel.zero_stage=3 parallel.tp=2 batch.micro_batch_rows=1"),
    "zero2 offload": (2, "parallel.zero_stage=2 parallel.zero_offload=optimizer"),
    "zero3 offload": (2, "parallel.zero_stage=3 parallel.zero_offload=all"),
    "zero3 recompute overlap": (2, "parallel.zero_stage=3 parallel.recompute=full parallel.overlap=true"),
}
ENGINE = "parallel.engine=deepspeed"


@pytest.fixture(scope="module")
def reference(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that returns the one-process run of an option on the megatron engine, trained at first use."""
    made: dict[str, Trained] = {}

    def get(option: str, *overrides: str) -> Trained:
        key = " ".join((option, *overrides))
        if key not in made:
            objective, choice = (OPTIONS | MORE)[option]
            folder = tmp_path_factory.mktemp("reference")
            made[key] = train(pool, 1, folder, corpus, objective, [*STEPS, *choice.split(), *overrides])
        return made[key]

    return get


def zero(pool: Pool, corpus: Path, folder: Path, option: str, layout: str, *overrides: str) -> Trained:
    objective, choice = (OPTIONS | MORE)[option]
    world, cut = LAYOUTS[layout]
    return train(pool, world, folder, corpus, objective, [*STEPS, ENGINE, *choice.split(), *cut.split(), *overrides])


@pytest.mark.parametrize(
    ("layout", "option"),
    tiered(
        pairs(LAYOUTS, list(OPTIONS)),
        first=[
            ("zero1", DROPOUT),
            ("zero2", CLIPPED),
            ("zero3", "clm stable_adamw none"),
            ("zero2 offload", "mlm adamw dropout"),
        ],
    ),
)
def test_zero_on_layout_matches_megatron_engine(
    pool: Pool, corpus: Path, tmp_path: Path, reference, layout: str, option: str
) -> None:
    actual = zero(pool, corpus, tmp_path, option, layout)
    assert equal(actual, reference(option)), difference(actual, reference(option))


@pytest.mark.full
@pytest.mark.parametrize("layout", ["zero1", "zero3 tp2"])
def test_zero_hybrid_objective_matches_megatron_engine(
    pool: Pool, corpus: Path, tmp_path: Path, reference, layout: str
) -> None:
    actual = zero(pool, corpus, tmp_path, "hybrid", layout)
    assert equal(actual, reference("hybrid")), difference(actual, reference("hybrid"))
    assert actual.column("labels_clm") == reference("hybrid").column("labels_clm")


@pytest.mark.parametrize("layout", tiered(["zero2", "zero3"], first=["zero2"]))
def test_zero_batch_warmup_matches_megatron_engine(
    pool: Pool, corpus: Path, tmp_path: Path, reference, layout: str
) -> None:
    overrides = ["batch.warmup_tokens=1000", "batch.warmup_min_rows=4"]
    actual, expected = zero(pool, corpus, tmp_path, CLIPPED, layout, *overrides), reference(CLIPPED, *overrides)
    assert equal(actual, expected), difference(actual, expected)
    rows = [last - first for first, last in actual.column("rows")]
    assert rows[0] == 4
    assert rows[-1] == 8


def test_zero_microbatch_normalization_matches_megatron_engine(
    pool: Pool, corpus: Path, tmp_path: Path, reference
) -> None:
    """With loss_normalization=microbatch every micro-batch has the same weight, as in the original trainer."""
    overrides = ["batch.loss_normalization=microbatch"]
    actual, expected = zero(pool, corpus, tmp_path, CLIPPED, "zero2", *overrides), reference(CLIPPED, *overrides)
    assert equal(actual, expected), difference(actual, expected)
    assert actual.column("grad_norm") != reference(CLIPPED).column("grad_norm")


@pytest.mark.parametrize("layout", tiered(["zero2", "zero3", "zero2 offload"], first=["zero2"]))
def test_zero_bf16_keeps_fp32_master_weights(pool: Pool, corpus: Path, tmp_path: Path, reference, layout: str) -> None:
    """Losses are within bf16 rounding of the megatron engine's, and the saved master weights are not bf16 values."""
    actual = zero(pool, corpus, tmp_path, DROPOUT, layout, "precision.name=bf16")
    masters = CheckpointReader(latest(actual.directory)).read("optimizer.state.param.head.dense.weight")
    assert not bool((masters == masters.bfloat16()).all())
    assert actual.column("loss") == pytest.approx(reference(DROPOUT, "precision.name=bf16").column("loss"), rel=5e-3)


WHOLE, HALF = 6, 3


@pytest.fixture(scope="module")
def unfinished(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function of (layout, steps) that returns the directory of that run, trained at first use."""
    made: dict[tuple[str, int], Path] = {}

    def get(layout: str, steps: int) -> Path:
        if (layout, steps) not in made:
            made[layout, steps] = tmp_path_factory.mktemp("unfinished")
            train_on(pool, corpus, layout, made[layout, steps], steps)
        return made[layout, steps]

    return get


def train_on(pool: Pool, corpus: Path, layout: str, folder: Path, steps: int) -> Trained:
    """Train on a layout written as "WORLD key=value ..." with keys of `parallel`; the engine is DeepSpeed by
    default."""
    world, *overrides = layout.split()
    if "engine=megatron" not in overrides:
        overrides.append("engine=deepspeed")
    overrides = [f"parallel.{word}" for word in overrides]
    return train(pool, int(world), folder, corpus, "clm", [f"run.steps={steps}", *overrides])


@pytest.mark.parametrize(
    ("first", "second"),
    tiered(
        [
            ("4 zero_stage=3 tp=2", "4 zero_stage=3 tp=2"),
            ("2 zero_stage=2", "2 zero_stage=2"),
            ("2 zero_stage=1", "4 zero_stage=3 tp=2"),
            ("4 zero_stage=3 tp=2", "4 engine=megatron tp=2 pp=2"),
            ("2 engine=megatron pp=2", "2 zero_stage=2 zero_offload=optimizer"),
            ("2 zero_stage=2", "2 engine=megatron pp=2"),
        ],
        first=[("2 zero_stage=2", "2 zero_stage=2"), ("2 zero_stage=2", "2 engine=megatron pp=2")],
    ),
)
def test_zero_resume_on_either_engine_matches_uninterrupted_run(
    pool: Pool, corpus: Path, tmp_path: Path, unfinished, first: str, second: str
) -> None:
    """The resumed run is bit-identical on the same layout and within tolerance on another."""
    uninterrupted = read(unfinished(first, WHOLE))
    shutil.copytree(unfinished(first, HALF), tmp_path / "run")
    resumed = train_on(pool, corpus, second, tmp_path / "run", WHOLE)
    assert resumed.column("rows") == uninterrupted.column("rows")
    if first == second:
        assert resumed.column("loss") == uninterrupted.column("loss")
        ours, theirs = resumed.weights(), uninterrupted.weights()
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
    assert equal(resumed, uninterrupted), difference(resumed, uninterrupted)


@pytest.mark.full
def test_zero_two_phases_match_megatron_train_and_validation_losses(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Train two phases in the same processes, the second from the weights of the first alone, on either engine."""
    evaluated = [f"data.validation={corpus / 'heldout'}", "metrics.eval_every_steps=2", "metrics.eval_rows=16"]
    actual = {}
    for engine in ("megatron", "deepspeed"):
        zero3 = ["parallel.zero_stage=3"] if engine == "deepspeed" else []
        overrides = [f"parallel.engine={engine}", *zero3, *evaluated, "checkpoint.weights_every_tokens=400"]
        folder = tmp_path / engine
        first = train(pool, 2, folder / "first", corpus, "mlm", ["run.steps=2", *overrides])
        assert [path.name for path in list_milestones(folder / "first")]
        options = ["--init-from", str(folder / "first"), "--init-optimizer", "fresh"]
        second = train(pool, 2, folder / "second", corpus, "mlm", ["run.steps=2", "run.seed=3", *overrides], options)
        actual[engine] = [line["loss"] for line in (*first.metrics, *second.metrics)]
        actual[engine] += [line["validation_loss"] for line in (*first.metrics, *second.metrics)[1::2]]
    pairs = zip(actual["deepspeed"], actual["megatron"], strict=True)
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-5


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("parallel.pp=2", "parallel.engine: deepspeed has no pipeline stages here (found pp 2)"),
        ("parallel.zero_stage=4", "parallel.zero_stage: 4 is not one of DeepSpeed's: 1, 2, 3"),
        ("parallel.zero_stage=1 precision.name=bf16", "parallel.zero_stage: 1 in bf16 is what"),
        ("precision.name=bf16 precision.gradients=bf16", "precision.gradients: bf16 needs parallel.engine=megatron"),
        ("parallel.zero_offload=all", "parallel.zero_offload: all moves weights too"),
        (
            "parallel.zero_offload=nvme",
            "parallel.zero_offload: 'nvme' does not exist; it is one of none, optimizer, all",
        ),
        ("optim.name=muon", "optim.name: muon updates whole matrices, but ZeRO shards them"),
        ("precision.name=fp8-current", "precision.name: fp8-current needs parallel.engine=megatron"),
        ("parallel.engine=megatron parallel.zero_stage=2", "parallel.zero_stage: 2 needs parallel.engine=deepspeed"),
        ("parallel.engine=deepsped", "parallel.engine: 'deepsped' does not exist (did you mean 'deepspeed'?)"),
    ],
)
def test_zero_invalid_setting_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: str, expected: str
) -> None:
    assert main(command(tmp_path / "run", corpus, "mlm", [ENGINE, *overrides.split()])) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_deepspeed_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ettin.optim.deepspeed import load_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"deepspeed cannot be imported .*megatron-ettin\[deepspeed\]"):
        load_deepspeed()


def test_zero_second_run_in_process_leaks_no_threads(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Train two runs in one process; the threads of the first run's process groups end with it."""
    threads = []
    for number in range(2):
        overrides = ["run.steps=1", ENGINE, "parallel.zero_stage=3"]
        train(pool, 2, tmp_path / f"run{number}", corpus, "mlm", overrides)
        pids = [process.pid for _, process in pool.workers[:2]]
        threads.append([len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids])
    assert threads[0] == threads[1]
