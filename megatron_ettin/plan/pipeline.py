"""A pipeline's step as events: every rank runs its passes in the order of core's schedules (1F1B, arXiv 2104.04473
figure 4; with several model chunks a rank, interleaved), each as soon as it is free and what it needs has arrived.

Where all stages take the same time the closed form of the bubble, (pp - 1) / (vp x micro-batches), comes out; with
unequal stages, transfers, or ranks that are now and then slow, it does not, and this is what does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FORWARD, BACKWARD = "forward", "backward"
Pass = tuple[str, int, int]  # kind, model chunk of the rank, micro-batch


@dataclass(frozen=True)
class Simulated:
    """Of one step. `busy_seconds`: of each rank."""

    seconds: float
    busy_seconds: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the step that the busiest rank waits."""
        return 1 - max(self.busy_seconds) / self.seconds


def order_of_passes(rank: int, ranks: int, chunks: int, micro_batches: int) -> list[Pass]:
    """What a rank runs, in core's order. Raises ValueError where the interleaved schedule has no whole groups."""
    if chunks > 1 and micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {ranks} pipeline ranks")
    total = chunks * micro_batches

    def forward(number: int) -> Pass:
        return (FORWARD, *_place(number, ranks, chunks))

    def backward(number: int) -> Pass:
        chunk, micro_batch = _place(number, ranks, chunks)
        return BACKWARD, chunks - 1 - chunk, micro_batch

    ahead = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    ahead = min(ahead, total)
    if chunks > 1 and micro_batches == ranks:
        ahead = total  # core then runs all forward passes first
    order = [forward(number) for number in range(ahead)]
    for number in range(total - ahead):
        order += [forward(ahead + number), backward(number)]
    return order + [backward(number) for number in range(total - ahead, total)]


def _place(number: int, ranks: int, chunks: int) -> tuple[int, int]:
    """(model chunk, micro-batch) of a rank's pass of that number: groups of as many micro-batches as ranks, a group's
    passes through one chunk after those through the one before."""
    if chunks == 1:
        return 0, number
    group, within = divmod(number, ranks * chunks)
    chunk, micro_batch = divmod(within, ranks)
    return chunk, group * ranks + micro_batch


def simulate(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    micro_batches: int,
    ranks: int,
    hop_seconds: float = 0.0,
    slowness: Callable[[int, int], float] | None = None,
) -> Simulated:
    """A step over stages in model order (rank r has stages r, r + ranks, ...), whose passes take `forward_seconds` and
    `backward_seconds`. `slowness(rank, number)`: what the rank's pass of that number takes times as long."""
    stages, chunks = len(forward_seconds), len(forward_seconds) // ranks
    orders = [order_of_passes(rank, ranks, chunks, micro_batches) for rank in range(ranks)]
    free, busy, at = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    done: dict[tuple[str, int, int], float] = {}  # (kind, stage, micro-batch) -> when
    left = sum(map(len, orders))
    while left:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                kind, chunk, micro_batch = order[at[rank]]
                stage = chunk * ranks + rank
                ready = _ready(done, kind, stage, stages, micro_batch, hop_seconds if ranks > 1 else 0.0)
                if ready is None:
                    break
                took = (forward_seconds if kind == FORWARD else backward_seconds)[stage]
                took *= slowness(rank, at[rank]) if slowness is not None else 1.0
                free[rank] = max(free[rank], ready) + took
                busy[rank] += took
                done[kind, stage, micro_batch] = free[rank]
                at[rank] += 1
                left -= 1
                moved = True
        if not moved:
            raise ValueError(f"the schedule of {ranks} ranks and {micro_batches} micro-batches waits for itself")
    return Simulated(max(free), tuple(busy))


def _ready(
    done: dict[tuple[str, int, int], float], kind: str, stage: int, stages: int, micro_batch: int, hop: float
) -> float | None:
    """When what a pass needs is there; None while it is not known."""
    if kind == FORWARD:
        needed = (FORWARD, stage - 1, micro_batch) if stage else None
    elif stage == stages - 1:
        return done.get((FORWARD, stage, micro_batch))
    else:
        needed = (BACKWARD, stage + 1, micro_batch)
    if needed is None:
        return 0.0
    when = done.get(needed)
    return None if when is None else when + hop
