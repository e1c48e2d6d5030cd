"""Decide whether runs are a pair: check each model's chain of phases against the first model's.

The configurations of a pair agree in shape, data order, schedule, optimizer, batch and seed. Its records agree, at
every step that both have, in rows, tokens, learning rate and whether the update was made. The configuration alone
proves nothing; the recorded steps do. Layout, micro-batch, precision and device may differ and are not checked.

Skipped updates are read from metrics.jsonl and the newest checkpoint's counts. Older versions did not record `updated`,
so for steps that they marked `ignored` it is unknown whether the update was made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import GUARD_KEYS
from megatron_ettin.metrics.record import METRICS_FILE
from megatron_ettin.runs.chain import PhaseChain, join_phases
from megatron_ettin.runs.directory import RunDirectory

# science keys that may differ between the encoder and decoder of a pair
OBJECTIVE_KEYS = {"run.objective", "data.mlm_probability", "data.clm_fraction", "model.decoder_window_keys"}
# largest number of step ranges in one line
MOST_RANGES = 12
ORDER_KEYS = ("fingerprint", "tokenizer", "rows_per_step")
# checks by configuration -> prefixes of their science keys
GROUPS = {
    "model shape": ("model.",),
    "phase and seed": ("run.phase", "run.seed"),
    "schedule": ("schedule.", "run.tokens"),
    "optimizer": ("optim.",),
    "batch and rows": ("batch.", "data."),
    "bad steps": ("resilience.",),
}


@dataclass(frozen=True)
class Check:
    """Result of one check of two models."""

    pair: str
    """Names of the two models, as `A / B`."""
    phase: str
    """Phase; empty for a check of all phases."""
    name: str
    """Short name, such as `data order`."""
    passed: bool
    detail: str
    """The equal values if passed, else the differing ones."""


@dataclass(frozen=True)
class Comparison:
    """The compared models, and the checks of each other model against the first."""

    chains: list[PhaseChain]
    """The models; the others are checked against the first."""
    checks: list[Check]

    @property
    def verdict(self) -> str:
        """Return PAIRED, NOT PAIRED, SAME TRAINING or ONE MODEL."""
        if len(self.chains) == 1:
            return "ONE MODEL"
        if self.failed:
            return "NOT PAIRED"
        return "PAIRED" if len({chain.objective for chain in self.chains}) > 1 else "SAME TRAINING"

    @property
    def failed(self) -> list[Check]:
        """Return the checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def left_out(self) -> str:
        """Return the steps whose updates each model skipped, as text; empty if no model skipped any."""
        skipped = [(chain.name, chain.skipped_updates()) for chain in self.chains]
        if not any(by_phase for _, by_phase in skipped):
            return ""
        parts = []
        for name, by_phase in skipped:
            phases = [f"{phase} {format_steps(steps)}" for phase, steps in by_phase.items()]
            parts.append(f"{name} {', '.join(phases) or 'none'}")
        return "; ".join(parts)

    @property
    def without_partner(self) -> str:
        """Return, as text, how many steps of each run the other model's run lacks; empty if none."""
        parts = []
        for other in self.chains[1:]:
            for a, b in zip(self.chains[0].runs, other.runs):
                for chain, own, theirs in ((self.chains[0], a, b), (other, b, a)):
                    if more := len(own.steps.keys() - theirs.steps.keys()):
                        parts.append(f"{chain.name} {own.phase} {more:,}")
        return ", ".join(parts)


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the run directories and check each chain of phases against the first. Raises UserError."""
    return compare_runs([RunDirectory(path) for path in paths])


def compare_runs(runs: Sequence[RunDirectory]) -> Comparison:
    """Join runs to chains of phases and check each against the first. Raises UserError as `check_comparable`."""
    for run in runs:
        check_comparable(run)
    chains = join_phases(runs, by_record=False)
    return Comparison(chains, [check for other in chains[1:] for check in check_pair(chains[0], other)])


def check_comparable(run: RunDirectory) -> None:
    """Raise UserError if a file that `compare` needs cannot be read, or the run has no step yet."""
    run.check_begun()
    if not run.steps:
        raise UserError(f"{run.path}: {METRICS_FILE} holds no step yet")
    run.check_order()
    _ = run.science


def check_pair(first: PhaseChain, second: PhaseChain) -> Iterator[Check]:
    """Yield every check of two models."""
    pair = f"{first.name} / {second.name}"
    phases = [" then ".join(chain.phases) for chain in (first, second)]
    same = first.phases == second.phases
    yield Check(pair, "", "phases", same, phases[0] if same else ", but ".join(phases))
    for a, b in zip(first.runs, second.runs):
        for name, (passed, detail) in check_runs(a, b):
            yield Check(pair, a.phase, name, passed, detail)


def check_runs(a: RunDirectory, b: RunDirectory) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Yield (name, (passed, detail)) of every check of two runs of one phase: configurations, then recorded steps."""
    keys_a, keys_b = a.science, b.science
    if not all(key in keys for keys in (keys_a, keys_b) for key in GUARD_KEYS):
        # older runs do not record GUARD_KEYS; `check_updates` compares the updates themselves
        keys_a, keys_b = ({key: keys[key] for key in keys if key not in GUARD_KEYS} for keys in (keys_a, keys_b))
    own = OBJECTIVE_KEYS if a.objective != b.objective else set()
    for name, prefixes in GROUPS.items():
        keys = [key for key in {**keys_a, **keys_b} if key.startswith(prefixes) and key not in own]
        if keys:
            yield name, _equal_values({key: (keys_a.get(key), keys_b.get(key)) for key in keys})
    yield "data order", check_order(a, b)
    yield "no change on the way", check_changes(a, b)
    yield "rows of every step", check_steps(a, b, "rows")
    yield "tokens of every step", check_steps(a, b, "tokens")
    yield "learning rate of every step", check_steps(a, b, "lr")
    yield "updates of every step", check_updates(a, b)


