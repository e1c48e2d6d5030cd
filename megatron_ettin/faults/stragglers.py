"""Find the slowest rank: one GPU that is hot or one disk that is shared holds up all ranks at every step.

Each rank's own seconds until the step's first sum over all ranks are averaged over the steps since the last comparison,
and one number of each rank is gathered. Ranks are compared within their own pipeline stage, because stages differ by
nature. Within a tensor-parallel group, and along a pipeline, all ranks are as slow as the slowest of them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from megatron_ettin.base.log import log_warning
from megatron_ettin.faults.heartbeat import RankInfo
from megatron_ettin.parallel.collectives import all_gather_object
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult

WARN_RATIO = 1.5
# warn once this many comparisons in a row name the same rank, each with a ratio above WARN_RATIO
WARN_TIMES = 3


def slowest(seconds: Sequence[float], stages: Sequence[int]) -> tuple[int, float] | None:
    """Find the rank that is slowest in comparison with the other ranks of its pipeline stage.

    Args:
        seconds: seconds of each rank until the step's first sum over the ranks.
        stages: pipeline stage of each rank.

    Returns:
        (rank, its seconds divided by the median of its stage's other ranks); None if no stage has two ranks.
    """
    by_stage: dict[int, list[int]] = defaultdict(list)
    for rank, stage in enumerate(stages):
        by_stage[stage].append(rank)
    candidates = []
    for ranks in by_stage.values():
        rank = max(ranks, key=lambda member: seconds[member])
        others = [seconds[member] for member in ranks if member != rank]
        if others and (middle := statistics.median(others)) > 0:
            candidates.append((rank, seconds[rank] / middle))
    return max(candidates, key=lambda candidate: candidate[1], default=None)


class Stragglers(Hook):
    """Adds the slowest rank to the metrics every `metrics.ranks_every_steps` steps; warns if it stays the same."""

    def __init__(self, peers: Sequence[RankInfo]) -> None:
        self.peers = peers
        self.seconds: list[float] = []
        self.in_a_row: list[int] = []

    def start(self, run: Run) -> None:
        """Look up the pipeline stage of each rank."""
        topology = run.train_state.layout.topology
        self.stages = [topology.coords(rank)["pp"] for rank in range(topology.world)]
        # not compared, because kernels are compiled and files are opened in it
        self.first_step = run.progress.step + 1

    def step(self, run: Run, info: StepResult) -> None:
        """Every `metrics.ranks_every_steps` steps, compare the ranks (collective) and add the slowest to `info`."""
        if len(self.peers) == 1 or info.step == self.first_step:
            return
        self.seconds.append(run.train_state.clock.seconds)
        if info.step % run.config.metrics.ranks_every_steps:
            return
        mean = statistics.fmean(self.seconds)
        self.seconds = []
        result = slowest(all_gather_object(mean), self.stages)
        if result is None:
            return
        rank, ratio = result
        peer = self.peers[rank]
        info.extra.update(slowest_rank=peer.rank, slowest_host=peer.host, slowest_ratio=round(ratio, 4))
        self.in_a_row = [*(self.in_a_row if peer.rank in self.in_a_row else []), peer.rank]
        if ratio <= WARN_RATIO:
            self.in_a_row = []
        if run.is_main_process and len(self.in_a_row) == WARN_TIMES:
            log_warning(
                f"warning: {peer} is slow: {ratio:.1f} times the others' seconds until the gradient sum, over"
                f" the last {WARN_TIMES * run.config.metrics.ranks_every_steps} steps; all ranks wait for it"
            )
