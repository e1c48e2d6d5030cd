"""Are these runs a pair? Reads run directories, joins a model's phases into a chain, checks chain against chain.

A pair shares shape, data order, schedule, optimizer, batch and seed by configuration, and rows, tokens, learning rate
and whether the update was made by the record of every step that both have. The configuration alone would be a promise;
the record is the proof. What may differ (layout, micro-batch, precision, device) is shown and never judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.config.science import GUARD_KEYS
from megatron_ettin.config.tables import short_name
from megatron_ettin.metrics import METRICS_FILE, read_metrics
from megatron_ettin.report.updates import left_out, named, unproven
from megatron_ettin.runs.history import allowed_changes, read_launches, stored_science_keys

OBJECTIVE_KEYS = {
    "run.objective",
    "data.mlm_probability",
    "data.clm_fraction",
    "model.decoder_window_keys",
}  # what a pair differs in
PHASE_ORDER = {"pretrain": 0, "extend": 1, "decay": 2, "cross": 3}
ORDER_KEYS = ("fingerprint", "tokenizer", "rows_per_step")
# of a step's line
NUMBERS = ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "updates")
# what is checked by configuration -> prefixes of its science keys
GROUPS = {
    "model shape": ("model.",),
    "phase and seed": ("run.phase", "run.seed"),
    "schedule": ("schedule.", "run.tokens"),
    "optimizer": ("optim.",),
    "batch and rows": ("batch.", "data."),
    "bad steps": ("resilience.",),
}


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    path: Path
    config: Config
    science: dict[str, object]  # the keys that its config.yaml fixes
    order: dict[str, Any]
    changes: list[str]  # science keys that --allow-change let through on the way
    steps: dict[int, dict[str, Any]]  # step -> its line
    torn_launches: list[int] = field(default_factory=list)
    """Numbers of lines of history.jsonl that cannot be read."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises UserError for a directory that is no run or holds no step yet."""
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: no run directory (it has no config.yaml)")
        lines = read_metrics(path / METRICS_FILE)
        steps = {line["step"]: _sound(line) for line in lines if _is_count(line.get("step")) and is_step(line)}
        if not steps:
            raise UserError(f"{path}: {METRICS_FILE} holds no step yet")
        torn: list[int] = []
        changes = [key for launch in read_launches(path, torn) for key in allowed_changes(launch)]
        order = _json_object(path / "order.json")
        config = path / "config.yaml"
        science = stored_science_keys(config)
        return cls(path, from_yaml(config), science, order, changes, dict(sorted(steps.items())), torn)

    @property
    def tokens(self) -> int:
        return max(line["tokens"] for line in self.steps.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_step(line: dict[str, Any]) -> bool:
    """Whether a line of the record is a step's: evaluations have no tokens of their own."""
    return _is_count(line.get("tokens")) and line["tokens"] > 0


def _sound(line: dict[str, Any]) -> dict[str, Any]:
    """A step's line without what is no number where every step has one: as if it had not been recorded."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and -1e300 < value < 1e300

    wrong = {key for key in NUMBERS if line.get(key) is not None and not is_number(line[key])}
    return {key: value for key, value in line.items() if key not in wrong} if wrong else line


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none. Raises UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: JSON objects were expected")
    return found


@dataclass
class Chain:
    """The phases of one model, in the order in which they are trained."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def objective(self) -> str:
        return self.runs[0].config.run.objective

    @property
    def phases(self) -> list[str]:
        return [run.config.run.phase for run in self.runs]

    def segments(self, key: str) -> list[tuple[list[float], list[float]]]:
        """For each phase that has some: (tokens since the chain's start, values) of steps with a number for `key`."""
        found, before = [], 0
        for run in self.runs:
            lines = [line for line in run.steps.values() if isinstance(line.get(key), int | float)]
            if lines:
                tokens = [float(before + line["tokens"]) for line in lines]
                found.append((tokens, [float(line[key]) for line in lines]))
            before += run.tokens
        return found

    def left_out(self) -> dict[str, list[int]]:
        """Phase -> the steps whose updates were left out; phases without any are not in it."""
        found = {run.config.run.phase: left_out(run.steps) for run in self.runs}
        return {phase: steps for phase, steps in found.items() if steps}

    def phase_starts(self) -> list[tuple[float, str]]:
        ends = itertools.accumulate((run.tokens for run in self.runs), initial=0)
        return [(float(start), phase) for start, phase in zip(ends, self.phases)]


def chains(runs: Sequence[Run]) -> list[Chain]:
    """Runs of one size and objective form a chain while their phases differ; a phase again starts another chain."""
    found: list[Chain] = []
    for run in runs:
        settings = run.config.run
        name = f"{short_name(settings.size, run.config.model)} {settings.objective}"
        last = next((chain for chain in reversed(found) if chain.name == name), None)
        if last is None or settings.phase in last.phases:
            last = Chain(name)
            found.append(last)
        last.runs.append(run)
    for chain in found:  # a pattern of the shell names them by the alphabet
        chain.runs.sort(key=lambda run: PHASE_ORDER.get(run.config.run.phase, len(PHASE_ORDER)))
    for name in {chain.name for chain in found}:
        same = [chain for chain in found if chain.name == name]
        for chain in same if len(same) > 1 else []:
            chain.name = f"{name} ({chain.runs[0].path.name})"
    if len({chain.name for chain in found}) < len(found):  # folders of one name
        for number, chain in enumerate(found, start=1):
            chain.name = f"{number}: {chain.name}"
    return found


@dataclass(frozen=True)
class Check:
    """One thing that a pair shares. `detail` says what was compared, or what differs."""

    pair: str
    phase: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Comparison:
    chains: list[Chain]
    checks: list[Check]

    @property
    def verdict(self) -> str:
        if len(self.chains) == 1:
            return "ONE MODEL"
        if not all(check.passed for check in self.checks):
            return "NOT PAIRED"
        return "PAIRED" if len({chain.objective for chain in self.chains}) > 1 else "SAME TRAINING"

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def left_out(self) -> str:
        """Which updates each model left out, in words; empty where none left out any."""
        if not any(chain.left_out() for chain in self.chains):
            return ""
        told = []
        for chain in self.chains:
            phases = [f"{phase} {named(steps)}" for phase, steps in chain.left_out().items()]
            told.append(f"{chain.name} {', '.join(phases) or 'none'}")
        return "; ".join(told)

    @property
    def without_partner(self) -> str:
        """Name how many steps of each run have no partner in the other model's; empty if every step has one."""
        told = []
        for other in self.chains[1:]:
            for a, b in zip(self.chains[0].runs, other.runs):
                for chain, own, theirs in ((self.chains[0], a, b), (other, b, a)):
                    if more := len(own.steps.keys() - theirs.steps.keys()):
                        told.append(f"{chain.name} {own.config.run.phase} {more:,}")
        return ", ".join(told)


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the runs and check each chain against the first. Raises UserError for what cannot be read."""
    found = chains([Run.read(path) for path in paths])
    return Comparison(found, [check for other in found[1:] for check in check_pair(found[0], other)])


def check_pair(first: Chain, second: Chain) -> Iterator[Check]:
    pair = f"{first.name} / {second.name}"
    same = first.phases == second.phases
    told = " then ".join(first.phases)
    yield Check(pair, "", "phases", same, told if same else f"{told}, but {' then '.join(second.phases)}")
    for a, b in zip(first.runs, second.runs):
        for name, (passed, detail) in check_runs(a, b):
            yield Check(pair, a.config.run.phase, name, passed, detail)


def check_runs(a: Run, b: Run) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Every check of two runs of one phase: by configuration, then by the record."""
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


def check_order(a: Run, b: Run) -> tuple[bool, str]:
    for run in (a, b):
        if not run.order.get("fingerprint"):
            return False, f"{run.path}: order.json has no fingerprint, so its data order is unknown"
    passed, detail = _equal_values({key: (a.order.get(key), b.order.get(key)) for key in ORDER_KEYS})
    return passed, f"fingerprint {a.order['fingerprint'][:16]}" if passed else detail


def check_changes(a: Run, b: Run) -> tuple[bool, str]:
    """A run whose science changed half-way is described by no configuration, so it is nobody's pair."""
    changed = [f"{run.path.name}: {key}" for run in (a, b) for key in dict.fromkeys(run.changes)]
    torn = [f"{run.path.name}: line {number} cannot be read" for run in (a, b) for number in run.torn_launches]
    told = "; ".join(["neither run used --allow-change", *torn])
    return not changed, "; ".join(changed) or told


def check_steps(a: Run, b: Run, key: str) -> tuple[bool, str]:
    """Whether `key` agrees on every step that both recorded; names the first step that does not."""
    common = [step for step in a.steps if step in b.steps]
    if not common:
        return False, "the runs have no step in common"
    for step in common:
        left, right = a.steps[step].get(key), b.steps[step].get(key)
        if left is None or right is None:
            return False, f"step {step}: {key} was not recorded"
        # Learning rates may have been computed on other machines: the last bit is no difference.
        if not _equal(left, right):
            return False, f"step {step}: {left} and {right}"
    return True, f"{len(common)} common steps ({common[0]} to {common[-1]}; recorded {len(a.steps)} and {len(b.steps)})"


def check_updates(a: Run, b: Run) -> tuple[bool, str]:
    """Whether both made, and left out, the updates of the same steps."""
    common = {step for step in a.steps if step in b.steps}
    if not common:
        return False, "the runs have no step in common"
    for run in (a, b):
        if (why := unproven(run.path, run.steps)) is not None:
            return False, why
    left, right = ([step for step in left_out(run.steps) if step in common] for run in (a, b))
    if left == right:
        return True, f"left out in both: {named(left)}" if left else f"made at all of {len(common)} common steps"
    names = [run.config.run.objective for run in (a, b)]
    if names[0] == names[1]:
        names = [str(run.path) for run in (a, b)]
    return False, f"left out in {names[0]}: {named(left)}; in {names[1]}: {named(right)}"


def _equal(left: Any, right: Any) -> bool:
    """Learning rates may have been computed on other machines: the last bit is no difference."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)


def operations(run: Run) -> dict[str, str]:
    """What a run may choose freely, for the page: shown, not judged."""
    parallel = run.config.parallel
    degrees = {axis: getattr(parallel, axis) for axis in ("tp", "pp", "vpp", "cp")}
    layout = " ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
    return {
        "layout": layout or "data-parallel",
        "micro-batch rows": str(run.config.batch.micro_batch_rows),
        "precision": run.config.precision.name,
        "device": run.config.run.device,
    }
