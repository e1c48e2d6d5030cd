"""A run does not resume if a record in its directory is lost, damaged, or another run's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import list_checkpoints
from megatron_ettin.runs.launches import check_writable
from tests.pool import Pool
from tests.train.runs import Trained, command, read, train

pytestmark = pytest.mark.ranks
SHAPE = ["model.num_layers=2", "checkpoint.every_steps=1", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def halves(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train two steps of an encoder and of a decoder. Tests copy the runs before use."""
    folder = tmp_path_factory.mktemp("halves")
    overrides = [*SHAPE, "run.steps=2"]
    return {objective: train(pool, 1, folder / objective, corpus, objective, overrides) for objective in ("mlm", "clm")}


@pytest.fixture
def run(halves: dict[str, Trained], tmp_path: Path) -> Path:
    return shutil.copytree(halves["mlm"].directory, tmp_path / "run")


def lost(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def no_object(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("damage", [lost, torn, pytest.param(no_object, marks=pytest.mark.full)])
def test_resume_without_order_record_is_refused_until_allowed(
    pool: Pool, corpus: Path, run: Path, damage: Callable[[Path], None]
) -> None:
    damage(run / "order.json")
    for dataset in (corpus, corpus / "heldout"):
        result = pool.run(1, command(run, dataset, "mlm", [*SHAPE, "run.steps=3"]))[0]
        assert result.status == 2, result.output[-2000:]
        assert f"{run / 'order.json'}: missing or damaged, though the run has checkpoints" in result.output
    assert read(run).column("step") == [1, 2]
    train(pool, 1, run, corpus, "mlm", [*SHAPE, "run.steps=3"], ["--allow-change", "data.mixture"])
    # the record is rewritten, so nothing needs to be allowed again
    train(pool, 1, run, corpus, "mlm", [*SHAPE, "run.steps=4"])
    assert read(run).column("step") == [1, 2, 3, 4]


@pytest.mark.parametrize("overrides", [["optim.lr=1e-4"], pytest.param(["run.seed=77"], marks=pytest.mark.full)])
def test_resume_without_config_is_refused_with_a_remedy(
    pool: Pool, corpus: Path, run: Path, overrides: list[str]
) -> None:
    (run / "config.yaml").unlink()
    newest = list_checkpoints(run)[-1]
    result = pool.run(1, command(run, corpus, "mlm", [*SHAPE, "run.steps=3", *overrides]))[0]
    assert result.status == 2
    assert "config.yaml: missing, though the run has checkpoints" in result.output
    assert f"put {newest / 'config.yaml'} there" in result.output
    shutil.copy(newest / "config.yaml", run / "config.yaml")
    train(pool, 1, run, corpus, "mlm", [*SHAPE, "run.steps=3"])


def test_resume_of_a_decoder_from_an_encoders_checkpoint_is_refused(
    pool: Pool, corpus: Path, halves: dict[str, Trained], tmp_path: Path
) -> None:
    run = shutil.copytree(halves["clm"].directory, tmp_path / "run")
    newest = list_checkpoints(run)[-1]
    shutil.rmtree(newest)
    shutil.copytree(list_checkpoints(halves["mlm"].directory)[-1], newest)
    result = pool.run(1, command(run, corpus, "clm", [*SHAPE, "run.steps=3"]))[0]
    assert result.status == 2
    assert f"{newest}: was written with run.objective=mlm, this run has clm: it is another run's" in result.output
    assert read(run).column("step") == [1, 2]


def test_resume_after_an_allowed_change_needs_no_second_permission(pool: Pool, corpus: Path, run: Path) -> None:
    """The launch with --allow-change ended before it saved, so the newest checkpoint still has the old value."""
    overrides = [*SHAPE, "run.steps=2", "optim.lr=1e-3"]
    train(
        pool,
        1,
        run,
        corpus,
        "mlm",
        overrides,
        ["--allow-change", "optim.lr", "--allow-change", "optim.weight_decay_reference_lr"],
    )
    with open(run / "history.jsonl", "a") as history:
        history.write('{"time": "2026-01-01T00')
    train(pool, 1, run, corpus, "mlm", [*SHAPE, "run.steps=3", "optim.lr=1e-3"])
    assert read(run).column("step") == [1, 2, 3]


def test_train_on_a_file_system_without_locks_warns_and_trains(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", corpus, "mlm", ["model.num_layers=2", "run.steps=1"])
    result = pool.run(1, arguments, "no_locks")[0]
    assert result.status == 0, result.output[-2000:]
    assert result.output.count("its file system has no locks (Function not implemented)") == 1
    assert read(tmp_path / "run").column("step") == [1]


@pytest.mark.parametrize("name", [".lock", "history.jsonl", "metrics.jsonl"])
def test_run_directory_with_another_users_file_is_refused_by_name(name: str) -> None:
    """Resume, in a fork as another user, a run that a group shares."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user wants root")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    folder.chmod(0o777)
    (folder / name).write_text("")
    (folder / name).chmod(0o644)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            check_writable(folder)
        except UserError as error:
            os._exit(7 if f"{folder / name}: cannot be written, it is another user's (uid 0)" in str(error) else 1)
        finally:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(folder)
    assert status == 7
