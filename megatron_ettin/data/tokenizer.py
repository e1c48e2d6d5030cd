"""Load and save tokenizers through the `tokenizers` library alone.

`transformers`, which takes seconds to import, is imported only for a hub name that has no tokenizer.json. A run needs
little of a tokenizer: ids without special tokens, the roles of the special ids, and a fingerprint that tells whether
two datasets were made by the same one. Chunks begin with [CLS] (BOS if a tokenizer has none) and end with [SEP] (else
EOS). A prefix space is added in front of a text only. The option `add_prefix_space` of ByteLevel is not used, because
it also adds a space after every added token, which changes code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.parsing import load_object
from megatron_ettin.data.default_tokenizer import default_tokenizer_directory

DEFAULT_NAME = "ettin"
LONG_TEXT_CHARACTERS = 1 << 18
# characters given to the library in one call
BATCH_CHARACTERS = 1 << 20
LETTER_SPACE_LETTER = re.compile(r"[A-Za-z] (?=[A-Za-z])")
# role -> its names in tokenizer_config.json
ROLE_KEYS = {
    "unk": ("unk_token",),
    "cls": ("cls_token", "bos_token", "eos_token"),
    "sep": ("sep_token", "eos_token", "cls_token"),
    "pad": ("pad_token",),
    "mask": ("mask_token",),
}
# role -> token texts to try if the config names none
ROLE_TEXTS = {
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "sep": ("[SEP]", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "mask": ("[MASK]", "<mask>"),
}


def vocabulary_size(backend: tokenizers.Tokenizer) -> int:
    """Return one more than the largest id: the number of rows that an embedding needs.

    It is more than the number of entries if some ids are unused.
    """
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class Tokenizer:
    """A `tokenizers.Tokenizer` and the roles of its special ids."""

    def __init__(self, backend: tokenizers.Tokenizer, roles: dict[str, int | None], name: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.name = name
        self.roles = roles
        self.cls_id = required(roles, "cls", name)
        self.sep_id = required(roles, "sep", name)
        self.unk_id = roles.get("unk")
        self.mask_id = roles.get("mask")
        pad = roles.get("pad")
        # any id serves: padding is never trained on, because rows carry their lengths
        self.pad_id = self.sep_id if pad is None else pad
        self.vocab_size = vocabulary_size(backend)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Return the ids that are never masked, ascending; `all_special_ids` of Hugging Face."""
        ids = {self.unk_id, self.cls_id, self.sep_id, self.pad_id, self.mask_id}
        return tuple(sorted(i for i in ids if i is not None))

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of the canonical JSON of the tokenizer and its roles; the same after save and load."""
        content = {"roles": self.roles, "tokenizer": json.loads(self.backend.to_str())}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def has_holes(self) -> bool:
        """Return True if some ids below `vocab_size` belong to no entry."""
        return self.backend.get_vocab_size(with_added_tokens=True) < self.vocab_size

    def encode_batch(self, texts: Sequence[str], add_prefix_space: bool = True) -> list[list[int]]:
        """Return the ids of each text, without added special tokens. Those written in the text become their ids."""
        return [ids.tolist() for ids in self.encode_arrays(texts, add_prefix_space)]

    def encode_arrays(self, texts: Sequence[str], add_prefix_space: bool = True) -> Iterator[npt.NDArray[np.uint32]]:
        """Yield the ids of each text, as `encode_batch` returns them.

        The library encodes a bounded number of characters at a time. So a text of a gigabyte that can be cut takes
        memory for its ids (4 bytes each), not for all of the library's own data about them.
        """
        parts: list[list[npt.NDArray[np.uint32]]] = [[] for _ in texts]
        next_text = 0
        for group in grouped(self._pieces(texts, add_prefix_space)):
            encoded = self._encoded([piece for _, piece in group])
            for (i, _), encoding in zip(group, encoded, strict=True):
                parts[i].append(np.array(encoding.ids, dtype=np.uint32))
            # the group's last text may continue in the next one
            while next_text < group[-1][0]:
                yield joined(parts[next_text])
                parts[next_text] = []
                next_text += 1
        yield from (joined(part) for part in parts[next_text:])

    def _encoded(self, pieces: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        except BaseException as error:
            raise_unless_library(error)
            raise UserError(f"tokenizer {self.name}: cannot encode a text ({first_line(error)})") from None

    def _pieces(self, texts: Sequence[str], add_prefix_space: bool) -> Iterator[tuple[int, str]]:
        """Yield (number of the text, piece) for every piece of every text; each text has at least one."""
        for i, text in enumerate(texts):
            spaced = " " + text if add_prefix_space and text and text[0] != " " else text
            yield from ((i, piece) for piece in self._cut_long(spaced))

    def _cut_long(self, text: str) -> list[str]:
        """Cut a long text into pieces with the same ids, because the library takes 100 bytes of memory per character.

        Cuts are made only before a lone space between ASCII letters, where GPT-2's pre-tokenizer always begins a word.
        """
        if len(text) <= LONG_TEXT_CHARACTERS or not self._splits_at_spaces:
            return [text]
        pieces, start = [], 0
        while match := LETTER_SPACE_LETTER.search(text, start + LONG_TEXT_CHARACTERS):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*pieces, text[start:]]

    @cached_property
    def _splits_at_spaces(self) -> bool:
        content = json.loads(self.backend.to_str())
        before, normalizer = content["pre_tokenizer"] or {}, content["normalizer"] or {}
        byte_level = before.get("type") == "ByteLevel" and before.get("use_regex", True)
        spaced = any(" " in token["content"].strip(" ") for token in content["added_tokens"])
        prefixed = before.get("add_prefix_space", False)
        return byte_level and not prefixed and not spaced and normalizer.get("type") in (None, "NFC")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and the two files from which transformers (4.56 to 5.x) reads the special tokens."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {f"{role}_token": self.backend.id_to_token(i) for role, i in self.roles.items() if i is not None}
        added = json.loads(self.backend.to_str())["added_tokens"]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(token.pop("id")): token for token in added},
            **texts,
        }
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        special = {f"{role}_token": self._special_entry(i) for role, i in self.roles.items() if i is not None}
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer_config.json", config)

    def _special_entry(self, token_id: int) -> dict[str, Any]:
        token = self.backend.get_added_tokens_decoder().get(token_id)
        text = self.backend.id_to_token(token_id)
        if token is None:
            return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        flags = ("lstrip", "normalized", "rstrip", "single_word")
        return {"content": text, **{flag: bool(getattr(token, flag)) for flag in flags}}


def grouped(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yield groups of pieces in order; a group ends with the piece that makes it BATCH_CHARACTERS long."""
    group: list[tuple[int, str]] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1])
        if characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def joined(parts: list[npt.NDArray[np.uint32]]) -> npt.NDArray[np.uint32]:
    """Concatenate the ids of a text's pieces, without a copy if there is one piece."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_tokenizer(name_or_path: str | Path = DEFAULT_NAME) -> Tokenizer:
    """Load a tokenizer by name.

    Args:
        name_or_path: "ettin" (the recipe's, built offline), a directory, a tokenizer.json, a dataset directory or a hub
            name. It becomes the `name` of the result.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    name = str(name_or_path)
    if name == DEFAULT_NAME:
        return from_directory(default_tokenizer_directory(), name)
    path = Path(name).expanduser()
    if path.is_file():
        return from_file(path, {}, name)
    if path.is_dir():
        # a dataset has a copy of its tokenizer in tokenizer/
        for folder in (path, path / "tokenizer"):
            if (folder / "tokenizer.json").is_file():
                return from_directory(folder, name)
        raise UserError(f"tokenizer {name}: no tokenizer.json in this directory")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"tokenizer {name}: no such file or directory")
    return from_hub(name)


