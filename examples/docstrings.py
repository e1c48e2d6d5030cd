"""Collect real English text from this machine, for trying the system without a download.

It reads the docstrings of every installed Python module, standard library included, with `ast` (nothing is imported).
A document is a module: its docstrings in order, under the names they describe. Doctest blocks, parameter tables and
underlines are dropped, so that mostly prose is left. A docstring that an earlier module has too is dropped, because
libraries copy theirs by the hundred and a held-out part should not repeat the rest. The result is the same for the same
set of packages.

    python examples/docstrings.py --out docstrings.jsonl
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

LEAST_CHARACTERS = 200
# larger docstrings are generated tables
LARGEST_SOURCE_BYTES = 2_000_000
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "idle_test", "lib2to3"}
NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
UNDERLINE = re.compile(r"^\s*([-=~^*+#])\1{2,}\s*$")
FIELD = re.compile(r"^\s*(:(param|type|return|rtype|raise|arg|var)\w*\b|\.\. |@(param|return))|^[\w*, .]+ : \S")
TABLE_ROW = re.compile(r"^\s*\|.*\|")
PROMPT = re.compile(r"^\s*(>>>|\.\.\. |\$ |In \[)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write: id, text, source")
    parser.add_argument("--max-bytes", type=int, default=None, help="stop before the file grows past this")
    options = parser.parse_args()
    began = time.monotonic()
    documents, written = write(options.out, options.max_bytes)
    print(f"{options.out}: {documents} documents, {written / 1e6:.1f} MB, in {time.monotonic() - began:.1f} s")
    return 0


def write(out: Path, max_bytes: int | None) -> tuple[int, int]:
    """Write the documents to a temporary file that then replaces `out`. Returns (documents, bytes)."""
    sources = list(walk())
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    seen: set[bytes] = set()
    documents = written = 0
    with open(temporary, "wb") as file, multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        for (root, path), parts in zip(sources, pool.imap(read, sources, chunksize=64), strict=True):
            text = "\n\n".join(f"{name}\n{text}" if name else text for name, text in parts if is_new(text, seen))
            if len(text) < LEAST_CHARACTERS:
                continue
            module = path.relative_to(root).with_suffix("").as_posix()
            document = {"id": module, "text": text, "source": module.partition("/")[0]}
            line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
            if max_bytes is not None and written + len(line) > max_bytes:
                break
            file.write(line)
            documents, written = documents + 1, written + len(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)
    return documents, written


def is_new(text: str, seen: set[bytes]) -> bool:
    """Return whether no earlier docstring was the same, and remember this one."""
    digest = hashlib.sha256(text.encode()).digest()
    known = digest in seen
    seen.add(digest)
    return not known


def walk() -> Iterator[tuple[Path, Path]]:
    """Yield (root, file) of every installed module, roots and files in a fixed order, each file once."""
    paths = sysconfig.get_paths()
    seen: set[str] = set()
    for root in dict.fromkeys(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f.isidentifier() and f not in SKIPPED_FOLDERS)
            for name in sorted(files):
                path = os.path.join(folder, name)
                if name.endswith(".py") and path not in seen:
                    seen.add(path)
                    yield Path(root), Path(path)


def read(source: tuple[Path, Path]) -> list[tuple[str, str]]:
    """Return (name, prose) of one module's docstrings; none where it is not valid Python."""
    try:
        if os.path.getsize(source[1]) > LARGEST_SOURCE_BYTES:
            return []
        with warnings.catch_warnings():
            # hides warnings about escape sequences in other packages
            warnings.simplefilter("ignore")
            tree = ast.parse(source[1].read_bytes())
        return list(docstrings(tree, ""))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, prose) of a module, class or function and of all it defines, in the order of the file."""
    raw = ast.get_docstring(node, clean=False) if isinstance(node, (ast.Module, *NAMED)) else None
    text = prose(raw) if raw else ""
    if text:
        yield name, text
    for child in getattr(node, "body", []):
        if isinstance(child, NAMED):
            yield from docstrings(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from docstrings(child, name)


def prose(docstring: str) -> str:
    """Return a docstring without doctests, tables and underlines; blank lines are collapsed."""
    kept: list[str] = []
    in_doctest, field_indent = False, None
    for line in inspect.cleandoc(docstring).splitlines():
        indent = len(line) - len(line.lstrip())
        if field_indent is not None and line.strip() and indent <= field_indent:
            field_indent = None
        if FIELD.match(line) and field_indent is None:
            # a parameter's description is indented further than its name
            field_indent = indent
        in_doctest = bool(line.strip()) and (in_doctest or bool(PROMPT.match(line)))
        if in_doctest or UNDERLINE.match(line) or TABLE_ROW.match(line) or (field_indent is not None and line.strip()):
            continue
        if line.strip() or (kept and kept[-1]):
            kept.append(line.rstrip())
    text = "\n".join(kept).strip()
    # Lone surrogates are legal in a Python string and in no UTF-8 file.
    return text.encode("utf-8", "ignore").decode() if any(character.isalpha() for character in text) else ""


if __name__ == "__main__":
    sys.exit(main())
