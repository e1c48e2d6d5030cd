"""Kill the publishing of a checkpoint before each call that changes the disk.

After each cut a complete checkpoint must be found, `latest` must not name a torn one, and the next save must work and
leave nothing behind. A cut is a kill -9 before the call, one in the middle of a write (`torn`), or a simulated power
failure, which loses data that was not synced (`lost`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos_parts import tracing
from chaos_parts.launch import Launch, RankHost
from chaos_parts.specimen import corpus_in, train_arguments
from chaos_parts.tracing import Call, Cut
from chaos_parts.zygote import Zygote
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint import directory
from megatron_ettin.checkpoint.directory import checkpoints_folder, latest, step_name
from megatron_ettin.checkpoint.integrity import verify
from tests.pool import mutated

LIMIT_SECONDS = 120.0
KEPT = 2
KILLED, TORN, LOST = "killed", "torn", "lost"


@dataclass(frozen=True)
class Case:
    """A save to cut. `traced` runs it and cuts it at a call number; `wrong` returns the promises broken afterwards."""

    name: str
    folder: Path
    traced: Callable[[int, bool], Cut]
    wrong: Callable[[], str | None]
    ways: tuple[str, ...] = (KILLED, TORN, LOST)


def cuts_of(case: Case, every: int) -> Iterator[tuple[str, str | None]]:
    """Yield (what was cut, what is wrong) for every boundary, or for one in `every`."""
    calls = case.traced(0, False).calls
    if wrong := case.wrong():
        yield f"{case.name}, not cut", wrong
        return
    for way in case.ways:
        for number in boundaries(calls, way)[::every]:
            cut = case.traced(number, way == TORN)
            if way == LOST and cut.killed:
                tracing.lose(cut.calls[:-1])
            last = str(cut.calls[-1]).replace(str(case.folder), "") if cut.calls else "nothing"
            yield f"{case.name}, {way}, call {number} of {len(calls)}: {last}", case.wrong()


def boundaries(calls: list[Call], way: str) -> list[int]:
    """Return the numbers of the calls to cut.

    Consecutive writes to one file differ only in its length, so only the first and the last of them are cut.
    """

    def is_inner(at: int) -> bool:
        return calls[at].name == "write" and calls[at - 1 : at + 2].count(calls[at]) == 3

    numbers = [at + 1 for at in range(len(calls)) if not is_inner(at)]
    return [number for number in numbers if way != TORN or calls[number - 1].name == "write"]


def content_of(step: int, again: bool = False) -> dict[str, bytes]:
    """Return files of a checkpoint without torch, large enough to be written in several calls."""
    text = f"{step} {again} ".encode()
    sizes = {"__0_0.distcp": 300_000, ".metadata": 9_000, "common.pt": 500, "metadata.json": 60, "config.yaml": 900}
    return {name: (text * size)[:size] for name, size in {**sizes, "tokenizer/tokenizer.json": 20_000}.items()}


def save(run: Path, step: int, again: bool = False) -> None:
    staging = directory.new_staging(checkpoints_folder(run), step)
    (staging / "tokenizer").mkdir()
    for name, content in content_of(step, again).items():
        (staging / name).write_bytes(content)
    directory.publish(staging, checkpoints_folder(run) / step_name(step))
    directory.prune(run, KEPT)


def check_named(latest_file: Path) -> None:
    """Check that `latest` names a whole checkpoint, at its temporary path while its step is saved again."""
    named = latest_file.parent / latest_file.read_text().strip()
    verify(named if named.exists() else named.with_name(f".tmp-replaced-{named.name}"))


def litter(run: Path) -> list[str]:
    return [f"left {path.name}" for path in checkpoints_folder(run).glob(".*")]


def trouble(run: Path, allowed: list[dict[str, bytes]]) -> str | None:
    """Return what is wrong after a cut of `save`."""
    named = checkpoints_folder(run) / "latest"
    try:
        checkpoint = latest(run, checksums=True)
        if checkpoint is None:
            return "no checkpoint is found"
        check_named(named)
        held = {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
        held.pop("integrity.json")
        if held not in allowed:
            return f"{checkpoint.name} holds other bytes than were saved"
        save(run, 9)
        if latest(run, checksums=True) != named.parent / step_name(9):
            return "the next one is not found"
    except (UserError, OSError) as error:
        return str(error)
    return next(iter(litter(run)), None)


def cases_of_publish(work: Path, mutation: str | None) -> Iterator[Case]:
    """Return two cases: saving the next step, which deletes an old checkpoint, and the same step again."""
    base, run = work / "base", work / "cut"
    shutil.rmtree(base, ignore_errors=True)
    for step in (1, 2):
        save(base, step)

    def traced(step: int, number: int, torn: bool) -> Cut:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        waits, goes = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(waits, 1)
            with mutated(mutation):
                save(run, step, step == 2)
            os._exit(0)
        cut = Cut(child, checkpoints_folder(run), number, torn)
        cut.trace(lambda: os.write(goes, b"."))
        os.close(waits)
        os.close(goes)
        return cut

    for step, name in ((3, "the next step"), (2, "the same step again")):
        # the one before, moved aside, may be found while its step is saved again
        allowed = [content_of(2), content_of(step, step == 2)]
        yield Case(
            name,
            checkpoints_folder(run),
            lambda number, torn, step=step: traced(step, number, torn),  # type: ignore[misc]
            lambda allowed=allowed: trouble(run, allowed),  # type: ignore[misc]
        )


class CutRuns:
    """A run of one rank that resumes at step 4, trains to 7, and is cut in its saves of steps 6 and 7.

    After them the checkpoint of step 2 is deleted. The run must then continue to the same end as one without cuts.
    """

    def __init__(self, work: Path, mutation: str | None) -> None:
        self.work, self.mutation, self.corpus, self.zygote = work, mutation, corpus_in(work), Zygote()
        self.run, self.marker = work / "cut-run", work / "about-to-save"
        for run in (base := work / "base-run", work / "whole"):
            shutil.rmtree(run, ignore_errors=True)
            self.finish(self.launched(run, 4 if run == base else 7))
        from chaos_parts.rounds import state_of

        self.expected = state_of(work / "whole")

    def launched(self, run: Path, steps: int, *overrides: str, marker: Path | None = None) -> Launch:
        command = train_arguments(run, self.corpus, "checkpoint.every_steps=2", *overrides, steps=steps)
        host = RankHost(self.zygote, 1, self.mutation if marker else None)
        return Launch(host, run, run.with_name("logs"), command, marker)

    @staticmethod
    def finish(launch: Launch) -> None:
        if launch.finish([], LIMIT_SECONDS)[0] != [0]:
            raise RuntimeError(f"the run did not come to its end: {launch.output()[-1000:]}")

    def traced(self, overrides: list[str], number: int, torn: bool) -> Cut:
        for path in (self.run, self.run.with_name("logs")):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.work / "base-run", self.run)
        for path in self.work.glob(f"{self.marker.name}*"):
            path.unlink()
        launch = self.launched(self.run, 7, *overrides, marker=self.marker)
        await_file(self.marker, launch)
        cut = Cut(launch.pids[0], checkpoints_folder(self.run), number, torn)
        cut.trace(self.marker.with_suffix(".go").touch)
        return cut

    def wrong(self, overrides: list[str]) -> str | None:
        from chaos_parts.rounds import differences, state_of

        try:
            if latest(self.run, checksums=True) is None:
                return "no checkpoint is found"
            check_named(checkpoints_folder(self.run) / "latest")
            self.finish(self.launched(self.run, 7, *overrides))
            problems = differences(state_of(self.run), self.expected)
        except (UserError, OSError, RuntimeError) as error:
            return str(error)
        return "; ".join([*problems, *litter(self.run)]) or None


def await_file(path: Path, launch: Launch) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline or None not in launch.statuses():
            raise RuntimeError(f"the run did not come to its save: {launch.output()[-2000:]}")
        time.sleep(0.02)


def cases_of_training(work: Path, mutation: str | None) -> Iterator[Case]:
    """Return asynchronous and synchronous saves during training."""
    runs = CutRuns(work, mutation)
    with contextlib.closing(runs.zygote):
        for asynchronous in ("true", "false"):
            overrides = [f"checkpoint.asynchronous={asynchronous}"]
            yield Case(
                f"asynchronous={asynchronous}",
                checkpoints_folder(runs.run),
                lambda number, torn, overrides=overrides: runs.traced(overrides, number, torn),  # type: ignore[misc]
                lambda overrides=overrides: runs.wrong(overrides),  # type: ignore[misc]
                (KILLED, LOST),
            )


def run(work: Path, what: str, every: int, mutation: str | None = None) -> int:
    """Make all cuts; return 1 if one did harm."""
    if why := tracing.unavailable():
        print(f"left out: cut: {why}")
        return 0
    bad = 0
    for case in (cases_of_publish if what == "publish" else cases_of_training)(work, mutation):
        began, count, harmful = time.monotonic(), 0, 0
        for cut, wrong in cuts_of(case, every):
            count += 1
            if wrong is not None:
                harmful += 1
                print(f"{cut}: {wrong}", file=sys.stderr, flush=True)
        bad += harmful
        print(f"{case.name}: {count} cuts, {harmful} did harm; {time.monotonic() - began:.0f} s", flush=True)
    return int(bad > 0)
