"""The faults that a round of `tools/chaos.py run` can inject.

Each prepares the round, returns the actions of a disturbed launch, and may act between launches. Times are steps of the
run plus seconds, so that a seed means the same on a slow host.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_parts import network
from chaos_parts.launch import Action, Launch, RankHost
from chaos_parts.network import Network
from chaos_parts.specimen import STEPS

MIB = 1 << 20
# share of faults before the first step of a launch
STARTING = 0.25
START_SECONDS = 4.0


@dataclass
class Round:
    """One disturbed run. `damaged`: damaged checkpoint files and how; `harmed`: other damaged files."""

    run_dir: Path
    draw: random.Random
    host: RankHost
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    harmed: list[Path] = field(default_factory=list)
    closing: list[Callable[[], Any]] = field(default_factory=list)

    def action(self, name: str, act: Callable[[Launch], Any], later: float = 0.0) -> Action:
        """Return an action at a random time of the next launch, `later` seconds after that."""
        done = max(0, self._steps())
        if self.draw.random() < STARTING or done >= STEPS:
            return Action(name, -1, self.draw.uniform(0, START_SECONDS) + later, act)
        return Action(name, self.draw.randrange(done, STEPS) + 1, self.draw.uniform(0, 0.3) + later, act)

    def _steps(self) -> int:
        try:
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


class Fault:
    """`relaunches`: the most disturbed launches; `hang_seconds`: the watchdog's limit where a stall must be seen."""

    relaunches = 2
    hang_seconds = 30.0

    def unavailable(self) -> str | None:
        return None

    def prepare(self, round: Round) -> None: ...
    def actions(self, round: Round) -> list[Action]:
        return []

    def between(self, round: Round) -> list[str]:
        """Act after a disturbed launch and return what was done."""
        return []


def some_ranks(round: Round) -> list[int]:
    """Choose one, several or all ranks."""
    count = round.draw.choice([1, 1, 2, round.host.ranks])
    return round.draw.sample(range(round.host.ranks), min(count, round.host.ranks))


def sent(number: int, *ranks: int) -> Callable[[Launch], Any]:
    """Return the action that sends a signal to these ranks, or to all."""
    return lambda launch: launch.signal(number, *ranks)


class Kill(Fault):
    """kill -9 of one, several or all ranks."""

    relaunches = 3

    def actions(self, round: Round) -> list[Action]:
        ranks = some_ranks(round)
        return [round.action(f"kill {ranks}", sent(signal.SIGKILL, *ranks))]


class Stop(Fault):
    """SIGSTOP of some ranks: half of the time they continue after a while, else the watchdogs must see it."""

    relaunches = 1
    hang_seconds = 8.0

    def actions(self, round: Round) -> list[Action]:
        ranks, goes_on = some_ranks(round), round.draw.random() < 0.5
        seconds = round.draw.uniform(0.3, 3.0)

        first = round.action(f"stop {ranks}", sent(signal.SIGSTOP, *ranks))
        if not goes_on and len(ranks) < round.host.ranks:
            return [first]
        act = sent(signal.SIGCONT, *ranks)
        return [first, Action(f"continue {ranks}", first.after_step, first.delay + seconds, act)]


class Term(Fault):
    """A storm of SIGTERM and SIGUSR1 to random ranks."""

    def actions(self, round: Round) -> list[Action]:
        first = round.action("storm", lambda launch: None)
        storm = []
        for _ in range(round.draw.randint(1, 8)):
            number, rank = round.draw.choice([signal.SIGTERM, signal.SIGUSR1]), round.draw.randrange(round.host.ranks)
            delay = first.delay + round.draw.uniform(0, 0.5)
            name = f"{signal.Signals(number).name} {rank}"
            storm.append(Action(name, first.after_step, delay, sent(number, rank)))
        return storm


