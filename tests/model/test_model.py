"""Logits against `transformers`' own classes, at the widths of all sizes, and packed rows against the same chunks alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import SIZES
from megatron_ettin.model import init
from tests.model.rows import labelled, pack_rows

# a small vocabulary, because the output layer's code does not depend on it; widths and heads are the published ones
VOCABULARY = 512
# every third layer is global: two layers have one of them, seven have three, each followed by local ones
LAYERS = {"17m": 7, "32m": 4, "68m": 4, "150m": 4, "400m": 2, "1b": 2}
# sizes of the first tier; the others differ in numbers only
FIRST = ("17m", "32m")
# tokens, more than the local layers' windows on both sides
LONG, SHORT = 140, 90


def hf_model(size: str, objective: str):
    """Build a model of transformers with seeded random weights, also in norms and biases, so that a swapped tensor shows."""
    from transformers import (
        ModernBertConfig,
        ModernBertDecoderConfig,
        ModernBertDecoderForCausalLM,
        ModernBertForMaskedLM,
    )

    shape = SIZES[size]
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=LAYERS[size],
        num_attention_heads=shape.num_attention_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        global_rope_theta=160_000.0,
        local_rope_theta=10_000.0,
    )
    if objective == "mlm":
        model = ModernBertForMaskedLM(ModernBertConfig(**settings))
    else:
        model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 else 2 / parameter.shape[1] ** 0.5 * 0.5
            parameter.copy_(noise * scale + (1 if "norm" in name else 0))
    return model.eval()


def weights_of(model, heads: int) -> Callable[[str, list[int]], torch.Tensor]:
    """Return transformers' tensors under our names; the mapping is written independently of the converter's table."""
    source = model.state_dict()
    head = "head" if "head.dense.weight" in source else "lm_head"
    fixed = {
        "embedding.word_embeddings.weight": "model.embeddings.tok_embeddings.weight",
        "embedding.norm.weight": "model.embeddings.norm.weight",
        "transformer.final_layernorm.weight": "model.final_norm.weight",
        "head.dense.weight": f"{head}.dense.weight",
        "head.norm.weight": f"{head}.norm.weight",
        "output_layer.bias": "decoder.bias",
    }
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": "attn_norm.weight",
        "self_attention.linear_proj.weight": "attn.Wo.weight",
        "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight",
        "mlp.linear_fc1.weight": "mlp.Wi.weight",
        "mlp.linear_fc2.weight": "mlp.Wo.weight",
    }

    def full_of(name: str, shape: list[int]) -> torch.Tensor:
        if name in fixed:
            return source[fixed[name]]
        index, rest = name.removeprefix("transformer.layers.").split(".", 1)
        prefix = f"model.layers.{index}."
        if rest in layer:
            return source[prefix + layer[rest]]
        if prefix + "attn.Wqkv.weight" in source:
            qkv = source[prefix + "attn.Wqkv.weight"]
        else:
            qkv = torch.cat([source[f"{prefix}attn.{part}_proj.weight"] for part in "qkv"])
        return qkv.view(3, heads, -1, qkv.shape[1]).transpose(0, 1).reshape(qkv.shape)

    return full_of


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("size", [pytest.param(one, marks=[] if one in FIRST else pytest.mark.full) for one in SIZES])
def test_logits_padded_and_packed_match_transformers(size: str, objective: str, build_model: Callable) -> None:
    """Inputs longer than the window, unpadded and padded, and two of them packed into one row."""
    theirs = hf_model(size, objective)
    overrides = f"precision.name=fp32 model.vocab_size={VOCABULARY} model.num_layers={LAYERS[size]}"
    ours = build_model(parse(size, objective, "extend", overrides=[*overrides.split(), "model.local_rope_theta=10000"]))
    init.init_weights(ours, weights_of(theirs, SIZES[size].num_attention_heads), 1, 0)
    ids = torch.randint(3, VOCABULARY, (2, LONG), generator=torch.Generator().manual_seed(0))
    lengths = [LONG, SHORT]
    mask = torch.tensor([[int(i < n) for i in range(LONG)] for n in lengths])
    with torch.no_grad():
        padded = theirs(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask).logits
        alone = theirs(input_ids=ids[:1]).logits[0]
        rows = ours(torch.where(mask.bool(), ids, 0), pack_rows([[n] for n in lengths], LONG)).view(2, LONG, -1)
        both = torch.cat([ids[0], ids[1, :SHORT]])[None]
        packed = ours(both, pack_rows([lengths], LONG + SHORT))
    assert (rows[0] - alone).abs().max() <= 1e-4
    for i, n in enumerate(lengths):
        assert (rows[i, :n] - padded[i, :n]).abs().max() <= 1e-4
        begin = sum(lengths[:i])
        assert (packed[begin : begin + n] - padded[i, :n]).abs().max() <= 1e-4
    # logits large enough to differ
    assert padded.abs().max() > 1


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_packed_losses_match_losses_of_separate_chunks(objective: str, build_model: Callable) -> None:
    overrides = "precision.name=fp32 model.vocab_size=320 model.num_layers=4 model.attention_output_dropout=0"
    model = build_model(parse("17m", objective, "pretrain", overrides=overrides.split()))
    lengths = [90, 7, 103, 200]
    ids = torch.randint(5, 320, (1, 400), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.rand(400, generator=torch.Generator().manual_seed(2)) < 0.5, ids[0], -100)[None]
    with torch.no_grad():
        _, packed, _ = model(ids, pack_rows([lengths], 400), *labelled(labels))
        alone, begin = [], 0
        for n in lengths:
            part = slice(begin, begin + n)
            alone.append(model(ids[:, part], pack_rows([[n]], n), *labelled(labels[:, part]))[1])
            begin += n
    assert torch.allclose(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
