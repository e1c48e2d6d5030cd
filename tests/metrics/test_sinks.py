"""Weights & Biases, checked by reading its offline files: one wandb run over all resumes, one group for encoder and
decoder. Also an unreachable service."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.metrics.sinks import grouped
from tests.forkserver import program
from tests.pool import Pool
from tests.train.runs import command, read

pytestmark = pytest.mark.ranks


def records(run_dir: Path) -> list[Any]:
    """Return all records that were logged to wandb, over all launches."""
    from wandb.proto import wandb_internal_pb2

    logged = []
    for path in sorted((run_dir / "wandb").rglob("*.wandb")):
        for data in blocks(path.read_bytes()):
            logged.append(wandb_internal_pb2.Record.FromString(data))
    return logged


def blocks(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format (its doc/log_format.md) after a 7-byte header."""
    assert content.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, record_type = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is a full record, 4 the last part of one
        if record_type in (1, 4):
            yield record
            record = b""


def page(run_dir: Path) -> tuple[set[tuple[str, str]], list[dict[str, Any]]]:
    """Return the set of (run id, group), and the history rows."""
    everything = records(run_dir)
    pages = {(r.run.run_id, r.run.run_group) for r in everything if r.WhichOneof("record_type") == "run"}
    rows = []
    for record in everything:
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return pages, rows


def artifacts(run_dir: Path) -> dict[str, set[str]]:
    """Return the aliases and file paths of each artifact by name, over all launches."""
    named: dict[str, set[str]] = {}
    for record in records(run_dir):
        if record.WhichOneof("record_type") == "artifact":
            artifact = record.artifact
            paths = [entry.path for entry in artifact.manifest.contents]
            named.setdefault(artifact.name, set()).update(artifact.aliases, paths)
    return named


def test_wandb_resumed_runs_keep_one_page_and_share_a_group(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    def launch(objective: str, steps: int, *more: str) -> Path:
        overrides = [f"run.steps={steps}", "checkpoint.every_steps=1", "checkpoint.keep=0", "metrics.wandb=true", *more]
        (result,) = pool.run(1, command(tmp_path / objective, corpus, objective, overrides), "wandb_offline")
        assert result.status == 0, result.output[-2000:]
        assert "switched off" not in result.output, result.output[-2000:]
        return tmp_path / objective

    reference = "metrics.wandb_checkpoints=reference"
    launch("mlm", 1, reference)
    run = launch("mlm", 3, reference)
    # as after a kill: step 3 is trained again
    shutil.rmtree(run / "checkpoints" / "step_000000003")
    launch("mlm", 4, reference, "metrics.wandb_report=true")
    pages, rows = page(run)
    ((name, group),) = pages
    assert name.startswith("165K-mlm-pretrain-")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in rows] == read(run).column("loss")
    assert [row["data/tokens"] for row in rows] == read(run).column("tokens")
    logged = rows[0].keys()
    assert {"speed/tokens_per_second", "optim/lr", "optim/grad_norm", "memory/peak_bytes", "data/rows"} <= logged
    kept = artifacts(run)
    for step in (1, 2, 3, 4):
        assert f"step-{step}" in kept["165K-mlm-pretrain-checkpoint"], kept.keys()
    assert {"report.html", "figures/loss.png", "figures/speed.png"} <= kept["165K-mlm-pretrain-report"]
    ((name, decoders),), _ = page(launch("clm", 1))
    assert name.startswith("165K-clm-pretrain-")
    assert decoders == group


@pytest.mark.full
def test_wandb_unreachable_service_writes_to_disk_and_hides_key(corpus: Path, tmp_path: Path) -> None:
    """With an address that does not answer the run continues and is logged to disk, and its API key stays secret. Runs
    in a process of its own, because wandb keeps the mode of the first run of a process."""
    arguments = command(tmp_path, corpus, "mlm", ["run.steps=2", "metrics.wandb=true"])
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "5" * 40, "WANDB_INIT_TIMEOUT": "1"}
    line = program("ettin", *arguments)
    done = subprocess.run(line, env={**os.environ, **away}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(tmp_path).column("step") == [1, 2]
    assert "to be sent by `wandb sync`" in done.stderr
    assert "5" * 40 not in done.stdout + done.stderr
    assert [row["step"] for row in page(tmp_path)[1]] == [1, 2]


def test_metric_names_are_prefixed_with_their_group() -> None:
    assert grouped("loss") == "train/loss"
    assert grouped("bad") == "train/bad"
    assert grouped("validation_loss/web") == "validation/loss/web"
    assert grouped("validation_accuracy_clm") == "validation/accuracy_clm"


def test_wandb_checkpoints_invalid_choice_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, corpus, "mlm", ["metrics.wandb_checkpoints=yes"])) == 2
    assert "one of none, reference, upload" in capsys.readouterr().err
