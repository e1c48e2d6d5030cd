"""Find the weights in a file of the original trainer and give them their Hugging Face names.

The original trainer wraps a model several times, and each wrapper adds a prefix or an infix to the names. Without them,
the names are the encoder's names of convert/rules.py, also for a decoder, because the trainer fuses q, k and v in both.
A file with separate q, k and v gets the decoder's names.
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
"""(pattern, replacement) pairs that are applied in order to a name of the file."""


@dataclass(frozen=True)
class TrainerWeights:
    """Tensors of a file of the original trainer by their Hugging Face names."""

    file: TorchFile
    tensors: dict[str, TensorRecord]
    original_names: dict[str, str]
    """Hugging Face name -> name in the file."""
    head: str
    """Prefix of the prediction head's tensors in the file: `head` or `lm_head`."""
    naming: str
    """Objective (mlm or clm) under whose names `weight_mappings` lists these tensors."""
    dtypes: ClassVar[Collection[str]] = DTYPES.keys()
    """Names of the storage classes that can be read."""
    reads_ahead: ClassVar[bool] = False
    """False: no thread reads ahead, because all tensors may share one storage, which each read loads whole."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.file.path

    @property
    def num_layers(self) -> int:
        """Number of layers that have a tensor."""
        return len({name.split(".")[2] for name in self.tensors if name.startswith("model.layers.")})

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by its Hugging Face name; zeros for an output bias that the file lacks (the same model)."""
        if name == BIAS and name not in self.tensors:
            return torch.zeros(self.tensors[EMBEDDING].shape[0])
        return self.file.read(self.tensors[name])

    def display_name(self, name: str) -> str:
        """Return the tensor's name in the file, in quotes."""
        return repr(self.original_names[name])


def lookup(tree: Any, *keys: str) -> Any:
    """Return the value of nested dictionaries at `keys`; None if a key is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def find_weights(file: TorchFile) -> TrainerWeights:
    """Find the state dict of the model in a file.

    Raises:
        UserError: there is none, it lacks a prediction head or has two, or two names mean the same tensor.
    """
    path = file.path
    candidates = [lookup(file.tree, *keys) for keys in STATE_DICTS]
    dictionaries = [candidate for candidate in candidates if isinstance(candidate, dict)]
    state = next((tree for tree in dictionaries if any(isinstance(v, TensorRecord) for v in tree.values())), None)
    if state is None:
        searched = ", ".join("/".join(keys) for keys in STATE_DICTS if keys)
        raise UserError(f"{path}: no weights found; looked for tensors at {searched} and at the top")
    originals: dict[str, str] = {}
    for original, value in state.items():
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
    tensors = {name: state[original] for name, original in originals.items()}
    if TIED in tensors and tensors[TIED] == tensors.get(EMBEDDING):
        # both names refer to the same bytes of the file, so there is nothing to compare
        del tensors[TIED]
    return TrainerWeights(file, tensors, originals, heads[0], "clm" if is_split else "mlm")
