"""Where a trainer's file keeps its weights, and what they are called in `transformers`.

The original trainer wraps a model several times over; each wrapper puts a word before or into the names. Taken off, the
rest are the encoder's names of convert/rules.py, for its decoders keep the fused attention input too. A file whose
q, k and v are apart gets the decoder's names, which have them apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.convert.composer.inert import TensorRecord

PLACES = (("state", "model"), ("model",), ("state_dict",), ("model_state_dict",), ())
HEADS = ("head", "lm_head")
RENAMES = (
    (r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),  # torch.compile, FSDP
    (r"^(?:(?:module|model|bert)\.)+", ""),  # DDP, Composer, the trainer's class
    (r"^encoder\.layers\.", "layers."),
    (r"^(?=(?:embeddings|layers|final_norm)\.)", "model."),
)


@dataclass(frozen=True)
class Weights:
    """Tensors by the names of `transformers`; `original` has what the file calls them."""

    tensors: dict[str, TensorRecord]
    original: dict[str, str]
    head: str | None  # `head` or `lm_head`, as the file has it
    form: str  # whose names these are, for rules.pairs


def at(tree: Any, *keys: str) -> Any:
    """What a tree of dictionaries holds there, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def find_weights(tree: Any, path: Path) -> Weights:
    """The model's state dict. Raises UserError where there is none or a name has no place in our model."""
    for place in PLACES:
        found = at(tree, *place)
        if isinstance(found, dict) and any(isinstance(value, TensorRecord) for value in found.values()):
            return _renamed(found, path)
    places = ", ".join("/".join(place) for place in PLACES if place)
    raise UserError(f"{path}: no weights found; looked for tensors at {places} and at the top")


def _renamed(found: dict[Any, Any], path: Path) -> Weights:
    bare: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, TensorRecord):
            raise UserError(f"{path}: {name!r} is no plain tensor; a sharded or quantized file is not read")
        short = name
        for pattern, replacement in RENAMES:
            short = re.sub(pattern, replacement, short)
        if short in bare:
            raise UserError(f"{path}: {bare[short]!r} and {name!r} are the same tensor of our model")
        bare[short] = name
    heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in bare)]
    if len(heads) == 2:
        raise UserError(f"{path}: has both head.* (an encoder's) and lm_head.* (a decoder's)")
    form = "clm" if any(name.endswith(".attn.q_proj.weight") for name in bare) else "mlm"
    wanted = HEADS[form == "clm"]
    original = {re.sub(r"^(?:lm_)?head\.", f"{wanted}.", short): name for short, name in bare.items()}
    tensors = {short: found[name] for short, name in original.items()}
    return Weights(tensors, original, heads[0] if heads else None, form)
