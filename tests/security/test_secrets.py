"""Keys from the environment or an --env-file are never written or printed; keys in URLs are refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.forkserver import program
from tests.train.runs import command

TOKENS = {
    "WANDB_API_KEY": "7" * 30 + "wandbwandb",
    "HF_TOKEN": "hf_" + "q" * 30,
    "AWS_SECRET_ACCESS_KEY": "aws" + "z" * 30,
}


def ran(arguments: list[str], more: dict[str, str]) -> str:
    line = program("ettin", *arguments)
    environment = {**os.environ, **TOKENS, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_secret_tokens_appear_in_no_output_or_file(corpus: Path, tmp_path: Path) -> None:
    run, secrets = tmp_path / "run", tmp_path / "secrets.env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in TOKENS.items()))
    arguments = command(run, corpus, "mlm", ["run.steps=2", "metrics.wandb=true", "metrics.tensorboard=true"])
    output = ran(arguments, {})
    output += ran(
        [
            "launch",
            "--nodes",
            "1",
            "--gpus-per-node",
            "1",
            "--cpus-per-task",
            "1",
            "--env-file",
            str(secrets),
            "--",
            *arguments,
        ],
        {},
    )
    output += ran(["compare", str(run), str(run), "--out", str(tmp_path / "page.html")], {})
    output += ran(["report", str(run), "--out", str(tmp_path / "report.html"), "--svg", str(tmp_path / "svg")], {})
    output += ran(["inspect", str(run), "--json"], {})
    output += ran(["order", str(run), "--steps", "1:3", "--out", str(tmp_path / "order.parquet")], {})
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != secrets]
    assert len(files) > 20
    for name, value in TOKENS.items():
        assert value not in output, name
        assert not [path for path in files if value.encode() in path.read_bytes()], name


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/x", "https://host/x.jsonl?X-Amz-Signature=abc", "hf://datasets/a/b?token=hf_abc"]
)
def test_url_with_key_is_refused_without_printing_it(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", url, "--out", str(tmp_path / "out")]) == 2
    first = capsys.readouterr().err
    arguments = command(tmp_path / "run", tmp_path, "mlm", [f"data.validation={url}"])
    assert main(arguments) == 2
    second = capsys.readouterr().err
    for output, what in ((first, "INPUT"), (second, "data.validation")):
        assert output.count("\n") == 1
        assert f"{what}: a URL with a key in it" in output
        assert "secret@" not in output
        assert "abc" not in output
    assert list(tmp_path.iterdir()) == []
