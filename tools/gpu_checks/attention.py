"""Check every attention kernel that runs here: outputs and gradients against float64, and speed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpu_checks.session import DoesNotRunError, Session, median_seconds
from megatron_ettin.base.errors import UserError
from megatron_ettin.config.resolve import parse
from megatron_ettin.model.boundaries import ChunkBoundaries
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, release_store
from megatron_ettin.train.setup import build_single_process

KERNELS = ("te-fused", "flash", "varlen", "sdpa", "flex")
ROLES = {
    "encoder, global": (0, False),
    "encoder, local": (1, False),
    "decoder, global": (0, True),
    "decoder, local": (1, True),
}
# largest relative error, in the norm, of outputs and gradients with bf16 inputs
TOLERANCE = 2e-2


def section(session: Session) -> None:
    items = {
        f"{size} {kernel}": functools.partial(kernel_item, session, size, kernel)
        for size in session.sizes
        for kernel in KERNELS
    }
    session.run("attention", items)


def kernel_item(session: Session, size: str, kernel: str) -> dict[str, Any]:
    """Check one kernel through a model of two layers, in its four roles."""
    overrides = [
        *("precision.name=bf16", "model.num_layers=2", "data.clm_fraction=0.5", "parallel.distributed_optimizer=false"),
        *(
            f"runtime.attention={kernel}",
            f"runtime.device={session.device}",
            "runtime.compile=never",
            *session.overrides,
        ),
    ]
    train_state = None
    try:
        train_state = build_single_process(
            parse(size, "hybrid", "pretrain", overrides=overrides), initial_weights=False
        )
        layers = train_state.model_chunks[0].transformer.layers
        roles: dict[str, Any] = {}
        for role, (layer, causal) in ROLES.items():
            attention = layers[layer].self_attention.core_attention
            roles[role] = errors(attention, causal, train_state.config, session.torch_device)
            for length in session.lengths:
                seconds = time(attention, causal, train_state.config, session, length)
                roles[role][f"seconds_{length}"] = seconds
    except UserError as error:
        raise DoesNotRunError(str(error)) from None
    finally:
        if train_state is not None:
            train_state.close()
        destroy_model_parallel()
        destroy_process_group()
        release_store()
    worst = max(figures["error"] for figures in roles.values())
    speeds = [
        f"{role} " + "/".join(f"{figures[f'seconds_{length}'] * 1e3:.3g}" for length in session.lengths)
        for role, figures in roles.items()
    ]
    lengths = "/".join(map(str, session.lengths))
    return {
        "says": f"error {worst:.1e}; ms forward and backward at {lengths}: {'; '.join(speeds)}",
        "passed": worst <= TOLERANCE,
        "roles": roles,
    }


def inputs(config: Any, tokens: int, device: str) -> list[torch.Tensor]:
    """Return random q, k, v of a layer, after rotation."""
    heads = config.model.num_attention_heads
    width = config.model.hidden_size // heads
    return [
        torch.randn(tokens, heads, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]


def errors(attention: Any, causal: bool, config: Any, device: str) -> dict[str, Any]:
    """Return the largest relative error of output and gradients, over two rows of ragged chunks."""
    torch.manual_seed(1)
    window = attention.windows[causal]
    rows = [[300, 64, 1, 83], [448]]
    packed = PackedRows.of(ChunkBoundaries.of(rows, 448, causal_tokens=2 * 448 if causal else 0), device)
    tensors = inputs(config, 896, device)
    out = attention.attend(tensors, packed, causal, {}).reshape(896, -1)
    upstream = torch.randn_like(out)
    actual = [out, *torch.autograd.grad(out, tensors, upstream)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected_out = reference(wide, [n for row in rows for n in row], causal, window)
    expected = [expected_out, *torch.autograd.grad(expected_out, wide, upstream.double())]
    apart = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True)]
    return {"error": max(apart) if all(one == one for one in apart) else float("inf"), "errors": apart}


def reference(qkv: list[torch.Tensor], lengths: list[int], causal: bool, window: int | None) -> torch.Tensor:
    """Compute masked softmax chunk by chunk: keys of the chunk, none later if causal, none outside the window."""
    outs = []
    for q, k, v in zip(*(tensor.split(lengths) for tensor in qkv), strict=True):
        i, j = torch.arange(len(q), device=q.device)[:, None], torch.arange(len(q), device=q.device)[None]
        seen = j <= i if causal else j == j
        if window is not None:
            seen = seen & ((i - j < window) if causal else ((i - j).abs() <= window))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs).flatten(1)


def time(attention: Any, causal: bool, config: Any, session: Session, length: int) -> float:
    """Return the seconds of forward and backward of rows that are one chunk each."""
    rows = max(1, session.tokens_a_step // length)
    boundaries = ChunkBoundaries.of([[length]] * rows, length, causal_tokens=rows * length if causal else 0)
    packed = PackedRows.of(boundaries, session.torch_device)
    tensors = inputs(config, rows * length, session.torch_device)
    upstream = torch.randn(rows * length, config.model.hidden_size, device=session.torch_device, dtype=torch.bfloat16)

    def step() -> None:
        out = attention.attend(tensors, packed, causal, {}).reshape(rows * length, -1)
        torch.autograd.grad(out, tensors, upstream)

    return median_seconds(step, session.device, session.rounds)
