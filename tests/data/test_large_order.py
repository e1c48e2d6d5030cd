"""A mixture of 10**10 rows, made of sparse files of the real formats with content only in the rows that are read.
Neither opening it nor listing a late step takes memory that grows with the number of rows."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.config.resolve import from_yaml, parse, to_yaml
from megatron_ettin.data.blended_dataset import open_run_dataset
from megatron_ettin.data.sampler import BatchSizes
from tools.fake_corpora import fill_positions, make_sparse_dataset

DATASETS, ROWS, ROW_TOKENS = 10, 10**9, 1_024
STEPS = range(500_000, 500_010)
MEASURED = """
import sys
from megatron_ettin.cli.main import main
status = main(sys.argv[1:])
memory = dict(line.split(":", 1) for line in open("/proc/self/status"))
print({name: int(memory[name].split()[0]) for name in ("VmHWM", "RssAnon")}, sorted(sys.modules), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    folders = [folder / f"source{i}" for i in range(DATASETS)]
    try:
        for source in folders:
            make_sparse_dataset(source, ROWS, ROW_TOKENS)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of terabytes: {error}")
    mixture = [{"path": str(source), "weight": 1.0} for source in folders]
    overrides = ["data.seq_len=1024", "batch.global_batch_rows=32", "batch.warmup_min_rows=8", "batch.warmup_tokens=1B"]
    config = parse("17m", "mlm", "pretrain", overrides=overrides)
    config = config.with_keys({"data.mixture": mixture})
    sizes = BatchSizes.of(config.batch, ROW_TOKENS)
    fill_positions(folders, ROW_TOKENS, range(sizes.rows_before(STEPS[0] - 1), sizes.rows_before(STEPS[-1])))
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return path


def measured(*arguments: object) -> tuple[str, dict[str, int], str]:
    """Run a command; return its output, its peak memory in KiB and the modules that it imported."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    memory, modules = done.stderr.split("} ")
    return done.stdout, eval(memory + "}"), modules


def test_order_fingerprint_of_huge_mixture_needs_little_memory_and_no_torch(config: Path) -> None:
    """The process needs little memory, and imports neither torch nor the libraries of `prepare`."""
    printed, memory, modules = measured("order", config, "--fingerprint")
    assert len(printed.strip()) == 64
    assert memory["VmHWM"] < 200 * 1024
    for heavy in ("'torch'", "'datasets'", "'datatrove'", "'pyarrow'", "'pandas'"):
        assert heavy not in modules


def test_order_late_step_of_huge_mixture_is_exact_in_little_memory(config: Path) -> None:
    """The step has rows of every source, each once, and the process's own memory stays small (pages of mapped files,
    which the kernel can reclaim, are not counted)."""
    printed, memory, _ = measured("order", config, "--steps", f"{STEPS.start}:{STEPS.stop}", "--json")
    records = [json.loads(line) for line in printed.splitlines()]
    assert [(r["step"], r["slot"]) for r in records] == [(step, slot) for step in STEPS for slot in range(32)]
    assert len(records) == 320
    assert len({(r["dataset"], r["row"]) for r in records}) == 320
    assert len({r["dataset"] for r in records}) == DATASETS
    assert all(r["chunk"] == r["row"] < ROWS and r["end_token"] == ROW_TOKENS - 2 for r in records)
    assert memory["RssAnon"] < 200 * 1024


def test_blended_dataset_of_huge_mixture_pickles_small(config: Path) -> None:
    corpus = open_run_dataset(from_yaml(config))
    assert corpus.num_rows == DATASETS * ROWS
    packed = pickle.dumps(corpus)
    assert len(packed) < 100_000
    positions = np.arange(10**12, 10**12 + 50)  # epochs later
    for mine, theirs in zip(corpus.locate(positions), pickle.loads(packed).locate(positions), strict=True):
        assert np.array_equal(mine, theirs)
