"""The sizes that blocks run with: the tests' shape, rows and steps, a tokenizer of 320 entries, chunks of 48 tokens.
A block's own options take precedence, except for the number of workers and the numbers of GPUs of a `plan --scale`."""

from __future__ import annotations

import os

from megatron_ettin.plan.scaling import parse_gpu_counts
from tests.train.runs import TINY

STEPS = ["run.steps=2", "checkpoint.every_steps=1", "metrics.eval_rows=8"]
PREPARE = {"--tokenizer": "", "--chunk-tokens": "48"}


def sized(words: list[str]) -> list[str]:
    """Add small sizes to a call of ettin, unless its page has small sizes itself."""
    if words[:1] == ["release"]:  # each worker imports torch
        return [*words, "--workers", "1"]
    if os.environ.get("DOCS_EXACT"):
        return words
    if words[:1] == ["train"] and not {"--dry-run", "--explain"} & {*words}:
        return ["train", *TINY, *STEPS, *words[1:]]
    if words[:1] == ["bench"] and "--compare" not in words:
        return ["bench", *TINY, *words[1:]]
    if words[:1] == ["plan"] and "--scale" in words:  # seconds for each number
        place = words.index("--scale") + 1
        first, *_ = parse_gpu_counts(words[place])  # refuses what is no range
        return [*words[:place], f"{first}:{2 * first}", *words[place + 1 :]]
    if words[:1] == ["prepare"]:
        given = {"--tokenizer": os.environ["DOCS_TOKENIZER"], **{k: v for k, v in PREPARE.items() if v}}
        added = [word for option, value in given.items() if option not in words for word in (option, value)]
        return ["prepare", *added, *words[1:], "--workers", "1"]
    return words
