"""Sizes to run the docs' blocks with: the tests' shape, rows and steps, a tokenizer of 320 entries, chunks of 48
tokens. A block's own options take precedence, except for the number of workers and the numbers of GPUs of a `plan
--scale`."""

from __future__ import annotations

import os

from megatron_ettin.plan.scaling import parse_gpu_counts
from tests.train.runs import TINY

STEPS = ["run.steps=2", "checkpoint.every_steps=1", "metrics.eval_rows=8"]
PREPARE = {"--tokenizer": "", "--chunk-tokens": "48"}


def sized(arguments: list[str]) -> list[str]:
    """Add small sizes to a call of ettin, unless its page has small sizes itself."""
    if arguments[:1] == ["release"]:  # each worker imports torch
        return [*arguments, "--workers", "1"]
    if os.environ.get("DOCS_EXACT"):
        return arguments
    if arguments[:1] == ["train"] and not {"--dry-run", "--explain"} & {*arguments}:
        return ["train", *TINY, *STEPS, *arguments[1:]]
    if arguments[:1] == ["bench"] and "--compare" not in arguments:
        return ["bench", *TINY, *arguments[1:]]
    if arguments[:1] == ["plan"] and "--scale" in arguments:  # each number of GPUs takes seconds
        position = arguments.index("--scale") + 1
        first, *_ = parse_gpu_counts(arguments[position])  # raises if it is no range
        return [*arguments[:position], f"{first}:{2 * first}", *arguments[position + 1 :]]
    if arguments[:1] == ["prepare"]:
        given = {"--tokenizer": os.environ["DOCS_TOKENIZER"], **{k: v for k, v in PREPARE.items() if v}}
        added = [word for option, value in given.items() if option not in arguments for word in (option, value)]
        return ["prepare", *added, *arguments[1:], "--workers", "1"]
    return arguments
