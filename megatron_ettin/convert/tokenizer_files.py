"""Tokenizer files that travel with a model: between the checkpoint's tokenizer/ and the root of a Hugging Face folder.

Checkpoints of both objectives hold the same files, so that a pair shares its data. What a tokenizer does with a text
differs in a released folder: an encoder's writes [CLS] text [SEP] and pads on the right; a decoder's writes [CLS] text,
for a text that ends with [SEP] is finished and `generate` would begin another, pads on the left, and also calls the two
bos and eos, which evaluations of decoders ask for. The way back
undoes exactly that. The special ids of a config.json are looked up in the files, so that a model trained with another
tokenizer says its own; without files the published ids stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.config.json_reading import load_json
from megatron_ettin.convert.hf_files import hf_file

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SIDES = {"mlm": "right", "clm": "left"}  # that a batch is padded on
INPUTS = ["input_ids", "attention_mask"]
PUBLISHED_IDS = {"unk": 50_280, "cls": 50_281, "sep": 50_282, "pad": 50_283, "mask": 50_284}


def export_tokenizer(source: Path, target: Path, objective: str) -> bool:
    """Copy a checkpoint's tokenizer into a released folder; False where there is none."""
    return _copy(source, target) and _set_form(target, closing=objective == "mlm", padding_side=SIDES[objective])


def import_tokenizer(source: Path, target: Path) -> bool:
    """Copy a released folder's tokenizer into a checkpoint; False where there is none."""
    return _copy(source, target) and _set_form(target, closing=True, padding_side=None)


def _copy(source: Path, target: Path) -> bool:
    """Copy the files that are there. Raises UserError for one that is a link to somewhere else."""
    if not (source / FILES[0]).is_file():
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = hf_file(source, name)
        if path.is_file():
            shutil.copyfile(path, target / name)
    return True


def _set_form(folder: Path, closing: bool, padding_side: str | None) -> bool:
    """Let the tokenizer in `folder` end a text with [SEP] or not, and name the side it pads on. A file that says so
    already is not rewritten; a tokenizer that has no such template keeps what it has."""
    settings = _read_json(folder / FILES[1])
    named = {role: _text(settings.get(f"{role}_token"), role) for role in ("cls", "sep")}
    content = _read_json(folder / FILES[0])
    if _set_closing(content, named["cls"], named["sep"], closing):
        _write_json(folder / FILES[0], content)
    ends = {"bos_token": settings.get("cls_token", named["cls"]), "eos_token": settings.get("sep_token", named["sep"])}
    own = {key for key, value in ends.items() if settings.get(key) == value}
    wanted = {key: value for key, value in settings.items() if key != "padding_side" and key not in own}
    if padding_side == "left":
        wanted = {**ends, **wanted}
    if padding_side is not None:
        # without the second, transformers 4 makes token_type_ids, which the model refuses
        wanted = _for_both_generations(wanted) | {"padding_side": padding_side, "model_input_names": INPUTS}
    if wanted != settings:
        _write_json(folder / FILES[1], wanted)
    return True


def _for_both_generations(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes, in the words that 4 knows and 5 still reads."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(settings.get("extra_special_tokens"), list):  # 4 wants an object under this name
        more = settings["extra_special_tokens"]
        settings = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
        settings |= {"additional_special_tokens": more} if more else {}
    return settings


def _set_closing(content: dict[str, Any], cls: str, sep: str, closing: bool) -> bool:
    """Add or take the last [SEP] of the template for one text; True where something changed. The template for a pair
    of texts stays: it is what the tokenizer came with."""
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _text(token: Any, role: str) -> str:
    """What tokenizer_config.json calls a role: a text, or an object with its `content`; the usual name by default."""
    token = token.get("content") if isinstance(token, dict) else token
    return str(token or f"[{role.upper()}]")


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
    vocabulary, named = _vocabulary(tokenizer), _read_json(tokenizer / FILES[1])
    return {
        kind: vocabulary.get(_text(named.get(f"{kind}_token"), kind), default) for kind, default in published.items()
    }


def _last_rows(vocab_size: int) -> dict[str, int]:
    return {kind: max(0, vocab_size - 5 + place) for place, kind in enumerate(PUBLISHED_IDS)}
