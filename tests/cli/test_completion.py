"""Completion: the candidates for a partial line, and the shell scripts that ask for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.cli.completion import FILES, SCRIPTS, VALUES, offers
from megatron_ettin.cli.main import COMMANDS, main
from megatron_ettin.config.key_names import ELSEWHERE, nearest_key
from megatron_ettin.config.schema import key_types
from tests.cli.test_main import modules_after


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tr", ["train"]),
        ("--v", ["--version"]),
        ("nothing --x", []),
        ("train --si", ["--size"]),
        ("train --size 1", ["17m", "150m", "1b"]),
        ("train --size=1", ["--size=17m", "--size=150m", "--size=1b"]),
        ("train --phase c", ["cross"]),
        ("train --init-optimizer ", ["keep", "fresh"]),
        ("train p", ["parallel.", "precision.", "profile."]),
        ("train opt", []),
        ("train parallel.t", ["parallel.tp=", "parallel.tp_overlap="]),
        ("train --size 17m optim.lr=1 --dry-run data.mlm", ["data.mlm_probability="]),
        ("train runtime.attention=f", ["runtime.attention=flash", "runtime.attention=flex"]),
        ("train precision.name=fp8-b", ["precision.name=fp8-blockwise"]),
        ("train runtime.deterministic=", ["runtime.deterministic=true", "runtime.deterministic=false"]),
        ("train extend.data.mixture=", [FILES]),
        ("train extend.data.seq", ["extend.data.seq_len="]),
        ("train --sweep optim.l", ["optim.lr="]),
        ("train --allow-change optim.l", ["optim.lr"]),
        ("train --from-step ", []),
        ("train --run-dir ", [FILES]),
        ("launch --nodes 2 -- t", ["train"]),
        ("launch --nodes 2 -- train --ob", ["--objective"]),
        ("launch --launcher ", ["srun", "torchrun"]),
        ("convert from-c", ["from-composer"]),
        ("convert to-hf --dtype b", ["bfloat16", "bf16"]),
        ("convert to-hf run ", [FILES]),
        ("convert to-hf run out --objective ", ["mlm", "clm"]),
        ("eval run --data ", [FILES]),
        ("eval run --objective ", ["mlm", "clm", "mntp"]),
        ("prepare --slurm-time ", []),
        ("prepare --tokenizer ", [FILES]),
        ("prepare --end-token ", ["every", "last", "none"]),
        ("doctor --path a ", [FILES]),
        ("completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_completion_of_partial_line_offers_candidates(line: str, offered: list[str]) -> None:
    if line == "train opt":  # only one group of keys matches, so its keys are offered
        offered = [f"{key}=" for key in key_types() if key.startswith("optim.")]
    assert list(offers(line.split(" "))) == offered


def test_completion_imports_nothing_heavier_than_yaml() -> None:
    assert modules_after("__complete", "train", "parallel.") <= {"yaml"}


def test_completion_tables_match_gpus_config_keys_and_commands() -> None:
    import yaml

    parts = yaml.safe_load((Path(sys.modules["megatron_ettin"].__file__ or "").parent / "plan/gpus.yaml").read_text())
    assert set(VALUES["--gpu"]) == set(parts)
    assert {*ELSEWHERE.values()} <= set(key_types())
    for name in COMMANDS:
        assert f"--{'help'}" in offers([name, "--h"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("batch.seq_len", "data.seq_len"),
        ("tensor-model-parallel-size", "parallel.tp"),
        ("optim.learning_rate", "optim.lr"),
        ("hiden_size", "model.hidden_size"),
    ],
)
def test_nearest_key_of_misspelled_key_suggests_existing_one(written: str, meant: str) -> None:
    assert nearest_key(written, key_types()) == f" (did you mean {meant!r}?)"
    assert nearest_key("xyzzy.plugh", key_types()) == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --sise 17m", "unknown option --sise (did you mean '--size'?)"),
        ("train --max-steps 5", "unknown option --max-steps (did you mean 'run.steps='?)"),
        ("train --optim.lr 1", "keys are written without dashes: optim.lr="),
        ("convert to-hf a b --dtpye bf16", "unknown option --dtpye (did you mean '--dtype'?)"),
        ("convert to-fh a b", "'to-fh' does not exist (did you mean 'to-hf'?); it is one of to-hf, from-hf"),
        ("inspect a b", "too many words: b"),
        ("launch --nodes 2 -- trian", "found 'trian' (did you mean 'train'?)"),
        ("--versoin", "(did you mean '--version'?)"),
    ],
)
def test_main_misspelled_argument_exits_2_with_one_line_hint(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split(" ")) == 2
    (line_of_error,) = capsys.readouterr().err.splitlines()
    assert expected in line_of_error


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with files to complete, an `ettin` on PATH and the completion scripts."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "ettin").write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_ettin "$@"\n')
    (bin_folder / "ettin").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for shell, script in SCRIPTS.items():
        (tmp_path / f"ettin.{shell}").write_text(script)
    (tmp_path / "here" / "corpus").mkdir(parents=True)
    (tmp_path / "here" / "corp us").touch()
    return tmp_path


# typed line -> candidates with which bash replaces the last word (after its last `=`)
TYPED = {
    "ettin tra": ["train"],
    "ettin train --size 17m parallel.t": ["parallel.tp=", "parallel.tp_overlap="],
    "ettin train runtime.attention=fl": ["flash", "flex"],
    "ettin launch --nodes 2 -- train --objective c": ["clm"],
    "ettin train data.mixture=cor": ["corp us", "corpus"],
    "ettin train --phase ": ["pretrain", "extend", "decay", "cross", "all"],
}


def test_bash_completion_of_partial_line_offers_candidates(folder: Path) -> None:
    """Call the completion function as bash does, with the line up to the cursor."""
    lines = "\n".join(f"try {line!r}" for line in TYPED)
    script = f"""source {folder}/ettin.bash
complete -p ettin
try() {{
    COMP_LINE="$1 and more" COMP_POINT=${{#1}} COMPREPLY=()
    _ettin ettin
    printf '%s|' "${{COMPREPLY[@]}}"
    echo
}}
{lines}
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder / "here", check=True)
    registered, *answers = done.stdout.splitlines()
    assert registered == "complete -F _ettin ettin"
    assert [sorted(answer.rstrip("|").split("|")) for answer in answers] == [sorted(want) for want in TYPED.values()]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_completion_command_prints_script_that_shell_parses(
    shell: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == SCRIPTS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n", folder / f"ettin.{shell}"], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completion_of_config_value_offers_candidates(folder: Path) -> None:
    line = "ettin train runtime.attention=fl"
    script = f"source {folder}/ettin.fish; complete --do-complete '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["runtime.attention=flash", "runtime.attention=flex"]
