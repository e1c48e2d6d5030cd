"""Predict the bytes of a rank's collectives and transfers. Gathers and scatters count the whole tensor, as in
platform/trackers.py."""

from __future__ import annotations

from megatron_ettin.config.layouts import micro_batches, with_split_rows
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.memory import rank_stages
from megatron_ettin.plan.step_time import data_bytes, hidden_bytes, hop_bytes, tensor_passes, tied_gradient_bytes


def volumes(config: Config, dp: int, pp_rank: int) -> dict[str, float]:
    """Return the bytes, by mesh axis, that a rank of a pipeline stage passes to collectives and transfers in a step.

    Left out are sums over labels in the loss, gradients of norms, and single numbers.
    """
    config = with_split_rows(config, dp)
    parallel, count = config.parallel, micro_batches(config, dp)
    hidden = hidden_bytes(config)
    sent = dict.fromkeys(("tp", "cp", "pp", "dp"), 0.0)
    if parallel.tp > 1:
        sent["tp"] = count * hidden * tensor_passes(config, pp_rank)
    if parallel.cp > 1:
        # an all-to-all each for q, k, v and the output, forward and backward
        sent["cp"] = count * sum(map(len, rank_stages(config, pp_rank))) * 8 * hidden / parallel.tp
    if parallel.pp > 1:
        sent["pp"] = transfers(config, pp_rank) * count * hop_bytes(config)
        if pp_rank in (0, parallel.pp - 1):
            sent["pp"] += tied_gradient_bytes(config)
    if dp * parallel.cp > 1:
        sent["dp"] = sum(data_bytes(config, pp_rank))
    return sent


def transfers(config: Config, pp_rank: int) -> int:
    """Return the hidden states and gradients that a rank sends for a micro-batch, also between its own model chunks."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    forward, backward = vpp - (pp_rank == pp - 1), vpp - (pp_rank == 0)
    return forward + backward
