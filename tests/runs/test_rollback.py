"""Rolling back to an earlier step, skipping rows, and milestones (weights that are never pruned)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import latest, list_checkpoints, list_milestones
from megatron_ettin.cli.main import main
from megatron_ettin.config.values import parse_skips
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.mixture import MixtureEntry
from tests.pool import Pool
from tests.train.runs import Trained, command, read, train

pytestmark = pytest.mark.ranks
OVERRIDES = ["run.steps=6", "checkpoint.every_steps=1", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def whole(pool: Pool, corpus: Path, tmp_path_factory) -> Trained:
    """Train six steps of eight rows without interruption."""
    return train(pool, 1, tmp_path_factory.mktemp("whole"), corpus, "mlm", OVERRIDES)


@pytest.fixture
def run(whole: Trained, tmp_path: Path) -> Path:
    shutil.copytree(whole.directory, tmp_path / "run")
    return tmp_path / "run"


def test_from_step_retrains_bit_identically(pool: Pool, corpus: Path, whole: Trained, run: Path) -> None:
    again = train(pool, 1, run, corpus, "mlm", OVERRIDES, ["--from-step", "3"])
    assert again.column("loss") == whole.column("loss")
    assert again.column("step") == list(range(1, 7))
    ours, theirs = again.weights(), whole.weights()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = (run / "metrics.rolled_back.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6]
    assert sorted(path.name for path in (run / "rolled_back/checkpoints").iterdir()) == [
        f"step_00000000{i}" for i in (4, 5, 6)
    ]
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert last["from"].startswith("went back to step_000000003")
    # a requeued job runs the same command and must not roll back again
    metrics = (run / "metrics.jsonl").read_bytes()
    train(pool, 1, run, corpus, "mlm", OVERRIDES, ["--from-step", "3"])
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_data_skip_after_from_step_leaves_out_rows(
    pool: Pool, corpus: Path, whole: Trained, run: Path, tmp_path: Path
) -> None:
    """Steps 1 to 3 stay. The rows of step 4 are skipped, so the new step 4 has the rows and labels of the old step
    5."""
    skip = "data.skip=24:32"
    (refused,) = pool.run(1, command(run, corpus, "mlm", [*OVERRIDES, skip], ["--from-step", "3"]))
    assert refused.status == 2
    assert "was started with data.skip=None, now data.skip=[[24, 32]]" in refused.output
    trained = train(
        pool, 1, run, corpus, "mlm", [*OVERRIDES, skip], ["--from-step", "3", "--allow-change", "data.skip"]
    )
    assert trained.column("rows") == [[0, 8], [8, 16], [16, 24], [32, 40], [40, 48], [48, 56]]
    assert trained.column("loss")[:3] == whole.column("loss")[:3]
    assert trained.column("labels")[3:5] == whole.column("labels")[4:]
    # the same rows with other weights
    assert trained.column("loss")[3] != whole.column("loss")[4]
    # the order has another fingerprint, and before rows are skipped the same one
    orders = [json.loads((folder / "order.json").read_text()) for folder in (run, whole.directory)]
    assert orders[0]["fingerprint"] != orders[1]["fingerprint"]
    assert orders[0]["unskipped_fingerprint"] == orders[1]["unskipped_fingerprint"]
    assert main(["order", str(run), "--steps", "4:5", "--batches", str(tmp_path / "four.npz")]) == 0
    assert main(["order", str(whole.directory), "--steps", "5:6", "--batches", str(tmp_path / "five.npz")]) == 0
    four, five = np.load(tmp_path / "four.npz"), np.load(tmp_path / "five.npz")
    assert (four["input_ids"] == five["input_ids"]).all()
    assert (four["labels"] == five["labels"]).all()


def test_data_skip_of_trained_rows_is_refused(corpus: Path, whole: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*OVERRIDES, "run.steps=8", "data.skip=40:48"]
    assert main(command(whole.directory, corpus, "mlm", overrides, ["--allow-change", "data.skip"])) == 2
    message = "data.skip: 40:48 begins before row 48, up to which this run has trained; go back with --from-step first"
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_row_order_with_skips_leaves_out_rows(corpus: Path) -> None:
    entries = [MixtureEntry(str(corpus))]
    plain = open_blended_dataset(entries, 64, "packed", 21, "pretrain")
    some = dataclasses.replace(plain, skips=((3, 5), (7, 8)))
    assert some.order_indices(range(6)).tolist() == [0, 1, 2, 5, 6, 8]
    assert some.order_span(0, 4) == (0, 6)
    assert some.order_span(3, 5) == (5, 7)
    assert plain.order_span(3, 5) == (3, 5)
    assert some.fingerprint != plain.fingerprint == some.unskipped_fingerprint
    for ours, theirs in zip(some.rows(some.order_indices(range(6))), plain.rows([0, 1, 2, 5, 6, 8]), strict=True):
        assert ours.order_index == theirs.order_index
        assert (ours.tokens == theirs.tokens).all()


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "a:b", "1:3,2:4", "4:5,1:2", "", "1:2,", "-1:4"])
def test_parse_skips_invalid_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^data\.skip: "):
        parse_skips(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from-step", "9"], "has no checkpoint of that step; there are: 1, 2, 3, 4, 5, 6"),
        (["--from-step", "0"], "--from-step 0: must be at least 1"),
    ],
)
def test_from_step_without_checkpoint_is_refused(
    corpus: Path, whole: Trained, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(whole.directory, corpus, "mlm", OVERRIDES, options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert latest(whole.directory).name == "step_000000006"
    assert not (whole.directory / "rolled_back").exists()


def test_from_step_of_a_run_that_has_not_begun_is_refused_and_leaves_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "new", corpus, "mlm", OVERRIDES, ["--from-step", "9"])) == 2
    assert "has no checkpoint of that step; there are: none" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def milestones(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train four steps, of which the second and the fourth pass a multiple of 700 tokens."""
    overrides = ["run.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.weights_every_tokens=700"]
    trained = train(pool, 2, tmp_path_factory.mktemp("milestones"), corpus, "mlm", [*overrides, "parallel.tp=2"])
    tokens = [0, *trained.column("tokens")]
    assert [step for step in range(1, 5) if tokens[step] // 700 > tokens[step - 1] // 700] == [2, 4]
    return trained


def test_milestones_at_token_multiples_are_kept_and_start_a_phase(
    pool: Pool, corpus: Path, tmp_path: Path, milestones: Trained
) -> None:
    """Milestones are saved at multiples of a token count, besides one full checkpoint, and a phase can start from
    one."""
    run = milestones.directory
    assert [path.name for path in list_milestones(run)] == ["step_000000002", "step_000000004"]
    assert [path.name for path in list_checkpoints(run)] == ["step_000000004"]
    full = sum(path.stat().st_size for path in list_checkpoints(run)[0].rglob("*"))
    milestone = list_milestones(run)[0]
    assert sum(path.stat().st_size for path in milestone.rglob("*")) < full / 2
    assert main(["inspect", str(milestone), "--verify"]) == 0
    branch = ["--init-from", str(run), "--from-step", "2"]
    line = command(tmp_path / "branch", corpus, "mlm", ["run.steps=1"], branch)
    line[line.index("pretrain")] = "decay"
    (result,) = pool.run(1, line)
    assert result.status == 0, result.output[-2000:]
    assert f"weights of {milestone}" in result.output
    assert read(tmp_path / "branch").column("step") == [1]


@pytest.mark.full
def test_release_of_run_with_milestones_has_a_revision_for_each(tmp_path: Path, milestones: Trained) -> None:
    arguments = ["release", str(milestones.directory), "--out", str(tmp_path), "--order", "none", "--json"]
    assert main(arguments) == 0
    index = json.loads((tmp_path / "release.json").read_text())
    assert [one["revision"] for one in index["revisions"]] == ["step0", "step2", "step4"]
