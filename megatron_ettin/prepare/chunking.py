"""Cut documents into chunks as the recipe does: pieces of chunk_tokens - 2 tokens between [CLS] and [SEP].

The released scripts disagree about the [SEP]: one appends it to every chunk, another has that line commented out, a
third asserts that it is there. `end_token` therefore has all three readings: every chunk ends in it (the default, which
the assertion and the encoder's loader ask for), only a document's last chunk does, or none does. The pieces are
chunk_tokens - 2 long in each case, as in the scripts.

Let a document's last piece have `rest` tokens. It is dropped if it is shorter than skip_tokens, unless it is the only
one. If it is shorter than min_chunk_tokens, the boundary before it moves back by 0 to chunk_tokens - 3 - rest tokens.
So no token is read twice, and the last two pieces keep at least `rest` tokens each. Their lengths are uniformly
distributed, which lets rows be packed full. The recipe draws the number at random; this module derives it from a hash
of the document, so it is the same in every run. Encoder and decoder read the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.data.hashing import key64

SMALLEST_CHUNK_TOKENS = 16
# chunk_tokens -> (min_chunk_tokens, skip_tokens): the folder name "1024-512-128", the script's "8192-512-32", and the
# 8,000 of the context extension, whose loader then cuts to 7,999
RECIPE_LIMITS = {1_024: (512, 128), 7_999: (512, 32), 8_000: (512, 32), 8_192: (512, 32)}


@dataclass(frozen=True)
class ChunkRule:
    """Limits for cutting documents into chunks."""

    chunk_tokens: int
    """Longest chunk, special tokens included."""
    min_chunk_tokens: int
    """Shortest last piece that stays as it is, in document tokens."""
    skip_tokens: int
    """Shortest last piece that is not dropped, in document tokens."""
    end_token: str = "every"
    """Chunks of a document that end in [SEP]: `every`, `last` or `none`."""


def chunk_rule(
    chunk_tokens: int,
    min_chunk_tokens: int | None = None,
    skip_tokens: int | None = None,
    end_token: str = "every",
) -> ChunkRule:
    """Return the rule of a chunk size. Raises UserError.

    Limits that are None follow the recipe: RECIPE_LIMITS for its own sizes, else half and an eighth of the chunk, at
    most 512 and 128. `min_chunk_tokens=0, skip_tokens=0` moves no boundary and drops no piece.
    """
    if chunk_tokens < SMALLEST_CHUNK_TOKENS:
        raise UserError(f"--chunk-tokens: {chunk_tokens}; at least {SMALLEST_CHUNK_TOKENS}")
    least, skip = RECIPE_LIMITS.get(chunk_tokens, (min(512, chunk_tokens // 2), min(128, chunk_tokens // 8)))
    least = least if min_chunk_tokens is None else min_chunk_tokens
    skip = min(skip, least) if skip_tokens is None else skip_tokens
    if not 0 <= least <= chunk_tokens - 2:
        raise UserError(f"--min-chunk-tokens: {least}; allowed: 0 to {chunk_tokens - 2} (without specials)")
    if not 0 <= skip <= least:
        raise UserError(f"--skip-tokens: {skip}; allowed: 0 to {least} (min_chunk_tokens)")
    return ChunkRule(chunk_tokens, least, skip, end_token)


def piece_bounds(num_tokens: int, rule: ChunkRule, document_key: str) -> list[tuple[int, int]]:
    """Return the tokens [start, end) of each piece of a document; later tokens are dropped.

    `document_key` is hashed for the boundary before a short last piece.
    """
    size = rule.chunk_tokens - 2
    starts = range(0, num_tokens, size)
    bounds = [(start, min(start + size, num_tokens)) for start in starts]
    if len(bounds) < 2:
        return bounds
    start, end = bounds[-1]
    rest = end - start
    if rest < rule.skip_tokens:
        return bounds[:-1]
    if rest < rule.min_chunk_tokens:
        moved = key64("chunk", document_key) % (size - rest)
        bounds[-2:] = [(bounds[-2][0], start - moved), (start - moved, end)]
    return bounds


def chunk_lengths(bounds: list[tuple[int, int]], end_token: str) -> list[int]:
    """Return the number of tokens of each chunk of one document, special tokens included."""
    last = len(bounds) - 1
    return [end - start + 1 + has_end_token(i == last, end_token) for i, (start, end) in enumerate(bounds)]


def has_end_token(is_last_of_document: bool, end_token: str) -> bool:
    """Return whether a chunk ends in [SEP] under this `end_token`."""
    return end_token == "every" or (end_token == "last" and is_last_of_document)


def add_special_tokens(
    ids: npt.NDArray[np.integer], bounds: list[tuple[int, int]], cls_id: int, sep_id: int, end_token: str = "every"
) -> npt.NDArray[np.integer]:
    """Return the pieces of one document between [CLS] and, by `end_token`, [SEP], as one array."""
    lengths = chunk_lengths(bounds, end_token)
    out = np.empty(sum(lengths), dtype=ids.dtype)
    position = 0
    for (start, end), length in zip(bounds, lengths, strict=True):
        out[position] = cls_id
        out[position + 1 : position + 1 + end - start] = ids[start:end]
        position += length
        if length > end - start + 1:
            out[position - 1] = sep_id
    return out
