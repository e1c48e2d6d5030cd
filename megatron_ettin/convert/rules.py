"""The one table of names and shapes that both directions of conversion walk.

A rule says: our canonical tensor, its shape, and what it is called in `ModernBertForMaskedLM` (mlm) and
`ModernBertDecoderForCausalLM` (clm). Two of ours are not theirs byte for byte: the fused attention input, whose rows we
keep as [head][q, k, v][channel] so that a tensor-parallel rank holds whole heads, and the vocabulary, which tensor
parallelism may have padded. Everything else is the same bytes under another name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ettin.config.schema import ModelConfig

TIED = "decoder.weight"  # theirs only: the embedding under a second name, never stored by us


@dataclass(frozen=True)
class Form:
    """How one of ours becomes `parts` of theirs, and back."""

    split: Callable[[torch.Tensor, ModelConfig, int], list[torch.Tensor]]
    merge: Callable[[Sequence[torch.Tensor], ModelConfig], torch.Tensor]
    may_be_padded: bool = False


def _interleave(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """[q | k | v][head][channel] rows -> [head][q, k, v][channel] rows."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    heads, hidden = model.num_attention_heads, model.hidden_size
    return whole.view(3, heads, hidden // heads, hidden).transpose(0, 1).reshape(3 * hidden, hidden)


def _separate(tensor: torch.Tensor, model: ModelConfig, parts: int) -> list[torch.Tensor]:
    """The inverse of `_interleave`, as one tensor or as q, k and v."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    rows = tensor.view(heads, 3, hidden // heads, hidden).transpose(0, 1).reshape(3 * hidden, hidden)
    return list(rows.chunk(parts))


SAME = Form(lambda tensor, model, parts: [tensor], lambda parts, model: parts[0])
QKV = Form(_separate, _interleave)
VOCABULARY = Form(lambda tensor, model, parts: [tensor[: model.vocab_size]], lambda parts, model: parts[0], True)


@dataclass(frozen=True)
class Rule:
    """`{i}` stands for the layer's number. Shapes: V vocabulary, H hidden, F inner width of the gated MLP."""

    ours: str
    shape: tuple[str, ...]
    mlm: tuple[str, ...]
    clm: tuple[str, ...]
    form: Form = SAME
    first_layer: int = 0


def _rule(
    ours: str, shape: str, mlm: str, clm: str | tuple[str, ...] = "", form: Form = SAME, first_layer: int = 0
) -> Rule:
    theirs = (clm,) if isinstance(clm, str) else clm
    return Rule(ours, tuple(shape.split()), (mlm,), theirs if theirs != ("",) else (mlm,), form, first_layer)


_OURS, _THEIRS = "transformer.layers.{i}.", "model.layers.{i}."
_SEPARATE = tuple(f"{_THEIRS}attn.{letter}_proj.weight" for letter in "qkv")

RULES = (
    _rule("embedding.word_embeddings.weight", "V H", "model.embeddings.tok_embeddings.weight", form=VOCABULARY),
    _rule("embedding.norm.weight", "H", "model.embeddings.norm.weight"),
    # layer 0 has no norm before its attention: the embedding's norm is it
    _rule(f"{_OURS}self_attention.linear_qkv.layer_norm_weight", "H", f"{_THEIRS}attn_norm.weight", first_layer=1),
    _rule(f"{_OURS}self_attention.linear_qkv.weight", "3H H", f"{_THEIRS}attn.Wqkv.weight", _SEPARATE, QKV),
    _rule(f"{_OURS}self_attention.linear_proj.weight", "H H", f"{_THEIRS}attn.Wo.weight"),
    _rule(f"{_OURS}mlp.linear_fc1.layer_norm_weight", "H", f"{_THEIRS}mlp_norm.weight"),
    _rule(f"{_OURS}mlp.linear_fc1.weight", "2F H", f"{_THEIRS}mlp.Wi.weight"),  # both: the first half is activated
    _rule(f"{_OURS}mlp.linear_fc2.weight", "H F", f"{_THEIRS}mlp.Wo.weight"),
    _rule("transformer.final_layernorm.weight", "H", "model.final_norm.weight"),
    _rule("head.dense.weight", "H H", "head.dense.weight", "lm_head.dense.weight"),
    _rule("head.norm.weight", "H", "head.norm.weight", "lm_head.norm.weight"),
    _rule("output_layer.bias", "V", "decoder.bias", form=VOCABULARY),
)


@dataclass(frozen=True)
class Pair:
    """A rule applied to one layer of one model: one of ours and the tensors of theirs that hold it."""

    ours: str
    shape: tuple[int, ...]  # without padding
    theirs: tuple[str, ...]
    form: Form

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of each of theirs: ours cut into equal parts."""
        return (self.shape[0] // len(self.theirs), *self.shape[1:])


def pairs(model: ModelConfig, objective: str) -> Iterator[Pair]:
    """Every tensor of a model in file order."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    sizes = {"V": model.vocab_size, "H": hidden, "3H": 3 * hidden, "F": ffn, "2F": 2 * ffn}
    layers = [rule for rule in RULES if "{i}" in rule.ours]
    first = RULES.index(layers[0])
    expanded = [(rule, 0) for rule in RULES[:first]]
    expanded += [(rule, i) for i in range(model.num_layers) for rule in layers if i >= rule.first_layer]
    expanded += [(rule, 0) for rule in RULES[first + len(layers) :]]
    for rule, i in expanded:
        theirs = rule.mlm if objective == "mlm" else rule.clm
        names = tuple(name.replace("{i}", str(i)) for name in theirs)
        yield Pair(rule.ours.replace("{i}", str(i)), tuple(sizes[s] for s in rule.shape), names, rule.form)
