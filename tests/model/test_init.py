"""Initial weights: the recipe's distribution, drawn by name, split into shards that join to the whole tensor."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_ettin.config.resolve import parse
from megatron_ettin.model import init

MODEL = parse("17m", "mlm", "pretrain").model


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("transformer.layers.3.self_attention.linear_qkv.weight", 0.02),
        ("transformer.layers.3.self_attention.linear_proj.weight", 0.02 / math.sqrt(14)),
        ("transformer.layers.0.mlp.linear_fc2.weight", 0.02 / math.sqrt(14)),
        ("head.dense.weight", 0.02),
        ("embedding.word_embeddings.weight", 0.02),
    ],
)
def test_init_weight_is_normal_truncated_at_two_sigma(name: str, sigma: float) -> None:
    drawn = init.recipe_weights(21, MODEL)(name, [512, 512])
    assert drawn.abs().max() <= 2 * sigma
    # a normal cut at two sigma keeps 0.8796 of its standard deviation
    assert drawn.std().item() == pytest.approx(0.8796 * sigma, rel=0.01)


def test_init_weight_is_determined_by_seed_and_name() -> None:
    full_tensor = init.recipe_weights(21, MODEL)
    first, second = "transformer.layers.1.mlp.linear_fc1.weight", "transformer.layers.2.mlp.linear_fc1.weight"
    assert torch.equal(full_tensor(first, [64, 32]), full_tensor(first, [64, 32]))
    assert not torch.equal(full_tensor(first, [64, 32]), full_tensor(second, [64, 32]))
    assert not torch.equal(full_tensor(first, [64, 32]), init.recipe_weights(22, MODEL)(first, [64, 32]))
    assert torch.equal(full_tensor("output_layer.bias", [8]), torch.zeros(8))
    assert torch.equal(full_tensor("transformer.final_layernorm.weight", [8]), torch.ones(8))


def test_init_original_recipe_vocabulary_bias_is_uniform() -> None:
    """The bias has torch.nn.Linear's default: uniform within +-1 / sqrt(hidden size)."""
    bias = init.recipe_weights(21, parse("17m", "mlm", "pretrain", overrides=["run.recipe=original"]).model)
    drawn = bias("output_layer.bias", [50_368])
    assert drawn.abs().max() <= 1 / 16
    assert drawn.abs().max() > 0.999 / 16
    assert drawn.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
    assert torch.equal(drawn, bias("output_layer.bias", [50_368]))


@pytest.mark.parametrize("tp", [2, 3])
def test_init_shards_of_gated_and_padded_tensors_join_to_whole(tp: int) -> None:
    gated = torch.arange(24.0).view(12, 2)
    parameter = SimpleNamespace(tensor_model_parallel=True, partition_dim=0, partition_stride=2, shape=(12 // tp, 2))
    shards = [init.shard_tensor(gated, parameter, tp, rank) for rank in range(tp)]
    halves = [torch.cat([shard.chunk(2)[half] for shard in shards]) for half in (0, 1)]
    assert torch.equal(torch.cat(halves), gated)
    vocabulary = torch.arange(10.0)[:, None]
    rows = -(-10 // tp)
    parameter = SimpleNamespace(tensor_model_parallel=True, partition_dim=0, partition_stride=1, shape=(rows, 1))
    joined = torch.cat([init.shard_tensor(vocabulary, parameter, tp, rank) for rank in range(tp)])
    assert torch.equal(joined[:10], vocabulary)
    assert not joined[10:].any()