def from_directory(folder: Path, name: str) -> Tokenizer:
    """Load the tokenizer of a folder."""
    return from_file(folder / "tokenizer.json", read_settings(folder), name)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the keys of special_tokens_map.json and tokenizer_config.json; the latter win. Raises UserError."""
    config: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            config |= load_object(folder / file, f"tokenizer {folder / file}")
    return config


def from_file(path: Path, config: dict[str, Any], name: str) -> Tokenizer:
    """Load a tokenizer.json; `config` names its special tokens."""
    backend = read_backend(path)
    return Tokenizer(backend, special_roles(backend, config), name)


def special_tokens(folder: Path) -> dict[str, tuple[int, str]]:
    """Return role -> (id, text) of the special tokens of a tokenizer folder.

    A tokenizer without a pad token pads with [SEP]. Roles without a token are left out.
    """
    backend = read_backend(folder / "tokenizer.json")
    roles = special_roles(backend, read_settings(folder))
    roles["pad"] = roles["sep"] if roles["pad"] is None else roles["pad"]
    return {role: (number, str(backend.id_to_token(number))) for role, number in roles.items() if number is not None}


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json. Raises UserError if the library cannot read it."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        # the library raises bare Exception for whatever it cannot read
        raise_unless_library(error)
        raise UserError(f"tokenizer {path}: not a tokenizer.json ({first_line(error)})") from None


def raise_unless_library(error: BaseException) -> None:
    """Raise `error` again if it is an interrupt or an exit; return if it is an error of the library.

    A panic of its Rust code derives from BaseException, so `except Exception` would not catch it.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def special_roles(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, int | None]:
    """Return the id of each role, or None: of the token that `config` names, else of one with a usual text."""
    roles: dict[str, int | None] = {}
    for role, keys in ROLE_KEYS.items():
        entries = [config.get(key) for key in keys]
        texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
        # half of a surrogate pair, which JSON can hold, is not the text of any token
        given = [text for text in texts if isinstance(text, str) and text.encode("utf-8", "ignore").decode() == text]
        candidates = [*given, *ROLE_TEXTS[role]]
        ids = (backend.token_to_id(text) for text in candidates)
        roles[role] = next((i for i in ids if i is not None), None)
    return roles


def from_hub(name: str) -> Tokenizer:
    """Download a tokenizer by huggingface_hub. transformers converts one without tokenizer.json. Raises UserError."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"tokenizer {name}: no such path, and hub names need `pip install huggingface_hub`") from None
    wanted = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # network, authentication, unknown name: the hub has a class for each
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"tokenizer {name}: no such path, and the hub did not give it: {reason}") from None
    if (folder / "tokenizer.json").is_file():
        return from_directory(folder, name)
    return from_transformers(name)


def from_transformers(name: str) -> Tokenizer:
    """Load a tokenizer from the hub by transformers, which converts it to a tokenizer.json. Raises UserError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, use_fast=True)
        backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:
        raise UserError(f"tokenizer {name}: {' '.join(str(error).split())[:160]}") from None
    return Tokenizer(backend, special_roles(backend, dict(loaded.special_tokens_map)), name)


def required(roles: dict[str, int | None], role: str, name: str) -> int:
    """Return the id of a role. Raises UserError if the tokenizer `name` has none."""
    token_id = roles.get(role)
    if token_id is None:
        raise UserError(f"tokenizer {name}: no {role} token; one of {', '.join(ROLE_KEYS[role])} must be set")
    return token_id


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of the tokenizer. The manifest has its sha256, so equal content must give equal bytes."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
