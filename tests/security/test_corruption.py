"""Every changed byte of a dataset or a checkpoint is detected and named; checked by running tools/chaos.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import train

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("ETTIN_CORRUPTIONS", "80"))


def compile_an_order(pool: Pool, folder: Path) -> None:
    """Train on the rows of two steps of the run in `folder`, as an order from a file, so that order files exist."""
    given = folder / "steps.parquet"
    assert main(["order", str(folder / "run"), "--steps", "1:3", "--out", str(given)]) == 0
    train(pool, 2, folder / "again", folder / "dataset", "mlm", ["run.steps=2", f"data.order={given}"])


@pytest.mark.ranks
def test_chaos_corrupt_every_changed_byte_is_detected(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "dataset")
    train(pool, 2, tmp_path / "run", corpus, "mlm", ["run.steps=2", "checkpoint.every_steps=1"])
    compile_an_order(pool, tmp_path)
    line = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "chaos.py"), "corrupt"]
    line += [str(tmp_path / "dataset"), str(tmp_path / "run"), "--count", str(COUNT), "--seed", "3", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kinds = json.loads(done.stdout)["kinds"]
    assert {"order.json", "chunks.int64", "sources.int16"} <= kinds.keys()
    assert {".distcp", ".metadata", ".pt", ".bin", ".idx", "manifest.json", "integrity.json", "latest"} <= kinds.keys()
    assert sum(sum(counts.values()) for counts in kinds.values()) == COUNT
    assert sum(counts["harmless"] for counts in kinds.values()) < COUNT // 10


def test_chaos_corrupt_without_manifest_digest_reports_missed_byte(tmp_path: Path, corpus: Path) -> None:
    """The tool reports an undetected byte in a dataset whose manifest has no digest."""
    shutil.copytree(corpus, tmp_path / "dataset", ignore=shutil.ignore_patterns("heldout"))
    path = tmp_path / "dataset" / "manifest.json"
    content = json.loads(path.read_text())
    del content["content_sha256"]
    path.write_text(json.dumps(content))
    line = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "chaos.py"), "corrupt", str(tmp_path / "dataset")]
    done = subprocess.run([*line, "--count", "400"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "manifest.json: byte" in done.stdout
