"""Text of a run for a page that may be mailed: secrets are left out of it, the rest is escaped."""

from __future__ import annotations

import html
import json
import re
from typing import Any

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
    r"(^|[_.-])(secret|password|passwd|credentials?|api_?key|access_?key|private_?key|token)$", re.I
)
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{HIDDEN}@"),  # user:password@ of a URL
    (re.compile(r"(?i)([?&;][\w-]*(?:sig|signature|token|key|secret|password|credential)=)[^&\s]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[bap]-|AKIA|ASIA)[\w-]{12,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), HIDDEN),  # a JSON web token
    (re.compile(r"\b[0-9a-f]{40}\b"), HIDDEN),  # a key of wandb
)


def masked(text: object, key: str = "") -> str:
    """`text` without what looks like a password, a token or a URL's credentials; nothing of it where `key` says so."""
    if _SECRET_KEY.search(key) and text not in (None, ""):
        return HIDDEN
    shown = str(text)
    for pattern, instead in _SECRETS:
        shown = pattern.sub(instead, shown)
    return shown


def escaped(text: object, key: str = "") -> str:
    """`masked`, as HTML."""
    return html.escape(masked(text, key))


def embedded(value: Any) -> str:
    """JSON that can stand in a <script> element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
