"""Muon against torch.optim.Muon on the separate matrices, and against StableAdamW on embeddings and norms."""

from __future__ import annotations

import pytest
import torch

from megatron_ettin.optim.adamw import ParamInfo, ShardSlice, StableAdamW
from megatron_ettin.optim.muon import Matrix, Muon, is_hidden_matrix

HIDDEN, HEADS, CHANNELS, FFN, STEPS = 24, 3, 8, 40, 30
LR, MAX_LR, DECAY, MOMENTUM = 2e-2, 4e-2, 1e-3, 0.9
SHAPES = {
    "decoder.layers.0.self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
    "decoder.layers.0.self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
    "decoder.layers.0.mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "decoder.layers.0.mlp.linear_fc2.weight": (HIDDEN, FFN),
    "embedding.word_embeddings.weight": (50, HIDDEN),
    "final_layernorm.weight": (HIDDEN,),
}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def separate(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Split a fused tensor: q, k and v are interleaved by head, the halves of the gated MLP are consecutive."""
    if "qkv" in name:
        return [
            torch.cat([tensor[(3 * h + i) * CHANNELS :][:CHANNELS] for h in range(HEADS)])
            for i in range(3)
        ]  # fmt: skip
    return [tensor[:FFN], tensor[FFN:]] if "fc1" in name else [tensor]


def build(names: list[str], optimizer_class: type[StableAdamW], adjust_lr: str) -> tuple[StableAdamW, dict]:
    parameters = {name: torch.nn.Parameter(drawn(0)[name]) for name in names}
    extra = {"max_lr": MAX_LR, "momentum": MOMENTUM, "adjust_lr": adjust_lr}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "wd_mult": 1.0, **extra},
        {"params": [p for p in parameters.values() if p.ndim == 1], "wd_mult": 0.0, **extra},
    ]
    optimizer = optimizer_class(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=DECAY)
    params = {p: ParamInfo(i, p.numel(), True) for i, p in enumerate(parameters.values())}
    for name, p in parameters.items():
        if optimizer_class is Muon and is_hidden_matrix(name, p):
            params[p] = Matrix(params[p].index, p.numel(), True, name, CHANNELS, None)
    optimizer.bind({p: [ShardSlice(param)] for p, param in params.items()}, len(params), None)
    return optimizer, parameters


def trained(
    names: list[str], optimizer_class: type[StableAdamW], adjust_lr: str = "original"
) -> dict[str, torch.Tensor]:
    optimizer, parameters = build(names, optimizer_class, adjust_lr)
    for step in range(STEPS):
        for name, p in parameters.items():
            p.grad = drawn(step + 1)[name]
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_muon_matrices_match_torch_muon(adjust_lr: str) -> None:
    """torch's decay is lr * coefficient; ours is (lr / max_lr) * coefficient."""
    ours = trained(list(SHAPES), Muon, adjust_lr)
    for name in list(SHAPES)[:4]:
        theirs = [torch.nn.Parameter(part.clone()) for part in separate(name, drawn(0)[name])]
        optimizer = torch.optim.Muon(theirs, LR, DECAY / MAX_LR, MOMENTUM, adjust_lr_fn=adjust_lr)
        for step in range(STEPS):
            for p, gradient in zip(theirs, separate(name, drawn(step + 1)[name]), strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        for part, p in zip(separate(name, ours[name]), theirs, strict=True):
            assert torch.allclose(part, p.detach(), rtol=0, atol=2e-6)
            assert (part - drawn(0)[name][: len(part)]).abs().max() > LR


def test_muon_embedding_and_norm_equal_stable_adamw() -> None:
    rest = list(SHAPES)[4:]
    both, alone = trained(list(SHAPES), Muon), trained(rest, StableAdamW)
    assert all(torch.equal(both[name], alone[name]) for name in rest)


@pytest.mark.parametrize("name", list(SHAPES)[:4])
def test_matrix_split_and_join_round_trip(name: str) -> None:
    tensor = drawn(3)[name]
    matrix = Matrix(0, tensor.numel(), True, name, CHANNELS, 0)
    parts = matrix.split(tensor)
    assert all(torch.equal(a, b) for a, b in zip(parts, separate(name, tensor), strict=True))
    assert torch.equal(matrix.join(parts), tensor)
