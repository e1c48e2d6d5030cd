"""Account for a step's time: the least time of each part by this device's rates, against the measured step.

The rest is launches, waiting, and work that these parts do not count.
"""

from __future__ import annotations

import functools
from typing import Any

from gpu_checks.runs import FP8, OBJECTIVES
from gpu_checks.session import DoesNotRunError, Session
from megatron_ettin.config.flops import global_layers
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import layer_parameter_count, parameter_count

# bytes a weight: adamw.py's update moves 36, core clears and copies the gradient (4 + 8) and writes bf16 (2)
OPTIMIZER_BYTES = 50
# passes of hidden states through memory that are not measured: two norms and residuals, forward and backward
NORM_PASSES = 2 * (3 + 6)


def section(session: Session) -> None:
    items = {
        f"{size} {objective} at {length}, {precision}": functools.partial(
            item, session, size, objective, length, precision
        )
        for size in session.sizes
        for precision in ("bf16", *FP8)
        for length in session.lengths
        for objective in OBJECTIVES
    }
    session.run("roofline", items)


def item(session: Session, size: str, objective: str, length: int, precision: str) -> dict[str, Any]:
    results = session.results.items
    measured = look_up(results, f"throughput-{size}", f"{objective} at {length}, {precision}")
    rates = results.get("rates", {})
    linears = rates.get(f"{size} linears forward and backward, {precision}", {}).get("flops")
    products = look_up(results, "rates", f"{size} products, bf16")["flops"]
    attention = fastest(results.get("attention", {}), size, objective, length)
    config = parse(size, objective, "pretrain", overrides=[f"data.seq_len={length}", *session.overrides])
    tokens = session.tokens_a_step * measured["micro_batches"]
    parts = floor(config, tokens, linears or products, products, look_up(results, "rates", "copy")["bytes_per_second"])
    globals_ = global_layers(config.model.num_layers, config.model.global_attention_every)
    model_role = "decoder" if config.causal else "encoder"
    of_global, of_local = (
        attention["roles"][f"{model_role}, {reach}"][f"seconds_{length}"] for reach in ("global", "local")
    )
    parts["attention"] = measured["micro_batches"] * (
        globals_ * of_global + (config.model.num_layers - globals_) * of_local
    )
    element_wise = look_up(results, "rates", f"{size} element-wise")
    once = sum(
        element_wise[f"{name}_fused_seconds"] * times for name, times in (("rotation", 2), ("gate", 1), ("dropout", 1))
    )
    parts["rotation, gate, dropout"] = 3 * once * config.model.num_layers * measured["micro_batches"]
    seconds, least = measured["step_seconds"], sum(parts.values())
    text = ", ".join(f"{name} {value / seconds:.0%}" for name, value in parts.items())
    return {"says": f"floor {least:.4g} s of {seconds:.4g} s ({least / seconds:.0%}): {text}", "parts": parts}


def floor(config: Any, tokens: int, linears: float, products: float, copy: float) -> dict[str, float]:
    """Return the seconds of the parts that follow from shapes and rates alone."""
    model = config.model
    labelled = 1.0 if config.causal else config.data.mlm_probability
    head = model.hidden_size * (model.hidden_size + model.vocab_size)
    hidden_bytes = 2 * tokens * model.hidden_size
    return {
        "linears": 6 * model.num_layers * layer_parameter_count(model) * tokens / linears,
        "head": 6 * head * tokens * labelled / products,
        "norms and residuals": NORM_PASSES * model.num_layers * hidden_bytes / copy,
        "optimizer": OPTIMIZER_BYTES * parameter_count(model, model.vocab_size) / copy,
    }


def look_up(results: dict[str, Any], section: str, name: str) -> dict[str, Any]:
    """Return a result of another section. Raises DoesNotRunError if there is none."""
    result = results.get(section, {}).get(name)
    if result is None or result["state"] != "passed":
        raise DoesNotRunError(f"wants {section}: {name}")
    return result


def fastest(results: dict[str, Any], size: str, objective: str, length: int) -> dict[str, Any]:
    """Return the kernel that passed and whose global layers take least time."""
    role = "decoder, global" if objective == "clm" else "encoder, global"
    ran = [one for name, one in results.items() if name.startswith(f"{size} ") and one["state"] == "passed"]
    if not ran:
        raise DoesNotRunError(f"wants attention: {size}")
    return min(ran, key=lambda one: one["roles"][role][f"seconds_{length}"])
