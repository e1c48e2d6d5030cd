"""The shell of the blocks, and the datasets and runs that pages name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zstandard

from tests.config.original_yaml import original, write
from tests.conftest import sentences
from tests.docs.pages import Block
from tests.docs.shell import Shell, make_programs


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_tokenizer: Path) -> Shell:
    folder = tmp_path_factory.mktemp("docs")
    base = folder / "base"
    shutil.copytree(corpus, base / "corpus")
    shutil.copytree(tiny_tokenizer, base / "tokenizer")
    made = Shell(base, make_programs(folder / "programs"))
    make_base(made)
    return made


BASE = r"""
for objective in mlm clm; do
    ettin train --size 17m --objective $objective --phase pretrain --run-dir $objective data.mixture=$PWD/corpus \
        model.max_position_embeddings=1024 checkpoint.weights_every_tokens=600
done
ettin convert to-hf mlm hf --no-verify
"""


def make_base(shell: Shell) -> None:
    """Train a run of each objective and export one of them for transformers."""
    for end in ("bin", "idx"):
        shutil.copy(shell.base / "corpus" / f"shard_00000.{end}", shell.base / f"shard.{end}")
    (shell.base / "book.txt").write_text(sentences(1, 40))
    lines = "".join(json.dumps({"text": sentences(seed, 20), "id": f"d{seed}"}) + "\n" for seed in range(20))
    (shell.base / "wiki.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    write(shell.base / "encoder_base.yaml", original("150m", "mlm", "pretrain"))
    done = shell.run(Block("base", 0, "bash", BASE), shell.base)
    assert done.returncode == 0, done.stderr[-3000:]
