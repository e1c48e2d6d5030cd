"""examples/docstrings.py extracts prose from docstrings and makes the same corpus every time."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "docstrings.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("docstrings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prose_keeps_sentences_and_drops_the_rest(script):
    docstring = """Add two numbers.

    The sum is exact
    for integers.

    Parameters
    ----------
    a : int
        The first,
        over two lines.

    :param b: the second,
        over two lines too.

    >>> add(1, 2)
    3

    | x | y |

    See the manual.
    """
    assert script.prose(docstring).split("\n\n") == [
        "Add two numbers.",
        "The sum is exact\nfor integers.",
        "Parameters",
        "See the manual.",
    ]
    assert script.prose("-----\n1 2 3") == ""
    assert script.prose("half \ud800 a pair") == "half  a pair"


def test_docstrings_of_nested_code_are_named_in_order(script):
    source = '''"""Module."""
if True:
    class A:
        """A."""
        async def f(self):
            """F."""
'''
    assert list(script.docstrings(ast.parse(source), "")) == [("", "Module."), ("A", "A."), ("A.f", "F.")]


@pytest.mark.full
def test_docstrings_corpus_made_twice_is_identical(tmp_path):
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for out in outs:
        command = [sys.executable, str(SCRIPT), "--out", str(out), "--max-bytes", "100000"]
        subprocess.run(command, check=True, capture_output=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    written_bytes = outs[0].stat().st_size
    assert written_bytes > 80_000
    assert written_bytes <= 100_000
    documents = [json.loads(line) for line in outs[0].read_text(encoding="utf-8").splitlines()]
    assert {tuple(document) for document in documents} == {("id", "text", "source")}
    assert min(len(document["text"]) for document in documents) >= 200
    assert len({document["id"] for document in documents}) == len(documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
