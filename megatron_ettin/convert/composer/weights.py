"""Find the weights in a trainer's file and give them their Hugging Face names.

The original trainer wraps a model several times over, and each wrapper puts a word before or into the names. Without
these, the names are the encoder's names of convert/rules.py, because the trainer's decoders keep the fused attention
input too. A file whose q, k and v are separate gets the decoder's names, which have them separate.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.convert.composer.safe_unpickler import DTYPES, TensorRecord, TorchFile
from megatron_ettin.convert.rules import TIED

STATE_DICTS = (("state", "model"), ("model",), ("state_dict",), ("model_state_dict",), ())
"""Keys under which a file may keep its weights, in the order in which they are tried."""
HEADS = ("head", "lm_head")
BIAS = "decoder.bias"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
RENAMES = (
    # torch.compile, FSDP
    (r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),
    # DDP, Composer, the trainer's class
    (r"^(?:(?:module|model|bert)\.)+", ""),
    (r"^encoder\.layers\.", "layers."),
    (r"^(?=(?:embeddings|layers|final_norm)\.)", "model."),
)


@dataclass(frozen=True)
class TrainerWeights:
    """Tensors of a trainer's file by their Hugging Face names."""

    file: TorchFile
    tensors: dict[str, TensorRecord]
    original_names: dict[str, str]
    head: str
    """`head` or `lm_head`, as the file has it."""
    naming: str
    """The objective whose names these are, for `weight_mappings`."""
    dtypes: ClassVar[Collection[str]] = DTYPES.keys()
    """Classes of storages that can be read."""
    reads_ahead: ClassVar[bool] = False
    """All tensors may lie in one storage, which is read for each."""

    @property
    def path(self) -> Path:
        """Return the path of the file."""
        return self.file.path

    @property
    def num_layers(self) -> int:
        """Return the number of layers that have a tensor."""
        return len({name.split(".")[2] for name in self.tensors if name.startswith("model.layers.")})

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor; zeros for an output bias that the file does not have, which is the same model."""
        if name == BIAS and name not in self.tensors:
            return torch.zeros(self.tensors[EMBEDDING].shape[0])
        return self.file.read(self.tensors[name])

    def display_name(self, name: str) -> str:
        """Return the name that the file has, in quotes."""
        return repr(self.original_names[name])


def lookup(tree: Any, *keys: str) -> Any:
    """Return the value of nested dictionaries at `keys`; None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def find_weights(file: TorchFile) -> TrainerWeights:
    """Find the state dict of the model in a file. Raises UserError where there is none or a name is ambiguous."""
    path = file.path
    candidates = [lookup(file.tree, *keys) for keys in STATE_DICTS]
    dictionaries = [one for one in candidates if isinstance(one, dict)]
    held = next((one for one in dictionaries if any(isinstance(v, TensorRecord) for v in one.values())), None)
    if held is None:
        searched = ", ".join("/".join(keys) for keys in STATE_DICTS if keys)
        raise UserError(f"{path}: no weights found; looked for tensors at {searched} and at the top")
    originals: dict[str, str] = {}
    for original, value in held.items():
        if not isinstance(original, str) or not isinstance(value, TensorRecord):
            raise UserError(f"{path}: {original!r} is no plain tensor; a sharded or quantized file is not read")
        name = original
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in originals:
            raise UserError(f"{path}: {originals[name]!r} and {original!r} are the same tensor of our model")
        originals[name] = original
    heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in originals)]
    if len(heads) == 2:
        raise UserError(f"{path}: has both head.* (an encoder's) and lm_head.* (a decoder's)")
    if not heads:
        raise UserError(f"{path}: has no head.* or lm_head.*; a model without its prediction head is incomplete")
    is_split = any(name.endswith(".attn.q_proj.weight") for name in originals)
    originals = {re.sub(r"^(?:lm_)?head\.", f"{HEADS[is_split]}.", name): value for name, value in originals.items()}
    tensors = {name: held[original] for name, original in originals.items()}
    if TIED in tensors and tensors[TIED] == tensors.get(EMBEDDING):
        # the same bytes of the file, which need not be compared
        del tensors[TIED]
    return TrainerWeights(file, tensors, originals, heads[0], "clm" if is_split else "mlm")
