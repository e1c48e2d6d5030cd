"""Run tools/gpu_validate.py on the emulated Transformer Engine, in its own processes. All is as on a device but speed.
tests/nightly.sh runs the sections that take longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated_te.runs import WIDTHS
from tests.train.runs import TINY

ROOT = Path(__file__).resolve().parents[2]
STEPS = int(os.environ.get("ETTIN_EMULATED_STEPS", "0"))
pytestmark = pytest.mark.full


def validate(te_folder: Path, folder: Path, corpus: Path, only: str, steps: int) -> dict[tuple[str, str], dict]:
    """Run the tool and return its result for each (section, item)."""
    shape = [word for word in (*TINY, *WIDTHS) if word.startswith("model.")]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "gpu_validate.py"), "--data", str(corpus), "--device", "cpu"),
            *("--only", only, "--sizes", "17m", "--speed-sizes", "17m", "--seq-lens", "64", "--steps", str(steps)),
            *("--tokens", "512", "--rounds", "1", "--minutes", "60", "--results", str(folder / "found.json")),
            *("--work", str(folder / "work"), "--out", str(folder / "table.md"), "--", *shape),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'everywhere'}",
            "EMULATED_TE": str(te_folder),
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print((folder / "table.md").read_text())
    actual = json.loads((folder / "found.json").read_text())
    return {(section, item): result for section, items in actual.items() for item, result in items.items()}


def test_gpu_validate_attention_with_emulated_te_passes(te_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Compare packed rows with windows, in four roles, with float64; then run other kernels in the same process."""
    actual = validate(te_folder, tmp_path, corpus, "attention", 1)
    states = {kernel: actual["attention", f"17m {kernel}"]["state"] for kernel in ("te-fused", "sdpa", "flex")}
    assert states == {"te-fused": "passed", "sdpa": "passed", "flex": "does not run"}
    assert len(actual["attention", "17m te-fused"]["roles"]) == 4


@pytest.mark.skipif(not STEPS, reason="takes a quarter of an hour: ETTIN_EMULATED_STEPS=100, or tests/nightly.sh")
def test_gpu_validate_curves_and_checkpoints_with_emulated_te_pass(
    te_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    actual = validate(te_folder, tmp_path, corpus, "layers,precisions,checkpoints,export", STEPS)
    assert {result["state"] for result in actual.values()} == {"passed"}
    assert {name for section, name in actual if section == "precisions"} >= {"17m fp8-delayed, fp8_weights"}
