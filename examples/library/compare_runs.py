# %% [markdown]
# Train, inspect and compare a pair. `python examples/library/compare_runs.py [DATASET [FOLDER]]`

# %%
import sys
from pathlib import Path

from megatron_ettin.api import compare, configure, evaluate, load_checkpoint, load_dataset, order, train

data = Path(sys.argv[1] if len(sys.argv) > 1 else "data/corpus").absolute()
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/library")
vocabulary = load_dataset(data).manifest.tokenizer.vocab_size
overrides = [
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=2"),
    *(f"model.vocab_size={vocabulary}", "data.seq_len=128", f"data.mixture={data}"),
    *("batch.global_batch_rows=8", "batch.micro_batch_rows=4"),
    *("precision.name=fp32", "runtime.device=cpu", "run.steps=4", "metrics.tensorboard=false"),
]

# %% The two halves, as `ettin train` trains them: resumed if they were begun, left alone if they are done.
for objective in ("mlm", "clm"):
    train(configure("17m", objective, "pretrain", *overrides), folder / objective)

# %% Are they a pair?
comparison = compare(folder / "mlm", folder / "clm")
print(comparison.verdict)
for check in comparison.checks:
    print(f"  {'ok' if check.passed else 'differs'}  {check.name}: {check.detail}")

# %% Which documents did the second step read? The same for both.
first = next(order(folder / "mlm", 2, 2))
print(f"step {first['step']}: {first['document']}, tokens {first['start_token']} to {first['end_token']}")
assert first["document"] == next(order(folder / "clm", 2, 2))["document"]

# %% A checkpoint: its tensors are whole, whatever layout wrote them.
checkpoint = load_checkpoint(folder / "mlm")
print(f"step {checkpoint.step}, {checkpoint.tokens:,} tokens, {len(checkpoint.names())} tensors")
embedding = checkpoint.read("embedding.word_embeddings.weight")
print(f"embedding {tuple(embedding.shape)}, standard deviation {embedding.std():.4f}")

# %% Loss on held-out documents, in all and by source.
heldout = data / "heldout"
if heldout.is_dir():
    for objective in ("mlm", "clm"):
        print(f"{objective}: {evaluate(folder / objective, heldout, rows=8)}")
