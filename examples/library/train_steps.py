# %% [markdown]
# Write your own training loop. `python examples/library/train_steps.py [DATASET]`
#
# Under `torchrun --no-python python ...` each rank runs the same script; add overrides such as `parallel.tp=2`.

# %%
import sys

from megatron_ettin.api import build_model, configure, load_dataset, run_step

data = sys.argv[1] if len(sys.argv) > 1 else "data/corpus"

# %% A toy shape, so that it runs on a laptop. Everything else is the recipe's.
vocabulary = load_dataset(data).manifest.tokenizer.vocab_size
config = configure(
    *("17m", "clm", "pretrain"),
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=2"),
    *(f"model.vocab_size={vocabulary}", "data.seq_len=128", f"data.mixture={data}"),
    *("batch.global_batch_rows=8", "batch.micro_batch_rows=4"),
    *("precision.name=fp32", "runtime.device=cpu", "optim.lr=3e-3", "schedule.warmup_tokens=0"),
)

# %% One model at a time; its process groups end with the `with`.
with build_model(config) as model:
    count = sum(weight.numel() for weight in model.module.parameters())
    print(f"{count:,} weights")
    losses = []
    for _ in range(8):
        info = run_step(model)
        losses.append(info.loss)
        print(f"step {info.step}: loss {info.loss:.3f}, gradient norm {info.grad_norm:.3f}, {info.tokens:,} tokens")
    (logits,) = model.logits([[1, 10, 11, 12]])
    print(f"logits {tuple(logits.shape)}, likeliest next token {int(logits[-1].argmax())}")
assert losses[-1] < losses[0]
