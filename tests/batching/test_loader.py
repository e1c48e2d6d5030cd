"""The loader yields the same micro-batches with any number of worker processes and from any step on, and its workers
exit with the run, however it ends."""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.batching.host import HostBatch, HostBatches
from megatron_ettin.batching.loader import load_batches, worker_count
from megatron_ettin.batching.objectives import ObjectiveMix, make_collator
from megatron_ettin.cli.main import main
from megatron_ettin.config.schema import BatchConfig
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.mixture import MixtureEntry
from megatron_ettin.data.sampler import BatchSizes
from tests import forkserver
from tests.forkserver import Child
from tests.pool import Pool, mutated
from tests.train.runs import command, train

BATCH = BatchConfig(8, 2, warmup_tokens=2_000, warmup_min_rows=3)


def host_batches(corpus_path: Path, dp: int = 2, dp_rank: int = 1, group: int = 1) -> HostBatches:
    """Return host batches of 64-token rows, 3 growing to 8 rows per step, so micro-batches of 2 are not always full."""
    corpus = open_blended_dataset([MixtureEntry(str(corpus_path))], 64, "packed", 17, "pretrain")
    sizes = BatchSizes.of(BATCH, corpus.mean_tokens_per_row)
    collator = make_collator("mlm", corpus, 0.3, 17, "pretrain")
    windows = {True: 8, False: 8}
    return HostBatches(corpus, sizes, collator, ObjectiveMix(("mlm",)), windows, 64, 2, dp, dp_rank, group=group)


def content(batches: Iterable[HostBatch]) -> list[tuple]:
    """Return all that is in these micro-batches."""
    return [plain(batch) for batch in batches]


def plain(value: Any) -> Any:
    """Return a dataclass as a tuple of its fields, arrays as lists."""
    if dataclasses.is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value.tolist() if isinstance(value, np.ndarray) else value


def real_rows(host: HostBatches, batch: HostBatch) -> list[bool]:
    """Return for each row whether it holds tokens."""
    return (np.asarray(batch.input_ids) != host.corpus.pad_id).any(axis=1).tolist()


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


