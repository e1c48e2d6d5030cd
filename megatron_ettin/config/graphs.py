"""Checks of `run.cuda_graph`: which runs have micro-batches that are all alike."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.objectives import OBJECTIVES
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config

KERNELS = ("te-fused", "flash", "varlen")  # they take boundaries as tensors; the others' work depends on their values
TOKENS_A_CHUNK = (
    64  # rows have at most as many chunks as if each had so few tokens, unless data.max_chunks_per_row says
)


def max_chunks_per_row(config: Config) -> int:
    """Chunks that a recorded row has room for."""
    return config.data.max_chunks_per_row or max(1, config.data.seq_len // TOKENS_A_CHUNK)


def check_graphs(config: Config) -> None:
    if config.run.cuda_graph:
        for found, instead in _refusals(config):
            raise UserError(f"run.cuda_graph: goes not with {found}; {instead}")


def _refusals(config: Config) -> Iterator[tuple[str, str]]:
    """(what is in the way, what to do)."""
    parallel, run = config.parallel, config.run
    if OBJECTIVES[run.objective].is_hybrid:
        yield f"objective {run.objective}, whose micro-batches differ in kind", "run.cuda_graph=false"
    if parallel.pp > 1:
        yield f"pipeline stages, found pp {parallel.pp}", "use parallel.pp=1 or run.cuda_graph=false"
    for key, plain in (("engine", "megatron"), ("recompute", "none"), ("offload_layers", 0), ("overlap", False)):
        if (value := getattr(parallel, key)) != plain:
            yield f"parallel.{key}={value}", f"use parallel.{key}={str(plain).lower()} or run.cuda_graph=false"
    if PRECISIONS[config.precision.name].fp8_recipe == "delayed":
        yield "precision.name=fp8-delayed, whose scales the host moves on", "use fp8-current, or run.cuda_graph=false"
    if config.precision.fp8_weights:
        yield "precision.fp8_weights, which are made between recordings", "use precision.fp8_weights=false"
    if config.batch.loss_normalization != "global":
        yield f"batch.loss_normalization={config.batch.loss_normalization}", "use global, or run.cuda_graph=false"
    if run.attention not in ("auto", *KERNELS):
        yield f"run.attention={run.attention}", f"use one of {', '.join(KERNELS)}, or run.cuda_graph=false"
