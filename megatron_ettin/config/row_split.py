"""Split the rows of a step over data-parallel ranks, then over the micro-batches of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowSplit:
    """Rows of one step, spread evenly over `dp` ranks that run `count` micro-batches of `size` places each.

    Every rank gets floor(rows / dp) rows or one more, and every one of its micro-batches an equal part of them, rounded
    down or up. All micro-batches of a step have the same size, which pipeline stages need; a place without a row is
    empty. Where everything divides, micro-batch `index` of all ranks together holds consecutive rows."""

    rows: int
    dp: int
    count: int
    size: int

    @classmethod
    def of(cls, rows: int, dp: int, most: int, group: int = 1, fixed: bool = False) -> RowSplit:
        """Split `rows` over `dp` ranks in as few micro-batches of at most `most` rows as will do.

        Args:
            rows: rows of the step.
            dp: data-parallel ranks.
            most: rows that a micro-batch may hold.
            group: the number of micro-batches of a rank is a multiple of it.
            fixed: give micro-batches `most` places even where fewer would do, for what cannot change its shapes.
        """
        share = -(-rows // dp)
        count = -(-share // (most * group)) * group
        return cls(rows, dp, count, most if fixed else -(-share // count))

    @property
    def places(self) -> int:
        """Rows that all ranks compute in the step, empty ones included."""
        return self.count * self.dp * self.size

    @property
    def empty(self) -> int:
        """Places that have no row."""
        return self.places - self.rows

    def slots(self, rank: int, index: int) -> range:
        """Return the rows within the step that micro-batch `index` of data-parallel rank `rank` holds."""
        share, larger = divmod(self.rows, self.dp)  # the first `larger` ranks have a row more
        ends = [(n * (share + 1) // self.count, n * share // self.count) for n in (index, index + 1)]
        of_larger, of_others = (ends[1][kind] - ends[0][kind] for kind in (0, 1))
        before = larger * ends[0][0] + (self.dp - larger) * ends[0][1]
        start = before + min(rank, larger) * of_larger + max(0, rank - larger) * of_others
        return range(start, start + (of_larger if rank < larger else of_others))
