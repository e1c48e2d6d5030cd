"""Training in a recorded order: exported by `ettin order`, or published and matched by the content of its samples."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_ettin.api import ROWS_AT_ONCE, iterate_rows
from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import parse, to_yaml
from megatron_ettin.data.blended_dataset import BlendedDataset, open_run_dataset
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.sampler import BatchSizes
from tests.checkpoint.durable import watched

CLS, SEP, PAD = 50281, 50282, 50283
OVERRIDES = ["data.seq_len=256", "batch.global_batch_rows=8", "batch.warmup_min_rows=2", "batch.warmup_tokens=20000"]


def written_config(path: Path, *datasets: Dataset, overrides: tuple[str, ...] = ()) -> Path:
    mixture = ", ".join(f"{{path: {dataset.path}, weight: {i + 1}}}" for i, dataset in enumerate(datasets))
    config = parse("17m", "mlm", "pretrain", overrides=[*OVERRIDES, f"data.mixture=[{mixture}]", *overrides])
    path.write_text(to_yaml(config))
    return path


def corpus_of(*datasets: Dataset, overrides: tuple[str, ...] = ()) -> BlendedDataset:
    mixture = ", ".join(f"{{path: {dataset.path}, weight: 1}}" for dataset in datasets)
    return open_run_dataset(
        parse("17m", "mlm", "pretrain", overrides=[*OVERRIDES, f"data.mixture=[{mixture}]", *overrides])
    )


def refused(match: str, *datasets: Dataset, overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=match) as caught:
        corpus_of(*datasets, overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Dataset) -> Iterator[Path]:
    """Return a folder; afterwards check that no temporary folder is left in the dataset, and remove compiled orders."""
    yield tmp_path
    assert not list(prepared.path.glob(".tmp-order_*"))
    for folder in prepared.path.glob("order_*"):
        shutil.rmtree(folder)


def exported(config: Path, out: Path, steps: str = "1:30") -> Path:
    assert main(["order", str(config), "--steps", steps, "--out", str(out)]) == 0
    return out


def test_order_exported_and_replayed_gives_the_same_batches(prepared: Dataset, other: Dataset, cache: Path) -> None:
    """Tables and batches of a run in its own exported order are equal, warm-up included, in whatever order the mixture
    lists its datasets; --batches are the same bytes."""
    config = written_config(cache / "a.yaml", prepared, other)
    order = exported(config, cache / "order.parquet")
    replay = written_config(cache / "b.yaml", other, prepared, overrides=(f"data.order={order}",))
    assert parquet.read_table(exported(replay, cache / "again.parquet")).equals(parquet.read_table(order))
    for source, name in ((config, "a"), (replay, "b")):
        arguments = ["order", str(source), "--steps", "1:30", "--batches", str(cache / f"{name}.npz")]
        assert main(arguments) == 0
    assert (cache / "a.npz").read_bytes() == (cache / "b.npz").read_bytes()


def test_order_step_past_the_recorded_end_is_refused(
    prepared: Dataset, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    config = written_config(cache / "a.yaml", prepared)
    order = exported(config, cache / "order.parquet", "1:11")
    replay = written_config(cache / "b.yaml", prepared, overrides=(f"data.order={order}",))
    capsys.readouterr()
    assert main(["order", str(replay), "--steps", "10"]) == 0
    assert main(["order", str(replay), "--steps", "10:12"]) == 2
    assert f"the order of {order} ends with step 10" in capsys.readouterr().err


def test_iterate_rows_ends_with_the_recorded_order(prepared: Dataset, cache: Path) -> None:
    """Loop over more rows than `iterate_rows` looks up at once."""
    order = exported(written_config(cache / "a.yaml", prepared), cache / "order.parquet", "1:60")
    overrides = [*OVERRIDES, f"data.mixture=[{{path: {prepared.path}, weight: 1}}]", f"data.order={order}"]
    config = parse("17m", "mlm", "pretrain", overrides=overrides)
    rows = open_run_dataset(config).row_limit
    assert rows is not None
    assert rows > 2 * ROWS_AT_ONCE
    assert [row.order_index for row in iterate_rows(config)] == list(range(rows))
    assert [row.order_index for row in iterate_rows(config, rows - 2, 5)] == [rows - 2, rows - 1]
    assert [row.order_index for row in iterate_rows(config, 3, ROWS_AT_ONCE + 1)] == list(range(3, ROWS_AT_ONCE + 4))


def test_recorded_order_fingerprint_depends_only_on_content(prepared: Dataset, other: Dataset, cache: Path) -> None:
    config = written_config(cache / "a.yaml", prepared, other)
    order = exported(config, cache / "order.parquet")
    one = corpus_of(prepared, other, overrides=(f"data.order={order}",))
    moved = shutil.copy(order, cache / "elsewhere.parquet")
    os.utime(moved, ns=(1, 1))
    assert corpus_of(other, prepared, overrides=(f"data.order={moved}",)).fingerprint == one.fingerprint
    shorter = exported(config, cache / "shorter.parquet", "1:29")
    assert corpus_of(prepared, other, overrides=(f"data.order={shorter}",)).fingerprint != one.fingerprint
    again = pickle.loads(pickle.dumps(one))
    assert again.fingerprint == one.fingerprint
    assert len(pickle.dumps(one)) < 100_000
    mine, theirs = one.locate_rows(range(20)), again.locate_rows(range(20))
    assert all(np.array_equal(getattr(theirs, name), column) for name, column in vars(mine).items())


def test_recorded_order_folder_is_read_by_step_numbers_in_names(prepared: Dataset, cache: Path) -> None:
    config = written_config(cache / "a.yaml", prepared)
    whole = exported(config, cache / "whole.parquet", "1:13")
    (cache / "parts").mkdir()
    for steps in ("1:3", "3:10", "10:13"):
        exported(config, cache / "parts" / f"steps_{steps.replace(':', '_to_')}.parquet", steps)
    orders = [corpus_of(prepared, overrides=(f"data.order={path}",)) for path in (whole, cache / "parts")]
    assert orders[0].fingerprint == orders[1].fingerprint


def test_recorded_order_fsyncs_cache_before_rename(prepared: Dataset, cache: Path) -> None:
    order = exported(written_config(cache / "a.yaml", prepared), cache / "order.parquet")
    with watched(prepared.path) as seen:
        corpus_of(prepared, overrides=(f"data.order={order}",))
    assert [rename.target.name for rename in seen.renames][:-1] == ["order.json"]
    assert seen.renames[-1].target.name.startswith("order_")
    assert [rename.unforced for rename in seen.renames] == [[], []]
    assert seen.unnamed == []


def test_recorded_order_damaged_cache_is_rebuilt(prepared: Dataset, cache: Path) -> None:
    order = exported(written_config(cache / "a.yaml", prepared), cache / "order.parquet")
    overrides = (f"data.order={order}",)
    before = corpus_of(prepared, overrides=overrides).fingerprint
    (folder,) = prepared.path.glob("order_*")
    with open(folder / "chunks.int64", "r+b") as stream:
        stream.truncate(8)
    left = prepared.path / f".tmp-{folder.name}-killed"
    left.mkdir()  # a temporary folder such as a killed process leaves
    assert corpus_of(prepared, overrides=overrides).fingerprint == before
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 10**6}, "step 1 slot 0 has chunk 1000000 of .* which has"),
        ({"dataset": "/nowhere"}, "trains on dataset /nowhere, which data.mixture does not have"),
        ({"slot": -1}, "lines must be sorted by step and slot"),
        ({"step": None}, "a null in column step"),
    ],
)
def test_recorded_order_with_unfit_entries_is_refused(
    change: dict, message: str, prepared: Dataset, cache: Path
) -> None:
    table = parquet.read_table(exported(written_config(cache / "a.yaml", prepared), cache / "order.parquet"))
    records = table.to_pylist()
    index = 0 if "slot" not in change else len(records) - 1
    records[index].update(change)
    parquet.write_table(pa.Table.from_pylist(records), cache / "changed.parquet")
    refused(message, prepared, overrides=(f"data.order={cache / 'changed.parquet'}",))


def test_recorded_order_unreadable_or_incompatible_source_is_refused(
    prepared: Dataset, other: Dataset, cache: Path
) -> None:
    refused("not a file or folder; give keyed", prepared, overrides=("data.order=keyd",))
    refused("no .parquet file", prepared, overrides=(f"data.order={other.path / 'tokenizer'}",))
    parquet.write_table(pa.table({"text": ["a"]}), cache / "text.parquet")
    refused("columns text; wanted input_ids", prepared, overrides=(f"data.order={cache / 'text.parquet'}",))
    (cache / "torn.parquet").write_bytes((cache / "text.parquet").read_bytes()[:-20])
    refused("not a readable parquet file", prepared, overrides=(f"data.order={cache / 'torn.parquet'}",))
    order = exported(written_config(cache / "a.yaml", prepared), cache / "order.parquet")
    refused("trains on dataset .*fingerprint", other, overrides=(f"data.order={order}",))
    refused("exported with data.seq_len=256, this run has 300", prepared, overrides=(f"data.order={order}", "data.seq_len=300"))  # fmt: skip


def publish(folder: Path, samples: list[list[int]], files: int = 3) -> Path:
    """Write samples in the layout of the published order: numbered folders and files, rows shuffled within a file, and
    a column `step` that counts samples."""
    draw = np.random.default_rng(0)
    for i, part in enumerate(np.array_split(np.arange(len(samples)), files)):
        shuffled = draw.permutation(part)
        path = folder / f"checkpoint_{10**i:06d}" / f"steps_{part[0]}_to_{part[-1]}.parquet"
        path.parent.mkdir(parents=True)
        ids = pa.array([samples[j] for j in shuffled], pa.list_(pa.uint16()))
        parquet.write_table(pa.table({"input_ids": ids, "step": pa.array(shuffled, pa.uint64())}), path)
    return folder


def dressed(chunk: np.ndarray, style: int) -> list[int]:
    """Return a chunk with another combination of special tokens around it, as trainers differ in them."""
    inner = chunk[1:-1].tolist()
    return [[CLS, *inner, SEP], inner, [CLS, *inner], [CLS, *inner, SEP, PAD, PAD], [CLS, *inner, PAD]][style % 5]


@pytest.fixture
def drawn(prepared: Dataset, other: Dataset) -> list[tuple[Dataset, int]]:
    """Return 300 chunks of two datasets in random order, some of them twice."""
    draw = np.random.default_rng(3)
    return [(d, int(draw.integers(d.num_chunks))) for d in draw.choice(np.array([prepared, other]), 300)]


def contents(corpus: BlendedDataset) -> list[list[int]]:
    """Return the tokens of every chunk in training order."""
    pieces = []
    for row in corpus.rows(range(corpus.num_rows)):
        pieces += [piece.tolist() for piece in np.split(row.tokens, np.cumsum(row.lengths)[:-1])]
    return pieces


def test_recorded_order_published_samples_are_matched_by_content(
    prepared: Dataset, other: Dataset, drawn: list[tuple[Dataset, int]], cache: Path
) -> None:
    samples = [dressed(dataset.chunk(chunk), i) for i, (dataset, chunk) in enumerate(drawn)]
    overrides = (f"data.order={publish(cache / 'published', samples)}", "data.batching=padded")
    corpus = corpus_of(prepared, other, overrides=overrides)
    expected = [dataset.chunk(chunk).tolist() for dataset, chunk in drawn]
    assert contents(corpus) == expected
    packed = corpus_of(prepared, other, overrides=overrides[:1])
    assert sorted(contents(packed)) == sorted(expected)
    assert packed.num_rows < 0.75 * len(samples)
    for position, row in enumerate(packed.rows(range(packed.num_rows))):
        assert int(row.lengths.sum()) <= 256
        assert row.order_index == position
    assert packed.token_counts(np.arange(packed.num_rows)).tolist() == [
        len(row.tokens) for row in packed.rows(range(packed.num_rows))
    ]


def test_recorded_order_truncated_samples_match_truncated_chunks(prepared: Dataset, cache: Path) -> None:
    """Tokens beyond data.seq_len are ignored, in the sample and in the chunk."""
    long = [i for i in range(prepared.num_chunks) if len(prepared.chunk(i)) == 128][:10]
    samples = [prepared.chunk(i)[:100].tolist() for i in long]  # truncated, so without its [SEP]
    corpus = corpus_of(prepared, overrides=(f"data.order={publish(cache / 'p', samples)}", "data.batching=padded", "data.seq_len=100"))  # fmt: skip
    assert [row.tokens[:-1].tolist() for row in corpus.rows(range(10))] == [s[:99] for s in samples]


def test_recorded_order_unmatched_samples_are_refused_or_skipped(
    prepared: Dataset, drawn: list[tuple[Dataset, int]], cache: Path
) -> None:
    samples = [dataset.chunk(chunk).tolist() for dataset, chunk in drawn if dataset is prepared]
    known = len(samples)
    samples[7:7] = [[CLS, 5, 6, 7, SEP], [CLS, SEP]]
    order = publish(cache / "published", samples, files=1)
    overrides = (f"data.order={order}", "data.batching=padded")
    share = f"{100 * known / (known + 2):.2f} %"
    path = next(order.rglob("*.parquet"))
    row = parquet.read_table(path)["step"].to_pylist().index(7)
    refused(
        f"2 of {known + 2} samples are in no dataset .*{share} are.*{path} row {row};", prepared, overrides=overrides
    )
    corpus = corpus_of(prepared, overrides=(*overrides, "data.order_missing=skip"))
    assert corpus.num_rows == known
    assert corpus.skipped_samples == 2
    unknown = publish(cache / "unknown", [[CLS, 5, 6, 7, SEP]] * 3, files=1)
    refused("3 of 3 samples", prepared, overrides=(f"data.order={unknown}", "data.order_missing=skip"))


def test_recorded_order_duplicate_content_uses_the_first_chunk(prepared: Dataset, cache: Path) -> None:
    copy = shutil.copytree(prepared.path, cache / "copy")
    overrides = (
        f"data.order={publish(cache / 'p', [prepared.chunk(3).tolist()] * 4, files=2)}",
        "data.batching=padded",
    )
    config = parse(
        "17m", "mlm", "pretrain", overrides=[*OVERRIDES, f"data.mixture=[{prepared.path}, {copy}]", *overrides]
    )
    corpus = open_run_dataset(config)
    assert {(row.source, *row.chunks.tolist()) for row in corpus.rows(range(4))} == {(0, 3)}


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 50, 1000])
def test_steps_within_matches_step_by_step_count_through_warmup(rows: int) -> None:
    """Compare with a step-by-step count through the warm-up."""
    sizes = BatchSizes.of(parse("17m", "mlm", "pretrain", overrides=OVERRIDES).batch, 200.0)
    steps, used = 0, sizes.size_at(0)
    while used <= rows:
        steps += 1
        assert sizes.rows_before(steps) == used
        used += sizes.size_at(steps)
    assert sizes.steps_within(rows) == steps
