"""The pages that users read, and the blocks of commands in them.

A block is the text of a fence of `bash` or `console`. It runs as printed, unless an HTML comment before it says
otherwise and why:

    <!-- run: gpu, because eight devices -->

    gpu cluster push setup    its commands are checked: read by their parsers, with --dry-run where there is one
    never                     its options are read, nothing is started
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAGS = ("gpu", "cluster", "push", "setup", "never")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$", re.M | re.S)
TAG = re.compile(r"<!-- run: (?P<tag>\w+), because (?P<reason>[^>]{8,}?) -->\s*$")


@dataclass(frozen=True)
class Block:
    page: str
    """Path of the page, relative to the repository."""
    line: int
    """Line number of the fence."""
    language: str
    text: str
    tag: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return the README and every page under docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str, page: str) -> list[Block]:
    """Return every fence. Raises ValueError for a tag that does not exist or has no reason."""
    blocks = []
    for match in FENCE.finditer(text):
        before, line = text[: match.start()], text.count("\n", 0, match.start()) + 1
        last = before.rstrip("\n").rpartition("\n")[2] if before.endswith("\n") else ""
        tag = TAG.search(last)
        if "<!-- run" in last and (tag is None or tag["tag"] not in TAGS):
            raise ValueError(f"{page}:{line}: {last!r} is no tag with a reason; tags: {', '.join(TAGS)}")
        named = (tag["tag"], tag["reason"]) if tag else ("", "")
        blocks.append(Block(page, line, match["language"], match["text"], *named))
    return blocks


def all_blocks() -> list[Block]:
    return [block for path in pages() for block in blocks_of(path.read_text(), path.relative_to(ROOT).as_posix())]


def commands(block: Block) -> str:
    """Return the commands for the shell; in a console session these are the lines after `$ `."""
    if block.language != "console":
        return block.text
    return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))
