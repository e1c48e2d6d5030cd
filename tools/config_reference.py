"""Write docs/config.md, the lists of all configuration keys, from the keys' declarations.

python tools/config_reference.py docs/config.md
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_ettin.config.schema import all_keys, groups, key_types  # noqa: E402

HEAD = """# Configuration keys

All keys of a run, by group, with type, default, unit and range. Set them as `group.key=value` on the
command line, for one phase as `extend.group.key=value`, or in a YAML file for `--config`
([Training](training.md)). A default of *recipe* comes from the tables of [the recipe](recipe.md). `null`
means not set; counts may be written as `250B` or `1.7T`.

*Science* keys decide what is learned: they must not change within a run directory, unless `--allow-change`
names them. The rows that `data.mixture` gives are fixed as well, by the fingerprint of the data order; the
paths of its datasets are not. All others may change at every launch.

This page is generated from `megatron_ettin/config/schema.py` and `operations.py`; rewrite it with
`python tools/config_reference.py docs/config.md`.
"""


def reference() -> str:
    """Return the page."""
    parts = [HEAD]
    for group, cls in groups().items():
        parts.append(f"## `{group}`\n\n{(cls.__doc__ or '').strip()}\n")
        parts += [_entry(f"{group}.{field.name}", field) for field in dataclasses.fields(cls)]
        parts.append("")
    return "\n".join(parts)


def _entry(name: str, field: dataclasses.Field[Any]) -> str:
    """Return the entry of a key in the list of its group, in lines of at most 106 characters."""
    key = all_keys()[name]
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = "recipe" if value is dataclasses.MISSING else f"`{_yaml(value)}`"
    facts = [type_name(key_types()[name]), f"default {default}"]
    facts += [f"in {key.unit}"] if key.unit else []
    facts += [key.range] if key.range else []
    sentences = [f"- **`{name}`** ({', '.join(facts)}): {key.doc}"]
    if key.choices and not key.range:
        sentences.append(f"One of {', '.join(f'`{choice}`' for choice in key.choices)}.")
    if key.science:
        sentences.append(f"*Science* {key.science}." if isinstance(key.science, str) else "*Science.*")
    text = " ".join(sentences)
    return textwrap.fill(text, 106, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def type_name(hint: Any) -> str:
    """Return the type of a key's values in words: `int`, `str`, `any`."""
    inner = get_args(hint)
    if get_origin(hint) is list:
        return f"list of {type_name(inner[0])}"
    types = [one for one in inner or (hint,) if one is not type(None)]
    return ", ".join("any" if one is Any else one.__name__ if not get_args(one) else type_name(one) for one in types)


def _yaml(value: Any) -> str:
    """Return a default value in YAML notation."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
