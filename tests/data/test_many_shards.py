"""A dataset with more shards than the process may have open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.prepare.conftest import large, large_dataset_folder  # noqa: F401 (fixtures)

FILES = 36
READ_ALL = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
import numpy as np
from megatron_ettin.data.dataset import open_dataset
dataset = open_dataset(sys.argv[1])
order = np.random.default_rng(0).permutation(dataset.num_chunks)
tokens = sum(len(dataset.chunk(int(i))) for i in order)
spans = dataset.documents_of(order)
assert tokens == dataset.num_tokens
assert len(spans.source) == dataset.num_chunks
print(len(dataset.manifest.shards), len(os.listdir("/proc/self/fd")))
"""


def test_dataset_with_more_shards_than_file_limit_is_readable(large_dataset_folder: Path) -> None:  # noqa: F811
    done = subprocess.run([sys.executable, "-c", READ_ALL, large_dataset_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards, files = map(int, done.stdout.split())
    assert 4 * shards > FILES > files  # the limit is below the number of shards
