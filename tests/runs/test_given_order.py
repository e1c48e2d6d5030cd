"""`ettin train data.order=FILE` trains on the file's rows in their order and ends after them. A resume is refused if
the data has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from megatron_ettin.cli.main import main
from tests.conftest import make_corpus
from tests.pool import Pool
from tests.train.runs import command, train

pytestmark = pytest.mark.ranks


def exported(run: Path, out: Path, steps: str) -> Path:
    assert main(["order", str(run), "--steps", steps, "--out", str(out)]) == 0
    return out


def test_data_order_exported_from_run_reproduces_its_losses(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The losses are equal on one rank and the rows on two; the run ends with the order, and more steps are refused."""
    first = train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=4"])
    order = exported(first.directory, tmp_path / "order.parquet", "1:5")
    overrides = [f"data.order={order}"]
    result = pool.run(1, command(tmp_path / "again", corpus, "mlm", overrides))[0]
    assert result.status == 0, result.output
    assert "32 rows, 4 steps; the run ends with them" in result.output
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == first.column("loss")
    assert train(pool, 2, tmp_path / "two", corpus, "mlm", overrides).column("rows") == first.column("rows")
    tables = [exported(run, tmp_path / f"{run.name}.parquet", "1:5") for run in (first.directory, tmp_path / "again")]
    assert parquet.read_table(tables[0]).equals(parquet.read_table(tables[1]))
    refused = pool.run(1, command(tmp_path / "more", corpus, "mlm", [*overrides, "run.steps=5"]))[0]
    assert refused.status == 2
    assert f"run.steps: 5, but data.order {order} ends with step 4" in refused.output


def test_resume_compares_data_order_by_content_not_path(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The file may move; other rows, or leaving out data.order, need --allow-change data.order."""
    first = train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=1"])
    order = exported(first.directory, tmp_path / "order.parquet", "1:5")
    other = exported(first.directory, tmp_path / "other.parquet", "3:7")
    run = tmp_path / "run"
    train(pool, 1, run, corpus, "mlm", [f"data.order={order}", "run.steps=2", "checkpoint.every_steps=1"])
    moved = shutil.move(order, tmp_path / "moved.parquet")
    train(pool, 1, run, corpus, "mlm", [f"data.order={moved}", "run.steps=3"])
    for overrides in ([f"data.order={other}", "run.steps=4"], ["run.steps=4"]):
        refused = pool.run(1, command(run, corpus, "mlm", overrides))[0]
        assert refused.status == 2
        assert "was started with data.order=" in refused.output
        assert len(refused.output.splitlines()) == 1
    overrides = [f"data.order={other}", "run.steps=4"]
    changed = train(pool, 1, run, corpus, "mlm", overrides, options=["--allow-change", "data.order"])
    assert changed.column("step") == [1, 2, 3, 4]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert history[-1]["changes"] == ["data.order"]


def test_resume_with_changed_dataset_is_refused(pool: Pool, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Refuse a truncated shard, and another dataset under the same path unless it is allowed. `ettin order` refuses too
    when the data of the run is no longer there."""
    (tmp_path / "data").mkdir()
    dataset = make_corpus(tmp_path / "data", tiny_tokenizer)
    run = train(pool, 1, tmp_path / "run", dataset, "mlm", ["run.steps=2"]).directory
    shard = dataset / "shard_00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    refused = pool.run(1, command(run, dataset, "mlm", ["run.steps=3"]))[0]
    assert refused.status == 2
    assert f"{shard}: truncated" in refused.output
    shard.write_bytes(content)
    shutil.rmtree(dataset)
    text = tmp_path / "data" / "text.jsonl"
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:200]))
    arguments = ["--out", str(dataset), "--tokenizer", str(tiny_tokenizer), "--chunk-tokens", "48", "--workers", "1"]
    assert main(["prepare", str(text), *arguments]) == 0
    refused = pool.run(1, command(run, dataset, "mlm", ["run.steps=3"]))[0]
    assert refused.status == 2
    assert "was started with data.mixture=" in refused.output
    listed = pool.run(1, ["order", str(run), "--steps", "1"])[0]
    assert listed.status == 2
    assert "was trained in order" in listed.output
    changed = train(pool, 1, run, dataset, "mlm", ["run.steps=3"], options=["--allow-change", "data.mixture"])
    assert changed.column("step") == [1, 2, 3]


def test_mixture_file_edited_after_launch_leaves_recorded_entries(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """`ettin order` works after the mixture file was edited; a run that repeats its data often is warned of it."""
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"[{{path: {corpus}, weight: 1}}]")
    result = pool.run(1, command(tmp_path / "run", mixture, "mlm", ["run.steps=2"]))[0]
    assert result.status == 0, result.output
    assert "epochs" in result.output
    assert str(corpus) in result.output
    mixture.write_text("[{path: /elsewhere, weight: 1}]")
    assert main(["order", str(tmp_path / "run"), "--steps", "1"]) == 0
    long = pool.run(1, command(tmp_path / "long", corpus, "mlm", ["run.tokens=1T", "run.steps=1000000", "--dry-run"]))[
        0
    ]
    assert long.status == 0
    assert "beyond 4 epochs repeated data adds little" in long.output
