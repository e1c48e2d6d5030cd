"""The loader yields the same micro-batches with any number of workers and from any step on. Its workers exit with the
run, however the run ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.batching.host import HostBatch
from megatron_ettin.batching.loader import load_batches, worker_count
from megatron_ettin.cli.main import main
from tests import forkserver
from tests.batching.test_host import host_batches, plain
from tests.forkserver import Child
from tests.pool import Pool, mutated
from tests.train.runs import command, train


def content(batches: Iterable[HostBatch]) -> list[tuple]:
    """Return the arrays of these micro-batches as plain values that can be compared."""
    return [plain(batch) for batch in batches]


@pytest.mark.parametrize("dp_rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_loader_any_worker_count_yields_same_batches(corpus: Path, dp_rank: int) -> None:
    host = host_batches(corpus, dp_rank=dp_rank)
    expected = content(host.make(step, index) for step in range(12) for index in range(host.count(step)))
    for workers, prefetch in ((0, 4), (1, 1), (2, 3)):
        with load_batches(host, range(12), workers, prefetch) as batches:
            assert content(batches) == expected


def test_loader_started_at_a_step_continues_same_batches(corpus: Path) -> None:
    host = host_batches(corpus)
    count = sum(host.count(step) for step in range(7, 10))
    with load_batches(host, range(10)) as whole, load_batches(host, itertools.count(7), workers=2) as rest:
        assert content(whole)[-count:] == content(itertools.islice(rest, count))


def test_loader_imports_no_megatron() -> None:
    code = "import sys, megatron_ettin.batching.loader as _; assert not any(n.startswith('megatron.') for n in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_worker_count_unset_is_two_on_gpu_and_zero_on_cpu() -> None:
    assert (worker_count(None, True), worker_count(None, False), worker_count(0, True)) == (2, 0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_damaged_or_missing_shard_is_named(corpus: Path, tmp_path: Path, workers: int) -> None:
    """Report a token id beyond the vocabulary, and a shard that disappears after the run has begun."""
    # build the packing index of the dataset before it is copied
    host_batches(corpus)
    damaged = shutil.copytree(corpus, tmp_path / "damaged")
    with open(damaged / "shard_00000.bin", "r+b") as stream:
        tokens = np.full(stream.seek(0, 2) // 2, 60_000, "<u2")
        stream.seek(0)
        stream.write(tokens.tobytes())
    with (
        load_batches(host_batches(damaged), range(12), workers) as batches,
        pytest.raises(UserError, match=r"damaged: row \d+ .* the largest 60000; .* ends with 319: damaged"),
    ):
        content(batches)
    # a new path, which this process has not memory-mapped yet
    gone = shutil.copytree(corpus, tmp_path / "gone")
    host = host_batches(gone)
    (gone / "shard_00000.bin").unlink()
    with (
        load_batches(host, range(12), workers) as batches,
        pytest.raises(UserError, match=r"shard_00000\.bin: cannot be read any more \(No such file"),
    ):
        content(batches)


def test_loader_killed_worker_is_reported(corpus: Path) -> None:
    with load_batches(host_batches(corpus), itertools.count(), workers=2, prefetch=2) as batches:
        next(batches)
        workers = loading_processes(os.getpid())
        assert len(workers) == 2
        for worker in workers:
            worker.kill()
        with pytest.raises(UserError, match=r"data\.workers: .*; out of memory, .*data\.workers=0"):
            content(batches)


def loading_processes(pid: int) -> list[psutil.Process]:
    """Return the loader workers of a process: the children of its multiprocessing's fork server.

    The tests' own fork server (tests/forkserver.py) may also be a child of this process; its children are other ranks.
    """
    children = psutil.Process(pid).children()
    servers = [child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children(recursive=True)]


@pytest.mark.ranks
def test_train_losses_do_not_depend_on_worker_count(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Run `ettin train` without workers, and with 2 and a resume in the middle of the batch warm-up."""
    overrides = ["batch.warmup_tokens=2000", "batch.warmup_min_rows=2"]
    whole = train(pool, 1, tmp_path / "whole", corpus, "mlm", [*overrides, "run.steps=8", "data.workers=0"])
    train(pool, 1, tmp_path / "halves", corpus, "mlm", [*overrides, "run.steps=4", "data.workers=2"])
    more = [*overrides, "run.steps=8", "data.workers=2", "data.prefetch=1"]
    resumed = train(pool, 1, tmp_path / "halves", corpus, "mlm", more)
    for key in ("step", "loss", "grad_norm", "rows", "labels", "tokens"):
        assert resumed.column(key) == whole.column(key), key
    assert [last - first for first, last in whole.column("rows")] == [2, 2, 2, 2, 3, 3, 3, 4]


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize("layout", ["parallel.pp=2 parallel.vpp=2", "parallel.tp=2", ""])
def test_train_on_layout_with_workers_matches_without_workers(
    pool: Pool, corpus: Path, tmp_path: Path, layout: str
) -> None:
    overrides = [*layout.split(), "run.steps=4"]
    without = train(pool, 2, tmp_path / "without", corpus, "clm", [*overrides, "data.workers=0"])
    ahead = train(pool, 2, tmp_path / "with", corpus, "clm", [*overrides, "data.workers=1"])
    assert ahead.column("loss") == without.column("loss")


