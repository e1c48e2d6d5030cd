"""The objectives. Encoder and decoder differ in these rows and in nothing else.

A row of the batch is read in one of three ways (`KINDS`); an objective says which of them its rows are read in. `mntp`
is masked next-token prediction (the hidden state before a masked token predicts it), which the original trainer used
to train decoders on as encoders; the `hybrid` ones mix causal and masked rows in one model, as GPT-BERT does
(arXiv 2410.24159)."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE = -100  # the label of a position that predicts nothing


@dataclass(frozen=True)
class Kind:
    """How a row is read: whether attention is causal, whether tokens are masked, whether position i predicts i + 1."""

    causal: bool
    masks: bool
    shifts: bool


KINDS = {
    "mlm": Kind(causal=False, masks=True, shifts=False),
    "clm": Kind(causal=True, masks=False, shifts=True),
    "mntp": Kind(causal=False, masks=True, shifts=True),
}


@dataclass(frozen=True)
class Objective:
    """`kinds`: of its rows; where there are two, the first is the causal one and `data.clm_fraction` its share.
    `exports`: the objectives of the models that its weights are exported as, the first unless told otherwise."""

    kinds: tuple[str, ...]
    exports: tuple[str, ...]

    @property
    def needs_mask_token(self) -> bool:
        return any(KINDS[kind].masks for kind in self.kinds)

    @property
    def masked_kind(self) -> str | None:
        """How its rows with masked tokens are read; None where it has none."""
        return next((kind for kind in self.kinds if KINDS[kind].masks), None)

    @property
    def is_hybrid(self) -> bool:
        return len(self.kinds) > 1

    @property
    def causal(self) -> bool:
        """Whether all rows are."""
        return all(KINDS[kind].causal for kind in self.kinds)


OBJECTIVES = {
    "mlm": Objective(("mlm",), ("mlm",)),
    "clm": Objective(("clm",), ("clm",)),
    "mntp": Objective(("mntp",), ("mlm",)),
    "hybrid": Objective(("clm", "mlm"), ("mlm", "clm")),
    "hybrid_mntp": Objective(("clm", "mntp"), ("mlm", "clm")),
}
EXPORTED = ("mlm", "clm")  # what a checkpoint can be exported as: an encoder or a decoder of transformers
