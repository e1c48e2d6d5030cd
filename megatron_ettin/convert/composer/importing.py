"""Import the original trainer's checkpoint file as a weights-only checkpoint for training, evaluation and export.

One tensor is in memory at a time; the file's optimizer state is never read. The tokenizer that Composer records in the
file comes along.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.convert.composer.description import resolve_model
from megatron_ettin.convert.composer.torch_file import TorchFile
from megatron_ettin.convert.composer.weights import BIAS, find_weights, lookup
from megatron_ettin.convert.importing import ModelImport, Report
from megatron_ettin.convert.rules import weight_mappings
from megatron_ettin.convert.source import check_objective
from megatron_ettin.convert.tokenizer_files import FILES, import_tokenizer, token_count

FRESH = "only weights are read: training from them starts with a fresh optimizer"
NO_BIAS = "the file has no decoder.bias: zeros are stored, which is the same model"
NO_TOKENIZER = "the file records no tokenizer.json: the checkpoint has no tokenizer"


def from_composer(
    file: Path, out: Path, config: Path | None = None, report: Report | None = None, objective: str | None = None
) -> dict[str, Any]:
    """Import `file` into the new checkpoint folder `out`.

    Args:
        file: a file of torch.save.
        out: the checkpoint's folder.
        config: the run's YAML, or a config.json; without it the file's own record is used, else the published size.
        report: called with (tensors done, tensors in all).
        objective: mlm or clm, to import the weights as another objective's.

    Returns:
        What was read and what had to be assumed.
    """
    file, out = Path(file), Path(out)
    if objective is not None:
        check_objective(objective)
    with contextlib.closing(TorchFile(file)) as source:
        weights = find_weights(source)
        described = resolve_model(weights, config, objective)
        assert described.objective is not None
        notes = [*described.notes, *([] if BIAS in weights.tensors else [NO_BIAS]), FRESH]
        mappings = list(weight_mappings(described.model, weights.naming))
        model = ModelImport(weights, described.model, described.objective, mappings, notes)
        model.check(described.source, optional=(BIAS,))
        return model.write(out, lambda target: _import_tokenizer(source.tree, target, file), NO_TOKENIZER, report)


def _import_tokenizer(tree: Any, target: Path, file: Path) -> int | None:
    """Write the recorded tokenizer to the folder `target`.

    Returns:
        The number of its ids; None where the file records no tokenizer.
    """
    recorded = lookup(tree, "state", "integrations", "huggingface", "tokenizer")
    contents = {name: lookup(recorded, name, "content") for name in FILES}
    if not isinstance(contents[FILES[0]], dict):
        return None
    folder = target.with_name(".recorded")
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
        import_tokenizer(folder, target)
        return token_count(target)
    except UserError:
        raise UserError(f"{file}: the recorded {FILES[0]} is no tokenizer that `tokenizers` can read") from None
    finally:
        shutil.rmtree(folder)
