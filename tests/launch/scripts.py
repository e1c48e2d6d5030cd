"""Scripts that `ettin launch` writes, for the tests of this folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_ettin.cli.main import main

CALL = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain", "data.mixture=corpus"]
ONE_NODE = ["--nodes", "1", "--gpus-per-node", "8", "--cpus-per-task", "12"]


def write_scripts(tmp_path: Path, options: list[str], call: list[str]) -> dict[str, str]:
    """Run `ettin launch`, let bash check the syntax of each script, and return the scripts by name."""
    arguments = ["launch", *options, "--allow-unseen-data", "--", *call, "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 0
    scripts = {path.stem: path.read_text() for path in (tmp_path / "run" / "slurm").glob("*.sbatch")}
    for text in scripts.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return scripts
