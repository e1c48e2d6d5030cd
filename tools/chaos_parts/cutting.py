"""The publishing of a checkpoint, cut before each call that changes the disk and in the middle of each write. Every
time a whole checkpoint is found, `latest` never names a torn one, what follows works and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chaos_parts import tracing
from chaos_parts.launch import Launch, Place
from chaos_parts.specimen import corpus_in, train_words
from chaos_parts.tracing import Cut
from chaos_parts.zygote import Zygote
from megatron_ettin.checkpoint.directory import (
    checkpoints_folder,
    latest,
    new_staging,
    prune,
    publish,
    step_name,
    verify,
)
from megatron_ettin.config.errors import UserError

LIMIT_SECONDS = 120.0
KEPT = 2


def content_of(step: int, again: bool = False) -> dict[str, bytes]:
    """Files of a checkpoint without torch; large enough that buffers are written in several calls."""
    text = f"{step} {again} ".encode()
    sizes = {"__0_0.distcp": 300_000, ".metadata": 9_000, "common.pt": 500, "metadata.json": 60, "config.yaml": 900}
    return {name: (text * size)[:size] for name, size in {**sizes, "tokenizer/tokenizer.json": 20_000}.items()}


def save(run: Path, step: int, again: bool = False) -> None:
    staging = new_staging(checkpoints_folder(run), step)
    (staging / "tokenizer").mkdir()
    for name, content in content_of(step, again).items():
        (staging / name).write_bytes(content)
    publish(staging, checkpoints_folder(run) / step_name(step))
    prune(run, KEPT)


def check_named(latest_file: Path) -> None:
    """What `latest` names is whole. It is away for a moment where its own step is saved again: then it stands beside."""
    named = latest_file.parent / latest_file.read_text().strip()
    verify(named if named.exists() else named.with_name(f".tmp-replaced-{named.name}"))


def trouble(run: Path, allowed: list[dict[str, bytes]]) -> str | None:
    """What is wrong after a cut."""
    named = checkpoints_folder(run) / "latest"
    try:
        found = latest(run, checksums=True)
        assert found is not None, "no checkpoint is found"
        check_named(named)
        held = {p.relative_to(found).as_posix(): p.read_bytes() for p in found.rglob("*") if p.is_file()}
        held.pop("integrity.json")
        assert held in allowed, f"{found.name} holds other bytes than were saved"
        save(run, 9)
        assert latest(run, checksums=True) == named.parent / step_name(9), "the next one is not found"
        left = [path.name for path in named.parent.glob(".*")]
        assert not left, f"left {left}"
    except (AssertionError, UserError, OSError) as error:
        return str(error)
    return None


def cuts_of_publish(work: Path, every: int) -> Iterator[tuple[str, str | None]]:
    """(what was cut, what is wrong) for each, of the next step and of the same step again."""
    base = work / "base"
    for step in (1, 2):
        save(base, step)
    for step, torn in ((3, False), (3, True), (2, False)):
        number, again = 0, step == 2
        while True:
            number += every
            run = work / "cut"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(base, run)
            waits, goes = os.pipe()
            child = os.fork()
            if child == 0:
                os.read(waits, 1)
                save(run, step, again)
                os._exit(0)
            cut = Cut(child, checkpoints_folder(run), number, torn)
            cut.trace(lambda goes=goes: os.write(goes, b"."))
            os.close(waits)
            os.close(goes)
            what = f"save of step {step}{' again' * again}, call {number}{' torn' * torn}: {cut.calls[-1]}"
            # the one before, moved aside, may be found while its step is saved again
            yield what, trouble(run, [content_of(2), content_of(step, again)])
            if not cut.killed:
                break


def cuts_of_training(work: Path, every: int) -> Iterator[tuple[str, str | None]]:
    """The saves of steps 6 and 7 of a run of one rank that goes on from step 4, beside training and in its way."""
    from chaos_parts.rounds import differences, state_of

    zygote, corpus, base, whole = Zygote(), corpus_in(work), work / "base-run", work / "whole"
    settings = ["checkpoint.every_steps=2"]

    def launched(run: Path, steps: int, *words: str, marker: Path | None = None) -> Launch:
        command = train_words(run, corpus, *settings, *words, steps=steps)
        return Launch(Place(zygote, 1), run, run.with_name("logs"), command, marker)

    try:
        for run, steps in ((base, 4), (whole, 7)):
            assert launched(run, steps).finish([], LIMIT_SECONDS)[0] == [0]
        expected = state_of(whole)
        for asynchronous in ("true", "false"):
            words, number = [f"checkpoint.asynchronous={asynchronous}"], 0
            while True:
                number += every
                run, marker = work / "cut-run", work / "about-to-save"
                for path in (run, run.with_name("logs")):
                    shutil.rmtree(path, ignore_errors=True)
                shutil.copytree(base, run)
                for path in work.glob(f"{marker.name}*"):
                    path.unlink()
                launch = launched(run, 7, *words, marker=marker)
                await_file(marker, launch)
                cut = Cut(launch.pids[0], run / "checkpoints", number)
                cut.trace(marker.with_suffix(".go").touch)
                wrong = None
                try:
                    found, named = latest(run, checksums=True), run / "checkpoints" / "latest"
                    assert found is not None
                    check_named(named)
                    again = launched(run, 7, *words)
                    assert again.finish([], LIMIT_SECONDS)[0] == [0], again.said()[-1000:]
                    told = differences(state_of(run), expected)
                    assert not told, told
                    left = [path.name for path in named.parent.glob(".*")]
                    assert not left, f"left {left}"
                except (AssertionError, UserError, OSError) as error:
                    wrong = str(error)
                yield f"asynchronous={asynchronous}, call {number}: {cut.calls[-1]}", wrong
                if not cut.killed:
                    break
    finally:
        zygote.close()


def await_file(path: Path, launch: Launch) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline or None not in launch.statuses():
            raise RuntimeError(f"the run did not come to its save: {launch.said()[-2000:]}")
        time.sleep(0.02)


def run(work: Path, what: str, every: int) -> int:
    """All cuts; 1 where one did harm."""
    if why := tracing.unavailable():
        print(f"left out: {why}")
        return 0
    count, bad = 0, 0
    for cut, wrong in (cuts_of_publish if what == "publish" else cuts_of_training)(work, every):
        count, bad = count + 1, bad + (wrong is not None)
        if wrong is not None:
            print(f"{cut}: {wrong}", file=sys.stderr, flush=True)
        elif count % 50 == 0:
            print(f"{count} cuts; {cut}", flush=True)
    print(f"{what}: {count} cuts, {bad} did harm")
    return 1 if bad or not count else 0
