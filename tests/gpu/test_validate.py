"""tools/gpu_validate.py on a CPU: sections that need no GPU run, the others say why not, and none runs twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.train.runs import TINY

ROOT = Path(__file__).resolve().parents[2]
ITS_OWN = ("data.seq_len", "batch.", "precision.name", "optim.lr", "schedule.", "run.device", "metrics.", "checkpoint.")


def validate(folder: Path, corpus: Path, only: str, *more: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    words = [word for word in TINY if not word.startswith(ITS_OWN)]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "gpu_validate.py"), "--data", str(corpus), "--device", "cpu"),
            *("--only", only, "--sizes", "17m", "--speed-sizes", "17m", "--seq-lens", "64", "--steps", "30"),
            *("--tokens", "512", "--rounds", "2", "--results", str(folder / "found.json"), "--work", str(folder / "work")),
            *("--out", str(folder / "table.md"), *more, "--", *words),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = folder / "found.json"
    return done, json.loads(found.read_text()) if found.is_file() else {}


def test_gpu_validate_on_cpu_passes_and_repeats_nothing(corpus: Path, tmp_path: Path) -> None:
    done, found = validate(tmp_path, corpus, "attention,precisions,export")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    states = {(section, item): result["state"] for section, items in found.items() for item, result in items.items()}
    assert states["attention", "17m sdpa"] == "passed"
    assert found["attention"]["17m sdpa"]["roles"].keys() == {
        "encoder, global",
        "encoder, local",
        "decoder, global",
        "decoder, local",
    }
    assert states["attention", "17m te-fused"] == "does not run"
    assert "run.attention: te-fused needs a GPU" in found["attention"]["17m te-fused"]["says"]
    assert states["precisions", "17m fp32"] == "passed"
    assert len(found["precisions"]["17m fp32"]["losses"]) == 30
    assert "fp8-current needs a GPU" in found["precisions"]["17m fp8-current"]["says"]
    assert states["export", "mlm"] == states["export", "clm"] == "passed"
    assert "| attention | 17m sdpa | passed |" in (tmp_path / "table.md").read_text()
    before = (tmp_path / "found.json").read_text()
    again, _ = validate(tmp_path, corpus, "attention,precisions,export")
    assert again.returncode == 0
    assert (tmp_path / "found.json").read_text() == before


def test_gpu_validate_wrong_section_or_dataset_is_refused(corpus: Path, tmp_path: Path) -> None:
    done, _ = validate(tmp_path, corpus, "speed")
    assert done.returncode == 2
    assert "'speed' is no section; they are rates," in done.stderr
    done, _ = validate(tmp_path, tmp_path, "rates")
    assert done.returncode == 2
    assert "no dataset of `ettin prepare`" in done.stderr


def test_gpu_validate_failing_curve_exits_1(corpus: Path, tmp_path: Path) -> None:
    """One step is too few to learn anything: the curve fails, and so does the command."""
    done, found = validate(tmp_path, corpus, "precisions", "--steps", "1")
    assert done.returncode == 1
    assert found["precisions"]["17m fp32"]["state"] == "failed"
