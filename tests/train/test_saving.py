"""Asynchronous saving: same tensors as a synchronous save, kills while writing, full disks, retention, verification."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, list_checkpoints, read_progress, step_name
from megatron_ettin.checkpoint.integrity import verify
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.cli.main import main
from tests import forkserver
from tests.pool import Pool, mutated
from tests.train.runs import Trained, command, read, train

pytestmark = pytest.mark.ranks
# bytes; equal to that of `small_blocks` in tests/conditions.py
BLOCK = 1 << 16
OFTEN = ["checkpoint.every_steps=2", "checkpoint.keep=0"]
EACH = ["checkpoint.every_steps=1", "checkpoint.keep=0"]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, "precision.name=bf16"),
        pytest.param(1, "", marks=pytest.mark.full),
        pytest.param(4, "parallel.tp=2 parallel.pp=2", marks=pytest.mark.full),
        pytest.param(2, "parallel.distributed_optimizer=false", marks=pytest.mark.full),
        pytest.param(2, "parallel.engine=deepspeed parallel.zero_stage=3", marks=pytest.mark.full),
    ],
)
def test_async_save_matches_synchronous_save(
    pool: Pool, corpus: Path, tmp_path: Path, world: int, overrides: str
) -> None:
    """Each checkpoint holds its step's tensors, although the optimizer updates them while it is written."""
    for name in ("true", "false"):
        more = ["run.steps=4", *OFTEN, f"checkpoint.asynchronous={name}", *overrides.split()]
        train(pool, world, tmp_path / name, corpus, "mlm", more)
    ours, theirs = (list_checkpoints(tmp_path / name) for name in ("true", "false"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        verify(one)
        first, second = tensors(one), tensors(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in second), one
    assert not list((tmp_path / "true" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tp=2 precision.name=bf16",
        pytest.param("", marks=pytest.mark.full),
        pytest.param("parallel.pp=2 optim.name=adamw", marks=pytest.mark.full),
    ],
)
def test_sharded_save_matches_unsharded_and_is_spread_over_ranks(
    pool: Pool, corpus: Path, tmp_path: Path, overrides: str
) -> None:
    """The tensors are those of an optimizer that is not distributed, and every rank writes its share of the bytes."""
    checkpoints = {}
    for name in ("true", "false"):
        more = ["run.steps=2", f"parallel.distributed_optimizer={name}", "precision.name=fp32", *overrides.split()]
        train(pool, 4, tmp_path / name, corpus, "mlm", more)
        checkpoints[name] = latest(tmp_path / name)
    ours, theirs = tensors(checkpoints["true"]), tensors(checkpoints["false"])
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer.state.exp_avg.") for key in ours)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, msg=key)
    sizes = [sum(file.stat().st_size for file in checkpoints["true"].glob(f"__{rank}_*.distcp")) for rank in range(4)]
    assert min(sizes) > sum(sizes) / 8, sizes


def train_killed_at_second_save(moment: str, *arguments: str) -> int:
    """Run `ettin` in this process, which kills itself `before` or `after` it renames the checkpoint of step 2."""
    rename = os.rename

    def killing(source: Path, target: Path, **named: int) -> None:
        is_second = Path(target).name == step_name(2)
        if is_second and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **named)
        if is_second and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(os, "rename", killing), mutated(None):
        return main(list(arguments))


def test_save_killed_before_or_after_its_rename_keeps_previous_checkpoint(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    """`latest` names the previous checkpoint, which is complete, and the resumed run has the uninterrupted losses."""
    uninterrupted = train(pool, 1, tmp_path / "whole", corpus, "mlm", ["run.steps=4"])
    for moment in ("before", "after"):
        run = tmp_path / moment
        arguments = command(run, corpus, "mlm", ["run.steps=4", *EACH])
        line = forkserver.command("tests.train.test_saving:train_killed_at_second_save", moment, *arguments)
        assert subprocess.run(line, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
        assert (run / "checkpoints" / "latest").read_text() == "step_000000001\n"
        assert latest(run, checksums=True) == run / "checkpoints" / "step_000000001"
        assert (run / "checkpoints" / "step_000000002").exists() == (moment == "after")
        resumed = train(pool, 1, run, corpus, "mlm", ["run.steps=4", *EACH])
        assert resumed.column("loss") == uninterrupted.column("loss")
        assert not list((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.full
def test_save_interrupted_by_kill_9_leaves_latest_whole_and_resumes(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Kill a process that saves at every step at random moments. `latest` names a complete checkpoint, and the resumed
    run ends with the losses of an uninterrupted one."""
    overrides = ["checkpoint.every_steps=1", "checkpoint.keep=2", "run.steps=30"]
    line = forkserver.program("ettin", *command(tmp_path / "run", corpus, "mlm", overrides))
    draw = random.Random(5)
    for _ in range(3):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder = tmp_path / "run" / "checkpoints"
        began = latest(tmp_path / "run") if folder.exists() else None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            now = (folder / "latest").read_text() if (folder / "latest").exists() else ""
            if now and (began is None or now.strip() != began.name):
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoint = latest(tmp_path / "run", checksums=True)
        assert checkpoint is not None
        assert checkpoint.name == (folder / "latest").read_text().strip()
    resumed = train(pool, 1, tmp_path / "run", corpus, "mlm", overrides)
    uninterrupted = train(pool, 1, tmp_path / "whole", corpus, "mlm", ["run.steps=30"])
    assert resumed.column("loss") == uninterrupted.column("loss")
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 32 MiB with 1 MiB free: too little for a checkpoint of the tiny shape with its
    optimizer."""
    if os.geteuid() != 0:
        pytest.skip("mounting wants root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    (folder / "filler").write_bytes(b"\0" * (31 << 20))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_save_on_full_disk_is_reported_and_retried(pool: Pool, corpus: Path, small_disk: Path) -> None:
    """Training continues, and a later try of the save succeeds once there is room."""
    overrides = ["run.steps=12", "checkpoint.every_steps=3", "checkpoint.retry_seconds=0.01"]
    overrides.append("checkpoint.weights_every_tokens=1000")
    results = pool.run(2, command(small_disk / "run", corpus, "mlm", overrides), "room_after_step_8")
    assert [result.status for result in results] == [0, 0], results[0].output[-2000:]
    output = results[0].output + results[1].output
    assert "warning: step_000000003 could not be saved (" in output
    assert "MiB free, a checkpoint takes some" in output
    assert "there is none before it; tried again in 0.01 s" in output
    assert "there is none before it; weights alone are not tried again" in output
    steps = [int(path.name[5:]) for path in list_checkpoints(small_disk / "run")]
    assert steps
    assert steps[0] in (8, 9, 10)
    assert steps[-1] == 12
    assert read(small_disk / "run").column("step") == list(range(1, 13))


def test_save_disk_filled_while_writing_keeps_previous_checkpoint(pool: Pool, corpus: Path, small_disk: Path) -> None:
    """A save that runs out of space leaves no files. The previous checkpoint stays the latest, and the run fails."""
    (small_disk / "filler").unlink()
    train(pool, 1, small_disk / "run", corpus, "mlm", ["run.steps=1"])
    overrides = ["run.steps=4", "checkpoint.every_steps=2", "checkpoint.retry_seconds=1000"]
    results = pool.run(2, command(small_disk / "run", corpus, "mlm", overrides), "disk_full_while_writing")
    assert [result.status for result in results] == [1, 1]
    output = results[0].output + results[1].output
    warned = [
        line for line in output.splitlines() if line.startswith("warning: step_000000002 could not be saved (rank ")
    ]
    assert warned, output[-3000:]
    assert "ENOSPC, " in warned[0], output[-3000:]
    assert "the latest is that of step 1; tried again in 1000 s" in output
    assert "ettin train: step_000000004 could not be saved (" in output
    assert "the run ends without it" in output
    assert latest(small_disk / "run", checksums=True).name == "step_000000001"  # type: ignore[union-attr]
    assert not list((small_disk / "run" / "checkpoints").glob(".tmp-*"))


@pytest.fixture
def full_disk_under_metrics(tmp_path: Path) -> Iterator[Path]:
    """Yield a run's folder in which only metrics.jsonl is on a full file system; tmp_path/filler is the file to
    delete."""
    if os.geteuid() != 0:
        pytest.skip("mounting wants root")
    small, run = tmp_path / "small", tmp_path / "run"
    small.mkdir()
    run.mkdir()
    (run / "metrics.jsonl").touch()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    (small / "metrics.jsonl").touch()
    with contextlib.suppress(OSError), open(small / "filler", "wb", buffering=0) as filler:
        while filler.write(b"\0" * 4096):
            pass
    subprocess.run(["mount", "--bind", small / "metrics.jsonl", run / "metrics.jsonl"], check=True)
    # a link to the filler, at the path that `room_after_step_8` deletes
    (tmp_path / "filler").symlink_to(small / "filler")
    yield run
    subprocess.run(["umount", "-l", run / "metrics.jsonl"], check=True)
    subprocess.run(["umount", "-l", small], check=True)


def test_save_waits_for_metrics_that_cannot_be_written(pool: Pool, corpus: Path, full_disk_under_metrics: Path) -> None:
    """No checkpoint is published before its steps are in metrics.jsonl; once there is room, both are written."""
    run = full_disk_under_metrics
    overrides = ["run.steps=12", "checkpoint.every_steps=3", "checkpoint.retry_seconds=0.01"]
    results = pool.run(2, command(run, corpus, "mlm", overrides), "room_after_step_8")
    assert [result.status for result in results] == [0, 0], results[0].output[-2000:]
    output = results[0].output + results[1].output
    assert output.count("lines wait in memory, and nothing is saved before they are written") == 1
    assert f"step_000000003 could not be saved ({run}/metrics.jsonl: No space left on device); there is none" in output
    assert "Traceback" not in output
    assert [int(path.name[5:]) for path in list_checkpoints(run)][-1] == 12
    assert read(run).column("step") == list(range(1, 13))


def test_train_ending_with_unwritten_metrics_exits_1_with_one_line(
    pool: Pool, corpus: Path, full_disk_under_metrics: Path
) -> None:
    results = pool.run(1, command(full_disk_under_metrics, corpus, "mlm", ["run.steps=3"]))
    assert results[0].status == 1
    assert "ettin train: step_000000003 could not be saved (" in results[0].output
    assert (
        "metrics.jsonl: No space left on device); there is none before it; the run ends without it" in results[0].output
    )
    assert "Traceback" not in results[0].output


def test_save_failure_with_on_failure_stop_ends_the_run(pool: Pool, corpus: Path, small_disk: Path) -> None:
    overrides = ["run.steps=9", "checkpoint.every_steps=3", "checkpoint.on_failure=stop"]
    results = pool.run(2, command(small_disk / "run", corpus, "mlm", overrides))
    assert [result.status for result in results] == [1, 1]
    output = results[0].output + results[1].output
    assert "ettin train: step_000000003 could not be saved (" in output
    assert "the run stops (checkpoint.on_failure)" in output
    assert "Traceback" not in output
    assert read(small_disk / "run").column("step")[-1] == 4


def test_save_whose_pruning_fails_is_published_with_a_warning(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting wants root")
    train(pool, 1, tmp_path, corpus, "mlm", ["run.steps=1"])
    oldest = tmp_path / "checkpoints" / step_name(1)
    # a mount point cannot be renamed
    subprocess.run(["mount", "--bind", oldest, oldest], check=True)
    try:
        overrides = ["run.steps=3", "checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.on_failure=stop"]
        (result,) = pool.run(1, command(tmp_path, corpus, "mlm", overrides))
    finally:
        subprocess.run(["umount", "-l", oldest], check=True)
    assert result.status == 0, result.output[-2000:]
    assert f"warning: {oldest}: an old checkpoint cannot be removed (Device or resource busy)" in result.output
    assert "could not be saved" not in result.output
    assert latest(tmp_path, checksums=True) == tmp_path / "checkpoints" / step_name(3)


def test_save_keep_every_tokens_with_staging_keeps_crossed_steps(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    overrides = ["run.steps=8", "checkpoint.every_steps=2", "checkpoint.keep=1", "checkpoint.keep_every_tokens=1100"]
    overrides.append(f"checkpoint.staging={tmp_path / 'own-disk'}")
    run = train(pool, 2, tmp_path / "run", corpus, "clm", overrides)
    tokens = dict(zip(run.column("step"), run.column("tokens"), strict=True))
    saved = range(2, 9, 2)
    crossed = [s for s in saved if tokens[s] // 1100 > (tokens[s - 2] if s > 2 else 0) // 1100]
    assert len(crossed) == 2
    assert 8 not in crossed
    checkpoints = list_checkpoints(tmp_path / "run")
    assert [int(path.name[5:]) for path in checkpoints] == [*crossed, 8]
    assert [bool(read_progress(path).get("keep")) for path in checkpoints] == [
        int(p.name[5:]) in crossed for p in checkpoints
    ]
    assert list((tmp_path / "own-disk").iterdir()) == []
    for path in checkpoints:
        verify(path)


@pytest.fixture(scope="module")
def two_checkpoints(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train two steps on two ranks, and save each as a checkpoint whose files have many blocks."""
    overrides = ["run.steps=2", *EACH]
    return train(pool, 2, tmp_path_factory.mktemp("saved"), corpus, "mlm", overrides, mutation="small_blocks")


@pytest.mark.parametrize("position_choice", ["one of each kind", pytest.param("all", marks=pytest.mark.full)])
def test_verify_damaged_byte_in_any_file_is_named_and_falls_back(
    pool: Pool, corpus: Path, tmp_path: Path, two_checkpoints: Trained, position_choice: str
) -> None:
    """Whichever rank verifies the damaged block, the error names its file. The run then resumes bit-identically from
    the previous checkpoint, although the damaged one was loaded first."""
    uninterrupted, newest = two_checkpoints, list_checkpoints(two_checkpoints.directory)[-1]
    entries = json.loads((newest / "integrity.json").read_text())["files"]
    # a file of each rank
    ours, theirs = sorted(name for name, entry in entries.items() if len(entry.get("blocks", [])) > 3)
    chosen = [(ours, 0), (theirs, entries[theirs]["bytes"] - 1), ("progress.json", 0)]
    if position_choice == "all":
        middles = [(name, entry["bytes"] // 2) for name, entry in sorted(entries.items())]
        ends = [(name, at) for name, e in sorted(entries.items()) if "blocks" in e for at in (0, e["bytes"] - 1)]
        chosen = [position for position in (*middles, *ends) if position not in chosen]
    for name, at in chosen:
        shutil.copytree(uninterrupted.directory, tmp_path / "damaged")
        path = tmp_path / "damaged" / "checkpoints" / newest.name / name
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        results = pool.run(2, command(tmp_path / "damaged", corpus, "mlm", ["run.steps=2", *EACH]))
        assert [result.status for result in results] == [0, 0]
        output = results[0].output + results[1].output
        block = rf"bytes {at // BLOCK * BLOCK:,} to [\d,]+: " if "blocks" in entries[name] else ""
        assert re.search(rf"{newest.name}/{re.escape(name)}: {block}sha256 ", output)
        assert "resumed step_000000001" in output
        assert read(tmp_path / "damaged").column("loss") == uninterrupted.column("loss")
        shutil.rmtree(tmp_path / "damaged")


@pytest.mark.full
def test_resume_from_integrity_format_1_verifies_and_falls_back(
    pool: Pool, corpus: Path, tmp_path: Path, two_checkpoints: Trained
) -> None:
    """A record of format 1 (one sha256 per file, none of itself) is verified, and a damaged file is named."""
    uninterrupted = train(pool, 2, tmp_path / "whole", corpus, "mlm", ["run.steps=3"])
    shutil.copytree(two_checkpoints.directory, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run")[-1]
    files = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file() and path.name != "integrity.json"}
    entries = {
        path.relative_to(newest).as_posix(): {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    }
    (newest / "integrity.json").write_text(json.dumps({"format": 1, "files": entries}))
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    resumed = train(pool, 2, tmp_path / "run", corpus, "mlm", ["run.steps=3", *EACH])
    assert resumed.column("loss") == uninterrupted.column("loss")
    data = next((tmp_path / "damaged" / "checkpoints" / newest.name).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    results = pool.run(2, command(tmp_path / "damaged", corpus, "mlm", ["run.steps=3", *EACH]))
    output = results[0].output + results[1].output
    assert f"{newest.name}/{data.name}: sha256 " in output
    assert "resumed step_000000001" in output


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("checkpoint.on_failure=ignore", "checkpoint.on_failure: 'ignore' does not exist; it is one of retry, stop"),
        ("checkpoint.retry_seconds=0", "checkpoint.retry_seconds: 0.0 is not allowed; it must be above 0"),
        ("checkpoint.keep_every_tokens=0", "checkpoint.keep_every_tokens: 0 is not allowed; it must be at least 1"),
        ("checkpoint.asynchronous=later", "checkpoint.asynchronous: 'later' is not a bool"),
        ("checkpoint.staging=/proc/nowhere", "checkpoint.staging: /proc/nowhere: cannot be written ("),
    ],
)
def test_checkpoint_invalid_setting_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(command(tmp_path, corpus, "mlm", ["run.steps=1", word])) == 2
    assert message in capsys.readouterr().err
