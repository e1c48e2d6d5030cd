"""Small corpora for the data tests, made from fixed seeds, so that their content is known and quick to prepare."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

from megatron_ettin.cli.main import main
from tests.forkserver import program

COMMON_WORDS = (
    "the of and a in is it you that he was for on are with as his they be at one have this from or had by "
    "hot word but what some we can out other were all there when up use your how said an each she which "
    "do their time if will way about many then them write would like so these her long make thing see him "
    "two has look more day could go come"
)
WORDS = COMMON_WORDS.split()


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_jsonl(path: Path, documents: int, seed: int = 0, longest_words: int = 600) -> Path:
    """Write documents of 1 to `longest_words` words as JSON lines, every second one with an id."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(documents):
            record: dict[str, Any] = {"text": words(rng.randint(1, longest_words), seed * 1_000_003 + i)}
            if i % 2:
                record["id"] = f"doc-{i}"
            stream.write(json.dumps(record) + "\n")
    return path


def prepare_here(*arguments: object) -> int:
    """Run `ettin prepare` in this process and return its exit status."""
    return main(["prepare", *map(str, arguments)])


def ettin(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `ettin ...` in a process of its own, forked from one that has imported everything."""
    command = program("ettin", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
