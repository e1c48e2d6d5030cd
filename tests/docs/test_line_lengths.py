"""Lines of prose and tables in Markdown are short enough for a terminal and for a side-by-side diff."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_CHARACTERS = 110
URL = re.compile(r"https?://[^\s)>]+")


def long_lines(text: str) -> Iterator[tuple[int, int]]:
    """Yield (line number, characters) of each line that is too long, outside of code blocks and without URLs."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and len(URL.sub("", line)) > MOST_CHARACTERS:
            yield number, len(line)


def test_markdown_lines_are_at_most_110_characters() -> None:
    named = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md")]
    checked = [*named, *sorted((ROOT / "docs").rglob("*.md"))]
    assert len(checked) > 20
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in checked}
    assert [f"{path}:{line}: {count}" for path, text in texts.items() for line, count in long_lines(text)] == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a" * 111, [1]),
        ("a" * 110, []),
        (f"| {'a' * 110} |", [1]),
        (f"```\n{'a' * 111}\n```\n{'a' * 111}", [4]),
        (f"[a](https://example.org/{'a' * 111})", []),
    ],
)
def test_long_lines_leave_out_code_and_urls(text: str, lines: list[int]) -> None:
    assert [line for line, _ in long_lines(text)] == lines
