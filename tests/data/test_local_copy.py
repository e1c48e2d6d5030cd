"""`data.local_copy`: complete, verified, resumed after a kill, found again, and without effect on the data order."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.data import local_copy
from megatron_ettin.data.blended_dataset import BlendedDataset, open_blended_dataset
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.local_copy import copy_path, open_local_copy
from megatron_ettin.data.mixture import MixtureEntry
from megatron_ettin.data.verify import unlisted_files, verify_files
from megatron_ettin.train import trainer
from tests import forkserver
from tests.data.corpora import ettin, files_of
from tests.data.together import at_once
from tests.train.runs import command, train

SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2"]


def mixture(*datasets: Dataset, batching: str = "packed") -> BlendedDataset:
    entries = [MixtureEntry(str(dataset.path), weight=1.0) for dataset in datasets]
    return open_blended_dataset(entries, 256, batching, 3, "pretrain")


@pytest.fixture
def copied(prepared: Dataset, tmp_path: Path) -> Dataset:
    """Return a copy of the prepared dataset, which a test may damage."""
    return open_dataset(shutil.copytree(prepared.path, tmp_path / "source"))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_local_copy_yields_the_same_rows_and_is_reused(
    prepared: Dataset, other: Dataset, tmp_path: Path, batching: str
) -> None:
    corpus, lines = mixture(prepared, other, batching=batching), []
    local = open_local_copy(corpus, str(tmp_path / "local"), lines.append)
    assert local.fingerprint == corpus.fingerprint
    assert all(tmp_path / "local" in dataset.path.parents for dataset in local.datasets)
    for ours, theirs in zip(local.rows(range(50)), corpus.rows(range(50)), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.chunks.tolist() == theirs.chunks.tolist()
    folder = "rows_256" if batching == "packed" else "padded_256"
    for dataset, source in zip(local.datasets, (prepared, other), strict=True):
        dataset.verify()
        files = files_of(dataset.path)
        assert "heldout/manifest.json" not in files
        assert f"{folder}/plan.json" in files
        assert all((source.path / name).read_bytes() == content for name, content in files.items())
    assert "copying" in lines[0]
    assert "every sha256 checked" in lines[1]
    assert len(lines) == 2
    open_local_copy(corpus, str(tmp_path / "local"), lines.append)
    assert len(lines) == 2  # the copy exists, so nothing is copied
    assert not list((tmp_path / "local").rglob(".tmp-*"))
    assert not list((tmp_path / "local").rglob(".part-*"))


def test_local_copy_other_row_length_adds_only_its_packing_index(prepared: Dataset, tmp_path: Path) -> None:
    open_local_copy(mixture(prepared), str(tmp_path), print)
    folder = copy_path(prepared, tmp_path)
    before = (folder / "shard_00000.bin").stat().st_ino
    longer = open_blended_dataset([MixtureEntry(str(prepared.path))], 300, "packed", 3, "pretrain")
    assert open_local_copy(longer, str(tmp_path), print).fingerprint == longer.fingerprint
    assert (folder / "shard_00000.bin").stat().st_ino == before
    assert (folder / "rows_256").is_dir()
    assert (folder / "rows_300").is_dir()


def test_local_copy_dataset_listed_twice_is_copied_once(prepared: Dataset, tmp_path: Path) -> None:
    corpus = mixture(prepared, prepared)
    assert open_local_copy(corpus, str(tmp_path), print).fingerprint == corpus.fingerprint
    assert len(list(tmp_path.glob("dataset-*"))) == 1


def test_local_copy_damaged_source_is_refused_until_repaired(copied: Dataset, tmp_path: Path) -> None:
    corpus = mixture(copied)
    path = copied.path / "shard_00000.starts.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard_00000\.starts\.npy: damaged, its sha256"):
        open_local_copy(corpus, str(tmp_path / "local"), print)
    assert not copy_path(copied, tmp_path / "local").exists()
    path.write_bytes(good)
    open_local_copy(corpus, str(tmp_path / "local"), print).datasets[0].verify()


def test_local_copy_with_bad_or_missing_files_is_repaired(prepared: Dataset, tmp_path: Path) -> None:
    corpus = mixture(prepared)
    open_local_copy(corpus, str(tmp_path), print)
    folder = copy_path(prepared, tmp_path)
    kept = (folder / "shard_00000.idx").stat().st_ino
    (folder / "shard_00000.bin").write_bytes(b"short")
    (folder / "rows_256" / "ends.int64").unlink()
    local = open_local_copy(corpus, str(tmp_path), print)
    local.datasets[0].verify()
    assert verify_files(list(unlisted_files(folder))).problems == []
    assert (folder / "shard_00000.idx").stat().st_ino == kept


def test_local_copy_after_kill_keeps_finished_files(prepared: Dataset, tmp_path: Path) -> None:
    """kill -9 after the third file: the next run copies the others."""
    code = (
        "import os, sys; from megatron_ettin.data import local_copy as c; from megatron_ettin.data.mixture import "
        "MixtureEntry; from megatron_ettin.data.blended_dataset import open_blended_dataset\n"
        "c.COPIED_AT_ONCE, real, done = 1, c.copy_file, []\n"
        "def copy_file(*given):\n"
        "    if len(done) == 3: os.kill(os.getpid(), 9)\n"
        "    done.append(real(*given))\n"
        "c.copy_file = copy_file\n"
        "c.open_local_copy(open_blended_dataset([MixtureEntry(sys.argv[1])], 256, 'packed', 3, 'pretrain'), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(prepared.path), str(tmp_path)]
    assert subprocess.run(command, timeout=60, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    staging = copy_path(prepared, tmp_path).with_name(f".tmp-{copy_path(prepared, tmp_path).name}")
    kept = {path.name: path.stat().st_ino for path in staging.iterdir() if path.name.startswith("shard")}
    assert len(kept) == 3
    local = open_local_copy(mixture(prepared), str(tmp_path), print)
    local.datasets[0].verify()
    assert {name: (local.datasets[0].path / name).stat().st_ino for name in kept} == kept


def test_local_copy_concurrent_processes_copy_once(prepared: Dataset, tmp_path: Path) -> None:
    mixture(prepared)  # builds its packing index
    outputs = at_once("tests.data.together:copy_locally", prepared.path, tmp_path)
    lines = [line for text in outputs for line in text.splitlines()]
    assert len([line for line in lines if "copying" in line]) == 1
    assert len([line for line in lines if "every sha256 checked" in line]) == 1


def test_local_copy_keeps_rows_left_out_and_nominal_tokens(prepared: Dataset, tmp_path: Path) -> None:
    entries = [MixtureEntry(str(prepared.path))]
    corpus = open_blended_dataset(entries, 256, "packed", 3, "pretrain")
    corpus = replace(corpus, nominal_tokens=250.0, skips=((3, 5),))
    local = open_local_copy(corpus, str(tmp_path), print)
    assert local.order_indices(range(5)).tolist() == [0, 1, 2, 5, 6]
    assert local.fingerprint == corpus.fingerprint
    assert local.mean_tokens_per_row == corpus.mean_tokens_per_row


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not mounted or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_local_copy_too_little_space_is_refused_before_copying(prepared: Dataset, small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"data\.local_copy: .*small has 65.5 kB free, the data .* needs .*B more"):
        open_local_copy(mixture(prepared), str(small_disk), print)
    assert [path.name for path in small_disk.iterdir()] == [".lock"]


def test_local_copy_disk_filling_up_is_reported(
    prepared: Dataset, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the space after the check for it."""
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(UserError, match=r"data\.local_copy: .*No space left on device; what was copied is kept"):
        open_local_copy(mixture(prepared), str(small_disk), print)


