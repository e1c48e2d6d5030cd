"""Rounds: a run is disturbed, launched again until it ends, and compared bit for bit with an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chaos_parts.faults import FAULTS, Fault, Round
from chaos_parts.launch import Launch, RankHost
from chaos_parts.specimen import LAYOUTS, STEPS, corpus_in, train_arguments
from chaos_parts.zygote import Zygote
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import latest, read_progress
from megatron_ettin.checkpoint.integrity import verify
from megatron_ettin.checkpoint.reader import CheckpointReader

# seconds without a step that count as a hang, on a host that is busy with other work
PATIENT_SECONDS = 30.0
# most disturbed launches in a round
LAUNCHES = 8
# most seconds of an undisturbed launch
LIMIT_SECONDS = 150.0
# most seconds after a launch's last fault; some faults hang for ten minutes on purpose
PATIENCE_SECONDS = 40.0
# share of rounds with a second kind of fault
TOGETHER = 0.35
COMPARED = ("step", "tokens", "loss", "grad_norm", "lr", "rows")
IDENTICAL, REFUSED = "identical", "refused"
# prefix of the line with the reason for which a run ends
REFUSAL = "ettin train: "


@dataclass
class RoundRecord:
    """Record of a round, one line of the log."""

    seed: int
    round: int
    faults: list[str]
    layout: str
    asynchronous: bool
    # exit statuses of the ranks, per launch
    launches: list[list[int]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    outcome: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.outcome in (IDENTICAL, REFUSED)


@dataclass(frozen=True)
class State:
    """The final state of a run."""

    tensors: dict[str, torch.Tensor]
    lines: list[list[Any]]
    progress: dict[str, Any]


def state_of(run_dir: Path) -> State:
    """Return every tensor of the last checkpoint, the optimizer's too, and the record of every step."""
    checkpoint = latest(run_dir, checksums=True)
    if checkpoint is None:
        raise UserError(f"{run_dir}: no checkpoint")
    reader = CheckpointReader(checkpoint)
    tensors = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return State(tensors, [[line[key] for key in COMPARED] for line in lines], read_progress(checkpoint))


def differences(actual: State, expected: State) -> list[str]:
    """Return one line per difference; none if every bit is the same."""
    lines = [f"tensors {sorted(set(actual.tensors) ^ set(expected.tensors))[:3]} on one side only"] * (
        actual.tensors.keys() != expected.tensors.keys()
    )
    for key in actual.tensors.keys() & expected.tensors.keys():
        ours, theirs = actual.tensors[key], expected.tensors[key]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not torch.equal(bits(ours), bits(theirs)):
            lines.append(f"{key} differs")
    if actual.lines != expected.lines:
        lines.append("metrics.jsonl differs")
    if actual.progress != expected.progress:
        lines.append("progress.json differs")
    return lines


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Chaos:
    """Runs of one session: the process that ranks are forked from, the undisturbed runs, the available faults.

    A context manager. `mutation` applies to all ranks but those of undisturbed runs.
    """

    def __init__(
        self, work: Path, ranks: int, fault_names: Sequence[str], layouts: Sequence[str], mutation: str | None = None
    ) -> None:
        self.work, self.ranks, self.layouts, self.mutation = work, ranks, layouts, mutation
        self.fault_names, self.unavailable = [], {}
        for name in fault_names:
            why = FAULTS[name]().unavailable()
            if why is None:
                self.fault_names.append(name)
            else:
                self.unavailable[name] = why
        self.zygote = Zygote()
        self.corpus = corpus_in(work)
        self.undisturbed: dict[str, State] = {}

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *error: object) -> None:
        self.zygote.close()

    def arguments(
        self, run_dir: Path, layout: str, asynchronous: bool, hang_seconds: float = PATIENT_SECONDS
    ) -> list[str]:
        settings = [f"resilience.hang_seconds={hang_seconds}", "checkpoint.retry_seconds=1"]
        settings.append(f"checkpoint.asynchronous={str(asynchronous).lower()}")
        return train_arguments(run_dir, self.corpus, *LAYOUTS[layout], *settings)

    def reference(self, layout: str) -> State:
        """Train undisturbed, once for each layout and number of ranks."""
        if layout not in self.undisturbed:
            run_dir = self.work / f"undisturbed-{self.ranks}-{layout.replace(' ', '-')}"
            host = RankHost(self.zygote, self.ranks)
            launch = Launch(host, run_dir, run_dir / "logs", self.arguments(run_dir, layout, True))
            if launch.finish([], LIMIT_SECONDS)[0] != [0] * self.ranks:
                raise RuntimeError(f"the undisturbed run did not end well: {launch.output()[-3000:]}")
            self.undisturbed[layout] = state_of(run_dir)
        return self.undisturbed[layout]

    def round(self, seed: int, number: int) -> RoundRecord:
        draw = random.Random(f"{seed} {number}")
        fault_names = [self.fault_names[number % len(self.fault_names)]]
        if draw.random() < TOGETHER:
            fault_names = sorted({*fault_names, draw.choice(self.fault_names)})
        record = RoundRecord(seed, number, fault_names, draw.choice(list(self.layouts)), draw.random() < 0.7)
        expected = self.reference(record.layout)
        began, folder = time.monotonic(), self.work / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "run").mkdir(parents=True)
        round = Round(folder / "run", draw, RankHost(self.zygote, self.ranks, self.mutation))
        try:
            record.outcome = self.disturbed(round, [FAULTS[name]() for name in fault_names], record, expected)
        finally:
            for close in reversed(round.closing):
                close()
        record.seconds = time.monotonic() - began
        if record.passed:
            shutil.rmtree(folder, ignore_errors=True)
        return record

    def disturbed(self, round: Round, faults: list[Fault], record: RoundRecord, expected: State) -> str:
        """Launch until the run ends, and return the result."""
        for fault in faults:
            fault.prepare(round)
        disturbed = round.draw.randint(1, max(fault.relaunches for fault in faults))
        output, statuses = "", [1]
        for number in range(LAUNCHES):
            actions = [action for fault in faults for action in fault.actions(round)] if number < disturbed else []
            hang_seconds = min(fault.hang_seconds for fault in faults) if actions else PATIENT_SECONDS
            command = self.arguments(round.run_dir, record.layout, record.asynchronous, hang_seconds)
            launch = Launch(round.host, round.run_dir, round.run_dir.parent / f"logs-{number}", command)
            statuses, events, too_long = launch.finish(actions, PATIENCE_SECONDS if actions else LIMIT_SECONDS)
            output = launch.output()
            record.launches.append(statuses)
            record.events += [f"launch {number}: {event}" for event in events]
            if too_long and number >= disturbed:
                return f"FAILED: launch {number}, undisturbed, did not end"
            unnamed = unnamed_damage(round, output)
            if unnamed:
                return f"FAILED: {unnamed}"
            if all(status == 0 for status in statuses):
                break
            if number < disturbed:
                record.events += [f"after {number}: {event}" for fault in faults for event in fault.between(round)]
            elif number >= disturbed + 1 and 2 in statuses:
                # another launch would be refused again
                break
        record.events += [line for line in output.splitlines() if line.startswith(REFUSAL)]
        return judged(round, statuses, output, expected)


