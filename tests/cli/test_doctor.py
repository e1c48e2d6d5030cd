"""`ettin doctor` on the real host: its findings, its exit status, its table."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.base import versions as base_versions
from megatron_ettin.cli import doctor as command
from megatron_ettin.cli.main import main
from megatron_ettin.doctor.findings import Finding, ok


def test_doctor_quick_reports_findings_without_heavy_imports(tmp_path: Path) -> None:
    """Run doctor as a health check does; torch is the only heavy import."""
    call = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "megatron_ettin",
        "doctor",
        "--quick",
        "--json",
        "--path",
        tmp_path,
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["state"] in ("ok", "note", "warning")
    assert answer["version"] == base_versions.code_version()
    assert {"python", "gpu", "packages", "/dev/shm", f"files in {tmp_path}"} <= {
        one["name"] for one in answer["findings"]
    }
    assert not re.search(r"\| +(megatron\.core|deepspeed|transformers|transformer_engine)$", done.stderr, re.MULTILINE)


def test_doctor_exit_status_follows_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["doctor", "--quick", "--path", str(tmp_path)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note", "warning", "problem") for line in lines[:-1])
    assert lines[-1].startswith(f"{socket.gethostname()}: ")
    assert main([*arguments, "--gpus", "99"]) == 1
    assert "problem  gpu: torch sees 0 of 99" in capsys.readouterr().out
    assert main([*arguments, "--ranks"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert main([*arguments, "--gpus", "-1"]) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    capsys.readouterr()
    assert main(arguments) == 0
    # only rank 0 of this host reports
    assert capsys.readouterr().out == ""


def test_doctor_table_shows_text_literally_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    command.draw([ok("a", "fine"), Finding("b", "problem", "broken [red]", "mend it")], "host: 1 problem")
    text = capsys.readouterr().out
    assert "broken [red]" in text
    assert "-> mend it" in text
