"""docs/config.md is what tools/config_reference.py makes of the keys."""

from __future__ import annotations

from pathlib import Path

from tools.config_reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_config_page_is_up_to_date() -> None:
    """If this fails after a change of a key, run: python tools/config_reference.py docs/config.md."""
    assert PAGE.read_text(encoding="utf-8") == reference()
