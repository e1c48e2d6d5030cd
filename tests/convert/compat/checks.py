"""Checks of an exported folder, one function per promise: `check(case)` raises if the folder breaks the promise.

`probe.py` runs them in environments without the project and without pytest, so neither is imported."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.convert.compat.cases import Case, major

TOLERANCE = 1e-4  # largest difference of float32 logits, as in the export's own verification
HEADS = ("head.", "lm_head.", "decoder.")  # weights that a model without a head does not load


def close(a: torch.Tensor, b: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a.float() - b.float()).abs().max().item()
    assert difference <= tolerance, f"{what}: differ by {difference:.2e}, more than {tolerance:.0e}"


def same(a: Any, b: Any, what: str) -> None:
    assert a == b, f"{what}: {a!r} and {b!r}"


def is_misread(case: Case) -> bool:
    """Return whether this transformers computes the folder's local rotary table from the wrong base.

    transformers 4 makes both tables of a decoder from the global base, whatever config.json says."""
    return case.objective == "clm" and case.has_local_base and major() < 5


def as_trained(case: Case, model: Any) -> Any:
    """Return the model, with the workaround of docs/convert.md if transformers misreads the folder."""
    if is_misread(case):
        config = copy.copy(model.config)
        config.global_rope_theta = config.local_rope_theta
        model.model.local_rotary_emb = type(model.model.local_rotary_emb)(config)
    return model


def saved_folder(case: Case) -> Path:
    """Return the folder into which this transformers saves the model again."""
    import transformers

    return case.folder / f"saved_by_{transformers.__version__}"


def config_says_what_was_exported(case: Case) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(case.model)
    suffix = "Config" if case.objective == "mlm" else "DecoderConfig"
    same(type(config).__name__, f"ModernBert{suffix}", "class")
    ids = (config.bos_token_id, config.cls_token_id, config.eos_token_id, config.sep_token_id, config.pad_token_id)
    same(ids, (1, 1, 2, 2, 3), "special ids")
    same((config.vocab_size, config.hidden_size, config.max_position_embeddings), (320, 64, 128), "shape")
    same(str(config.dtype), f"torch.{case.expected['dtype']}", "dtype")
    bases = (case.expected["global_rope_theta"], case.expected["local_rope_theta"])
    if major() < 5:
        same((config.global_rope_theta, config.local_rope_theta), bases, "rotary bases")
    else:
        types = ("full_attention", "sliding_attention")
        same(tuple(config.rope_parameters[suffix]["rope_theta"] for suffix in types), bases, "rotary bases")
    if case.objective == "clm":
        same(config.sliding_window, 8, "window")
    else:
        same(config.local_attention, 16, "window")


def every_tensor_is_loaded(case: Case) -> None:
    model, actual = case.auto_class().from_pretrained(case.model, output_loading_info=True)
    for suffix in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        same(list(actual[suffix]), [], suffix)
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied, "the output weight is not the embedding"


def logits_are_ours(case: Case) -> None:
    for attention in ("eager", "sdpa"):
        model = as_trained(case, case.load(attn_implementation=attention))
        with torch.no_grad():
            for ids, ours in zip(case.token_lists, case.logits, strict=True):
                close(model(input_ids=torch.tensor([ids])).logits[0], ours, f"{len(ids)} tokens, {attention}")


def base_model_is_the_same(case: Case) -> None:
    from transformers import AutoModel

    base, actual = AutoModel.from_pretrained(case.model, dtype=torch.float32, output_loading_info=True)
    same(list(actual["missing_keys"]), [], "missing")
    same([name for name in actual["unexpected_keys"] if not name.startswith(HEADS)], [], "unexpected")
    whole = case.load()
    whole.model = base.eval()
    with torch.no_grad():
        logits = as_trained(case, whole)(input_ids=torch.tensor([case.token_lists[0]])).logits[0]
    close(logits, case.logits[0], "logits of the base model under the head")


def stored_precision_is_kept(case: Case) -> None:
    model = as_trained(case, case.load(dtype="auto"))
    wanted = getattr(torch, case.expected["dtype"])
    same({weight.dtype for weight in model.parameters()}, {wanted}, "dtypes")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([case.token_lists[0]])).logits[0]
    coarse = 0.1 * case.logits[0].abs().max().item()  # for arithmetic in bfloat16
    close(logits, case.logits[0], "logits", TOLERANCE if wanted == torch.float32 else coarse)


def saved_again_is_the_same(case: Case) -> None:
    """Save with this transformers and load again; the folder stays, because test_environments.py imports it."""
    again = saved_folder(case)
    model, tokenizer = case.load(dtype="auto"), case.tokenizer()
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    config = type(model.config).from_pretrained(again)
    if case.objective == "clm" and major() < 5:
        # 4 does not store a decoder's local_attention, and takes 64 keys when it reads its own folder (docs/convert.md)
        same(config.sliding_window, 64, "the window that transformers 4 forgot")
        config.sliding_window = model.config.sliding_window
    reloaded = case.auto_class().from_pretrained(again, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = as_trained(case, reloaded)(input_ids=torch.tensor([case.token_lists[2]])).logits[0]
    close(logits, case.logits[2], "logits")
    same(type(tokenizer).from_pretrained(again)(case.expected["texts"])["input_ids"], case.expected["text_ids"], "ids")


def tokenizer_gives_the_same_ids(case: Case) -> None:
    tokenizer = case.tokenizer()
    for text, ids in zip(case.expected["texts"], case.expected["text_ids"], strict=True):
        same(tokenizer(text)["input_ids"], ids, repr(text))
        same(tokenizer.decode(ids, skip_special_tokens=True).strip(), text.replace("[MASK]", "").strip(), "decoded")
    names = ("unk", "cls", "sep", "pad", "mask")
    same([getattr(tokenizer, f"{name}_token_id") for name in names], [0, 1, 2, 3, 4], "special ids")
    more = set(tokenizer.all_special_tokens) - {f"[{name.upper()}]" for name in names}
    same(sorted(more), case.expected["more_special_tokens"], "special tokens beyond the usual ones")
    same(tokenizer.padding_side, "right" if case.objective == "mlm" else "left", "padding side")


def tokenizer_output_fits_the_model(case: Case) -> None:
    """`model(**tokenizer(texts))` works and gives our logits, also in a padded batch."""
    tokenizer, model = case.tokenizer(), as_trained(case, case.load())
    inputs = tokenizer(case.expected["texts"], padding=True, return_tensors="pt")
    same(set(inputs), {"input_ids", "attention_mask"}, "what the tokenizer gives")
    with torch.no_grad():
        logits = model(**inputs).logits
    first = case.expected["prompts"]
    for row, mask, ours in zip(logits, inputs["attention_mask"], case.logits[first:], strict=True):
        close(row[mask.bool()], ours, "logits in a padded batch")


def nothing_is_warned_of(case: Case) -> None:
    """Loading and generating log no warning, because users would take it for a fault of the folder."""
    from transformers import AutoConfig
    from transformers.utils import logging as theirs

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("transformers"), theirs.get_verbosity()
    logger.addHandler(handler)
    theirs.set_verbosity_warning()
    try:
        AutoConfig.from_pretrained(case.model)
        model, tokenizer = case.load(), case.tokenizer()
        if case.objective == "clm":
            model.generate(**tokenizer("the reader", return_tensors="pt"), max_new_tokens=2)
    finally:
        theirs.set_verbosity(level)
        logger.removeHandler(handler)
    same(messages, [], "warnings")


def fill_mask_pipeline(case: Case) -> None:
    from transformers import pipeline

    text, ids = case.expected["texts"][-1], case.expected["text_ids"][-1]
    ours = case.logits[-1][ids.index(4)].softmax(-1).topk(5)
    actual = pipeline("fill-mask", model=case.model, dtype=torch.float32)(text)
    same([one["token"] for one in actual], ours.indices.tolist(), "tokens")
    close(torch.tensor([one["score"] for one in actual]), ours.values, "scores")


def sentence_transformers_embed(case: Case) -> None:
    """sentence-transformers embeds by the mean over tokens, although the folder has no file of that library."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    texts, kwargs = case.expected["texts"], {"dtype": torch.float32}
    embedder = SentenceTransformer(case.model, device="cpu", model_kwargs=kwargs)
    together = torch.tensor(embedder.encode(texts))
    model, tokenizer = AutoModel.from_pretrained(case.model, **kwargs).eval(), case.tokenizer()
    for i, text in enumerate(texts):
        with torch.no_grad():
            by_hand = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        close(together[i], by_hand, f"{text!r} in a batch")
        close(torch.tensor(embedder.encode(text)), by_hand, f"{text!r} alone")
    with tempfile.TemporaryDirectory() as folder:
        embedder.save(folder)
        close(torch.tensor(SentenceTransformer(folder, device="cpu").encode(texts)), together, "saved and loaded", 0.2)
    as_stored = torch.tensor(SentenceTransformer(case.model, device="cpu").encode(texts))
    close(as_stored, together, "in the stored precision", 0.1 * together.abs().max().item())


def code_of_the_card_runs(case: Case) -> None:
    """Every Python block of README.md runs inside the folder and prints something."""
    text = Path(case.model, "README.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert blocks, "the card shows no code"
    with contextlib.chdir(case.model), contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    assert out.getvalue(), "the code prints nothing"


BOTH = [
    config_says_what_was_exported,
    every_tensor_is_loaded,
    logits_are_ours,
    base_model_is_the_same,
    stored_precision_is_kept,
    saved_again_is_the_same,
    tokenizer_gives_the_same_ids,
    tokenizer_output_fits_the_model,
    nothing_is_warned_of,
    code_of_the_card_runs,
]
ENCODER = [fill_mask_pipeline]
