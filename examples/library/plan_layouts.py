# %% [markdown]
# Find the best layout and its speed, before there are any GPUs. `python examples/library/plan_layouts.py`

# %%
from megatron_ettin.api import configure, plan

# %% Predictions, from published runs of other systems until yours are given (docs/planning.md).
for size, gpus in (("400m", 8), ("1b", 64)):
    config = configure(size, "mlm", "pretrain")
    best, *others = plan(config, gpus, "h100")
    layout = best.config.parallel
    print(f"{size} on {gpus}: tp {layout.tp} pp {layout.pp} dp {best.dp}, {len(others)} others")
    print(f"  {best.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, MFU {best.mfu:.0%}")
    print(f"  {best.memory.total_bytes / 2**30:.0f} GiB on the fullest GPU")
    days = config.run.tokens / (best.tokens_per_second_per_gpu * gpus) / 86_400
    print(f"  {days:.1f} days for the phase")
