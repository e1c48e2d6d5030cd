"""Tokenizer files that travel with a model: between the checkpoint's tokenizer/ and the root of a Hugging Face folder.

They are copied byte for byte. The special ids of a config.json are looked up in them, so that a model trained with
another tokenizer says its own; without files the published ids stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_ettin.config.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PUBLISHED_IDS = {"unk": 50_280, "cls": 50_281, "sep": 50_282, "pad": 50_283, "mask": 50_284}


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files; False where `source` has none."""
    if not (source / FILES[0]).is_file():
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return True


def token_count(tokenizer: Path) -> int:
    """One more than the largest id of the tokenizer in the folder `tokenizer`."""
    return max(_vocabulary(tokenizer).values(), default=-1) + 1


def _vocabulary(tokenizer: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    path = tokenizer / FILES[0]
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: unreadable ({error})") from None


def special_ids(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Ids of unk, cls, sep, pad and mask: the tokenizer's, else the published ones.

    A vocabulary too small for those (a test's) has them in its last five rows, for transformers wants a pad row."""
    published = PUBLISHED_IDS if vocab_size > max(PUBLISHED_IDS.values()) else _last_rows(vocab_size)
    if not (tokenizer / FILES[0]).is_file():
        return published
    vocabulary = _vocabulary(tokenizer)
    named = {}
    if (tokenizer / FILES[1]).is_file():
        try:
            named = json.loads((tokenizer / FILES[1]).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{tokenizer / FILES[1]}: unreadable ({error})") from None
    ids = {}
    for kind, default in published.items():
        token = named.get(f"{kind}_token") or f"[{kind.upper()}]"
        token = token["content"] if isinstance(token, dict) else token
        ids[kind] = vocabulary.get(token, default)
    return ids


def _last_rows(vocab_size: int) -> dict[str, int]:
    return {kind: max(0, vocab_size - 5 + place) for place, kind in enumerate(PUBLISHED_IDS)}
