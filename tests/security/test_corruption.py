"""Every changed byte of a dataset or a checkpoint is detected and named; checked by running tools/chaos.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.data.blended_dataset import open_run_dataset
from tests import forkserver
from tests.train.runs import command

COUNT = int(os.environ.get("ETTIN_CORRUPTIONS", "80"))
SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2"]


def corrupt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `tools/chaos.py corrupt` with these arguments."""
    line = forkserver.command("tests.chaos.forked:run_chaos", "corrupt", *arguments)
    return subprocess.run(line, capture_output=True, text=True, cwd=forkserver.ROOT)


def compile_an_order(folder: Path) -> None:
    """Export two steps of the run in `folder` and open them as a recorded order, so that a compiled order exists."""
    given = folder / "steps.parquet"
    assert main(["order", str(folder / "run"), "--steps", "1:3", "--out", str(given)]) == 0
    config = from_yaml(folder / "run" / "config.yaml")
    mixture = [{"path": str(folder / "dataset")}]
    open_run_dataset(config.with_keys({"data.mixture": mixture, "data.order": str(given)}))


def test_chaos_corrupt_every_changed_byte_is_detected(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "dataset")
    overrides = [*SMALL, "run.steps=2", "checkpoint.every_steps=1"]
    subprocess.run(forkserver.program("ettin", *command(tmp_path / "run", corpus, "mlm", overrides)), check=True)
    compile_an_order(tmp_path)
    done = corrupt(tmp_path / "dataset", tmp_path / "run", "--count", COUNT, "--seed", 3, "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    types = json.loads(done.stdout)["kinds"]
    assert {"order.json", "chunks.int64", "sources.int16"} <= types.keys()
    assert {".distcp", ".metadata", ".pt", ".bin", ".idx", "manifest.json", "integrity.json", "latest"} <= types.keys()
    assert sum(sum(counts.values()) for counts in types.values()) == COUNT
    assert sum(counts["harmless"] for counts in types.values()) < COUNT // 10


def test_chaos_corrupt_without_manifest_digest_reports_missed_byte(tmp_path: Path, corpus: Path) -> None:
    """Report an undetected byte in a dataset whose manifest has no digest.

    Most of that manifest is the name of a source, which nothing else checks. Changed bytes are random, so in an
    ordinary manifest every one might hit something that is checked.
    """
    shutil.copytree(corpus, tmp_path / "dataset", ignore=shutil.ignore_patterns("heldout"))
    path = tmp_path / "dataset" / "manifest.json"
    content = json.loads(path.read_text())
    del content["content_sha256"]
    content["sources"][0]["name"] = "n" * 40_000
    path.write_text(json.dumps(content))
    done = corrupt(tmp_path / "dataset", "--count", 200)
    assert done.returncode == 1
    assert "manifest.json: byte" in done.stdout
