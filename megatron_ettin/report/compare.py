"""Decide whether runs are a pair: join a model's phases into a chain, and check chain against chain.

A pair shares shape, data order, schedule, optimizer, batch and seed by configuration. By the record of every step that
both have, it shares rows, tokens, learning rate and whether the update was made. The configuration alone would be a
promise; the record is the proof. What may differ (layout, micro-batch, precision, device) is shown and never judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.config.science import GUARD_KEYS
from megatron_ettin.config.tables import long_name, short_name
from megatron_ettin.metrics import METRICS_FILE, read_metrics
from megatron_ettin.report.record import PHASE_ORDER, final_loss, make_names_distinct
from megatron_ettin.report.updates import format_steps, left_out, unproven
from megatron_ettin.runs.history import allowed_changes, read_launches, stored_science_keys

# science keys in which a pair differs
OBJECTIVE_KEYS = {"run.objective", "data.mlm_probability", "data.clm_fraction", "model.decoder_window_keys"}
ORDER_KEYS = ("fingerprint", "tokenizer", "rows_per_step")
# numbers in a step's line
NUMBERS = ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "updates")
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
class ComparedRun:
    """A run directory with every step's line."""

    path: Path
    config: Config
    science: dict[str, object]
    """Science keys that its config.yaml fixes."""
    order: dict[str, Any]
    changes: list[str]
    """Science keys that were changed by --allow-change."""
    steps: dict[int, dict[str, Any]]
    """Step -> its line in metrics.jsonl."""
    torn_launches: list[int] = field(default_factory=list)
    """Numbers of lines of history.jsonl that cannot be read."""

    @classmethod
    def read(cls, path: Path) -> ComparedRun:
        """Read a run. Raises UserError for a directory that is not a run or has no step yet."""
        config = path / "config.yaml"
        if not config.is_file():
            raise UserError(f"{path}: no run directory (it has no config.yaml)")
        lines = read_metrics(path / METRICS_FILE)
        steps = {line["step"]: _sound(line) for line in lines if _is_count(line.get("step")) and is_step(line)}
        if not steps:
            raise UserError(f"{path}: {METRICS_FILE} holds no step yet")
        torn: list[int] = []
        changes = [key for launch in read_launches(path, torn) for key in allowed_changes(launch)]
        order, science = _json_object(path / "order.json"), stored_science_keys(config)
        return cls(path, from_yaml(config), science, order, changes, dict(sorted(steps.items())), torn)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return max(int(line["tokens"]) for line in self.steps.values())

    @property
    def phase(self) -> str:
        """Name of the phase."""
        return self.config.run.phase


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_step(line: dict[str, Any]) -> bool:
    """Return whether a line of the record is a step's: evaluations have no tokens of their own."""
    return _is_count(line.get("tokens")) and line["tokens"] > 0


def _sound(line: dict[str, Any]) -> dict[str, Any]:
    """Return a step's line without values that should be numbers and are not, as if they had not been recorded."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and -1e300 < value < 1e300

    wrong = {key for key in NUMBERS if line.get(key) is not None and not is_number(line[key])}
    return {key: value for key, value in line.items() if key not in wrong} if wrong else line


def _json_object(path: Path) -> dict[str, Any]:
    """Return the object in a file, empty where there is no file. Raises UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


@dataclass
class PhaseChain:
    """The phases of one model, in the order in which they are trained."""

    name: str
    runs: list[ComparedRun] = field(default_factory=list)

    @property
    def objective(self) -> str:
        """Objective of the model."""
        return self.runs[0].config.run.objective

    @property
    def phases(self) -> list[str]:
        """Names of the phases."""
        return [run.phase for run in self.runs]

    def left_out(self) -> dict[str, list[int]]:
        """Return the steps whose updates were skipped, by phase; phases without any are not in it."""
        skipped = {run.phase: left_out(run.steps) for run in self.runs}
        return {phase: steps for phase, steps in skipped.items() if steps}

    def summary(self) -> dict[str, Any]:
        """Return the figures of the model for --json. What a run may choose freely is shown and not judged."""
        last = self.runs[-1].config
        lines = [line for run in self.runs for line in run.steps.values()]
        losses = [line["loss"] for line in self.runs[-1].steps.values() if line.get("loss") is not None]
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        degrees = {axis: getattr(last.parallel, axis) for axis in ("tp", "pp", "vpp", "cp")}
        return {
            "name": self.name,
            "model": long_name(last.run.size, last.model),
            "runs": [str(run.path) for run in self.runs],
            "phases": self.phases,
            "steps": len(lines),
            "tokens": sum(run.tokens for run in self.runs),
            "final_loss": final_loss(losses),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "updates_left_out": self.left_out(),
            "layout": " ".join(f"{axis} {size}" for axis, size in degrees.items() if size > 1) or "data-parallel",
            "micro-batch rows": str(last.batch.micro_batch_rows),
            "precision": last.precision.name,
            "device": last.runtime.device,
        }


def join_phases(runs: Sequence[ComparedRun]) -> list[PhaseChain]:
    """Join runs of one size and objective to chains while their phases differ; a phase again starts another chain."""
    chains: list[PhaseChain] = []
    for run in runs:
        settings = run.config.run
        name = f"{short_name(settings.size, run.config.model)} {settings.objective}"
        last = next((chain for chain in reversed(chains) if chain.name == name), None)
        if last is None or run.phase in last.phases:
            last = PhaseChain(name)
            chains.append(last)
        last.runs.append(run)
    # a pattern of the shell names runs by the alphabet
    for chain in chains:
        chain.runs.sort(key=lambda run: PHASE_ORDER.get(run.phase, len(PHASE_ORDER)))
    make_names_distinct(chains)
    return chains


