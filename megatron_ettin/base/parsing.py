"""Parse JSON and YAML files that others may have made.

A manifest, by which other files are checked, holds the sha256 of its own content, so that damage to it is noticed.

YAML 1.1 has numbers to base sixty and reads the rows `24:32` as 1472. The loader of this module does not read them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_ettin.base.errors import UserError, first_line

DIGEST = "content_sha256"


def load_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, also if it is nested too deeply for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or holds no object."""
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path, unreadable: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, and none if it cannot be opened.

    Args:
        path: the file.
        unreadable: gets the numbers, from 1, of lines that hold no object; blank lines are not among them.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = load_json(line)
            # a killed writer leaves a torn line
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            elif unreadable is not None:
                unreadable.append(number)


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with its sha256 added as `content_sha256`."""
    return {**content, DIGEST: _digest_of(content)}


def checked_digest(raw: dict[str, Any]) -> dict[str, Any]:
    """Check the sha256 in the content and return the content without it. Files of older versions have none.

    Raises:
        ValueError: the sha256 is not that of the content.
    """
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


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*))$"),
    list("-+0123456789"),
)


MOST_DEPTH = 100
# aliases count as what they stand for: a file of a few lines can stand for billions of nodes
MOST_NODES = 100_000


def load_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        yaml.YAMLError: it cannot be parsed, is nested too deeply, or has too many nodes once its aliases are expanded.
    """
    # the scanner's time grows with the square of the depth
    if _depth(text) > MOST_DEPTH:
        raise yaml.YAMLError("nested too deeply")
    try:
        loader = _Loader(text)
    # a character that YAML does not allow
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(first_line(error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    # text that looks like a date or a number and is none
    except (ValueError, OverflowError, TypeError) as error:
        if isinstance(error, yaml.YAMLError):
            raise
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def read_yaml(path: Path, label: str) -> Any:
    """Parse a YAML file. Raises UserError, whose message begins with `label`, if it cannot be read or parsed."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{label}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{label}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None


def _depth(text: str) -> int:
    """Return the depth to which flow collections are nested; brackets within quotes are counted too."""
    deepest = depth = 0
    for character in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if character in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _count(node: Any, known: dict[int, int]) -> int:
    """Count a node's nodes, aliases expanded. Raises yaml.YAMLError if they are too many or it contains itself."""
    count = known.get(id(node))
    if count == 0:
        raise yaml.YAMLError("an alias stands for what it is in")
    if count is None:
        known[id(node)] = 0
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [one for pair in inside for one in pair] if isinstance(node, yaml.MappingNode) else inside
        count = known[id(node)] = 1 + sum(_count(child, known) for child in children)
    if count > MOST_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_NODES:,} values")
    return count


def load_object(path: Path, label: str = "", expected: str = "an object") -> dict[str, Any]:
    """Return the object in a JSON file, which must hold one.

    Args:
        path: the file.
        label: name of the file in messages; its path by default.
        expected: what the file should hold, for the message.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{label or path}: unreadable ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{label or path}: holds a {type(content).__name__}, not {expected}")
    return content
