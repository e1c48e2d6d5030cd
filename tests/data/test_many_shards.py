"""A dataset of more shards than the process may hold files open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.data.small_tasks import arguments_for, start

FILES = 36
READ_ALL = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
import numpy as np
from megatron_ettin.data.dataset import open_dataset
dataset = open_dataset(sys.argv[1])
order = np.random.default_rng(0).permutation(dataset.num_chunks)
tokens = sum(len(dataset.chunk(int(i))) for i in order)
places = dataset.documents_of(order)
assert tokens == dataset.num_tokens
assert len(places.source) == dataset.num_chunks
print(len(dataset.manifest.shards), len(os.listdir("/proc/self/fd")))
"""


def test_dataset_with_more_shards_than_file_limit_is_readable(large: Path, tmp_path: Path) -> None:
    made = start(arguments_for(large, tmp_path / "out", 1), tmp_path / "small_tasks.py")
    _, errors = made.communicate(timeout=120)
    assert made.returncode == 0, errors
    done = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards, files = map(int, done.stdout.split())
    assert 4 * shards > FILES > files  # all of them at once would not have fitted
