"""Evaluation by source: each row holds one source, and the losses of the sources add up to the total on any layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.cli.main import main
from megatron_ettin.config.values import validation_sets
from megatron_ettin.data.blended_dataset import open_by_source
from megatron_ettin.data.dataset import open_dataset
from tests.conftest import sentences
from tests.pool import Pool
from tests.train.runs import Trained, command, train

NEWS, CODE, BOTH = 40, 25, 65


@pytest.fixture(scope="module")
def two_inputs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Prepare a dataset of two INPUTs: the file `news.jsonl`, and the folder `code` with two files of other text."""
    folder = tmp_path_factory.mktemp("two")
    draw = random.Random(0)
    lines = [json.dumps({"text": sentences(seed, draw.randint(1, 9))}) for seed in range(NEWS)]
    (folder / "news.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "code").mkdir()
    for i, seeds in enumerate((range(10), range(10, CODE))):
        texts = [f"for x in range({seed}): print(x ** {seed % 7})\n" * 4 for seed in seeds]
        (folder / "code" / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--out", folder / "dataset", "--tokenizer", tiny_tokenizer, "--chunk-tokens", 48, "--workers", 1]
    assert main(["prepare", str(folder / "news.jsonl"), str(folder / "code"), *map(str, arguments)]) == 0
    return folder / "dataset"


@pytest.fixture(scope="module", params=[("mlm", "", 1000), ("clm", "parallel.pp=2", 30)], ids=["mlm dp2", "clm pp2"])
def run(
    request: pytest.FixtureRequest,
    pool: Pool,
    corpus: Path,
    two_inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Train two steps on two ranks, evaluated at the end on both datasets, on all rows or on 30."""
    objective, layout, rows = request.param
    held_out = f"data.validation={{old: {corpus / 'heldout'}, new: {two_inputs}}}"
    arguments = [held_out, "metrics.eval_every_steps=2", f"metrics.eval_rows={rows}", "run.steps=2", *layout.split()]
    return train(pool, 2, tmp_path_factory.mktemp("run"), corpus, objective, arguments)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_rows_by_source_hold_one_source_and_cover_every_chunk(two_inputs: Path, batching: str) -> None:
    dataset = open_dataset(two_inputs)
    parts = open_by_source(str(two_inputs), 64, batching, 0, "validation")
    assert list(parts) == ["news.jsonl", "code"]
    read: list[int] = []
    for name, part in parts.items():
        rows = part.rows(range(part.num_rows))
        chunks = np.concatenate([row.chunks for row in rows])
        assert {file.partition("/")[0] for file in dataset.documents_of(chunks).source} == {name}
        assert max(len(row.tokens) for row in rows) <= 64
        assert sum(len(row.tokens) for row in rows) == part.packing_indices[0].num_tokens
        read += chunks.tolist()
    assert sorted(read) == list(range(dataset.num_chunks))


@pytest.mark.ranks
def test_train_validation_logs_a_loss_per_source(run: Trained) -> None:
    names = {"old", "new/news.jsonl", "new/code"}
    assert {key.partition("/")[2] for key in run.metrics[-1] if key.startswith("validation_loss/")} == names
    assert "validation_loss" in run.metrics[-1]
    assert "validation_loss" not in run.metrics[0]


@pytest.mark.ranks
def test_eval_single_process_matches_validation_loss_per_source(
    run: Trained, pool: Pool, corpus: Path, two_inputs: Path
) -> None:
    """One process gets the losses and accuracies of two ranks, in total and by source; the sources add up to the
    total."""
    rows = read_config(run.directory)["metrics"]["eval_rows"]
    arguments = ["--data", f"old={corpus / 'heldout'}", "--data", f"new={two_inputs}", "--rows", str(rows), "--json"]
    answer = pool.run(1, ["eval", str(run.directory), *arguments, "--baseline", str(corpus)])[0]
    assert answer.status == 0, answer.output
    result, logged = json.loads(answer.output.strip().splitlines()[-1]), run.metrics[-1]
    assert result["loss"] == pytest.approx(logged["validation_loss"], rel=1e-5)
    assert result["accuracy"] == pytest.approx(logged["validation_accuracy"])
    assert 3 < result["unigram_loss"] < np.log(320)
    for name, part in result["sources"].items():
        assert part["loss"] == pytest.approx(logged[f"validation_loss/{name}"], rel=1e-5)
        assert ("perplexity" in part) == (result["objective"] == "clm")
        assert 0 <= part["accuracy"] <= 1
    parts = result["sources"].values()
    assert result["labels"] == sum(part["labels"] for part in parts)
    assert result["rows"] == sum(part["rows"] for part in parts)
    assert (result["rows"] == 30) == (rows == 30)
    assert result["loss"] == pytest.approx(sum(part["loss"] * part["labels"] for part in parts) / result["labels"])
    assert len({round(part["loss"], 6) for part in parts}) == len(parts)


@pytest.mark.ranks
def test_eval_dataset_of_two_inputs_reports_each_as_a_source(run: Trained, pool: Pool, two_inputs: Path) -> None:
    """Each INPUT is a source, and a limit on rows leaves at least one row of each."""
    lines = pool.run(1, ["eval", str(run.directory), "--data", str(two_inputs), "--rows", "6"])[0].output.splitlines()
    assert [line.strip().partition(":")[0] for line in lines[-2:]] == ["news.jsonl", "code"]
    arguments = ["--data", str(two_inputs), "--rows", "6", "--json"]
    result = json.loads(pool.run(1, ["eval", str(run.directory), *arguments])[0].output.strip().splitlines()[-1])
    assert result["rows"] == 6
    assert all(part["rows"] >= 1 for part in result["sources"].values())


@pytest.mark.ranks
def test_eval_single_source_reports_one_part_equal_to_total(run: Trained, pool: Pool, corpus: Path) -> None:
    answer = pool.run(1, ["eval", str(run.directory), "--data", str(corpus / "heldout"), "--json"])[0]
    result = json.loads(answer.output.strip().splitlines()[-1])
    assert list(result["sources"]) == ["dataset"]
    assert result["sources"]["dataset"]["loss"] == result["loss"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a/b", {"b": "a/b"}),
        ("a/b/heldout", {"b": "a/b/heldout"}),
        (["x/a", "x/b/heldout"], {"a": "x/a", "b": "x/b/heldout"}),
        (["x/a", "y/a"], {"x/a": "x/a", "y/a": "y/a"}),
        ({"web": "x/a", "code": "y/a"}, {"web": "x/a", "code": "y/a"}),
    ],
)
def test_validation_sets_are_named_by_key_or_path(value: object, expected: dict[str, str]) -> None:
    assert validation_sets(value) == expected


@pytest.mark.parametrize("value", [[], {}, "", 3, [3], ["a", "a"], {"web": None}, {"web": ["a"]}])
def test_validation_sets_invalid_value_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^data\.validation: "):
        validation_sets(value)


def test_train_empty_or_duplicate_validation_set_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, message in (
        ("data.validation=[]", "data.validation: empty; give a DATASET path"),
        (f"data.validation=[{corpus}, {corpus}]", "data.validation: a dataset is given twice"),
    ):
        assert main(command(tmp_path / "run", corpus, "mlm", [word, "run.steps=1"])) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
