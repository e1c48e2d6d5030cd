"""Recomputation keeps fewer bytes for backward and gives the same gradients."""

from __future__ import annotations

import torch

from megatron_ettin.config.resolve import parse
from tests.model.rows import labelled, pack_rows

SHAPE = ["model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4", "model.vocab_size=320"]
SELECTIVE = "parallel.recompute=selective"


def kept_bytes_and_gradients(build_model, *overrides: str) -> tuple[int, dict[str, torch.Tensor]]:
    model = build_model(parse("17m", "mlm", "pretrain", overrides=[*SHAPE, "runtime.device=cpu", *overrides])).train()
    ids = torch.arange(128).view(2, 64)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, *_ = model(ids, pack_rows([[40, 24], [64]], 64), *labelled(ids))
    bytes_kept = sum(kept.values())
    total.backward()
    return bytes_kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recompute_keeps_less_with_identical_gradients(build_model) -> None:
    every, expected = kept_bytes_and_gradients(build_model)
    actual = {
        overrides: kept_bytes_and_gradients(build_model, *overrides.split())
        for overrides in (
            SELECTIVE,
            f"{SELECTIVE} parallel.recompute_modules=core_attn,mlp",
            "parallel.recompute=full parallel.recompute_layers=5",
            "parallel.recompute=full",
        )
    }
    sizes = [every, *(size for size, _ in actual.values())]
    assert sizes == sorted(sizes, reverse=True), sizes
    assert sizes[-1] < sizes[0] / 4, sizes
    for overrides, (_, gradients) in actual.items():
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected), overrides
