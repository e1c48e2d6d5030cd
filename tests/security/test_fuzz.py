"""Damaged and hostile files for every reader, by running tools/fuzz.py. tests/nightly.sh runs a million."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver

ROOT = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("ETTIN_FUZZ_RUNS", "20000"))


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "fuzz.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


# readers that accept most damaged files and leave out the damaged lines or parts
UNREFUSED = ("metrics", "status", "report", "compare")


def check(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 17
    for row in rows:
        assert row["refused"] > row["executions"] // 4 or row["reader"] in UNREFUSED, row
        # "local-copy" may refuse every input, because nearly every byte of a small dataset is checked
        assert row["accepted"] > 0 or row["reader"] == "local-copy", row
        assert row["peak_bytes"] < 1 << 30, row
        assert row["failures"] == [], row


def test_fuzz_every_reader_a_hundred_times_finds_no_failure(tmp_path: Path) -> None:
    command = forkserver.command("tests.security.fuzzed:fuzz_all", 100, 12, tmp_path / "failures")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    check(rows)
    fewer = {"yaml": 20, "compare": 5, "report": 5, "status": 20}
    assert [row["executions"] for row in rows] == [fewer.get(row["reader"], 100) for row in rows]


@pytest.mark.full
def test_fuzz_every_reader_accepts_or_refuses_without_failure(tmp_path: Path) -> None:
    done = fuzz("--runs", str(RUNS), "--seed", "11", "--out", str(tmp_path / "failures"), "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout)
    check(rows)
    assert sum(row["executions"] for row in rows) >= RUNS
    assert not (tmp_path / "failures").exists()


@pytest.mark.full
def test_fuzz_faulty_readers_are_reported_and_kept(tmp_path: Path) -> None:
    """The tool reports a reader that raises an unexpected error and one that runs code from a file."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys, pickle, json\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import fuzz\n"
        "from fuzzing import readers\n"
        "def unsafe(folder):\n"
        "    try: pickle.loads((folder / '.metadata').read_bytes())\n"
        "    except Exception: pass\n"
        "def raw(folder): json.loads((folder / 'integrity.json').read_text(errors='replace'))\n"
        "def reader(name, read): return readers.Reader(readers.READERS[name].make, read, readers.READERS[name].mutate)\n"
        "readers.READERS['checkpoint'] = reader('checkpoint', unsafe)\n"
        "readers.READERS['records'] = reader('records', raw)\n"
        "for name in ('checkpoint', 'records'):\n"
        f"    print(json.dumps(fuzz.run_reader(name, 3000, 0, 1, {str(tmp_path / 'kept')!r})['failures']))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    unsafe, raw = map(json.loads, done.stdout.splitlines()[-2:])
    assert any("os.system" in line for line in unsafe), unsafe
    assert len(raw) == 5, raw
    assert all("JSONDecodeError" in line or "RecursionError" in line for line in raw), raw
    assert len(list((tmp_path / "kept").rglob("error.txt"))) == len(unsafe) + 5


def test_fuzz_unknown_reader_is_refused(tmp_path: Path) -> None:
    done = fuzz("--reader", "zip")
    assert done.returncode == 2
    assert "--reader: 'zip' is none; they are idx, manifest" in done.stderr
