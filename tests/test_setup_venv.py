"""`tools/setup_venv.sh` on a complete environment: its output on both streams."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUESTED = ("constraints-cpu.txt", "setup.cfg")


def test_setup_venv_prints_path_for_scripts_and_activation_for_people(tmp_path: Path) -> None:
    """Standard output has only the path, because scripts read it. How to activate it is on standard error."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    wanted = hashlib.sha256(f"{ROOT}\n".encode() + b"".join((ROOT / name).read_bytes() for name in REQUESTED))
    (venv / ".complete").write_text(f"{wanted.hexdigest()}\n")
    environment = {**os.environ, "VENV": str(venv), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "tools" / "setup_venv.sh"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{venv}\n"
    assert done.stderr.splitlines()[-1] == f"setup_venv: ready: source {venv}/bin/activate"