def unnamed_damage(round: Round, output: str) -> str | None:
    """Return the damage that the launch should have named: in the checkpoint it resumed from, or in a newer one."""
    match = re.search(r"resumed (step_\d+) ", output)
    if not match or not round.damaged:
        return None
    # later launches skip it, or its step was saved again
    damaged, round.damaged = round.damaged, []
    for path, how in damaged:
        name = path.parts[path.parts.index("checkpoints") + 1]
        if name == match[1]:
            return f"went on from {name} in spite of {how}"
        if name.startswith("step_") and name > match[1] and name not in output:
            return f"{how}: passed over without a word"
    return None


def names_damage(round: Round, line: str) -> bool:
    """Return whether an error names a damaged file, or the setting that differs in the run's own record."""
    harmed = [path for path, _ in round.damaged] + round.harmed
    changed = f"{round.run_dir}: was started with "
    return any(path.name in line or (path.parent == round.run_dir and changed in line) for path in harmed)


def judged(round: Round, statuses: list[int], output: str, expected: State) -> str:
    if any(statuses):
        lines = [line for line in output.splitlines() if line.startswith(REFUSAL)]
        if 2 in statuses and len(lines) == 1 and names_damage(round, lines[0]):
            return REFUSED
        return f"FAILED: statuses {statuses}: {(lines or output.splitlines() or ['no output'])[-1][:300]}"
    try:
        actual = state_of(round.run_dir)
        verify(round.run_dir / "checkpoints" / f"step_{STEPS:09d}")
    except (UserError, OSError, ValueError, KeyError) as error:
        return f"FAILED: ended well, but {error}"
    problems = differences(actual, expected)
    # lost lines do not come back
    if any(path.name == "metrics.jsonl" for path in round.harmed):
        problems = [line for line in problems if "metrics" not in line]
    litter = [path.name for path in (round.run_dir / "checkpoints").glob(".*")]
    problems += [f"left {litter}"] * bool(litter)
    return f"FAILED: {'; '.join(problems[:4])}" if problems else IDENTICAL


def run(log: Path, chaos: Chaos, seed: int, rounds: int) -> list[RoundRecord]:
    """Run all rounds that the log does not have yet, and log each as it ends."""
    done = {}
    if log.exists():
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        done = {line["round"]: RoundRecord(**line) for line in lines if line["seed"] == seed}
    for number in range(rounds):
        if number in done:
            continue
        record = chaos.round(seed, number)
        done[number] = record
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        launches = f"{len(record.launches)} launch{'es' * (len(record.launches) > 1)}"
        what = f"{' + '.join(record.faults)} ({record.layout})"
        print(f"round {number}: {what}, {launches}, {record.seconds:.0f} s: {record.outcome}", flush=True)
        if not record.passed:
            print(f"  repeat with: --seed {seed} --only {number}; kept in {chaos.work / f'round-{number}'}", flush=True)
    return [done[number] for number in sorted(done) if number < rounds]


def report(done: Sequence[RoundRecord]) -> int:
    """Print a table of results by kind of fault; return 1 if a round failed."""
    print(f"{'fault':<10} rounds identical refused failed launches seconds")
    for fault in sorted({fault for record in done for fault in record.faults}):
        of = [record for record in done if fault in record.faults]
        counts = [sum(record.outcome == outcome for record in of) for outcome in (IDENTICAL, REFUSED)]
        failed = sum(not record.passed for record in of)
        launches, seconds = sum(len(record.launches) for record in of), sum(record.seconds for record in of)
        print(f"{fault:<10} {len(of):>6} {counts[0]:>9} {counts[1]:>7} {failed:>6} {launches:>8} {seconds:>7.0f}")
    bad = sum(not record.passed for record in done)
    print(f"{len(done)} rounds, {bad} failed")
    return int(bad > 0)