def _equal_values(pairs: dict[str, tuple[Any, Any]]) -> tuple[bool, str]:
    differing = [f"{key}: {left} and {right}" for key, (left, right) in pairs.items() if left != right]
    return not differing, "; ".join(differing) or f"{len(pairs)} {'keys' if len(pairs) > 1 else 'key'} equal"


def check_order(a: RunDirectory, b: RunDirectory) -> tuple[bool, str]:
    """Check that the data order's fingerprint, tokenizer and rows per step agree. Return (passed, detail)."""
    for run in (a, b):
        if not (isinstance(run.order.get("fingerprint"), str) and run.order["fingerprint"]):
            return False, f"{run.path}: order.json has no fingerprint, so its data order is unknown"
    passed, detail = _equal_values({key: (a.order.get(key), b.order.get(key)) for key in ORDER_KEYS})
    return passed, f"fingerprint {a.order['fingerprint'][:16]}" if passed else detail


def check_changes(a: RunDirectory, b: RunDirectory) -> tuple[bool, str]:
    """Check that neither run changed a science key midway, as `--allow-change` permits. Return (passed, detail)."""
    changed = [f"{run.path.name}: {key}" for run in (a, b) for key in dict.fromkeys(run.changes)]
    torn = [f"{run.path.name}: line {number} cannot be read" for run in (a, b) for number in run.torn_launches]
    return not changed, "; ".join(changed or ["neither run used --allow-change", *torn])


def check_steps(a: RunDirectory, b: RunDirectory, key: str) -> tuple[bool, str]:
    """Check that `key` agrees on every step that both recorded. Return (passed, detail with the first difference)."""
    common = [step for step in a.steps if step in b.steps]
    if not common:
        return False, "the runs have no step in common"
    for step in common:
        left, right = a.steps[step].get(key), b.steps[step].get(key)
        if left is None or right is None:
            return False, f"step {step}: {key} was not recorded"
        if not _equal(left, right):
            return False, f"step {step}: {left} and {right}"
    return True, f"{len(common)} common steps ({common[0]} to {common[-1]}; recorded {len(a.steps)} and {len(b.steps)})"


def check_updates(a: RunDirectory, b: RunDirectory) -> tuple[bool, str]:
    """Check that both runs skipped the updates of the same common steps. Return (passed, detail)."""
    common = {step for step in a.steps if step in b.steps}
    if not common:
        return False, "the runs have no step in common"
    for run in (a, b):
        if (reason := _unproven(run)) is not None:
            return False, reason
    left, right = ([step for step in run.skipped_updates if step in common] for run in (a, b))
    if left == right:
        return True, f"left out in both: {format_steps(left)}" if left else f"made at all of {len(common)} common steps"
    names = [run.objective for run in (a, b)]
    if names[0] == names[1]:
        names = [str(run.path) for run in (a, b)]
    return False, f"left out in {names[0]}: {format_steps(left)}; in {names[1]}: {format_steps(right)}"


def _unproven(run: RunDirectory) -> str | None:
    """Return why the record of a run does not prove which updates it made; None if it does."""
    lines = run.steps.items()
    unclear = [step for step, line in lines if "updated" not in line and str(line.get("bad")).startswith("ignored")]
    if run.saved_skips is not None:
        reached, count = run.saved_skips
        known = sum(step <= reached for step in run.skipped_updates)
        if count != known:
            return (
                f"{run.path}: the checkpoint of step {reached:,} counts {count:,} updates that were left out,"
                f" metrics.jsonl names {known:,}"
            )
        unclear = [step for step in unclear if step > reached]
    return f"{run.path}: whether the update of step {unclear[0]} was made was not recorded" if unclear else None


def format_steps(steps: Sequence[int]) -> str:
    """Return steps as text such as `3, 7 to 9`, with at most MOST_RANGES ranges; `none` without steps."""
    groups = itertools.groupby(enumerate(sorted(steps)), key=lambda pair: pair[1] - pair[0])
    consecutive = [[step for _, step in group] for _, group in groups]
    ranges = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in consecutive]
    more = f" and {len(ranges) - MOST_RANGES} more ranges" if len(ranges) > MOST_RANGES else ""
    return ", ".join(ranges[:MOST_RANGES]) + more or "none"


def _equal(left: Any, right: Any) -> bool:
    # learning rates computed on different hosts may differ in the last bit
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)
