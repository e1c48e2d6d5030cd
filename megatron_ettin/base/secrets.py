"""Keys in URLs, which are refused: a URL is part of a configuration, which is written into run directories, checkpoints
and pages. And what is left out of a page that may be mailed, of files that others may have written."""

from __future__ import annotations

import re

from megatron_ettin.base.errors import UserError

# user:password@, or a query that signs or authorises
_SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&](?:[^=&]*(?:token|signature|secret|password|key))=", re.IGNORECASE)

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
    r"(^|[_.-])(secret|password|passwd|credentials?|api_?key|access_?key|private_?key|token)$", re.IGNORECASE
)
_LOOKS_SECRET = (
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{HIDDEN}@"),  # user:password@ of a URL
    (
        re.compile(r"([?&;][\w-]*(?:sig|signature|token|key|secret|password|credential)=)[^&\s]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[bap]-|AKIA|ASIA)[\w-]{12,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), HIDDEN),  # a JSON web token
    (re.compile(r"(?<![\w/@-])[0-9a-f]{40}\b"), HIDDEN),  # a key of wandb; a commit in a path or after an @ is none
)


def masked(text: object, key: str = "") -> str:
    """`text` without what looks like a password, a token or a URL's credentials; nothing of it where `key` says so."""
    if _SECRET_KEY.search(key) and text not in (None, ""):
        return HIDDEN
    shown = str(text)
    for pattern, instead in _LOOKS_SECRET:
        shown = pattern.sub(instead, shown)
    return shown


def refuse_secrets(text: str, what: str) -> None:
    """Raise UserError, without the text, where it is a URL with a password, a token or a signature in it."""
    if _SECRET.search(text):
        raise UserError(
            f"{what}: a URL with a key in it, which would be written into configurations and logs; give the key by the"
            " environment or the file that fsspec reads for this kind of storage"
        )