def test_host_batch_pinned_has_every_array_as_a_tensor_in_page_locked_memory(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host without a GPU, which has no page-locked memory, pinning is a mark on the tensor."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: setattr(tensor, "marked", True) or tensor)
    batch = host_batches(corpus).make(0, 0)
    pinned = batch.pin_memory()
    pairs = [(batch, pinned), (batch.boundaries, pinned.boundaries)]
    for before, after in pairs:
        for name, array in vars(before).items():
            if isinstance(array, np.ndarray):
                assert getattr(after, name).marked, name
                assert getattr(after, name).tolist() == array.tolist(), name
    assert plain(pinned)[3] == batch.causal_labels


def test_host_batches_of_data_parallel_ranks_partition_each_step(corpus: Path) -> None:
    """Two data-parallel ranks together hold the rows of a single rank, each row once."""
    alone = host_batches(corpus, dp=1, dp_rank=0)
    ranks = [host_batches(corpus, dp=2, dp_rank=rank) for rank in (0, 1)]
    for step in (0, 5, 40):
        missing: dict[int, tuple] = {}
        for host in (alone, *ranks):
            rows: dict[int, tuple] = {}
            for index in range(host.count(step)):
                batch = host.make(step, index)
                labels = np.full(batch.input_ids.size, IGNORE)
                labels[batch.label_positions] = batch.labels
                parts = zip(real_rows(host, batch), batch.input_ids, labels.reshape(-1, 64), strict=True)
                slots = batch.boundaries.slots.tolist()
                rows |= {slots[i]: (ids.tolist(), own.tolist()) for i, (real, ids, own) in enumerate(parts) if real}
            if host is alone:
                missing = rows
                assert len(rows) == host.sizes.size_at(step)
            else:
                assert rows.items() <= missing.items()
                missing = {slot: row for slot, row in missing.items() if slot not in rows}
        assert not missing


@pytest.mark.parametrize("dp", [3, 4])
def test_host_batches_during_batch_warmup_spread_rows_evenly(corpus: Path, dp: int) -> None:
    """3 growing to 8 rows a step in micro-batches of at most 2: no rank computes for lack of rows of its own."""
    ranks = [host_batches(corpus, dp=dp, dp_rank=rank) for rank in range(dp)]
    for step in (0, 5, 40):
        rows = ranks[0].sizes.size_at(step)
        computed, real = [], []
        for host in ranks:
            batches = [host.make(step, index) for index in range(host.count(step))]
            computed.append([len(batch.input_ids) for batch in batches])
            real.append(sum(sum(real_rows(host, batch)) for batch in batches))
        assert max(real) - min(real) <= 1, (step, real)
        assert all(sizes == computed[0] for sizes in computed), (step, computed)
        assert len(set(computed[0])) == 1, (step, computed)
        assert sum(computed[0]) - -(-rows // dp) < max(computed[0]), (step, computed)


def test_loader_imports_no_megatron_and_host_batches_no_torch() -> None:
    lines = [
        "import sys, megatron_ettin.batching.host",
        "assert 'torch' not in sys.modules",
        "import megatron_ettin.batching.loader",
        "assert not [name for name in sys.modules if name.startswith('megatron.')]",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


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

    The tests' own fork server (tests/forkserver.py) may be a child of this process too, and has other tests' ranks.
    """
    children = psutil.Process(pid).children()
    servers = [child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children(recursive=True)]


@pytest.mark.ranks
def test_train_losses_do_not_depend_on_worker_count(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Run `ettin train` without workers, and with 2 and a resume in the middle of the batch warm-up."""
    words = ["batch.warmup_tokens=2000", "batch.warmup_min_rows=2"]
    whole = train(pool, 1, tmp_path / "whole", corpus, "mlm", [*words, "run.steps=8", "data.workers=0"])
    train(pool, 1, tmp_path / "halves", corpus, "mlm", [*words, "run.steps=4", "data.workers=2"])
    more = [*words, "run.steps=8", "data.workers=2", "data.prefetch=1"]
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
    words = [*layout.split(), "run.steps=4"]
    without = train(pool, 2, tmp_path / "without", corpus, "clm", [*words, "data.workers=0"])
    ahead = train(pool, 2, tmp_path / "with", corpus, "clm", [*words, "data.workers=1"])
    assert ahead.column("loss") == without.column("loss")


@pytest.mark.full
@pytest.mark.ranks
def test_data_order_with_workers_is_not_read_past_its_end(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Workers that prefetch stop at the end of an order of four exported steps."""
    whole = train(pool, 1, tmp_path / "keyed", corpus, "clm", ["run.steps=4"])
    exported = tmp_path / "order.parquet"
    words = ["order", str(whole.directory), "--steps", "1:5", "--out", str(exported)]
    assert pool.run(1, words)[0].status == 0
    given = train(pool, 1, tmp_path / "given", corpus, "clm", [f"data.order={exported}", "data.workers=2"])
    assert given.column("loss") == whole.column("loss")


def train_in_own_group(*words: str) -> int:
    """Run `ettin WORDS` in this process, as the leader of a process group."""
    os.setsid()
    with mutated(None):
        return main(list(words))


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Return a function that starts a run with two workers in a process of its own, which leads a group."""
    started: list[Child] = []

    def start_training(word: str) -> Child:
        words = command(tmp_path / "run", corpus, "mlm", ["data.workers=2", word])
        with open(tmp_path / "said", "wb") as said:
            files = (0, said.fileno(), said.fileno())
            target = "tests.batching.test_loader:train_in_own_group"
            started.append(forkserver.call(forkserver.shared(), target, words, files))
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
    """Return the names of the signals of a scheduler that a process neither blocks nor ignores."""
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
    said = tmp_path / "said"
    assert child.wait(60) == 75, said.read_text()
    assert "Traceback" not in said.read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list((tmp_path / "run" / "checkpoints").glob(f"step_{lines[-1]['step']:09d}"))
    assert all_end(below)


@pytest.mark.full
def test_train_finished_run_leaves_no_process(corpus: Path, tmp_path: Path) -> None:
    """The command as users start it, in a process group of its own."""
    words = command(tmp_path / "run", corpus, "mlm", ["data.workers=2", "run.steps=3"])
    process = subprocess.Popen([sys.executable, "-m", "megatron_ettin", *words], start_new_session=True)
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
