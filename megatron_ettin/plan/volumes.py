"""Bytes that a rank hands to collectives and transfers in a step, by axis: of what is gathered or scattered the whole,
as platform/comm_volume.py counts it on real ranks (tests/plan/test_volumes.py holds one against the other)."""

from __future__ import annotations

from megatron_ettin.config.layouts import micro_batches, stage_layers, with_split_rows
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.activations import element_bytes, micro_batch_tokens
from megatron_ettin.plan.memory import fp8_parameters, rank_parameters


def volumes(config: Config, dp: int, pp_rank: int) -> dict[str, float]:
    """Of a rank of that pipeline stage. Left out: sums over labels in the loss, gradients of norms, single numbers."""
    config = with_split_rows(config, dp)
    parallel, count = config.parallel, micro_batches(config, dp)
    hidden = hidden_bytes(config)
    found = dict.fromkeys(("tp", "cp", "pp", "dp"), 0.0)
    if parallel.tp > 1:
        found["tp"] = count * hidden * tensor_passes(config, pp_rank)
    if parallel.cp > 1:  # q, k, v and the output change hands, forward and backward
        found["cp"] = count * rank_layers(config, pp_rank) * 8 * hidden / parallel.tp
    if parallel.pp > 1:
        found["pp"] = transfers(config, pp_rank) * count * hop_bytes(config)
        if pp_rank in (0, parallel.pp - 1):
            found["pp"] += tied_gradient_bytes(config)
    if dp * parallel.cp > 1:
        found["dp"] = sum(data_bytes(config, pp_rank))
    return found


def rank_layers(config: Config, pp_rank: int) -> int:
    return sum(stage_layers(config)[pp_rank :: config.parallel.pp])


def hidden_bytes(config: Config) -> int:
    """Of a micro-batch's hidden states on one context rank."""
    return micro_batch_tokens(config) * config.model.hidden_size * element_bytes(config)


def hop_bytes(config: Config) -> float:
    """That a pipeline stage sends the next for a micro-batch."""
    return hidden_bytes(config) / (config.parallel.tp if config.parallel.sequence_parallel else 1)


def tensor_passes(config: Config, pp_rank: int) -> int:
    """How often hidden states are gathered, scattered or all-reduced for a micro-batch. With sequence parallelism a
    layer gathers twice and scatters twice each way, and gathers its two inputs once more for the weights' gradients;
    without, it all-reduces twice each way."""
    pp, layers = config.parallel.pp, rank_layers(config, pp_rank)
    if not config.parallel.sequence_parallel:
        return 4 * layers + (pp_rank == 0)
    return 10 * layers + 2 * (pp_rank == 0) + (pp_rank == pp - 1)


def transfers(config: Config, pp_rank: int) -> int:
    """Hidden states and gradients that a rank sends for a micro-batch, those between its own model chunks included."""
    pp, vp = config.parallel.pp, config.parallel.vp
    forward, backward = vp - (pp_rank == pp - 1), vp - (pp_rank == 0)
    return forward + backward


def tied_gradient_bytes(config: Config) -> int:
    """Of the vocabulary's weights, whose gradients first and last stage sum."""
    rows = -(-config.model.vocab_size // config.parallel.tp)
    return rows * config.model.hidden_size * gradient_bytes(config)


def gradient_bytes(config: Config) -> int:
    return 4 if config.precision.gradients == "fp32" or PRECISIONS[config.precision.name].compute == "fp32" else 2


def data_bytes(config: Config, pp_rank: int) -> tuple[int, int]:
    """(gradients that are reduced, weights that are gathered); without the distributed optimizer nothing is."""
    parameters, _ = rank_parameters(config, pp_rank)
    gathered = parameters * element_bytes(config) if config.parallel.distributed_optimizer else 0
    if config.precision.fp8_weights:
        gathered -= fp8_parameters(config, pp_rank)
    return parameters * gradient_bytes(config), gathered
