"""Write README.md of an exported folder: the model's facts, its training, an example of use, the parity check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.text import format_count
from megatron_ettin.config.tables import VOCABULARY, parameter_count
from megatron_ettin.convert.hf_config import reader_notes
from megatron_ettin.convert.source import SourceCheckpoint, cross_notes, predicts_next

THIS_FOLDER = 'FOLDER = "."  # this one'
"""Line of the example that names the folder; a caller may replace it."""
_USE = {
    "mlm": """from transformers import AutoModelForMaskedLM, AutoTokenizer

FOLDER = "."  # this one
model = AutoModelForMaskedLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer(f"The capital of France is {tokenizer.mask_token}.", return_tensors="pt")
at = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero()[0, 1]
print(tokenizer.decode(model(**inputs).logits[0, at].argmax()))""",
    "clm": """from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = "."  # this one
model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))""",
}
# for encoders trained from decoders: the prediction of a masked token is at the position before it
_USE_SHIFTED = _USE["mlm"].replace("logits[0, at]", "logits[0, at - 1]")
_TASKS = {"mlm": ("encoder", "fill-mask"), "clm": ("decoder", "text-generation")}


@dataclass(frozen=True)
class CardInfo:
    """Facts for a model card that the checkpoint does not record."""

    name: str | None = None
    licence: str | None = None
    """SPDX identifier."""
    revision: str | None = None
    total_tokens: int | None = None
    """Tokens trained in all phases up to this one."""


def model_card(
    source: SourceCheckpoint,
    dtype: str,
    has_tokenizer: bool,
    parity: dict[str, Any] | None,
    info: CardInfo,
) -> str:
    """Return the text of README.md, stating only facts of the checkpoint and of `info`.

    Args:
        source: the exported checkpoint.
        dtype: type of the exported weights.
        has_tokenizer: whether a tokenizer was exported.
        parity: record of the comparison with transformers; None if none was made.
        info: facts that the checkpoint does not record.
    """
    role, task = _TASKS[source.objective]
    usage = _USE[source.objective]
    if predicts_next(source):
        # the fill-mask pipeline would read the prediction at the mask's own position
        task, usage = "feature-extraction", _USE_SHIFTED
    model, progress = source.model, source.progress
    parameters = parameter_count(model, model.vocab_size)
    encoder, decoder = f"{model.encoder_window} keys to each side", f"{model.decoder_window_keys} keys up to and with"
    window = encoder if source.objective == "mlm" else f"{decoder} the query"
    rows = {
        "parameters": f"{parameters:,} ({format_count(parameters)})",
        "shape": f"{model.num_layers} layers, hidden {model.hidden_size}, MLP {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads, vocabulary {model.vocab_size:,}",
        "attention": f"one layer in {model.global_attention_every} global, the others {window}",
        "rotary bases": f"global {model.global_rope_theta:g}, local {model.local_rope_theta:g}",
        "phase": f"{source.run.get('phase') or 'not recorded'}, step {progress.get('step', 0):,}",
        **_tokens(source, info),
        "longest text": f"{source.trained_length:,} tokens in training",
        "weights": dtype,
        "licence": info.licence or "not stated",
    }
    if info.revision:
        rows = {"revision": f"`{info.revision}`"} | rows
    lines = [
        *("---", "library_name: transformers", f"pipeline_tag: {task}"),
        *([f"license: {info.licence}"] if info.licence else []),
        *("tags:", "- modernbert", "- ettin", "---", "", f"# {info.name or f'A ModernBERT-style {role}'}", ""),
    ]
    lines += [
        f"A ModernBERT-style {role}, trained with megatron_ettin (the Ettin recipe of paired encoders and decoders).",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "```python", usage, "```"]
    lines += [f"\n{note}." for note in (*reader_notes(model, source.objective), *cross_notes(source))]
    if not has_tokenizer:
        lines += ["", "The checkpoint came without a tokenizer: none is in this folder."]
        if not source.special_ids and model.vocab_size != VOCABULARY:
            lines[-1] += " The ids of special tokens in config.json only stand in for those of a tokenizer."
    lines += ["", _checked(parity), ""]
    return "\n".join(lines)


def _tokens(source: SourceCheckpoint, info: CardInfo) -> dict[str, str]:
    """Return the table rows `tokens trained` and, if the phase has a plan, `tokens planned`."""
    trained, planned = source.progress.get("tokens") or 0, planned_tokens(source.run)
    rows = {"tokens trained": format_count(trained) + (" in this phase" if info.total_tokens is not None else "")}
    if info.total_tokens is not None:
        rows["tokens trained"] += f", {format_count(info.total_tokens)} in all"
    return rows | ({"tokens planned": f"{planned} in this phase"} if planned else {})


def planned_tokens(run: Mapping[str, Any]) -> str:
    """Return the tokens (and steps) that the `run` group of a config.yaml plans, as text; empty without a plan."""
    tokens, steps = run.get("tokens"), run.get("steps")
    if not isinstance(tokens, int) or tokens <= 0:
        return ""
    return format_count(tokens) + (f", or {steps:,} steps" if isinstance(steps, int) else "")


def _checked(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "Not compared with transformers at export."
    tensors = f"Checked at export: all {parity['tensors']} tensors equal the checkpoint's bit for bit"
    if parity["max_abs_logit_difference"] is None:
        return tensors + "; logits were not compared."
    return (
        f"{tensors}; logits of transformers {parity['transformers']} differ from the training code's by at most "
        f"{parity['max_abs_logit_difference']:.1e} (parity.json)."
    )
