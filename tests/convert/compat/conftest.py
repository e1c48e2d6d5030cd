"""Fixtures: the exported folders and the results of the checks in each environment, made once a session on first
use."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.convert.compat.exports import EXPORTS, make_export

ROOT = Path(__file__).resolve().parents[3]
NO_INDEX = 69  # exit status of tools/compat_env.sh


@dataclass(frozen=True)
class Probed:
    """Result of `probe.py` in one environment."""

    version: str
    failures: dict[str, dict[str, str | None]]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[[str], Path]:
    """Return the folder of an export by its name, made on first use."""
    room = tmp_path_factory.mktemp("compat")
    return functools.cache(lambda name: make_export(room, tiny_tokenizer, name))


@pytest.fixture(scope="session")
def exports(exported: Callable[[str], Path]) -> Path:
    """Return the folder that holds every export, made on first use."""
    folders = [exported(name) for name in EXPORTS]
    return folders[0].parent


@pytest.fixture(scope="session")
def probed(exports: Path) -> Callable[[str], Probed]:
    """Return a function of an environment's name that returns its results; skip if no package index can be reached."""
    done: dict[str, Probed | str] = {}

    def of(name: str) -> Probed:
        if name not in done:
            done[name] = probe(name, exports)
        result = done[name]
        if isinstance(result, str):
            pytest.skip(result)
        return result

    return of


def probe(name: str, exports: Path) -> Probed | str:
    """Make the environment and run every check in it; return a reason instead if it cannot be made here."""
    environment = {**os.environ, "PYTHON": sys.executable}
    made = subprocess.run(
        ["bash", str(ROOT / "tools/compat_env.sh"), name], capture_output=True, text=True, env=environment
    )
    if made.returncode == NO_INDEX:
        return made.stderr.strip().splitlines()[-1]
    assert made.returncode == 0, made.stderr
    out = exports.parent / f"{name}.json"
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [made.stdout.strip(), "-m", "tests.convert.compat.probe", str(exports), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
        cwd=exports,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(out.read_text())
    return Probed(result["versions"]["transformers"], result["found"])
