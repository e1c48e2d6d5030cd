"""Copy tokenizer files between a checkpoint's tokenizer/ and the root of a Hugging Face folder.

Checkpoints of both objectives hold the same files, so that a pair shares its data. The released files differ. An
encoder's tokenizer returns [CLS] text [SEP], as training framed every chunk, and pads on the right. A decoder's returns
[CLS] text, because `generate` would begin another text after [SEP]; it pads on the left and also names the two tokens
bos and eos, which evaluations of decoders need. Ids and roles are those of training (data/tokenizer.py). An import
undoes these changes. Settings that cannot be derived from the released files are kept in tokenizer_config.json under
the key `TRAINED`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_object
from megatron_ettin.config.tables import VOCABULARY
from megatron_ettin.convert.folders import hf_file
from megatron_ettin.data.tokenizer import read_backend, special_tokens, vocabulary_size, write_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PADDING_SIDES = {"mlm": "right", "clm": "left"}
INPUTS = ["input_ids", "attention_mask"]
PUBLISHED_IDS = {"unk": 50_280, "cls": 50_281, "sep": 50_282, "pad": 50_283, "mask": 50_284}
TRAINED = "megatron_ettin_trained"
"""Key of tokenizer_config.json for the post-processor and pad token of training, if an import cannot derive them."""


def export_tokenizer(source: Path, target: Path, objective: str, max_length: int, ends_with_sep: bool) -> bool:
    """Copy a checkpoint's tokenizer into a released folder, adapted to the objective.

    Args:
        source: the checkpoint's tokenizer/.
        target: the released folder.
        objective: mlm or clm.
        max_length: tokens of the longest text trained on, special tokens included.
        ends_with_sep: whether the chunks of training ended in [SEP].

    Returns:
        True; False if the checkpoint has no tokenizer.
    """
    if not _copy(source, target):
        return False
    content, settings = load_object(target / FILES[0]), _read_settings(target)
    trained = {"post_processor": content.get("post_processor"), "pad_token": settings.get("pad_token")}
    tokens = special_tokens(target)
    if "cls" in tokens and "sep" in tokens:
        _set_frame(content, tokens, ends_with_sep and objective == "mlm")
        write_json(target / FILES[0], content)
    given = {key: value for key, value in settings.items() if value is not None}
    settings = {f"{role}_token": text for role, (_, text) in tokens.items()} | given
    _drop_ends(settings)
    if objective == "clm":
        settings.setdefault("bos_token", settings.get("cls_token"))
        settings.setdefault("eos_token", settings.get("sep_token"))
    # without model_input_names, transformers 4 makes token_type_ids, which the model refuses
    settings = _for_both_generations(settings) | {
        "padding_side": PADDING_SIDES[objective],
        "model_input_names": INPUTS,
    }
    settings["model_max_length"] = max_length
    # `content` is now what an import derives without TRAINED
    _set_closing(content, _text(settings, "cls"), _text(settings, "sep"), True)
    if trained != {"post_processor": content.get("post_processor"), "pad_token": settings.get("pad_token")}:
        settings[TRAINED] = trained
    write_json(target / FILES[1], settings)
    return True


def import_tokenizer(source: Path, target: Path) -> bool:
    """Copy a released folder's tokenizer into a checkpoint, as training had it.

    Returns:
        True; False if the folder has no tokenizer.
    """
    if not _copy(source, target):
        return False
    content, given = load_object(target / FILES[0]), _read_settings(target)
    settings = {key: value for key, value in given.items() if key not in (TRAINED, "padding_side")}
    _drop_ends(settings)
    trained = given.get(TRAINED)
    if isinstance(trained, dict) and "post_processor" in trained:
        content["post_processor"] = trained["post_processor"]
        if trained.get("pad_token") is None:
            settings.pop("pad_token", None)
        write_json(target / FILES[0], content)
    elif _set_closing(content, _text(settings, "cls"), _text(settings, "sep"), True):
        write_json(target / FILES[0], content)
    if settings != given:
        write_json(target / FILES[1], settings)
    return True


def _copy(source: Path, target: Path) -> bool:
    """Copy the FILES that exist; return False without tokenizer.json. Raises UserError if a link leads elsewhere."""
    if not (source / FILES[0]).is_file():
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = hf_file(source, name)
        if path.is_file():
            shutil.copyfile(path, target / name)
    return True


def _drop_ends(settings: dict[str, Any]) -> None:
    """Remove bos and eos from `settings` if they only repeat cls and sep."""
    for end, role in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if end in settings and settings[end] == settings.get(role):
            del settings[end]


def _for_both_generations(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with keys and values that only transformers 5 knows replaced by those that 4 and 5 read."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # transformers 4 expects an object under this key
    if isinstance(settings.get("extra_special_tokens"), list):
        more = settings["extra_special_tokens"]
        settings = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
        settings |= {"additional_special_tokens": more} if more else {}
    return settings


def _set_frame(content: dict[str, Any], tokens: dict[str, tuple[int, str]], closing: bool) -> None:
    """Change tokenizer.json's `content` to put [CLS] before a text, [SEP] after it if `closing`, and nothing else."""
    (cls_id, cls), (sep_id, sep) = tokens["cls"], tokens["sep"]
    after = [sep_id] if closing else []
    if _frames(content, [cls_id], after):
        return
    if _set_closing(content, cls, sep, closing) and _frames(content, [cls_id], after):
        return
    content["post_processor"] = _template(content.get("post_processor") or {}, tokens, closing)


