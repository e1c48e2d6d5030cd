"""Simulate a pipeline's step pass by pass, and count the empty row slots of a run.

Every rank runs its passes in the order of core's schedules (1F1B, arXiv 2104.04473 figure 4; with several model
chunks per rank, interleaved), each as soon as the rank is free and its input has arrived. If all stages take the
same time, this gives the closed form of the bubble, (pp - 1) / (vpp x micro-batches). With unequal stages or
transfers the closed form is wrong.

An empty row slot is a row of a micro-batch without data. They are counted over a whole run, in which the batch warm-up
has smaller steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ettin.config.layouts import RowSplit, full_batch_split, has_fixed_shapes, micro_batch_group
from megatron_ettin.config.schema import Config
from megatron_ettin.data.sampler import BatchSizes

FORWARD, BACKWARD = "forward", "backward"
# (direction, model chunk of the rank, micro-batch)
Pass = tuple[str, int, int]


def order_of_passes(rank: int, ranks: int, chunks: int, micro_batches: int) -> list[Pass]:
    """Return the passes of a pipeline rank in core's order; several model chunks per rank are interleaved.

    Raises:
        ValueError: there are several chunks, and the micro-batches are no multiple of the ranks.
    """
    if chunks > 1 and micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {ranks} pipeline ranks")
    total = chunks * micro_batches

    def forward(number: int) -> Pass:
        return (FORWARD, *_chunk_and_micro_batch(number, ranks, chunks))

    def backward(number: int) -> Pass:
        chunk, micro_batch = _chunk_and_micro_batch(number, ranks, chunks)
        return BACKWARD, chunks - 1 - chunk, micro_batch

    ahead = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    ahead = min(ahead, total)
    if chunks > 1 and micro_batches == ranks:
        # core then runs all forward passes first
        ahead = total
    order = [forward(number) for number in range(ahead)]
    for number in range(total - ahead):
        order += [forward(ahead + number), backward(number)]
    return order + [backward(number) for number in range(total - ahead, total)]


def _chunk_and_micro_batch(number: int, ranks: int, chunks: int) -> tuple[int, int]:
    """Return the model chunk and the micro-batch of a rank's forward pass `number`, counted from 0.

    A group has as many micro-batches as there are ranks, and passes through one chunk after the other.
    """
    group, within = divmod(number, ranks * chunks)
    chunk, micro_batch = divmod(within, ranks)
    return chunk, group * ranks + micro_batch


def simulate(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    micro_batches: int,
    ranks: int,
    hop_seconds: float = 0.0,
) -> tuple[float, list[float]]:
    """Simulate a step over stages in model order (rank r has stages r, r + ranks, ...).

    Args:
        forward_seconds: seconds of each stage's forward pass.
        backward_seconds: seconds of each stage's backward pass.
        micro_batches: number of micro-batches.
        ranks: number of pipeline ranks.
        hop_seconds: seconds to send a micro-batch to the next stage.

    Returns:
        (seconds of the step, seconds that each rank computes)
    """
    stages, chunks = len(forward_seconds), len(forward_seconds) // ranks
    hop = hop_seconds if ranks > 1 else 0.0
    orders = [order_of_passes(rank, ranks, chunks, micro_batches) for rank in range(ranks)]
    free, busy, next_pass = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    # (index among the micro-batch's passes, forward and then backward; micro-batch) -> seconds at which it ended
    done: dict[tuple[int, int], float] = {}
    while len(done) < 2 * stages * micro_batches:
        before = len(done)
        for rank, order in enumerate(orders):
            while next_pass[rank] < len(order):
                direction, chunk, micro_batch = order[next_pass[rank]]
                stage = chunk * ranks + rank
                position = stage if direction == FORWARD else 2 * stages - 1 - stage
                arrived = done.get((position - 1, micro_batch)) if position else 0.0
                if arrived is None:
                    break
                # the first pass has no input, and the last stage turns back without a transfer
                if position not in (0, stages):
                    arrived += hop
                took = (forward_seconds if direction == FORWARD else backward_seconds)[stage]
                free[rank] = max(free[rank], arrived) + took
                busy[rank] += took
                done[position, micro_batch] = free[rank]
                next_pass[rank] += 1
        if len(done) == before:
            raise ValueError(f"the schedule of {ranks} ranks and {micro_batches} micro-batches waits for itself")
    return max(free), busy


# largest data-parallel degree that `empty_shares` covers
MOST_DP = 1024
# `describe_shares` does not list smaller shares one by one
LEAST_SHOWN = 0.01


def run_row_slots(config: Config, dp: int) -> tuple[int, int]:
    """Return the number of rows in all steps of the run, and of the row slots that the ranks compute for them."""
    row_tokens = config.data.mean_tokens_per_row or config.data.seq_len
    sizes = BatchSizes.of(config.batch, row_tokens)
    end = config.run.steps or sizes.steps_for(config.run.tokens / row_tokens)
    fixed = has_fixed_shapes(config)
    most = full_batch_split(config, dp).size if fixed else config.batch.micro_batch_rows
    rows = slots = 0
    for level, size in enumerate(sizes.rows):
        last = sizes.first_step[level + 1] if level + 1 < len(sizes.rows) else end
        steps = max(0, min(last, end) - sizes.first_step[level])
        rows += steps * size
        slots += steps * RowSplit.of(size, dp, most, micro_batch_group(config.parallel), fixed).capacity
    return rows, slots


def empty_shares(config: Config) -> dict[int, float]:
    """Return the share of the run's row slots that are empty, by data-parallel degree.

    Degrees are the powers of two up to the rows of a step, at most MOST_DP.
    """
    most = min(MOST_DP, config.batch.global_batch_rows)
    counts = {2**n: run_row_slots(config, 2**n) for n in range(most.bit_length())}
    return {dp: 1 - rows / slots for dp, (rows, slots) in counts.items()}


def describe_shares(shares: dict[int, float]) -> str:
    """Return the empty shares as a line."""
    wasteful = {dp: f"{share:.0%}" for dp, share in shares.items() if share >= LEAST_SHOWN}
    others = ", ".join(str(dp) for dp in shares if dp not in wasteful)
    shown = ", ".join(f"{share} at dp {dp}" for dp, share in wasteful.items())
    return f"{shown or 'none'} of the run's work; below {LEAST_SHOWN:.0%} at dp {others}"
