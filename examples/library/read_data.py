# %% [markdown]
# Look into a dataset, and at the rows that a run reads. `python examples/library/read_data.py [DATASET]`

# %%
import itertools
import sys

from megatron_ettin.api import configure, iterate_rows, load_dataset

data = sys.argv[1] if len(sys.argv) > 1 else "data/corpus"

# %% A dataset is chunks of documents, memory-mapped: opening it reads nothing.
dataset = load_dataset(data)
print(f"{dataset.num_documents:,} documents, {dataset.num_chunks:,} chunks, {dataset.num_tokens:,} tokens")
print(f"fingerprint {dataset.fingerprint[:16]}")

# %% Any chunk, and where it comes from.
source, document, start, _ = dataset.document_of(0)
print(f"chunk 0: {len(dataset.chunk(0))} tokens from {source} {document}, from token {start} on")

# %% Rows, as a run of these names has them: whole chunks, packed. No model is needed.
config = configure("17m", "mlm", "pretrain", f"data.mixture={data}", "data.seq_len=128")
for row in iterate_rows(config, first=100, count=3):
    print(f"row {row.order_index}: {len(row.tokens)} tokens in {len(row.lengths)} chunks, {row.chunks.tolist()}")

# %% The order has no end: a run that reads a dataset twice goes on.
tokens = sum(len(row.tokens) for row in itertools.islice(iterate_rows(config), 50))
print(f"the first 50 rows are {tokens / 50 / config.data.seq_len:.1%} full")
