"""The console script: quick help, suggestions, one example a command, exit statuses."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import megatron_ettin
from megatron_ettin import __version__
from megatron_ettin.base import versions
from megatron_ettin.cli.main import COMMANDS, main
from tests import forkserver

HEAVY = ("torch", "transformers", "megatron", "pyarrow", "matplotlib", "numpy", "yaml")


def modules_after(*arguments: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has imported after `ettin ARGUMENTS`."""
    source = (
        "import sys\nfrom megatron_ettin.cli.main import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, summary) in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines)


def test_help_imports_nothing_heavy():
    assert modules_after("--help") == set()


def test_version_prints_ettin_python_torch_and_megatron_core(capsys):
    assert main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"ettin {re.escape(__version__)}(\+g[0-9a-f]{{7,}}(\.dirty)?)?", first)
    assert second.startswith(f"Python {platform.python_version()}, torch {version('torch')}, megatron-core ")


def test_version_imports_nothing_heavy():
    assert modules_after("--version") == set()


def test_installed_commit_of_git_checkout_shows_hash_and_dirty(tmp_path, monkeypatch):
    """Show the commit of the checkout that holds the package, not of a checkout around its environment."""

    def git(*git_arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tmp_path, *identity, *git_arguments], check=True, capture_output=True)

    package = tmp_path / "megatron_ettin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(megatron_ettin, "__file__", str(package / "__init__.py"))
    assert versions.describe_commit() is None
    git("init")
    git("add", ".")
    git("commit", "--message", "all")
    commit = versions.describe_commit()
    assert re.fullmatch("[0-9a-f]{9}", commit)
    git("tag", "v9")
    (package / "__init__.py").write_text("x = 1")
    assert versions.describe_commit() == f"{commit}.dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.code_version() == __version__  # PATH has no git


def test_python_m_version_prints_ettin_version(tmp_path):
    call = [sys.executable, "-m", "megatron_ettin", "--version"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.startswith(f"ettin {__version__}")


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("inspekt", "inspect"), ("conver", "convert")])
def test_main_unknown_command_suggests_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert f"no command {typed!r} (did you mean {meant!r}?)" in error
    assert error.count("\n") == 1


def test_main_size_between_two_others_suggests_none(capsys):
    """Suggest no size for 18m, because 17m and 68m are equally likely."""
    assert main(["plan", "--size", "18m", "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error
    assert "17m, 32m, 68m" in error


@pytest.mark.parametrize("command_line", ["--help", "plan --size 17m --gpus 8", "order --help"])
def test_command_output_on_full_disk_exits_1_in_one_line(command_line):
    with open("/dev/full", "w") as full:
        line = forkserver.program("ettin", *command_line.split())
        ended = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == f"ettin {command_line.split()[0]}: standard output cannot be written (No space left on device)\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: ettin {name}" in text
    examples = [line for line in text.splitlines() if line.startswith(" ") and f"ettin {name} " in line]
    assert examples, "the module's docstring holds an indented example line"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_imports_neither_torch_nor_transformers(name):
    assert modules_after(name, "--help").isdisjoint({"torch", "transformers", "megatron"})


@pytest.mark.parametrize("name", COMMANDS)
def test_command_unknown_option_is_a_user_error(name, capsys):
    assert main([name, "--no-such-option"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ettin {name}: ")
    assert "--help` shows the options" in line


def test_main_output_into_closed_pipe_is_no_error():
    command = f"{sys.executable} -m megatron_ettin --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
