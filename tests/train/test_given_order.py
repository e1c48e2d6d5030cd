"""`ettin train data.order=FILE`: the rows of the file in its order, an end where it ends, and refusals on resume when the
data is no longer what the run was started with."""

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


def test_a_run_repeats_another_from_its_order(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Equal losses on one rank and on two, and it ends with the order, saying so; more steps are refused."""
    first = train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=4"])
    order = exported(first.directory, tmp_path / "order.parquet", "1:5")
    words = [f"data.order={order}"]
    result = pool.run(1, command(tmp_path / "again", corpus, "mlm", words))[0]
    assert result.status == 0, result.output
    assert "32 rows, 4 steps; the run ends with them" in result.output
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == first.column("loss")
    assert train(pool, 2, tmp_path / "two", corpus, "mlm", words).column("rows") == first.column("rows")
    tables = [exported(run, tmp_path / f"{run.name}.parquet", "1:5") for run in (first.directory, tmp_path / "again")]
    assert parquet.read_table(tables[0]).equals(parquet.read_table(tables[1]))
    refused = pool.run(1, command(tmp_path / "more", corpus, "mlm", [*words, "run.steps=5"]))[0]
    assert refused.status == 2 and f"run.steps: 5, but data.order {order} ends with step 4" in refused.output


def test_resume_compares_orders_by_content(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The file may move; other rows, or the keyed order, need --allow-change data.order."""
    first = train(pool, 1, tmp_path / "first", corpus, "mlm", ["run.steps=8"])
    order = exported(first.directory, tmp_path / "order.parquet", "1:9")
    other = exported(first.directory, tmp_path / "other.parquet", "3:9")
    run = tmp_path / "run"
    train(pool, 1, run, corpus, "mlm", [f"data.order={order}", "run.steps=2", "checkpoint.every_steps=1"])
    moved = shutil.move(order, tmp_path / "moved.parquet")
    train(pool, 1, run, corpus, "mlm", [f"data.order={moved}", "run.steps=3"])
    for words in ([f"data.order={other}", "run.steps=4"], ["run.steps=4"]):
        refused = pool.run(1, command(run, corpus, "mlm", words))[0]
        assert refused.status == 2 and "was started with data.order=" in refused.output
        assert len(refused.output.splitlines()) == 1
    words = [f"data.order={other}", "run.steps=4"]
    changed = train(pool, 1, run, corpus, "mlm", words, options=["--allow-change", "data.order"])
    assert changed.column("step") == [1, 2, 3, 4]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert history[-1]["changes"] == ["data.order"]


def test_changed_data_is_refused_by_name(pool: Pool, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A file of another size, then another dataset under the same path; the latter may be allowed. `ettin order` does
    not tell what a run read from data that is no longer there."""
    (tmp_path / "data").mkdir()
    dataset = make_corpus(tmp_path / "data", tiny_tokenizer)
    run = train(pool, 1, tmp_path / "run", dataset, "mlm", ["run.steps=2"]).directory
    shard = dataset / "shard_00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    refused = pool.run(1, command(run, dataset, "mlm", ["run.steps=3"]))[0]
    assert refused.status == 2 and f"{shard}: truncated" in refused.output
    shard.write_bytes(content)
    shutil.rmtree(dataset)
    text = tmp_path / "data" / "text.jsonl"
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:200]))
    words = ["--out", str(dataset), "--tokenizer", str(tiny_tokenizer), "--chunk-tokens", "48", "--workers", "1"]
    assert main(["prepare", str(text), *words]) == 0
    refused = pool.run(1, command(run, dataset, "mlm", ["run.steps=3"]))[0]
    assert refused.status == 2 and "was started with data.mixture=" in refused.output
    told = pool.run(1, ["order", str(run), "--steps", "1"])[0]
    assert told.status == 2 and "was trained in order" in told.output
    changed = train(pool, 1, run, dataset, "mlm", ["run.steps=3"], options=["--allow-change", "data.mixture"])
    assert changed.column("step") == [1, 2, 3]


def test_a_mixture_file_is_recorded_as_its_entries(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """A run says what it read even when the file it was given is edited later; repeats are warned of."""
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"[{{path: {corpus}, weight: 1}}]")
    result = pool.run(1, command(tmp_path / "run", mixture, "mlm", ["run.steps=2"]))[0]
    assert result.status == 0, result.output
    assert "epochs" in result.output and str(corpus) in result.output
    mixture.write_text("[{path: /elsewhere, weight: 1}]")
    assert main(["order", str(tmp_path / "run"), "--steps", "1"]) == 0
    long = pool.run(1, command(tmp_path / "long", corpus, "mlm", ["run.tokens=1T", "run.steps=1000000", "--dry-run"]))[
        0
    ]
    assert long.status == 0 and "beyond 4 epochs repeated data adds little" in long.output
