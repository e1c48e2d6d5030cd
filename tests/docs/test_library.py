"""The scripts of examples/library run as they are, on a tiny dataset, and docs/api.md shows lines of theirs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_ettin import api
from megatron_ettin.base.errors import UserError
from tests.docs.pages import ROOT, Block, blocks_of
from tests.docs.shell import Shell

LIBRARY = ROOT / "examples" / "library"
SCRIPTS = {
    "read_data": "corpus",
    "train_steps": "corpus",
    "compare_runs": "corpus runs",
    "convert_models": "mlm exported",
    "plan_layouts": "",
}


@pytest.mark.parametrize(
    "script",
    [
        *("read_data", "train_steps", "convert_models"),
        *(pytest.param(script, marks=pytest.mark.full) for script in ("compare_runs", "plan_layouts")),
    ],
)
def test_library_script_on_tiny_corpus_exits_0(script: str, shell: Shell, tmp_path: Path) -> None:
    folder = shell.sandbox(tmp_path / "here", "docs/api.md")
    call = f"python examples/library/{script}.py {SCRIPTS[script]}"
    done = shell.run(Block("docs/api.md", 0, "bash", call), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def test_library_scripts_are_all_run_and_have_cells() -> None:
    assert {path.stem for path in LIBRARY.glob("*.py")} == {*SCRIPTS}
    assert all(path.read_text().count("# %%") >= 3 for path in LIBRARY.glob("*.py"))


def test_api_names_are_documented_and_used_in_scripts() -> None:
    scripts = " ".join(path.read_text() for path in LIBRARY.glob("*.py"))
    page = (ROOT / "docs" / "api.md").read_text()
    for name in api.__all__:
        assert getattr(api, name).__doc__, name
        assert f"::: megatron_ettin.api.{name}\n" in page, name
        assert name in scripts or name in ("Checkpoint", "Model", "UserError"), name


def test_api_page_python_lines_are_in_library_scripts() -> None:
    lines = {line.strip() for path in LIBRARY.glob("*.py") for line in path.read_text().splitlines()}
    for block in blocks_of((ROOT / "docs" / "api.md").read_text(), "docs/api.md"):
        if block.language == "python":
            ast.parse(block.text)
            shown = {line.strip() for line in block.text.splitlines() if line.strip()}
            assert not sorted(shown - lines), str(block)


def test_api_functions_are_typed_and_py_typed_is_shipped() -> None:
    assert (ROOT / "megatron_ettin" / "py.typed").is_file()
    assert "megatron_ettin = py.typed" in (ROOT / "setup.cfg").read_text()
    functions = [
        node
        for node in ast.walk(ast.parse((ROOT / "megatron_ettin" / "api.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    untyped = [
        f.name
        for f in functions
        if f.returns is None or any(a.annotation is None for a in f.args.args if a.arg != "self")
    ]
    assert not untyped


def test_api_import_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, megatron_ettin.api; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_api_wrong_argument_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        api.load_dataset(tmp_path / "none")
    with pytest.raises(UserError, match="did you mean"):
        api.configure("17m", "mlm", "pretrain", "optim.learning_rate=1")
    with pytest.raises(UserError, match="no such folder"):
        api.load_checkpoint(tmp_path / "none")
