"""Text of a run for a page: secrets are left out of it, the rest is escaped."""

from __future__ import annotations

import html
import json
from typing import Any

from megatron_ettin.base.secrets import masked


def escaped(text: object, key: str = "") -> str:
    """`masked`, as HTML."""
    return html.escape(masked(text, key))


def embedded(value: Any) -> str:
    """JSON that can stand in a <script> element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
