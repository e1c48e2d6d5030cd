"""Write the rows of a Megatron .bin as MDS shards with mosaicml-streaming, in an environment that has it.

python tools/peers/write_mds.py shard_00000.bin OUT ROWS
"""

from __future__ import annotations

import sys

import numpy as np
from streaming import MDSWriter

ROW_TOKENS = 1_024


def main(tokens: str, out: str, rows: int) -> None:
    source = np.memmap(tokens, "<u2", "r").reshape(-1, ROW_TOKENS)
    with MDSWriter(out=out, columns={"input_ids": "ndarray:uint16"}, hashes=[], size_limit=1 << 26) as writer:
        for i in range(rows):
            writer.write({"input_ids": source[i]})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
