"""Make text safe to show, and read and write counts as people do: `1.7T`, `250B`, `8_500_000_000`, `4096`, `2.5e9`.

- A terminal would obey escape sequences in text from files: their characters are shown instead.
- A URL is part of a configuration, which is written into run directories, checkpoints and pages: URLs with keys in them
  are refused.
- A page that may be mailed shows files that others may have written: passwords and tokens are left out of it.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from megatron_ettin.base.errors import UserError

KEPT_OF_TEXTS = "\n\t"


def printable(text: object, keep: str = "") -> str:
    """Return the text with every non-printable character escaped, except those in `keep`.

    An escape sequence could set the terminal's title, wipe the screen or fake lines.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown)


def printable_json(content: Any) -> str:
    """Return the content as indented JSON, in ASCII if it has non-printable characters, which a terminal may obey."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return text if text.replace("\n", "").isprintable() else json.dumps(content, indent=1)


SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][+]?[0-9]+)?)\s*([KMBGT]?)(?:tok(?:ens)?)?", re.IGNORECASE)


def parse_count(text: str | int | float, key: str) -> int:
    """Return the whole number that `text` means. Raises UserError, which names the setting `key`."""
    match = _COUNT.fullmatch(str(text).strip())
    if match is None:
        raise UserError(f"{key}: {text!r} is not a count; write 4096, 8_500_000_000, 250B or 1.7T")
    value = Decimal(match[1].replace("_", "")) * SUFFIXES[match[2].upper()]
    if value != int(value):
        raise UserError(f"{key}: {text!r} is {value}, not a whole number")
    return int(value)


def format_count(count: float) -> str:
    """Format a count with three digits: 1.7T, 250B, 16.9M, 512."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:g}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 row`, `2,000 rows`. `plural` is for a noun that takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: `3d 4h`, `2h 5m`, `40s`."""
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    for index, (name, size) in enumerate(units):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            if index + 1 == len(units):
                return f"{whole}{name}"
            below, small = units[index + 1]
            return f"{whole}{name} {rest // small}{below}"
    return "0s"


# user:password@, or a query that signs or authorises
_SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&](?:[^=&]*(?:token|signature|secret|password|key))=", re.IGNORECASE)

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
    r"(^|[_.-])(secret|password|passwd|credentials?|api_?key|access_?key|private_?key|token)$", re.IGNORECASE
)
_LOOKS_SECRET = (
    # user:password@ of a URL
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{HIDDEN}@"),
    (
        re.compile(r"([?&;][\w-]*(?:sig|signature|token|key|secret|password|credential)=)[^&\s]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[bap]-|AKIA|ASIA)[\w-]{12,}"), HIDDEN),
    # a JSON web token
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), HIDDEN),
    # a key of wandb; 40 digits in a path or after an @ are a commit
    (re.compile(r"(?<![\w/@-])[0-9a-f]{40}\b"), HIDDEN),
)


def masked(text: object, key: str = "") -> str:
    """Replace passwords, tokens and credentials in URLs by `(hidden)`; the whole text if `key` names a secret."""
    if _SECRET_KEY.search(key) and text not in (None, ""):
        return HIDDEN
    shown = str(text)
    for pattern, instead in _LOOKS_SECRET:
        shown = pattern.sub(instead, shown)
    return shown


def refuse_secrets(text: str, what: str) -> None:
    """Raise UserError if the text has a URL with a password, token or signature. The message names `what` only."""
    if _SECRET.search(text):
        raise UserError(
            f"{what}: a URL with a key in it, which would be written into configurations and logs; give the key by the"
            " environment or the file that fsspec reads for this kind of storage"
        )