def test_local_copy_folder_that_cannot_be_created_is_refused(prepared: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.local_copy: .*file/local: Not a directory"):
        open_local_copy(mixture(prepared), str(tmp_path / "file" / "local"), print)


@pytest.mark.full
@pytest.mark.ranks
def test_train_from_local_copy_gives_the_same_losses(pool, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two ranks have the same losses, and a run that began without the copy resumes with it."""
    plain = train(pool, 2, tmp_path / "plain", corpus, "mlm", [*SMALL, "run.steps=3"])
    overrides = [*SMALL, f"data.local_copy={tmp_path / 'local'}", "run.steps=3", "data.workers=1"]
    train(pool, 2, tmp_path / "run", corpus, "mlm", [*SMALL, "run.steps=1"])
    resumed = train(pool, 2, tmp_path / "run", corpus, "mlm", overrides)
    assert resumed.column("loss") == plain.column("loss")
    assert list((tmp_path / "local").glob("dataset-*"))


def test_train_local_copy_that_cannot_be_made_is_refused(corpus: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "run.steps=1", f"data.local_copy={corpus}/manifest.json"]
    done = ettin(*command(tmp_path / "refused", corpus, "mlm", overrides))
    assert done.returncode == 2
    assert "data.local_copy: " in done.stderr


FORGOTTEN = {"data.skip": "skips", "data.mean_tokens_per_row": "nominal_tokens"}


def train_from_reader_that_forgets(key: str, *arguments: str) -> int | None:
    """Run `ettin train` with a reader of the local copy that ignores the setting `key`."""
    copy = trainer.open_local_copy

    def forgetful(corpus: BlendedDataset, folder: str) -> BlendedDataset:
        return replace(copy(corpus, folder), **{FORGOTTEN[key]: () if key == "data.skip" else None})

    with mock.patch.object(trainer, "open_local_copy", forgetful):
        return forkserver.be_program("ettin", *arguments)


@pytest.mark.parametrize("key", FORGOTTEN)
def test_train_local_copy_that_reads_another_order_is_refused(corpus: Path, tmp_path: Path, key: str) -> None:
    """A reader that ignored the skipped rows once trained on them, under the fingerprint of a run without them."""
    overrides = [*SMALL, "run.steps=1", f"data.local_copy={tmp_path / 'local'}", "data.skip=0:8"]
    overrides.append("data.mean_tokens_per_row=50")
    target = "tests.data.test_local_copy:train_from_reader_that_forgets"
    line = forkserver.command(target, key, *command(tmp_path / "run", corpus, "mlm", overrides))
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "data: the batches are read in another order than order.json records" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "order.json").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
