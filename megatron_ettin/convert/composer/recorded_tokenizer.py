"""The tokenizer that Composer records in a checkpoint file, file by file, as the checkpoint's tokenizer/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.convert.composer.names import at
from megatron_ettin.convert.tokenizer_files import FILES, import_tokenizer, token_count

NONE = "the file records no tokenizer.json: the checkpoint has no tokenizer"


def write_tokenizer(tree: Any, staging: Path, model: ModelConfig, file: Path) -> list[str]:
    """Write `staging`/tokenizer where the file has one. Returns what a reader must know."""
    recorded = at(tree, "state", "integrations", "huggingface", "tokenizer")
    contents = {name: at(recorded, name, "content") for name in FILES}
    if not isinstance(contents[FILES[0]], dict):
        return [NONE]
    folder = staging / ".recorded"
    folder.mkdir()
    for name, content in contents.items():
        if not isinstance(content, dict):
            continue
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        except (TypeError, ValueError, RecursionError):
            raise UserError(f"{file}: the recorded {name} is not plain JSON") from None
    try:
        import_tokenizer(folder, staging / "tokenizer")
        tokens = token_count(staging / "tokenizer")
    except UserError:
        raise UserError(f"{file}: the recorded {FILES[0]} is no tokenizer that `tokenizers` can read") from None
    finally:
        shutil.rmtree(folder)
    if tokens > model.vocab_size:
        raise UserError(f"{file}: the tokenizer has {tokens:,} ids, the model's vocabulary {model.vocab_size:,} rows")
    return []
