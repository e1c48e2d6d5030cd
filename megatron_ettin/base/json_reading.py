"""JSON of files that others may have made, and its own digest in what says how all other files should be: that must be
known to be right itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any

DIGEST = "content_sha256"


def load_json(text: str | bytes) -> Any:
    """The content. Raises ValueError, also for lists in lists so deep that Python's own reader gives up."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """The same with its own sha256."""
    return {**content, DIGEST: _digest_of(content)}


def checked_digest(raw: dict[str, Any]) -> dict[str, Any]:
    """The content without its sha256. Raises ValueError where that is another's; one without any is of before."""
    content = {key: value for key, value in raw.items() if key != DIGEST}
    try:
        is_own = DIGEST not in raw or raw[DIGEST] == _digest_of(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not is_own:
        raise ValueError(f"its {DIGEST} is not that of its content")
    return content


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
