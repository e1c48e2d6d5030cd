"""Exported folders to check under another transformers, each with our model's logits for given tokens.

`Case` reads what `exports.py` wrote. It imports nothing of the project, because it runs in environments without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """An exported folder `folder/model`, with `folder/expected.json` and `folder/logits.safetensors` next to it."""

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def logits(self) -> list[torch.Tensor]:
        """Return our model's logits [tokens, vocabulary] for each list of `expected["token_lists"]`."""
        from safetensors.torch import load_file

        stored = load_file(self.folder / "logits.safetensors")
        return [stored[str(i)] for i in range(len(stored))]

    @property
    def objective(self) -> str:
        return self.expected["objective"]

    @property
    def token_lists(self) -> list[list[int]]:
        return self.expected["token_lists"]

    @property
    def has_local_base(self) -> bool:
        """Return whether local layers have another rotary base than global ones."""
        return self.expected["local_rope_theta"] != self.expected["global_rope_theta"]

    def auto_class(self) -> Any:
        import transformers

        is_encoder = self.objective == "mlm"
        return transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM

    def load(self, **options: Any) -> Any:
        """Load the model with its Auto class, in float32 unless `options` set another dtype."""
        return self.auto_class().from_pretrained(self.model, **{"dtype": torch.float32, **options}).eval()

    def tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.model)


def major() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])
