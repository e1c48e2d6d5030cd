"""Keys in URLs. A URL is part of a configuration, which is written into run directories, checkpoints and pages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.config.schema import Config

# user:password@, or a query that signs or authorises
_SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&](?:[^=&]*(?:token|signature|secret|password|key))=", re.IGNORECASE)


def refuse_secrets(text: str, what: str) -> None:
    """Raise UserError, without the text, where it is a URL with a password, a token or a signature in it."""
    if _SECRET.search(text):
        raise UserError(
            f"{what}: a URL with a key in it, which would be written into configurations and logs; give the key by the"
            " environment or the file that fsspec reads for this kind of storage"
        )


def check_secrets(config: Config) -> None:
    for group, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            for text in _texts(value):
                refuse_secrets(text, f"{group}.{key}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
