"""Verify that an exported folder equals the checkpoint: compare tensors bit for bit and logits with transformers'.

The function that computes our model's logits is an argument, because conversion may not import the model. A bfloat16
export has rounded weights, so our model runs on a checkpoint imported from it. Both models then have the same weights,
and the tolerance covers only float32 arithmetic in another order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.safetensors_file import ModelFiles
from megatron_ettin.convert.source import SourceCheckpoint

Logits = Callable[[Path, list[list[int]], str], Sequence[torch.Tensor]]
"""(checkpoint, token lists, objective) -> float32 logits [tokens, vocabulary] of each list."""
TOLERANCE, TOLERANCE_OF_LARGEST = 1e-4, 2e-5
"""Largest allowed difference of float32 logits: absolute, and as a share of the largest logit; the larger one counts.

Rounding grows with the size of the logits; 1e-5 was measured at a largest logit of 5. Weights of either dtype are
compared in float32 arithmetic, so one tolerance serves both.
"""
SEED = 21


class ParityError(Exception):
    """The exported folder differs from the checkpoint: a fault of this program, never of the user."""


def check_export(
    source: SourceCheckpoint, folder: Path, dtype: torch.dtype, our_logits: Logits | None
) -> dict[str, Any]:
    """Compare an export whose weights are `dtype` with its checkpoint; if `our_logits` is None, only the tensors.

    Returns:
        The content of parity.json.

    Raises:
        ParityError: a tensor or the logits differ.
    """
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


def compare_tensors(source: SourceCheckpoint, folder: Path, dtype: torch.dtype) -> int:
    """Compare the bits of every exported tensor with the checkpoint's in `dtype`; return the number of tensors.

    Raises:
        ParityError: a name or a bit differs.
    """
    files = ModelFiles(folder)
    stored = {name for mapping in source.mappings for name in mapping.hf_names}
    if set(files.tensors) != stored:
        raise ParityError(f"{folder}: names differ: {sorted(set(files.tensors) ^ stored)[:3]}")
    for mapping, tensor in source.tensors():
        back = mapping.transform.merge([files.read(name) for name in mapping.hf_names], source.model)
        if not _same_bits(back, tensor.to(dtype)):
            raise ParityError(f"{folder}: {', '.join(mapping.hf_names)} read back is not {mapping.name}")
    return len(stored)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the bytes are equal: a NaN equals itself and -0.0 is not 0.0."""
    same_type = a.dtype == b.dtype and a.shape == b.shape
    return same_type and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def token_lists(vocab_size: int, window: int, longest: int) -> list[list[int]]:
    """Return three lists of seeded random ids of at most `longest`; two are longer than the window of local layers."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [min(longest, length) for length in (2 * window + 37, window + 9, max(2, window // 2))]
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _compare_logits(source: SourceCheckpoint, folder: Path, dtype: torch.dtype, our_logits: Logits) -> dict[str, Any]:
    """Return the entries of the parity record on logits, of lists run alone and in one batch. Raises ParityError."""
    model = source.model
    window = model.encoder_window if source.objective == "mlm" else model.decoder_window_keys
    lists = token_lists(model.vocab_size, window, model.max_position_embeddings)
    if dtype == torch.float32:
        ours = our_logits(source.checkpoint, lists, source.objective)
    else:
        # the exported weights are rounded, so our model must run on them too
        with tempfile.TemporaryDirectory(prefix=".tmp-reimport-", dir=folder.parent) as temporary:
            from_hf(folder, Path(temporary) / "checkpoint")
            ours = our_logits(Path(temporary) / "checkpoint", lists, source.objective)
    alone, padded = transformers_logits(folder, source.objective, lists)
    for theirs, mine in zip([*alone, *padded], [*ours, *ours], strict=True):
        if theirs.shape != mine.shape:
            raise ParityError(f"{folder}: logits are {tuple(theirs.shape)}, not {tuple(mine.shape)}")
    # [tokens of all lists, twice, vocabulary]
    mine, theirs = torch.cat([*ours, *ours]), torch.cat([*alone, *padded])
    difference, largest = (mine - theirs).abs().max().item(), mine.abs().max().item()
    tolerance = max(TOLERANCE, TOLERANCE_OF_LARGEST * largest)
    # `difference > tolerance` would be false for NaN
    if not difference <= tolerance:
        raise ParityError(
            f"{folder}: logits differ from transformers' by {difference:.2e}, more than {tolerance:.0e}; not exported"
        )
    likeliest, other = mine.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
    # margins at positions whose likeliest id differs, as rounding may cause if two logits are close
    ties = (mine.gather(-1, likeliest) - mine.gather(-1, other))[likeliest != other]
    if ties.numel() and ties.max().item() > 2 * tolerance:
        raise ParityError(f"{folder}: the likeliest token is another one than transformers'; not exported")
    return {
        **{"max_abs_logit_difference": difference, "tolerance": tolerance, "largest_logit": largest},
        **{"argmax_equal": not ties.numel(), "near_ties": ties.numel()},
        "tokens": sum(len(ids) for ids in lists),
    }


def transformers_logits(
    folder: Path, objective: str, lists: list[list[int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return transformers' float32 logits [tokens, vocabulary] of each list: run alone, and in a right-padded batch."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    # eager attention is plain matrix products, the same in every version
    model = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    longest = max(map(len, lists))
    # the attention mask hides padding, so any id will do
    pad = model.config.pad_token_id or 0
    batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in lists])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in lists])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in lists]
        padded = model(input_ids=batch, attention_mask=mask).logits
    return alone, [padded[i, : len(ids)] for i, ids in enumerate(lists)]
