"""Round trip of the whole 1b shape, with all layers and a vocabulary that tensor parallelism pads: from a folder of
transformers into a checkpoint, through one rank and through TP 2 x PP 2, and back, bit for bit.

Its training state does not fit a machine of 24 GB, so the ranks load and save weights alone. Minutes a case and 17 GB of
disk: only with ETTIN_FULL_SHAPES=1b (tests/nightly.sh)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from tests.convert.folders import SHAPE_17M, make_folder

pytestmark = pytest.mark.skipif("1b" not in os.environ.get("ETTIN_FULL_SHAPES", ""), reason="nightly")
DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16)}
LAYOUTS = {"1 rank": (1, 1), "tp2 pp2": (2, 2)}


def shape() -> dict[str, int]:
    size = SIZES["1b"]
    return SHAPE_17M | {
        **{"hidden_size": size.hidden_size, "intermediate_size": size.ffn_hidden_size, "vocab_size": 50_369},
        **{"num_hidden_layers": size.num_layers, "num_attention_heads": size.num_attention_heads},
    }


def reshard(checkpoint: Path, out: Path, precision: str, tp: int, pp: int) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tp * pp), "-m"]
    arguments = [str(checkpoint), str(out), precision, str(tp), str(pp)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([*start, "tests.convert.reshard", *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]


def assert_same(theirs: Path, again: Path, what: str) -> None:
    """Compare tensor by tensor, because two of these models at once take half of the memory."""
    with safe_open(theirs / "model.safetensors", "pt") as a, safe_open(again / "model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            left, right = a.get_tensor(name), b.get_tensor(name)
            assert left.dtype == right.dtype, (
                name,
                what,
            )
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), (
                name,
                what,
            )


@pytest.mark.parametrize(
    ("objective", "precision"), [("mlm", "fp32"), ("clm", "bf16"), ("mlm", "bf16"), ("clm", "fp32")]
)
def test_convert_full_1b_through_one_and_four_ranks_keeps_bits(tmp_path: Path, objective: str, precision: str) -> None:
    name, dtype = DTYPES[precision]
    theirs = make_folder(tmp_path / "theirs", objective, shape(), dtype)
    from_hf(theirs, tmp_path / "imported")
    for layout, (tp, pp) in LAYOUTS.items():
        reshard(tmp_path / "imported", tmp_path / "sharded", precision, tp, pp)
        to_hf(tmp_path / "sharded", tmp_path / "again", ExportOptions(name, max_shard_bytes=10**10))
        assert_same(theirs, tmp_path / "again", layout)
        for used in ("sharded", "again"):
            shutil.rmtree(tmp_path / used)
    shutil.rmtree(tmp_path)