def _frames(content: dict[str, Any], before: list[int], after: list[int]) -> bool:
    """Return whether the tokenizer adds exactly the ids `before` and `after` to a text. Raises UserError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        # the library raises plain Exception
        raise UserError(f"{FILES[0]}: unreadable ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bare, framed = (tokenizer.encode("a text", add_special_tokens=special).ids for special in (False, True))
    return framed == [*before, *bare, *after]


def _template(old: dict[str, Any], tokens: dict[str, tuple[int, str]], closing: bool) -> dict[str, Any]:
    """Return a post-processor that adds [CLS] and [SEP]; ByteLevel steps of the old one, which set offsets, stay."""
    known = {text: {"id": text, "ids": [number], "tokens": [text]} for number, text in (tokens["cls"], tokens["sep"])}
    cls, sep = ({"SpecialToken": {"id": tokens[role][1], "type_id": 0}} for role in ("cls", "sep"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    frame = {
        "type": "TemplateProcessing",
        "single": [cls, first, *([sep] if closing else [])],
        "pair": [cls, first, sep, second, sep],
        "special_tokens": known,
    }
    steps = [step for step in [old, *old.get("processors", [])] if step.get("type") == "ByteLevel"]
    return {"type": "Sequence", "processors": [*steps, frame]} if steps else frame


def _set_closing(content: dict[str, Any], cls: str, sep: str, closing: bool) -> bool:
    """Add (if `closing`) or remove the last [SEP] of the template for one text; that for a pair of texts stays.

    Returns:
        Whether `content` changed.
    """
    template = content.get("post_processor") or {}
    pieces = template.get("single") if template.get("type") == "TemplateProcessing" else None
    if not pieces or sep not in template.get("special_tokens", {}):
        return False
    names = [piece.get("SpecialToken", {}).get("id") for piece in pieces]
    if not closing and names == [cls, None, sep]:
        pieces.pop()
    elif closing and names == [cls, None]:
        pieces.append({"SpecialToken": {"id": sep, "type_id": 0}})
    else:
        return False
    return True


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty without one."""
    return load_object(folder / FILES[1]) if (folder / FILES[1]).is_file() else {}


def _text(settings: dict[str, Any], role: str) -> str:
    """Return the text of a role's token in tokenizer_config.json (a string or an object); by default [ROLE]."""
    token = settings.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return str(token or f"[{role.upper()}]")


def token_count(tokenizer: Path) -> int:
    """Return one more than the largest id of the tokenizer in the folder `tokenizer`."""
    return vocabulary_size(read_backend(tokenizer / FILES[0]))


def special_ids(tokenizer: Path, vocab_size: int, recorded: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of unk, cls, sep, pad and mask.

    The tokenizer's ids come first, then those that an import `recorded`. For a role that neither has, a vocabulary of
    the published size without a tokenizer gets the published id. Otherwise one of the last five ids stands in, because
    transformers needs such ids in every decoder's config. The folder `tokenizer` need not exist.
    """
    known, has_tokenizer = dict(recorded), (tokenizer / FILES[0]).is_file()
    if has_tokenizer:
        known |= {role: number for role, (number, _) in special_tokens(tokenizer).items()}
    if vocab_size == VOCABULARY and not has_tokenizer:
        return PUBLISHED_IDS | known
    return {role: max(0, vocab_size - 5 + i) for i, role in enumerate(PUBLISHED_IDS)} | known
