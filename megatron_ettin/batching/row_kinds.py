"""Which rows of a step are read causally and which with masked tokens.

Rows of a step come in the shuffled order of the data, so its first slots are as good a sample as any: they are the
causal ones. Every micro-batch of any layout then has its causal rows first, and all but one of a step hold rows of one
kind. How many there are is a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ettin.config.fractions import Points, parse_points, share_at
from megatron_ettin.config.objectives import KINDS, OBJECTIVES
from megatron_ettin.config.schema import Config
from megatron_ettin.data.batch_sizes import BatchSizes
from megatron_ettin.data.hashing import key64


@dataclass(frozen=True)
class RowKinds:
    """Kinds of the rows of any step. `points`: the causal share by nominal tokens, of a hybrid objective."""

    kinds: tuple[str, ...]
    points: Points = ()
    seed: int = 0
    phase: str = ""
    mean_tokens_per_row: float = 1.0

    @classmethod
    def of(cls, config: Config, mean_tokens_per_row: float) -> RowKinds:
        kinds = OBJECTIVES[config.run.objective].kinds
        if len(kinds) == 1:
            return cls(kinds)
        points = parse_points(config.data.clm_fraction, "data.clm_fraction")
        return cls(kinds, points, config.run.seed, config.run.phase, mean_tokens_per_row)

    def causal_rows(self, sizes: BatchSizes, step: int) -> int:
        """Rows of `step` that are causal: slots 0, 1, ... A share of 2.4 rows is 2 or 3 of them, 2.4 on average."""
        rows = sizes.size_at(step)
        if not self.points:
            return rows if KINDS[self.kinds[0]].causal else 0
        share = share_at(self.points, sizes.rows_before(step) * self.mean_tokens_per_row)
        draw = (key64("kinds", self.seed, self.phase, step) >> 11) * 2.0**-53
        return min(rows, int(share * rows + draw))

    def of_slot(self, slot: int, causal_rows: int) -> str:
        return self.kinds[0] if slot < causal_rows else self.kinds[-1]
