"""Text out of files on its way to a terminal: what would be taken for a command of the terminal is shown instead."""

from __future__ import annotations

import json
from typing import Any

KEPT_OF_TEXTS = "\n\t"


def printable(text: object, keep: str = "") -> str:
    """Return the text with every character that is not printed written as its escape, but for those in `keep`.

    An escape sequence could set the terminal's title, wipe the screen or fake lines."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() or one in keep else _escape(one) for one in shown)


def _escape(character: str) -> str:
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character) or (
        f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"
    )


def printable_json(content: Any) -> str:
    """Return the content as indented JSON, in ASCII where a terminal would take a character for a command."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return text if text.replace("\n", "").isprintable() else json.dumps(content, indent=1)
