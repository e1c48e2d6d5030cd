"""What dashboards call the keys of metrics.jsonl: a group and a name. The record itself keeps its flat keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPED = {
    "loss": "train/loss",
    "tokens": "data/tokens",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "tflops_per_second": "speed/tflops_per_second",
    "step_seconds": "speed/step_seconds",
    "slowest_rank": "speed/slowest_rank",
    "slowest_ratio": "speed/slowest_ratio",
    "labels": "data/labels",
    "peak_memory_bytes": "memory/peak_bytes",
}
# the first that a key begins with; what follows stays
PREFIXES = {
    "validation_loss": "validation/loss",
    "validation_accuracy": "validation/accuracy",
    "loss_": "train/loss_",
    "labels_": "data/labels_",
}


def grouped(key: str) -> str:
    """`loss` -> `train/loss`, `validation_loss/web` -> `validation/loss/web`; others go to `train/`."""
    if key in GROUPED:
        return GROUPED[key]
    for prefix, group in PREFIXES.items():
        if key.startswith(prefix):
            return group + key.removeprefix(prefix)
    return f"train/{key}"


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a dashboard can draw, under their groups; `data/rows` is where the step's rows end."""
    found = {
        grouped(key): value
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    rows = values.get("rows")
    return found | ({"data/rows": rows[1]} if rows else {})
