"""Build core's ModuleSpec of the layers: the class of each role, for core's layers and for Transformer Engine's.

Layer 0 has no norm before its attention. Core does not slice a list of specs for a pipeline stage, so `block_spec`
builds the stage's own from core's first layer and layer count (which cover uneven splits and virtual stages).
The gated MLP is core's two linears with the gate between them as one function that may be compiled.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch.nn import functional

from megatron_ettin.model.attention import (
    MASKS,
    KernelAttention,
    TransformerEngineAttention,
    attend,
    attend_flash,
    attend_flex,
    attend_varlen,
)
from megatron_ettin.model.config import EttinTransformerConfig
from megatron_ettin.model.dropout import CounterDropoutAdd, PlainAdd
from megatron_ettin.platform.compile import maybe_compile

# core logs for every layer on every rank that the MLP class is not one of its own
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

ATTENTIONS = {"sdpa": attend, "flash": attend_flash, "varlen": attend_varlen, "flex": attend_flex}
# checkpoints use the names of layers that fuse the norm into the linear after it
CANONICAL = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class EttinLayer(TransformerLayer):
    """Core's layer, passing the layer number and the micro-batch's boundaries to its dropout."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        add = self.self_attn_bda
        add.config, add.layer_number = self.config, self.layer_number
        if self.config.sequence_parallel:
            add.slice_rank = self.pg_collection.tp.rank()

    def _forward_attention(self, *arguments: Any, packed_seq_params: Any = None, **keywords: Any) -> Any:
        self.self_attn_bda.packed = packed_seq_params
        return super()._forward_attention(*arguments, packed_seq_params=packed_seq_params, **keywords)


def layer_spec(config: EttinTransformerConfig, first: bool) -> ModuleSpec:
    """Return the spec of one layer; `first` marks the model's first layer."""
    backend = config.backend
    fused = backend.norm_column_linear
    qkv = fused if fused is not None and not first else backend.column_linear
    attention = ModuleSpec(module=KernelAttention, params={"kernel": ATTENTIONS.get(backend.attention.name)})
    if backend.core_attention is not None:
        attention = ModuleSpec(module=TransformerEngineAttention, params={"kernel": backend.core_attention})
    return ModuleSpec(
        module=EttinLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if first or fused is not None else BiasFreeLayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": MASKS[config.causal]},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv, core_attention=attention, linear_proj=backend.row_linear
                ),
            ),
            self_attn_bda=ModuleSpec(module=CounterDropoutAdd),
            pre_mlp_layernorm=IdentityOp if fused is not None else BiasFreeLayerNorm,
            mlp=ModuleSpec(
                module=GatedMlp,
                submodules=MLPSubmodules(linear_fc1=fused or backend.column_linear, linear_fc2=backend.row_linear),
            ),
            mlp_bda=ModuleSpec(module=PlainAdd),
            sharded_state_dict_keys_map={} if fused is not None else CANONICAL,
        ),
    )


def first_layer(config: EttinTransformerConfig, vp_stage: int | None, pp_rank: int) -> int:
    """Return the index in the whole model of this stage's first layer."""
    return int(get_transformer_layer_offset(config, vp_stage, pp_rank))


def block_spec(config: EttinTransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
    """Return the specs of one pipeline stage's layers and of the final norm."""
    offset = first_layer(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = [layer_spec(config, first=offset + i == 0) for i in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=BiasFreeLayerNorm)


@maybe_compile
def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """Multiply the exact GELU (not its tanh form) of the first half of the channels by the second half."""
    first, second = x.chunk(2, dim=-1)
    return functional.gelu(first) * second


class GatedMlp(MLP):
    """Core's MLP with a gate, exact GELU and no biases."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return the output [tokens, 1, hidden] and None in the role of core's bias."""
        inner, _ = self.linear_fc1(hidden_states)
        output: tuple[torch.Tensor, None] = self.linear_fc2(gated_gelu(inner))
        return output


class BiasFreeLayerNorm(torch.nn.Module):
    """Layer norm without bias: (x - mean) / sqrt(var + eps) * weight over the last dimension.

    Core's own local norm refuses sequence parallelism. This one marks its weight, and core sums the gradient over
    tensor-parallel ranks, each of which holds a slice of the tokens.
    """

    def __init__(
        self,
        config: EttinTransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        shards = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        # core reads this attribute
        setattr(self.weight, "sequence_parallel", shards)  # noqa: B010
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., hidden], normed over the last dimension."""
        return functional.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)
