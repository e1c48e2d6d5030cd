"""tools/gpu_validate.py on a CPU: sections that need no GPU run, the others say why not, and none runs twice. Processes
are forks here; tests/emulated_te/test_validate.py starts the tool itself."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import forkserver
from tests.train.runs import TINY

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_validate.py"
ITS_OWN = (
    "data.seq_len",
    "batch.",
    "precision.name",
    "optim.lr",
    "schedule.",
    "runtime.device",
    "metrics.",
    "checkpoint.",
)


def be_tool(*arguments: str) -> None:
    """Run the tool as a script, in a fork of the server; what it starts are forks too."""
    start = subprocess.run

    def run(line: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        match line:
            case [sys.executable, "-m", "megatron_ettin", *rest]:
                line = forkserver.program("ettin", *rest)
            case [sys.executable, path, *rest] if path == str(TOOL):
                line = forkserver.command("tests.gpu.test_validate:be_tool", *rest)
        return start(line, **named)

    sys.path.insert(0, str(TOOL.parent))
    sys.argv = [str(TOOL), *arguments]
    with mock.patch.object(subprocess, "run", run):
        runpy.run_path(str(TOOL), run_name="__main__")


def validate(folder: Path, corpus: Path, only: str, *more: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run the tool and return (exit status, results by section and item)."""
    overrides = [word for word in TINY if not word.startswith(ITS_OWN)]
    done = subprocess.run(
        [
            *forkserver.command("tests.gpu.test_validate:be_tool"),
            *("--data", str(corpus), "--device", "cpu"),
            *("--only", only, "--sizes", "17m", "--speed-sizes", "17m", "--seq-lens", "64", "--steps", "30"),
            *("--tokens", "512", "--rounds", "2", "--results", str(folder / "found.json"), "--work", str(folder / "work")),
            *("--out", str(folder / "table.md"), *more, "--", *overrides),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    actual = folder / "found.json"
    return done, json.loads(actual.read_text()) if actual.is_file() else {}


def check_attention(actual: dict) -> None:
    """Check the results of the section `attention`."""
    assert actual["attention"]["17m sdpa"]["state"] == "passed"
    assert actual["attention"]["17m sdpa"]["roles"].keys() == {
        "encoder, global",
        "encoder, local",
        "decoder, global",
        "decoder, local",
    }
    assert actual["attention"]["17m te-fused"]["state"] == "does not run"
    assert "runtime.attention: te-fused needs a GPU" in actual["attention"]["17m te-fused"]["says"]


def test_gpu_validate_attention_section_on_cpu_passes(corpus: Path, tmp_path: Path) -> None:
    """Run the command that the tool starts for one section."""
    done, actual = validate(tmp_path, corpus, "attention", "--child", "attention")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_attention(actual)


@pytest.mark.full
def test_gpu_validate_on_cpu_passes_and_repeats_nothing(corpus: Path, tmp_path: Path) -> None:
    done, actual = validate(tmp_path, corpus, "attention,precisions,export")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_attention(actual)
    states = {(section, item): result["state"] for section, items in actual.items() for item, result in items.items()}
    assert states["precisions", "17m fp32"] == "passed"
    assert len(actual["precisions"]["17m fp32"]["losses"]) == 30
    assert "fp8-current needs a GPU" in actual["precisions"]["17m fp8-current"]["says"]
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


@pytest.mark.full
def test_gpu_validate_failing_curve_exits_1(corpus: Path, tmp_path: Path) -> None:
    """One step is too few to learn anything: the curve fails, and so does the command."""
    done, actual = validate(tmp_path, corpus, "precisions", "--steps", "1")
    assert done.returncode == 1
    assert actual["precisions"]["17m fp32"]["state"] == "failed"