class Disk(Fault):
    """The run's folder, or its checkpoints alone, on a small file system that is enlarged later."""

    def unavailable(self) -> str | None:
        if os.geteuid() != 0:
            return "mounting wants root"
        probe = Path(f"/tmp/chaos-mount-{os.getpid()}")
        probe.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True, text=True)
        if mounted.returncode == 0:
            subprocess.run(["umount", probe], check=True)
        probe.rmdir()
        return None if mounted.returncode == 0 else f"nothing can be mounted ({mounted.stderr.strip()})"

    def prepare(self, round: Round) -> None:
        self.folder = round.run_dir / round.draw.choice(["", "checkpoints"])
        self.folder.mkdir(parents=True, exist_ok=True)
        size = round.draw.randint(MIB // 16, 3 * MIB)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.folder], check=True)
        round.closing.append(lambda: subprocess.run(["umount", "-l", self.folder], check=True))

    def enlarge(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)

    def actions(self, round: Round) -> list[Action]:
        if round.draw.random() < 0.5:
            return []
        return [round.action("enlarge the disk", lambda launch: self.enlarge())]

    def between(self, round: Round) -> list[str]:
        self.enlarge()
        return ["enlarged the disk"]


class Corrupt(Fault):
    """All ranks end together; then a checkpoint's files change, shrink or go, or another file of the run is damaged."""

    RUN_FILES = ("config.yaml", "order.json", "history.jsonl", "metrics.jsonl")

    def actions(self, round: Round) -> list[Action]:
        number = round.draw.choice([signal.SIGKILL, signal.SIGTERM])
        return [Action(f"{number.name} all", round.draw.randrange(3, STEPS), 0.1, sent(number))]

    def between(self, round: Round) -> list[str]:
        folder = round.run_dir / "checkpoints"
        existing = [path for name in self.RUN_FILES if (path := round.run_dir / name).exists()]
        if existing and round.draw.random() < 0.25:
            path = round.draw.choice(existing)
            round.harmed.append(path)
            return [harm(path, round.draw)]
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and ".tmp" not in str(path.relative_to(folder))
        )
        newest = max((path.name for path in folder.glob("step_*")), default="")
        chosen = [path for path in files if newest in path.parts] if round.draw.random() < 0.6 else files
        done = []
        for path in round.draw.sample(chosen, min(len(chosen), round.draw.choice([1, 1, 2, 5]))):
            done.append(harm(path, round.draw))
            round.damaged.append((path, done[-1]))
        return done


def harm(path: Path, draw: random.Random) -> str:
    """Damage one file and return how."""
    content, how = bytearray(path.read_bytes()), draw.choice(["flip", "flip", "zeros", "cut", "delete"])
    if how == "delete" or not content:
        path.unlink()
        return f"{path.name} deleted"
    position = draw.randrange(len(content))
    if how == "flip":
        content[position] ^= draw.randrange(1, 256)
    elif how == "zeros":
        end = min(len(content), position + 512)
        content[position:end] = (
            bytes(byte ^ 0xFF for byte in content[position:end])
            if not any(content[position:end])
            else bytes(end - position)
        )
    else:
        del content[position:]
    path.write_bytes(content)
    return f"{path.parent.name}/{path.name}: {how} at {position}"


class NetworkDrop(Fault):
    """One rank's network is cut, for a short time or for good."""

    relaunches = 1
    hang_seconds = 8.0

    def unavailable(self) -> str | None:
        return network.unavailable()

    def prepare(self, round: Round) -> None:
        context = Network(round.host.ranks).up()
        self.network = context.__enter__()
        round.closing.append(lambda: context.__exit__(None, None, None))
        round.host.networks = self.network.addresses

    def actions(self, round: Round) -> list[Action]:
        rank, seconds = round.draw.randrange(round.host.ranks), round.draw.uniform(0.2, 2.0)
        self.rank = rank
        first = round.action(f"draw the cable of {rank}", lambda launch: self.network.set(rank, "down"))
        if round.draw.random() < 0.5:
            return [first]
        back = Action(
            f"plug {rank} in", first.after_step, first.delay + seconds, lambda launch: self.network.set(rank, "up")
        )
        return [first, back]

    def between(self, round: Round) -> list[str]:
        self.network.set(self.rank, "up")
        return [f"plugged {self.rank} in"]


class Clock(Fault):
    """The wall clock of one rank, as Python reads it, jumps forwards and back by seconds to years."""

    def prepare(self, round: Round) -> None:
        self.file = round.run_dir.with_name("clock")
        self.file.write_text("0")
        round.host.clock = (round.draw.randrange(round.host.ranks), self.file)

    def actions(self, round: Round) -> list[Action]:
        def jump(seconds: float) -> Callable[[Launch], Any]:
            return lambda launch: self.file.write_text(str(seconds))

        by = [round.draw.choice([-1, 1]) * 10 ** round.draw.uniform(0, 8.5) for _ in range(round.draw.randint(1, 3))]
        return [round.action(f"clock by {seconds:.0f} s", jump(seconds)) for seconds in by]


FAULTS: dict[str, type[Fault]] = {
    "kill": Kill,
    "stop": Stop,
    "term": Term,
    "disk": Disk,
    "corrupt": Corrupt,
    "network": NetworkDrop,
    "clock": Clock,
}
