"""Read our files with Megatron-Core and transformers. Tests call these in forks that have imported both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests import forkserver


def called(name: str, *arguments: object) -> Any:
    """Call a function of this module in a fork and return what it prints as JSON."""
    command = forkserver.command(f"{__name__}:{name}", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def read_by_core(prefix: str, mmap: str) -> None:
    """Print the chunks of a shard and the number of its documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix, mmap=mmap == "True")
    chunks = [dataset[i].tolist() for i in range(len(dataset))]
    print(json.dumps({"chunks": chunks, "documents": len(dataset.document_indices) - 1}))


def write_by_core(prefix: str, documents: str) -> None:
    """Write documents (a JSON file of lists of ids) as a pair of .bin and .idx by Megatron-Core."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in json.loads(Path(documents).read_text()):
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    print("{}")


def read_by_transformers(folder: str, texts: str) -> None:
    """Print as JSON how transformers reads a saved tokenizer: its size, special ids, inputs, and the ids of `texts`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = {
        "size": len(tokenizer),
        "special": sorted(tokenizer.all_special_ids),
        "inputs": tokenizer.model_input_names,
        "ids": [tokenizer(text)["input_ids"] for text in json.loads(texts)],
    }
    print(json.dumps(content))