@pytest.mark.full
@pytest.mark.ranks
def test_data_order_with_workers_is_not_read_past_its_end(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Workers that prefetch stop at the end of an order of four exported steps."""
    whole = train(pool, 1, tmp_path / "keyed", corpus, "clm", ["run.steps=4"])
    exported = tmp_path / "order.parquet"
    overrides = ["order", str(whole.directory), "--steps", "1:5", "--out", str(exported)]
    assert pool.run(1, overrides)[0].status == 0
    given = train(pool, 1, tmp_path / "given", corpus, "clm", [f"data.order={exported}", "data.workers=2"])
    assert given.column("loss") == whole.column("loss")


def train_in_own_group(*overrides: str) -> int:
    """Run `ettin` with these arguments in this process, which becomes the leader of a process group."""
    os.setsid()
    with mutated(None):
        return main(list(overrides))


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Return a function that starts a run with two workers in a process of its own, which leads a group."""
    started: list[Child] = []

    def start_training(word: str) -> Child:
        overrides = command(tmp_path / "run", corpus, "mlm", ["data.workers=2", word])
        with open(tmp_path / "said", "wb") as output:
            files = (0, output.fileno(), output.fileno())
            target = "tests.batching.test_loader:train_in_own_group"
            started.append(forkserver.call(forkserver.shared(), target, overrides, files))
        return started[-1]

    yield start_training
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.close()


def workers_after_a_step(child: Child, folder: Path) -> list[psutil.Process]:
    """Wait for the first step of a run in `folder`, and return the processes that it has started."""
    for _ in range(3000):
        if (folder / "run" / "metrics.jsonl").exists() and (folder / "run" / "metrics.jsonl").read_text():
            break
        assert child.poll() is None, (folder / "said").read_text()
        time.sleep(0.02)
    below = psutil.Process(child.pid).children(recursive=True)
    # a fork server and two workers
    assert len(below) >= 3
    return below


def heeded_signals(process: psutil.Process) -> set[str]:
    """Return the names of the scheduler's signals that a process neither blocks nor ignores."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    masks = dict(line.split(":\t") for line in lines if line.startswith(("SigBlk", "SigIgn")))
    left_out = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
    return {number.name for number in (signal.SIGINT, signal.SIGTERM) if not left_out >> (number - 1) & 1}


def all_end(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not alive


def test_loader_workers_leave_signals_to_run_and_exit_when_it_is_killed(
    start: Callable[[str], Child], tmp_path: Path
) -> None:
    child = start("run.steps=100000")
    below = workers_after_a_step(child, tmp_path)
    assert [heeded_signals(process) for process in below] == [set()] * len(below)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert all_end(below)


@pytest.mark.full
def test_sigterm_to_process_group_saves_and_exits_75(start: Callable[[str], Child], tmp_path: Path) -> None:
    """SIGTERM to every process of the job, as a scheduler sends it: the run saves its last step and exits with 75."""
    child = start("run.steps=100000")
    below = workers_after_a_step(child, tmp_path)
    assert {os.getpgid(process.pid) for process in below} == {child.pid}
    os.killpg(child.pid, signal.SIGTERM)
    output = tmp_path / "said"
    assert child.wait(60) == 75, output.read_text()
    assert "Traceback" not in output.read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list((tmp_path / "run" / "checkpoints").glob(f"step_{lines[-1]['step']:09d}"))
    assert all_end(below)


@pytest.mark.full
def test_train_finished_run_leaves_no_process(corpus: Path, tmp_path: Path) -> None:
    """Start the command as users do, in a new process group, and see the group empty at its end."""
    overrides = command(tmp_path / "run", corpus, "mlm", ["data.workers=2", "run.steps=3"])
    process = subprocess.Popen([sys.executable, "-m", "megatron_ettin", *overrides], start_new_session=True)
    assert process.wait(timeout=120) == 0
    # the fork server needs a moment to notice that its parent has exited
    for _ in range(3000):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a process of the run is still there")


@pytest.mark.parametrize("word", ["data.workers=-1", "data.prefetch=0"])
def test_loader_invalid_setting_is_refused(
    corpus: Path, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "run", corpus, "mlm", [word, "run.steps=1"])) == 2
    assert f"{word.partition('=')[0]}: {word.partition('=')[2]} is not allowed" in capsys.readouterr().err
