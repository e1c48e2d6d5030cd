"""Compare one training step of this package with `transformers` + torch AdamW on the CPU, same shape, same rows.

  python tools/bench_step.py [--threads 2] [--rows 4] [--steps 5] [--rounds 2] [--out docs/benchmarks/step.md]

17m shape, fp32, rows of one chunk of 1,024 tokens (so that `transformers`, which ignores boundaries within a row, does
the same attention), dropout 0 (`transformers` cannot express ours). `fused`: runtime.compile=always. Each side runs in
a process of its own, and sides take turns for `rounds` rounds. tokens/s is the median step, peak memory the process's
largest resident set.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SEQ_LEN, VOCABULARY, SPECIALS, MASK = 1024, 50_368, (50_280, 50_281, 50_282, 50_283, 50_284), 50_284
SIDES = {
    "encoder, ours": ("ours", "mlm"),
    "encoder, ours fused": ("fused", "mlm"),
    "encoder, transformers dense head": ("theirs", "dense"),
    "encoder, transformers sparse_prediction": ("theirs", "sparse"),
    "decoder, ours": ("ours", "clm"),
    "decoder, ours fused": ("fused", "clm"),
    "decoder, transformers": ("theirs", "clm"),
}
RATIOS = [
    ("encoder, ours", "encoder, transformers dense head"),
    ("encoder, ours", "encoder, transformers sparse_prediction"),
    ("decoder, ours", "decoder, transformers"),
    ("encoder, ours fused", "encoder, transformers sparse_prediction"),
    ("decoder, ours fused", "decoder, transformers"),
]


class RandomRows:
    """Stand-in for a corpus: rows of one full chunk, a function of the order index."""

    vocab_size, special_ids, pad_id, mask_id, mean_tokens_per_row = VOCABULARY, SPECIALS, 50_283, MASK, float(SEQ_LEN)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Accept every model, because rows are drawn from its vocabulary."""

    def row(self, order_index: int) -> SimpleNamespace:
        import numpy as np

        tokens = np.random.default_rng(order_index).integers(5, 50_000, SEQ_LEN).astype(np.uint16)
        tokens[0], tokens[-1] = 50_281, 50_282
        return SimpleNamespace(tokens=tokens, lengths=np.array([SEQ_LEN]), order_index=order_index)

    def rows(self, order_indices: Iterable[int]) -> list[SimpleNamespace]:
        return [self.row(index) for index in order_indices]

    def order_indices(self, row_indices: Any) -> Any:
        """Return the rows as they are: none are skipped."""
        import numpy as np

        return np.array(row_indices, np.int64)

    def order_span(self, first: int, end: int) -> tuple[int, int]:
        return first, end


def ours(objective: str, rows: int, fuse: str) -> Callable[[int], None]:
    """Return a function that runs step n of this package."""
    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.parallel.env import read_distributed_env
    from megatron_ettin.parallel.process_groups import init_process_group
    from megatron_ettin.platform import detect
    from megatron_ettin.train.progress import Progress
    from megatron_ettin.train.setup import setup_training
    from megatron_ettin.train.step import train_step

    overrides = f"precision.name=fp32 runtime.device=cpu batch.global_batch_rows={rows} batch.micro_batch_rows={rows}"
    overrides += f" runtime.compile={fuse} batch.warmup_tokens=0 model.attention_output_dropout=0"
    config = parse("17m", objective, "pretrain", overrides=overrides.split())
    train_state = detect("cpu")
    init_process_group(read_distributed_env(), train_state)
    rank = setup_training(config, train_state, 1)
    batches = Batches.of(config, RandomRows(), rank.layout, train_state.device)  # type: ignore[arg-type]

    def run(step: int) -> None:
        rank.progress = Progress(step)
        train_step(rank, batches, 3e-4)

    return run


def theirs(mode: str, rows: int) -> Callable[[int], None]:
    """Return a function that runs step n of `transformers` with torch's AdamW."""
    import numpy as np
    import torch
    from transformers import (
        ModernBertConfig,
        ModernBertDecoderConfig,
        ModernBertDecoderForCausalLM,
        ModernBertForMaskedLM,
    )

    from megatron_ettin.batching.objectives import make_collator

    shape = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4}
    if mode == "clm":
        model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**shape, use_cache=False))
    else:
        model = ModernBertForMaskedLM(ModernBertConfig(**shape, sparse_prediction=mode == "sparse"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    source = RandomRows()
    label = make_collator("clm" if mode == "clm" else "mlm", source, 0.3, 21, "pretrain")

    def step(n: int) -> None:
        chosen = [source.row(n * rows + i) for i in range(rows)]
        pairs = [label(row.tokens, row.lengths, row.order_index) for row in chosen]
        input_ids = torch.from_numpy(np.stack([pair[0] for pair in pairs]))
        labels = torch.from_numpy(np.stack([pair[1] for pair in pairs]))
        optimizer.zero_grad()
        # its loss shifts the labels itself
        if mode == "clm":
            labels = input_ids
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels).loss.backward()
        # our step computes the gradient norm too
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()

    return step


def measure(side: str, threads: int, rows: int, steps: int) -> None:
    """Print the seconds of each step after one warm-up step, and the peak memory; run in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    who, mode = SIDES[side]
    step = theirs(mode, rows) if who == "theirs" else ours(mode, rows, "always" if who == "fused" else "never")
    step(0)
    seconds = []
    for n in range(1, steps + 1):
        began = time.perf_counter()
        step(n)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def table(results: dict[str, dict], args: argparse.Namespace) -> str:
    import torch
    import transformers

    tokens = args.rows * SEQ_LEN
    speed = {side: tokens / statistics.median(result["seconds"]) for side, result in results.items()}
    spread = {side: [tokens / max(r["seconds"]), tokens / min(r["seconds"])] for side, r in results.items()}
    lines = [
        "# Training step on the CPU against transformers",
        "",
        f"`python tools/bench_step.py --threads {args.threads} --rows {args.rows} --steps {args.steps}"
        f" --rounds {args.rounds}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; {args.threads} threads of {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}; 17m shape, fp32, {args.rows} rows"
        f" of {SEQ_LEN} tokens.",
        "",
        "| side | tokens/s (median) | slowest - fastest | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for side, result in results.items():
        low, high = spread[side]
        lines.append(
            f"| {side} | {speed[side]:,.0f} | {low:,.0f} - {high:,.0f} | {result['peak_bytes'] / 2**20:,.0f} |"
        )
    lines += ["", "| ours | theirs | tokens/s, ours / theirs | peak memory, ours / theirs |", "|---|---|---|---|"]
    for mine, other in RATIOS:
        memory = results[mine]["peak_bytes"] / results[other]["peak_bytes"]
        lines.append(f"| {mine} | {other} | {speed[mine] / speed[other]:.2f} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.threads, args.rows, args.steps)
        return
    results: dict[str, dict] = {side: {"seconds": [], "peak_bytes": 0} for side in SIDES}
    for _ in range(args.rounds):
        for side, result in results.items():
            arguments = [
                "--side",
                side,
                "--threads",
                str(args.threads),
                "--rows",
                str(args.rows),
                "--steps",
                str(args.steps),
            ]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.strip().splitlines()[-1])
            result["seconds"] += measured["seconds"]
            result["peak_bytes"] = max(result["peak_bytes"], measured["peak_bytes"])
            print(f"{side}: {args.rows * SEQ_LEN / statistics.median(measured['seconds']):,.0f} tokens/s", flush=True)
    text = table(results, args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
