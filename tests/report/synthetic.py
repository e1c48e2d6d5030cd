"""Write run directories as training does, with a made-up loss, for tests of the code that reads them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

from megatron_ettin.config.resolve import parse, to_yaml
from megatron_ettin.metrics.record import JsonlSink

FINGERPRINT = "5f" * 32


def write_run(
    path: Path,
    objective: str = "mlm",
    phase: str = "pretrain",
    steps: int = 40,
    overrides: tuple[str, ...] = (),
    fingerprint: str = FINGERPRINT,
    **changed: Mapping[int, object],
) -> Path:
    """Write a run of `steps` steps; `changed` maps a key of metrics.jsonl to {step: another value}."""
    base = ("batch.global_batch_rows=64", "run.tokens=1_000_000_000", "schedule.warmup_tokens=100_000")
    config = parse("17m", objective, phase, overrides=(*base, "schedule.decay_tokens=100_000", *overrides))
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    order = {"fingerprint": fingerprint, "tokenizer": "aa", "rows_per_step": 64, "mean_tokens_per_row": 1000.0}
    (path / "order.json").write_text(json.dumps(order), encoding="utf-8")
    (path / "history.jsonl").write_text(json.dumps({"changes": []}) + "\n", encoding="utf-8")
    dice = random.Random(f"{objective} {phase}")
    sink = JsonlSink(path / "metrics.jsonl")
    tokens, floor = 0, 4.2 if objective == "clm" else 3.0
    height = (10.8 if phase == "pretrain" else 5.0) - floor
    for step in range(1, steps + 1):
        tokens += 64_000 + step % 7
        loss = floor + height * math.exp(-step / 90) + dice.gauss(0, 0.05)
        line = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": config.optim.lr * min(1.0, tokens / 1_000_000),
            "grad_norm": 0.5 + 3 * math.exp(-step / 40) + (12 if step % 97 == 96 else 0) + dice.random() * 0.2,
            "tokens_per_second": 250_000 * dice.uniform(0.97, 1.01),
            "mfu": None,
            "updated": True,
            "rows": [(step - 1) * 64, step * 64],
        }
        if step % 50 == 0:
            line["validation_loss"] = loss + 0.05
        sink.log({**line, **{key: values[step] for key, values in changed.items() if step in values}})
    sink.close()
    return path
