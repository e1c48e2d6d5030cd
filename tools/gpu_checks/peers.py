"""The same rows through `transformers`' ModernBERT, compiled, with torch's fused AdamW, as a user would write it.

It takes turns with `ettin train` in one section, so that both run under the same conditions.
"""

from __future__ import annotations

import functools
import statistics
import time
from importlib.util import find_spec
from typing import Any

import torch

from gpu_checks.runs import OBJECTIVES, train
from gpu_checks.session import Session
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE

MICRO_BATCHES, STEPS, WARM_UP = 4, 8, 3


def section(session: Session) -> None:
    items = {
        f"{size} {objective} at {session.lengths[0]}": functools.partial(item, session, size, objective)
        for size in session.sizes
        for objective in OBJECTIVES
    }
    session.run("peers", items)


def item(session: Session, size: str, objective: str) -> dict[str, Any]:
    import shutil

    length = session.lengths[0]
    micro = max(1, session.tokens_a_step // length)
    name = f"peers-{size}-{objective}"
    shutil.rmtree(session.work / name, ignore_errors=True)
    overrides = ["precision.name=bf16", f"run.steps={STEPS}"]
    lines = train(session, name, size, overrides, objective, length, MICRO_BATCHES * micro)[WARM_UP:]
    shutil.rmtree(session.work / name, ignore_errors=True)
    ours = statistics.median(line["tokens_per_second"] for line in lines)
    batch = [f"batch.global_batch_rows={MICRO_BATCHES * micro}", f"batch.micro_batch_rows={micro}"]
    data = [f"data.mixture={session.data}", f"data.seq_len={length}", "batch.warmup_tokens=0"]
    config = parse(size, objective, "pretrain", overrides=[*batch, *data, *session.overrides])
    theirs, attention = transformers_speed(config, session.torch_device)
    return {
        "says": f"{ours:,.0f} tokens/s, transformers ({attention}, compiled) {theirs:,.0f}: {ours / theirs:.2f} times",
        "tokens_per_second": ours,
        "transformers_tokens_per_second": theirs,
        "ratio": ours / theirs,
    }


def transformers_speed(config: Config, device: str) -> tuple[float, str]:
    """Return (non-padding tokens per second, attention) of `transformers` on the run's rows.

    It attends to whole rows, because it ignores chunk boundaries.
    """
    batches = host_batches(config)
    model, attention = build(config, device, batches.corpus.pad_id)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=device == "cuda")
    speeds = []
    for step in range(STEPS):
        began, tokens = time.perf_counter(), 0
        optimizer.zero_grad()
        for index in range(MICRO_BATCHES):
            host = batches.make(step, index)
            tokens += host.tokens
            ids = torch.from_numpy(host.input_ids).to(device)
            # its class shifts the labels itself
            labels = ids
            if not config.causal:
                labels = torch.full_like(ids, IGNORE)
                labels.view(-1)[host.label_positions] = torch.from_numpy(host.labels).to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            (loss / MICRO_BATCHES).backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds[WARM_UP:]), attention


def host_batches(config: Config) -> Any:
    """Return the run's micro-batches in host memory, as one rank has them."""
    from megatron_ettin.batching.host import HostBatches
    from megatron_ettin.parallel.env import Topology
    from megatron_ettin.train.job import open_training_data

    return HostBatches.of(config, open_training_data(config), Topology.of(config, 1))


def build(config: Config, device: str, pad_id: int) -> tuple[Any, str]:
    """Return the model of the run's shape in `transformers`, fp32 weights, and its attention."""
    import transformers

    shape = config.model
    # any existing id
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), pad_id)
    keys = {
        **special,
        "pad_token_id": pad_id,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "max_position_embeddings": shape.max_position_embeddings,
    }
    attention = "flash_attention_2" if device == "cuda" and find_spec("flash_attn") else "sdpa"
    if config.causal:
        settings = transformers.ModernBertDecoderConfig(**keys, use_cache=False)
        model_class = transformers.ModernBertDecoderForCausalLM
    else:
        settings = transformers.ModernBertConfig(**keys, sparse_prediction=True)
        model_class = transformers.ModernBertForMaskedLM
    settings._attn_implementation = attention
    return model_class(settings).to(device).train(), attention
