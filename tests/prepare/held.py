"""Read prepared datasets document by document, for tests that compare them with their inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.data.dataset import open_dataset
from tests.data.corpora import prepare_here


def documents(path: Path) -> list[tuple[str, str, list[int]]]:
    """Return (source, document id, token ids) of every document, with chunks joined and without [CLS] and [SEP]."""
    dataset = open_dataset(path)
    by_number: dict[int, tuple[str, str, list[int]]] = {}
    for i in range(dataset.num_chunks):
        source, name, start, number = dataset.document_of(i)
        ids = dataset.chunk(i).tolist()
        document = by_number.setdefault(number, (source, name, []))
        assert len(document[2]) == start
        document[2].extend(ids[1:-1])
    return list(by_number.values())


def prepared(folder: Path, *inputs: object, options: tuple[object, ...] = ()) -> list[tuple[str, str, list[int]]]:
    """Run `ettin prepare` on the inputs with one worker and plain chunking, and return the documents."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    assert prepare_here(*inputs, "--out", out, "--workers", 1, "--chunking", "plain", *options) == 0
    return documents(out)


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Assert that `ettin prepare` refuses the input and leaves nothing behind, and return its one line of error."""
    capsys.readouterr()
    before = sorted(folder.rglob("*"))
    assert prepare_here(*arguments, "--out", folder / "refused", "--workers", 1) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    assert sorted(folder.rglob("*")) == before
    return message


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
