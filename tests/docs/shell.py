"""A folder with the files that a page's commands name, and a shell in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import ROOT, Block, commands
from tests.launch.forked import write_program

CALLS = ("ettin", "torchrun", "python")  # forked in every block
DRY_CALLS = ("srun", "pip", "docker", "apt-get", "nsys", "bash", "hf")  # forked in tagged blocks only
ABSOLUTE = re.compile(r"(?<![\w./])/(?=(?:data|scratch|shared)/)")  # absolute paths that pages invent
MEASURED = """\
{"size": "150m", "gpus": 8, "gpu": "h100", "tokens_per_second_per_gpu": 331000, "chunk_tokens": 615}
{"size": "1b", "gpus": 8, "gpu": "h100", "tokens_per_second_per_gpu": 74000, "chunk_tokens": 615}
"""
# page -> path -> what is put there: a copy of a run ("mlm", "clm"), of the corpus or of an exported folder, or a text
CORPORA = {"corpus": "corpus", "corpus-8k": "corpus"}
COMPOSER = {"ep0-ba5996-rank0.pt": str(ROOT / "tests" / "fixtures" / "composer" / "mlm.pt")}
RUN = {"runs/17m-mlm": "mlm"}
NEEDS: dict[str, dict[str, str]] = {
    "README.md": {"runs/1b-mlm/pretrain": "mlm"},
    "docs/api.md": {"corpus": "corpus", "data/corpus": "corpus", "mlm": "mlm"},
    "docs/composer.md": COMPOSER,
    "docs/convert.md": RUN,
    "docs/data.md": RUN,
    "docs/layouts.md": CORPORA,
    "docs/migrate-from-composer.md": {**CORPORA, **COMPOSER, "encoder_base.yaml": "encoder_base.yaml"},
    "docs/migrate-from-hf-trainer.md": {**CORPORA, "my-modernbert": "hf", "text/a.txt": "book.txt"},
    "docs/migrate-from-megatron-lm.md": {"my_text_document.bin": "shard.bin", "my_text_document.idx": "shard.idx"},
    "docs/mixtures.md": {"data/web": "corpus", "data/code": "corpus"},
    "docs/phases.md": {**CORPORA, "runs/mlm/decay": "mlm", "some/hf-folder": "hf"},
    "docs/planning.md": {"runs.jsonl": MEASURED, "curve.json": '{"8": 45455, "32": 45130, "64": 44402}'},
    "docs/precision.md": CORPORA,
    "docs/prepare.md": {"wiki.jsonl.zst": "wiki.jsonl.zst", "books/one.txt": "book.txt"},
    "docs/recipe.md": {**CORPORA, "encoder_base.yaml": "encoder_base.yaml"},
    "docs/release.md": RUN,
    "docs/training.md": {**CORPORA, "runs/mlm": "mlm", "runs/clm": "clm", "runs/decay": "mlm", "some/hf-folder": "hf"},
}
EXACT = ("docs/tutorial.md",)  # pages whose commands are run unchanged, because they are small as printed


@dataclass
class Shell:
    """A shell that runs a page's blocks in a folder with the files that they name.

    Attributes:
        base: folder of the runs, datasets and files to copy from.
        programs: folder of the programs that blocks call (`make_programs`).
    """

    base: Path
    programs: Path

    def sandbox(self, folder: Path, page: str) -> Path:
        folder.mkdir(parents=True)
        for name in ("examples", "tools"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "shared/env/bin").mkdir(parents=True)
        (folder / "shared/env/bin/ettin").symlink_to(self.programs / "dry" / "ettin")
        for name, source_name in NEEDS.get(page, {}).items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self.base / source_name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)
            else:
                target.write_text(source_name)
        return folder

    def run(self, block: Block, folder: Path, timeout_seconds: float = 900) -> subprocess.CompletedProcess[str]:
        """Run the block in bash; stop at the first command that fails."""
        dry = bool(block.tag)
        programs = self.programs / ("dry" if dry else "run")
        text = ABSOLUTE.sub(f"{folder}/", commands(block))
        environment = {
            **os.environ,
            "PATH": f"{programs}:/usr/bin:/bin",
            "DOCS_DRY": "1" if dry else "",
            "DOCS_EXACT": "1" if block.page in EXACT else "",
            "DOCS_TOKENIZER": str(self.base / "tokenizer"),
            "ETTIN_CACHE": str(folder / ".cache"),
            "HF_HUB_OFFLINE": "1",
        }
        command = ["/bin/bash", "-euo", "pipefail", "-c", text]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_seconds
        )


def make_programs(folder: Path) -> Path:
    """Write every program that blocks call."""
    for source_name, names in (("run", CALLS), ("dry", CALLS + DRY_CALLS)):
        (folder / source_name).mkdir(parents=True)
        for name in names:
            write_program(folder / source_name / name, "tests.docs.server:run")
    return folder
