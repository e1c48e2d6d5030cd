"""Draw initial weights by name: a full tensor from hash(seed, canonical name), then this rank's shard of it.

So the layout cannot change the initial model. The formulas are the recipe's `full_megatron`. Matrices are normal with a
sigma of 0.02, truncated at two sigma. Sigma is divided by sqrt(2 x layers) for matrices that write to the residual
stream. Norms are one and biases zero. Source: ModernBERT's initialization.py, lines 107-137. The original trainer left
the vocabulary bias at torch's default (`model.output_bias_init=uniform`); see docs/recipe.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.model.layer import CANONICAL, first_layer
from megatron_ettin.platform.fp8 import set_weight

LAYERS = "transformer.layers."
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.bias")


def canonical_name(name: str, offset: int) -> str:
    """Return a parameter's name in checkpoints.

    It has the layer number of the whole model, the name of Transformer Engine's fused norm, and for the tied output
    the name of the embedding.

    Args:
        name: name in this model chunk.
        offset: number of layers before this chunk.
    """
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if not name.startswith(LAYERS):
        return name
    index, rest = name[len(LAYERS) :].split(".", 1)
    for local, fused in CANONICAL.items():
        if rest.startswith(local):
            rest = fused + rest[len(local) :]
    return f"{LAYERS}{int(index) + offset}.{rest}"


def full_shape(name: str, parameter: Any, tp: int, vocab_size: int) -> list[int]:
    """Return the shape of the unsharded tensor, without the rows that pad the vocabulary."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp
    if name in VOCABULARY_TENSORS:
        shape[0] = vocab_size
    return shape


def shard_tensor(full: torch.Tensor, parameter: Any, tp: int, rank: int) -> torch.Tensor:
    """Return this rank's shard of an unsharded tensor.

    A partition_stride of 2 (the gated MLP) splits each half and joins the two shards. A vocabulary is padded with rows
    of zeros.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, size = parameter.partition_dim, parameter.shape[parameter.partition_dim] * tp
    if full.shape[dim] < size:
        full = torch.cat([full, full.new_zeros(size - full.shape[dim], *full.shape[1:])])
    halves = full.chunk(parameter.partition_stride, dim)
    return torch.cat([half.chunk(tp, dim)[rank] for half in halves], dim)


def init_weights(model: Any, full_tensor: Callable[[str, list[int]], torch.Tensor], tp: int, tp_rank: int) -> None:
    """Set every parameter of a model chunk from unsharded tensors.

    Call it after construction, because core sums the two copies of a tied embedding while it builds the model.

    Args:
        model: the model chunk.
        full_tensor: function of (canonical name, full shape) that returns the unsharded tensor.
        tp: tensor-parallel degree.
        tp_rank: tensor-parallel rank.
    """
    offset = first_layer(model.config, model.vp_stage, model.pp_rank)
    trained = [(canonical_name(name, offset), p) for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in trained:
            full = full_tensor(name, full_shape(name, parameter, tp, model.config.vocab_size))
            set_weight(parameter, shard_tensor(full, parameter, tp, tp_rank))


def recipe_weights(seed: int, model: ModelConfig) -> Callable[[str, list[int]], torch.Tensor]:
    """Return a function of (canonical name, full shape) that draws the recipe's initial weights."""
    num_layers, std = model.num_layers, model.init_std
    bound = model.hidden_size**-0.5 if model.output_bias_init == "uniform" else 0.0

    def full_tensor(name: str, shape: list[int]) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if name == "output_layer.bias":
            return torch.empty(shape).uniform_(-bound, bound, generator=generator) if bound else torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        sigma = std / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_OUTPUTS) else std
        return torch.nn.init.trunc_normal_(torch.empty(shape), 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)

    return full_tensor
