"""Make exports by the command line from checkpoints of tiny random models, and store our own model's logits for
them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ettin.cli.main import main
from megatron_ettin.data.tokenizer import load_tokenizer
from megatron_ettin.evaluate.inference import load_for_inference
from megatron_ettin.train import resume
from tests.conftest import sentences
from tests.convert.folders import make_folder
from tests.model.rows import pack_rows

NEW_TOKENS = 16  # twice the window
CLS, SEP = 1, 2
# the third is many times longer than any window (8 keys), and needs much padding in a batch with the others
PROMPT_TOKENS = (40, 47, 61)
TEXTS = [
    "the reader follows the next word.",
    "a small model 's <mask>, twice: \u00e9\u4e2d \n\n  done . ",
    sentences(7, 3),
]
MASKED = "the reader [MASK] the next word."


@dataclass(frozen=True)
class Export:
    """A checkpoint to make, and how to export it by `ettin convert to-hf`."""

    trained_as: str
    one_base: bool  # whether all layers have one rotary base
    options: tuple[str, ...] = ()
    objective: str | None = None  # objective to export as, if it is not that of training
    tokenizer: str = "plain"  # who wrote the tokenizer files: "plain" is by hand, else "transformers" or "prepare"


SHARDED = ("--max-shard-bytes", "100K")
EXPORTS = {
    "encoder": Export("mlm", one_base=False),
    "encoder_bf16": Export("mlm", False, ("--dtype", "bf16", *SHARDED), tokenizer="transformers"),
    "encoder_of_decoder": Export("clm", False, objective="mlm", tokenizer="prepare"),
    "decoder": Export("clm", True, SHARDED),
    "decoder_bf16": Export("clm", True, ("--dtype", "bf16"), tokenizer="transformers"),
    "decoder_of_encoder": Export("mlm", True, objective="clm"),
    "decoder_local_base": Export("clm", False, tokenizer="prepare"),
}


def objective_of(name: str) -> str:
    return EXPORTS[name].objective or EXPORTS[name].trained_as


def ettin(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, arguments)]) == 0, out.getvalue()


def make_export(root: Path, tokenizer: Path, name: str) -> Path:
    """Make the export NAME and return root/exports/NAME, a folder that `cases.Case` reads."""
    export = EXPORTS[name]
    checkpoint = make_checkpoint(root, tokenizer, export)
    target = root / "exports" / name
    target.mkdir(parents=True)
    as_other = ["--objective", export.objective] if export.objective else []
    ettin("convert", "to-hf", checkpoint, target / "model", *export.options, *as_other)
    if "bf16" in export.options:  # our logits must come from the rounded weights too
        checkpoint = root / f"{name}_imported"
        ettin("convert", "from-hf", target / "model", checkpoint)
    write_expected(target, checkpoint, tokenizer, name)
    return target


def make_checkpoint(root: Path, tokenizer: Path, export: Export) -> Path:
    variant = "_".join((export.trained_as, "one_base" if export.one_base else "", export.tokenizer))
    source, checkpoint = root / f"source_{variant}", root / f"checkpoint_{variant}"
    if checkpoint.exists():
        return checkpoint
    make_folder(source, export.trained_as)
    config = json.loads((source / "config.json").read_text())
    if export.one_base:
        config["rope_parameters"]["sliding_attention"] = config["rope_parameters"]["full_attention"]
    (source / "config.json").write_text(json.dumps(config))
    if export.tokenizer == "transformers":
        from transformers import AutoTokenizer

        # transformers 4 and 5 store an additional special token differently; no text contains "Z"
        AutoTokenizer.from_pretrained(tokenizer, extra_special_tokens=["Z"]).save_pretrained(source)
    elif export.tokenizer == "prepare":
        load_tokenizer(tokenizer).save(source)
    else:
        shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    ettin("convert", "from-hf", source, checkpoint)
    return checkpoint


def write_expected(target: Path, checkpoint: Path, tokenizer: Path, name: str) -> None:
    """Write our model's logits and greedy continuations, and the texts' ids by the library `tokenizers`."""
    from tokenizers import Tokenizer

    objective = objective_of(name)
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    closing = [SEP] if objective == "mlm" else []
    text_ids = [[CLS, *backend.encode(text, add_special_tokens=False).ids, *closing] for text in [*TEXTS, MASKED]]
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(5, 320, (tokens - 1,), generator=generator).tolist() for tokens in PROMPT_TOKENS]
    token_lists = [[CLS, *ids] for ids in drawn]
    with load_for_inference(checkpoint, objective) as train_state, torch.no_grad():
        resume.load(train_state, checkpoint, with_optimizer=False)
        model = train_state.model_chunks[0].eval()
        logits = [model(torch.tensor([ids]), pack_rows([[len(ids)]], len(ids))) for ids in [*token_lists, *text_ids]]
        continuations = [continued(model, ids) for ids in [*token_lists, *text_ids]] if objective == "clm" else []
        theta = train_state.config.model
    save_file(
        {str(i): one.reshape(-1, 320).contiguous() for i, one in enumerate(logits)}, target / "logits.safetensors"
    )
    expected = {
        **{"name": name, "objective": objective, "dtype": "bfloat16" if "bf16" in name else "float32"},
        **{"global_rope_theta": theta.global_rope_theta, "local_rope_theta": theta.local_rope_theta},
        **{"token_lists": [*token_lists, *text_ids], "prompts": len(token_lists), "continuations": continuations},
        **{"texts": [*TEXTS, MASKED], "text_ids": text_ids},
        "more_special_tokens": ["Z"] if EXPORTS[name].tokenizer == "transformers" else [],
    }
    (target / "expected.json").write_text(json.dumps(expected))


def continued(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return NEW_TOKENS greedy tokens, each computed without a cache; [SEP] is excluded, because it would end the
    text."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        last = model(torch.tensor([ids]), pack_rows([[len(ids)]], len(ids)))[-1]
        last[SEP] = -torch.inf
        ids.append(int(last.argmax()))
    return ids[len(prompt) :]
