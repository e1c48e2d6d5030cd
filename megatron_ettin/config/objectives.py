"""The two objectives. Encoder and decoder differ in these rows and in nothing else."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE = -100  # the label of a position that predicts nothing


@dataclass(frozen=True)
class Objective:
    """What an objective changes: the attention mask, where labels are, and the exported class."""

    causal: bool
    needs_mask_token: bool
    hf_class: str


OBJECTIVES = {
    "mlm": Objective(causal=False, needs_mask_token=True, hf_class="ModernBertForMaskedLM"),
    "clm": Objective(causal=True, needs_mask_token=False, hf_class="ModernBertDecoderForCausalLM"),
}
