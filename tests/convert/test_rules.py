from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import SIZES, parameter_count
from megatron_ettin.convert.rules import QKV, TIED, weight_mappings
from tests.convert.folders import classes


def model_of(size: str) -> ModelConfig:
    shape = dataclasses.asdict(SIZES[size])
    return ModelConfig(**shape, global_rope_theta=1e4, local_rope_theta=1e4, max_position_embeddings=1024)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("size", SIZES)
def test_rules_cover_names_and_shapes_of_transformers_exactly(size, objective):
    model = model_of(size)
    config, model_class, _ = classes(objective)
    with torch.device("meta"):
        theirs = model_class(
            config(
                num_hidden_layers=model.num_layers,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size,
                num_attention_heads=model.num_attention_heads,
            )
        ).state_dict()
    del theirs[TIED]
    ours = {name: mapping.hf_shape for mapping in weight_mappings(model, objective) for name in mapping.hf_names}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("size", SIZES)
def test_rules_our_names_are_distinct_and_count_every_parameter(size):
    model = model_of(size)
    listed = list(weight_mappings(model, "clm"))
    assert len({mapping.name for mapping in listed}) == len(listed)
    assert sum(torch.Size(mapping.shape).numel() for mapping in listed) == parameter_count(model)


def test_qkv_merge_orders_rows_by_head_and_split_inverts_it():
    model = dataclasses.replace(model_of("17m"), hidden_size=24, num_attention_heads=3)
    fused = torch.arange(72.0)[:, None].expand(72, 24).contiguous()
    ours = QKV.merge([fused], model)
    for head in range(3):
        for letter in range(3):
            for channel in range(8):
                assert ours[(head * 3 + letter) * 8 + channel, 0] == letter * 24 + head * 8 + channel
    assert torch.equal(QKV.split(ours, model, 1)[0], fused)
    assert torch.equal(torch.cat(QKV.split(ours, model, 3)), fused)
    assert torch.equal(QKV.merge(QKV.split(ours, model, 3), model), ours)
