"""Places of a whole run's micro-batches that have no row, the batch warm-up's smaller steps included."""

from __future__ import annotations

from megatron_ettin.config.layouts import full_split, has_fixed_shapes, micro_batch_group
from megatron_ettin.config.row_split import RowSplit
from megatron_ettin.config.schema import Config
from megatron_ettin.data.batch_sizes import BatchSizes

MOST_DP = 1024  # data-parallel degrees that `empty_shares` looks at
TOLD = 0.01  # smaller shares are not told one by one


def run_places(config: Config, dp: int) -> tuple[int, int]:
    """Return the rows of all steps of the run, and the places that the ranks compute for them."""
    row_tokens = config.data.mean_tokens_per_row or config.data.seq_len
    sizes = BatchSizes.of(config.batch, row_tokens)
    end = config.run.steps or sizes.steps_for(config.run.tokens / row_tokens)
    fixed = has_fixed_shapes(config)
    most = full_split(config, dp).size if fixed else config.batch.micro_batch_rows
    rows = places = 0
    for level, size in enumerate(sizes.rows):
        last = sizes.first_step[level + 1] if level + 1 < len(sizes.rows) else end
        steps = max(0, min(last, end) - sizes.first_step[level])
        rows += steps * size
        places += steps * RowSplit.of(size, dp, most, micro_batch_group(config), fixed).places
    return rows, places


def empty_share(config: Config, dp: int) -> float:
    """Return the part of the run's work that is empty places."""
    rows, places = run_places(config, dp)
    return 1 - rows / places


def empty_shares(config: Config) -> dict[int, float]:
    """Return `empty_share` by data-parallel degree, for powers of two up to the rows of a step."""
    most = min(MOST_DP, config.batch.global_batch_rows)
    return {dp: empty_share(config, dp) for dp in (2**n for n in range(most.bit_length()))}


def describe_shares(shares: dict[int, float]) -> str:
    """Return the empty shares as a line."""
    wasteful = {dp: f"{share:.0%}" for dp, share in shares.items() if share >= TOLD}
    others = ", ".join(str(dp) for dp in shares if dp not in wasteful)
    told = ", ".join(f"{share} at dp {dp}" for dp, share in wasteful.items())
    return f"{told or 'none worth telling'} of the run's work; below {TOLD:.0%} at dp {others}"
