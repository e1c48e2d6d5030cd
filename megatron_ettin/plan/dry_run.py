"""Describe a run for `ettin train --dry-run`: its configuration, parameters, operations per token, steps, memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.text import counted, format_count
from megatron_ettin.config.flops import mean_flops_per_token
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import parameter_count
from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.manifest import FILE_NAME as MANIFEST
from megatron_ettin.data.mixture import SourceEpochs, describe_epochs, epoch_warnings, parse_mixture, planned_epochs
from megatron_ettin.data.packing_index import check_rows
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.plan.hardware import TABLE, read_table
from megatron_ettin.plan.memory import estimate
from megatron_ettin.plan.pipeline import describe_shares, empty_shares
from megatron_ettin.plan.schedule_end import describe_end, expected_row_tokens, lr_at_end


def facts(config: Config) -> dict[str, Any]:
    """Return the figures of a run that are known before it starts, by name.

    Steps are counted for rows of `data.mean_tokens_per_row` tokens, or for full rows if it is not set. The mean of the
    actual rows decides the exact number.
    """
    model, data, batch = config.model, config.data, config.batch
    flops = mean_flops_per_token(config)
    row_tokens = data.mean_tokens_per_row or data.seq_len
    sizes = BatchSizes.of(batch, row_tokens)
    model_ranks = config.parallel.tp * config.parallel.pp * config.parallel.cp
    memory = estimate(config, dp=1)
    return {
        "parameters": parameter_count(model, model.vocab_size),
        "flops_per_token": flops,
        "tokens_per_step": round(batch.global_batch_rows * row_tokens),
        "steps": config.run.steps or sizes.steps_for(config.run.tokens / row_tokens),
        "smallest_world": model_ranks,
        "empty_share": empty_shares(config),
        "lr_at_end": lr_at_end(config, expected_row_tokens(config.data)),
        "memory_bytes": {**dataclasses.asdict(memory), "total_bytes": memory.total_bytes},
    }


def mixture_epochs(config: Config) -> tuple[list[SourceEpochs], str]:
    """Return (how often each dataset will be read, ""), or ([], the reason) if that is unknown.

    Raises:
        UserError: the mixture is not valid, or a dataset does not suit the run's rows.
    """
    if config.data.mixture is None:
        return [], "data.mixture is not set"
    mixture = parse_mixture(config.data.mixture, config.data.root)
    if config.data.order != "keyed":
        return [], f"in the order of {config.data.order}, once"
    batch, tokens = config.batch, config.run.tokens
    if config.run.steps is not None:
        tokens = min(tokens, config.run.steps * batch.global_batch_rows * config.data.seq_len)
    for entry in mixture:
        if (Path(entry.path) / MANIFEST).is_file():
            check_rows(open_dataset(entry.path), config.data.seq_len, config.data.batching)
    try:
        return planned_epochs(mixture, tokens), ""
    except UserError as error:
        return [], str(error)


def memory_line(config: Config) -> str | None:
    """Return a warning if no known GPU can hold the fullest rank, else None."""
    needed = estimate(config, dp=1).total_bytes / 2**30
    largest = max(read_table(TABLE).values(), key=lambda gpu: gpu.memory_gib)
    if needed <= largest.memory_gib:
        return None
    return (
        f"warning: the fullest rank needs about {needed:,.0f} GiB at dp 1,"
        f" {counted(config.batch.micro_batch_rows, 'row')} of {config.data.seq_len:,} tokens at a time;"
        f" a {largest.name} has {largest.memory_gib:g}"
    )


def describe(config: Config, as_json: bool) -> str:
    """Return the text or JSON that `--dry-run` prints, and log warnings about the mixture."""
    figures = facts(config)
    table, reason = mixture_epochs(config)
    for warning in epoch_warnings(table):
        log_warning(warning)
    if as_json:
        mixture = [source._asdict() for source in table]
        return json.dumps({"config": dataclasses.asdict(config), **figures, "mixture": mixture}, indent=1)
    memory = {name.removesuffix("_bytes"): f"{value / 2**30:.2f}" for name, value in figures["memory_bytes"].items()}
    return "\n".join(
        (
            to_yaml(config),
            f"parameters      {figures['parameters']:,}",
            f"operations      {format_count(figures['flops_per_token'])} a token (forward and backward)",
            f"steps           {figures['steps']:,} of up to {format_count(figures['tokens_per_step'])} tokens",
            f"schedule        {describe_end(config, expected_row_tokens(config.data))}",
            f"data            {reason}" if reason else "\n".join(describe_epochs(table)),
            f"ranks           a multiple of {figures['smallest_world']}",
            f"empty row slots {describe_shares(figures['empty_share'])}",
            "memory, GiB     " + ", ".join(f"{name} {value}" for name, value in memory.items())
            + " (fullest rank at dp 1, activations estimated)",
        )
    )  # fmt: skip
