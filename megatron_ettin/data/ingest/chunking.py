"""Documents to chunks, as the recipe cuts them: pieces of chunk_tokens - 2 tokens, [CLS] before and [SEP] after each.

A document's last piece is dropped when shorter than skip_tokens (unless it is the only one), and filled up from the
piece before it when shorter than min_chunk_tokens: the boundary moves back by 0 to chunk_tokens - 3 - rest tokens, so
no token is read twice, the two pieces keep at least `rest` tokens each and their lengths are spread evenly, which is
what lets rows be packed full. The recipe draws the number at random; here the document's hash does, the same in every
run. Encoder and decoder read the same chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.hashing import key64

SMALLEST_CHUNK_TOKENS = 16
RECIPE_LIMITS = {1_024: (512, 128), 8_192: (512, 32)}  # chunk_tokens -> (min_chunk_tokens, skip_tokens)


@dataclass(frozen=True)
class ChunkRule:
    chunk_tokens: int  # longest chunk, special tokens included
    min_chunk_tokens: int  # of document tokens
    skip_tokens: int  # of document tokens


def chunk_rule(chunk_tokens: int, min_chunk_tokens: int | None = None, skip_tokens: int | None = None) -> ChunkRule:
    """The rule of a chunk size; what is not given follows the recipe (half and an eighth, at most 512 and 128)."""
    if chunk_tokens < SMALLEST_CHUNK_TOKENS:
        raise UserError(f"--chunk-tokens: {chunk_tokens}; at least {SMALLEST_CHUNK_TOKENS}")
    least, skip = RECIPE_LIMITS.get(chunk_tokens, (min(512, chunk_tokens // 2), min(128, chunk_tokens // 8)))
    least = least if min_chunk_tokens is None else min_chunk_tokens
    skip = min(skip, least) if skip_tokens is None else skip_tokens
    if not 0 <= least <= chunk_tokens - 2:
        raise UserError(f"--min-chunk-tokens: {least}; allowed: 0 to {chunk_tokens - 2} (without specials)")
    if not 0 <= skip <= least:
        raise UserError(f"--skip-tokens: {skip}; allowed: 0 to {least} (min_chunk_tokens)")
    return ChunkRule(chunk_tokens, least, skip)


def piece_bounds(num_tokens: int, rule: ChunkRule, document_key: str) -> list[tuple[int, int]]:
    """[start, end) of each piece of a document. What lies after the last end is dropped."""
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


def framed(
    ids: npt.NDArray[np.integer], bounds: list[tuple[int, int]], cls_id: int, sep_id: int
) -> npt.NDArray[np.integer]:
    """The pieces of one document, each between [CLS] and [SEP], as one array."""
    out = np.empty(sum(end - start + 2 for start, end in bounds), dtype=ids.dtype)
    place = 0
    for start, end in bounds:
        out[place] = cls_id
        out[place + 1 : place + 1 + end - start] = ids[start:end]
        place += end - start + 2
        out[place - 1] = sep_id
    return out
