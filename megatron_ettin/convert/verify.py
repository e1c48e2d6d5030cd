"""Proof that an exported folder is the checkpoint: tensors read back bit for bit, logits against transformers.

Our side of the logits is handed in, for the model lives on a floor that conversion does not see. A bfloat16 export has
rounded weights; it is imported again and our model runs on that, so that both sides hold the same numbers and the
tolerance stays that of float32 arithmetic done in another order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.safetensors_file import ModelFiles
from megatron_ettin.convert.source import Source

# (checkpoint, token lists, objective) -> float32 logits [tokens, vocabulary] of each list
Logits = Callable[[Path, list[list[int]], str], Sequence[torch.Tensor]]
# Largest absolute difference of float32 logits. Rounding grows with what is added up: measured are 1e-5 where the
# largest logit is 5. Weights of either dtype are compared in float32 arithmetic, so one tolerance serves both.
TOLERANCE, TOLERANCE_OF_LARGEST = 1e-4, 2e-5
SEED = 21


class ParityError(Exception):
    """The exported folder is not the checkpoint: a fault of this program, never of the user."""


def check_export(source: Source, folder: Path, dtype: torch.dtype, our_logits: Logits | None) -> dict[str, Any]:
    """The parity record of an export. Raises ParityError where a tensor or the logits differ."""
    import transformers

    tensors = compare_tensors(source, folder, dtype)
    record: dict[str, Any] = {
        **{"tensors_identical": True, "tensors": tensors, "dtype": str(dtype).removeprefix("torch.")},
        **{"max_abs_logit_difference": None, "tolerance": TOLERANCE, "argmax_equal": None, "tokens": 0},
        **{"largest_logit": None, "near_ties": None},
        **{"transformers": transformers.__version__, "torch": torch.__version__},
    }
    if our_logits is not None:
        record |= _compare_logits(source, folder, dtype, our_logits)
    return record


def compare_tensors(source: Source, folder: Path, dtype: torch.dtype) -> int:
    """Read every tensor back through the rules and compare bits. Returns how many there are."""
    files = ModelFiles(folder)
    stored = {name for pair in source.pairs for name in pair.theirs}
    if set(files.tensors) != stored:
        raise ParityError(f"{folder}: names differ: {sorted(set(files.tensors) ^ stored)[:3]}")
    for pair, tensor in source.tensors():
        back = pair.form.merge([files.read(name) for name in pair.theirs], source.model)
        if not _same_bits(back, tensor.to(dtype)):
            raise ParityError(f"{folder}: {', '.join(pair.theirs)} read back is not {pair.ours}")
    return len(stored)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes: a NaN equals itself and -0.0 is not 0.0."""
    same_form = a.dtype == b.dtype and a.shape == b.shape
    return same_form and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def token_lists(vocab_size: int, window: int, longest: int) -> list[list[int]]:
    """Seeded ids of three lengths, two of them longer than the window of local layers."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [min(longest, length) for length in (2 * window + 37, window + 9, max(2, window // 2))]
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _compare_logits(source: Source, folder: Path, dtype: torch.dtype, our_logits: Logits) -> dict[str, Any]:
    """Padded and unpadded: each list alone, and all of them in one padded batch."""
    model = source.model
    window = model.encoder_window if source.objective == "mlm" else model.decoder_window_keys
    lists = token_lists(model.vocab_size, window, model.max_position_embeddings)
    ours = _our_side(source, folder, dtype, our_logits, lists)
    alone, padded = transformers_logits(folder, source.objective, lists)
    found = [_difference(folder, ours[i], theirs) for i in range(len(lists)) for theirs in (alone[i], padded[i])]
    difference, largest = max(one.difference for one in found), max(one.largest for one in found)
    tolerance = max(TOLERANCE, TOLERANCE_OF_LARGEST * largest)
    if not difference <= tolerance:
        raise ParityError(
            f"{folder}: logits differ from transformers' by {difference:.2e}, more than {tolerance:.0e}; not exported"
        )
    if any(one.widest_tie > 2 * tolerance for one in found):
        raise ParityError(f"{folder}: the likeliest token is another one than transformers'; not exported")
    return {
        **{"max_abs_logit_difference": difference, "tolerance": tolerance, "largest_logit": largest},
        **{"argmax_equal": not any(one.near_ties for one in found), "near_ties": sum(one.near_ties for one in found)},
        "tokens": sum(len(ids) for ids in lists),
    }


@dataclass(frozen=True)
class Difference:
    """Of two logits [tokens, vocabulary]. Near ties are tokens at which the two likeliest ids change places, which
    rounding may do where their logits are within it of each other; `widest_tie` is how far apart these were."""

    difference: float  # infinite where one holds a NaN
    largest: float
    near_ties: int
    widest_tie: float


def _difference(folder: Path, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    if ours.shape != theirs.shape:
        raise ParityError(f"{folder}: logits are {tuple(theirs.shape)}, not {tuple(ours.shape)}")
    gap = (ours - theirs).abs().max().item()
    mine, other = ours.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
    ties = (ours.gather(-1, mine) - ours.gather(-1, other))[mine != other]
    widest = ties.max().item() if ties.numel() else 0.0
    return Difference(gap if gap == gap else float("inf"), ours.abs().max().item(), ties.numel(), widest)


def _our_side(
    source: Source, folder: Path, dtype: torch.dtype, our_logits: Logits, lists: list[list[int]]
) -> Sequence[torch.Tensor]:
    if dtype == torch.float32:
        return our_logits(source.checkpoint, lists, source.objective)
    with tempfile.TemporaryDirectory(prefix=".tmp-reimport-", dir=folder.parent) as room:
        from_hf(folder, Path(room) / "checkpoint")
        return our_logits(Path(room) / "checkpoint", lists, source.objective)


def transformers_logits(
    folder: Path, objective: str, lists: list[list[int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """transformers' float32 logits of each list, run alone and run in one batch padded on the right."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading a few tensors
    loader = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    # eager: plain matrix products, the same in every version
    model = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    longest = max(map(len, lists))
    pad = model.config.pad_token_id or 0  # masked: any id does
    batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in lists])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in lists])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in lists]
        padded = model(input_ids=batch, attention_mask=mask).logits
    return alone, [padded[i, : len(ids)] for i, ids in enumerate(lists)]
