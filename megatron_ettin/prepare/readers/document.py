"""Define the document that every reader yields, a text or its token ids, and the settings of the readers.

Token inputs may have special tokens around their own: chunks between [CLS] and [SEP], rows filled up with [PAD]. These
are removed from each sequence, and the remaining tokens are cut like those of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.input_file import InputFile

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Document:
    """One document from a reader. It has a text if `tokens` is None, else token ids."""

    file: InputFile
    id: str
    """Value of the id column, else file:line, file@byte or file#row; the file's name for a text file."""
    text: str = ""
    tokens: npt.NDArray[np.uint32] | None = None
    """Token ids without the special tokens around them; None for a text."""

    @property
    def size(self) -> int:
        """Return the number of characters or tokens."""
        return len(self.text) if self.tokens is None else len(self.tokens)


@dataclass(frozen=True)
class ReadOptions:
    """Settings of the readers."""

    text_key: str = "text"
    id_key: str = "id"
    tokens_key: str = "input_ids"
    tokenizer: Tokenizer | None = None
    """Tokenizer that token inputs are checked against; None if they cannot be read."""
    tokens_first: bool = False
    """Read the token column if a file has both a text and a token column."""
    text_may_be_json: bool = False
    """Accept a text file whose first line is a JSON object (`--format text`); otherwise it is refused."""


def document_tokens(sequences: Iterable[IntArray], where: str, tokenizer: Tokenizer) -> npt.NDArray[np.uint32]:
    """Join the sequences of one document, each by `without_outer_specials`.

    Args:
        sequences: token ids.
        where: the document's name, for messages.
        tokenizer: the tokenizer that the ids are expected to come from.

    Raises:
        UserError: an id is outside the vocabulary.
    """
    pieces: list[IntArray] = []
    first = 0
    for ids in sequences:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size):
            position = int(np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))[0])
            raise UserError(
                f"{where}: token id {int(ids[position])} at position {first + position}; "
                f"the tokenizer's vocabulary has ids 0 to {tokenizer.vocab_size - 1}"
            )
        pieces.append(without_outer_specials(ids, tokenizer))
        first += len(ids)
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
    return joined.astype(np.uint32, copy=False)


def without_outer_specials(ids: IntArray, tokenizer: Tokenizer) -> IntArray:
    """Return ids without one leading [CLS], every trailing [PAD] and then one trailing [SEP]."""
    start, end = 0, len(ids)
    if end and ids[0] == tokenizer.cls_id:
        start = 1
    if end > start and ids[end - 1] == tokenizer.pad_id:
        kept = np.flatnonzero(ids[start:] != tokenizer.pad_id)
        end = start + (int(kept[-1]) + 1 if len(kept) else 0)
    if end > start and ids[end - 1] == tokenizer.sep_id:
        end -= 1
    return ids[start:end]