@dataclass(frozen=True)
class Check:
    """One thing that a pair shares."""

    pair: str
    """Names of the two models."""
    phase: str
    """Phase; empty for a check of all phases."""
    name: str
    """Short name, such as `data order`."""
    passed: bool
    detail: str
    """Values that were compared, or that differ."""


@dataclass(frozen=True)
class Comparison:
    """The models that were compared, and the checks of each against the first."""

    chains: list[PhaseChain]
    """The models, the first of which the others are checked against."""
    checks: list[Check]

    @property
    def verdict(self) -> str:
        """PAIRED, NOT PAIRED, SAME TRAINING or ONE MODEL."""
        if len(self.chains) == 1:
            return "ONE MODEL"
        if self.failed:
            return "NOT PAIRED"
        return "PAIRED" if len({chain.objective for chain in self.chains}) > 1 else "SAME TRAINING"

    @property
    def failed(self) -> list[Check]:
        """Checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def left_out(self) -> str:
        """Updates that each model skipped, in words; empty if none skipped any."""
        if not any(chain.left_out() for chain in self.chains):
            return ""
        parts = []
        for chain in self.chains:
            phases = [f"{phase} {format_steps(steps)}" for phase, steps in chain.left_out().items()]
            parts.append(f"{chain.name} {', '.join(phases) or 'none'}")
        return "; ".join(parts)

    @property
    def without_partner(self) -> str:
        """Number of steps of each run that have no partner in the other model; empty if every step has one."""
        parts = []
        for other in self.chains[1:]:
            for a, b in zip(self.chains[0].runs, other.runs):
                for chain, own, theirs in ((self.chains[0], a, b), (other, b, a)):
                    if more := len(own.steps.keys() - theirs.steps.keys()):
                        parts.append(f"{chain.name} {own.phase} {more:,}")
        return ", ".join(parts)


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the runs and check each chain against the first. Raises UserError for what cannot be read."""
    chains = join_phases([ComparedRun.read(path) for path in paths])
    return Comparison(chains, [check for other in chains[1:] for check in check_pair(chains[0], other)])


def check_pair(first: PhaseChain, second: PhaseChain) -> Iterator[Check]:
    """Yield every check of two models."""
    pair = f"{first.name} / {second.name}"
    phases = [" then ".join(chain.phases) for chain in (first, second)]
    same = first.phases == second.phases
    yield Check(pair, "", "phases", same, phases[0] if same else ", but ".join(phases))
    for a, b in zip(first.runs, second.runs):
        for name, (passed, detail) in check_runs(a, b):
            yield Check(pair, a.phase, name, passed, detail)


def check_runs(a: ComparedRun, b: ComparedRun) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Yield every check of two runs of one phase: by configuration, then by the record."""
    keys_a, keys_b = a.science, b.science
    if not all(key in keys for keys in (keys_a, keys_b) for key in GUARD_KEYS):
        # a run of an older version fixes none of them: the record of its updates is the proof
        keys_a, keys_b = ({key: keys[key] for key in keys if key not in GUARD_KEYS} for keys in (keys_a, keys_b))
    own = OBJECTIVE_KEYS if a.config.run.objective != b.config.run.objective else set()
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


def check_order(a: ComparedRun, b: ComparedRun) -> tuple[bool, str]:
    """Check the fingerprints of the data order and of the tokenizer."""
    for run in (a, b):
        if not run.order.get("fingerprint"):
            return False, f"{run.path}: order.json has no fingerprint, so its data order is unknown"
    passed, detail = _equal_values({key: (a.order.get(key), b.order.get(key)) for key in ORDER_KEYS})
    return passed, f"fingerprint {a.order['fingerprint'][:16]}" if passed else detail


def check_changes(a: ComparedRun, b: ComparedRun) -> tuple[bool, str]:
    """Check that no science key changed half-way: no configuration describes such a run, so it has no partner."""
    changed = [f"{run.path.name}: {key}" for run in (a, b) for key in dict.fromkeys(run.changes)]
    torn = [f"{run.path.name}: line {number} cannot be read" for run in (a, b) for number in run.torn_launches]
    return not changed, "; ".join(changed or ["neither run used --allow-change", *torn])


def check_steps(a: ComparedRun, b: ComparedRun, key: str) -> tuple[bool, str]:
    """Check that `key` agrees on every step that both recorded; name the first step that differs."""
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


def check_updates(a: ComparedRun, b: ComparedRun) -> tuple[bool, str]:
    """Check that both made, and skipped, the updates of the same steps."""
    common = {step for step in a.steps if step in b.steps}
    if not common:
        return False, "the runs have no step in common"
    for run in (a, b):
        if (reason := unproven(run.path, run.steps)) is not None:
            return False, reason
    left, right = ([step for step in left_out(run.steps) if step in common] for run in (a, b))
    if left == right:
        return True, f"left out in both: {format_steps(left)}" if left else f"made at all of {len(common)} common steps"
    names = [run.config.run.objective for run in (a, b)]
    if names[0] == names[1]:
        names = [str(run.path) for run in (a, b)]
    return False, f"left out in {names[0]}: {format_steps(left)}; in {names[1]}: {format_steps(right)}"


def _equal(left: Any, right: Any) -> bool:
    # learning rates may have been computed on other hosts: the last bit is no difference
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)
