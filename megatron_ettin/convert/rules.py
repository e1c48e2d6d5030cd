"""List tensor names and shapes in one table, which export and import both use.

A rule names a canonical tensor of this package, its shape, and its tensors in `ModernBertForMaskedLM` (mlm) and
`ModernBertDecoderForCausalLM` (clm). Conversion only renames tensors, with two exceptions. The rows of the fused
attention input are reordered: canonical is [head][q, k, v][channel], so that a tensor-parallel rank holds whole heads.
Rows that tensor parallelism added to the vocabulary are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ettin.config.schema import ModelConfig

TIED = "decoder.weight"
"""Hugging Face's second name for the embedding; checkpoints and exports do not store it."""


@dataclass(frozen=True)
class WeightTransform:
    """Conversion of one canonical tensor to its Hugging Face tensors and back."""

    split: Callable[[torch.Tensor, ModelConfig, int], list[torch.Tensor]]
    """(canonical tensor, model, number of parts) -> Hugging Face tensors."""
    merge: Callable[[Sequence[torch.Tensor], ModelConfig], torch.Tensor]
    """(Hugging Face tensors, model) -> canonical tensor: the inverse of `split`."""
    may_be_padded: bool = False
    """Whether tensor parallelism may have added rows to the canonical tensor."""


def _interleave(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Return [3H, H] with rows reordered from [q, k, v][head][channel] to [head][q, k, v][channel]."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    heads, hidden = model.num_attention_heads, model.hidden_size
    return whole.view(3, heads, hidden // heads, hidden).transpose(0, 1).reshape(3 * hidden, hidden)


def _separate(tensor: torch.Tensor, model: ModelConfig, parts: int) -> list[torch.Tensor]:
    """Invert `_interleave`: return the rows as one tensor (`parts` 1) or as q, k and v (`parts` 3)."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    rows = tensor.view(heads, 3, hidden // heads, hidden).transpose(0, 1).reshape(3 * hidden, hidden)
    return list(rows.chunk(parts))


SAME = WeightTransform(lambda tensor, model, parts: [tensor], lambda parts, model: parts[0])
QKV = WeightTransform(_separate, _interleave)
VOCABULARY = WeightTransform(
    lambda tensor, model, parts: [tensor[: model.vocab_size]], lambda parts, model: parts[0], may_be_padded=True
)


@dataclass(frozen=True)
class MappingRule:
    """Names of one canonical tensor here and in Hugging Face; `{i}` stands for the layer's number."""

    name: str
    shape: str
    """Sizes separated by spaces: V is the vocabulary, H the hidden size, F the inner width of the gated MLP."""
    mlm: str
    """Name of the encoder's tensor."""
    clm: tuple[str, ...] = ()
    """Names of the decoder's tensors, if they are not the encoder's."""
    transform: WeightTransform = SAME
    first_layer: int = 0
    """Number of the first layer that has this tensor."""


_OURS, _HF = "transformer.layers.{i}.", "model.layers.{i}."
_SEPARATE = tuple(f"{_HF}attn.{letter}_proj.weight" for letter in "qkv")

RULES = (
    MappingRule("embedding.word_embeddings.weight", "V H", "model.embeddings.tok_embeddings.weight", (), VOCABULARY),
    MappingRule("embedding.norm.weight", "H", "model.embeddings.norm.weight"),
    # layer 0 has no norm before its attention: the embedding's norm takes its place
    MappingRule(f"{_OURS}self_attention.linear_qkv.layer_norm_weight", "H", f"{_HF}attn_norm.weight", first_layer=1),
    MappingRule(f"{_OURS}self_attention.linear_qkv.weight", "3H H", f"{_HF}attn.Wqkv.weight", _SEPARATE, QKV),
    MappingRule(f"{_OURS}self_attention.linear_proj.weight", "H H", f"{_HF}attn.Wo.weight"),
    MappingRule(f"{_OURS}mlp.linear_fc1.layer_norm_weight", "H", f"{_HF}mlp_norm.weight"),
    # here as in Hugging Face, the activation is applied to the first half
    MappingRule(f"{_OURS}mlp.linear_fc1.weight", "2F H", f"{_HF}mlp.Wi.weight"),
    MappingRule(f"{_OURS}mlp.linear_fc2.weight", "H F", f"{_HF}mlp.Wo.weight"),
    MappingRule("transformer.final_layernorm.weight", "H", "model.final_norm.weight"),
    MappingRule("head.dense.weight", "H H", "head.dense.weight", ("lm_head.dense.weight",)),
    MappingRule("head.norm.weight", "H", "head.norm.weight", ("lm_head.norm.weight",)),
    MappingRule("output_layer.bias", "V", "decoder.bias", transform=VOCABULARY),
)


@dataclass(frozen=True)
class WeightMapping:
    """One canonical tensor of one model and the Hugging Face tensors that hold it."""

    name: str
    shape: tuple[int, ...]
    """Shape without padding."""
    hf_names: tuple[str, ...]
    transform: WeightTransform

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Return the shape of each Hugging Face tensor: the canonical tensor split evenly along dim 0."""
        return (self.shape[0] // len(self.hf_names), *self.shape[1:])


def weight_mappings(model: ModelConfig, objective: str) -> Iterator[WeightMapping]:
    """Yield the mapping of every tensor of a model, in file order."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    sizes = {"V": model.vocab_size, "H": hidden, "3H": 3 * hidden, "F": ffn, "2F": 2 * ffn}
    layers = [rule for rule in RULES if "{i}" in rule.name]
    first = RULES.index(layers[0])
    expanded = [(rule, 0) for rule in RULES[:first]]
    expanded += [(rule, i) for i in range(model.num_layers) for rule in layers if i >= rule.first_layer]
    expanded += [(rule, 0) for rule in RULES[first + len(layers) :]]
    for rule, i in expanded:
        theirs = rule.clm if objective == "clm" and rule.clm else (rule.mlm,)
        hf_names = tuple(name.replace("{i}", str(i)) for name in theirs)
        shape = tuple(sizes[size] for size in rule.shape.split())
        yield WeightMapping(rule.name.replace("{i}", str(i)), shape, hf_names, rule.transform)
