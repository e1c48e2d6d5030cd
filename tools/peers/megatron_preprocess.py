"""Do the work of Megatron-LM's tools/preprocess_data.py, as documented. That script is not in the package on PyPI.

A pool of processes takes lines of JSON in groups of 32, tokenizes document by document with the Hugging Face tokenizer
and appends the end token. The parent adds them to megatron-core's IndexedDatasetBuilder in order.

    python tools/peers/megatron_preprocess.py text.jsonl TOKENIZER_DIR OUT_PREFIX WORKERS
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

# lines given to a process at once, the script's own default
GROUP = 32
tokenizer: Any = None


def start(folder: str) -> None:
    global tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)


def encode(line: str) -> list[int]:
    ids: list[int] = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
    return [*ids, tokenizer.sep_token_id]


def main(text: str, folder: str, out: str, workers: int) -> int:
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=numpy.uint16)
    tokens = 0
    with (
        multiprocessing.get_context("spawn").Pool(workers, start, (folder,)) as pool,
        open(text, encoding="utf-8") as lines,
    ):
        for ids in pool.imap(encode, lines, GROUP):
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{out}.idx")
    return tokens


if __name__ == "__main__":
    print(json.dumps({"tokens": main(*sys.argv[1:4], int(sys.argv[4]))}))
