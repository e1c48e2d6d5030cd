"""Each deliberate mistake fails a test of the first tier, and each fault's test fails without the fault."""

from __future__ import annotations

import inspect
import os
import subprocess
from pathlib import Path

import pytest

from tests import fault_injection, forkserver, mutations
from tests.mutations import FAULTS, MISTAKES, PAGE, page

FAILED = 1  # pytest's exit status if a test failed; any other status is an error of this test


def run_test(nodeid: str) -> int:
    """Run one test of the first tier in this process, a fork with everything imported, and return pytest's status."""
    return int(pytest.main(["-x", "-p", "no:cacheprovider", "--tier", "first", nodeid]))


def outcome(nodeid: str, mistake: str, folder: Path) -> tuple[int, str]:
    """Run a test with a mistake applied in all its processes; return (pytest's status, its output)."""
    environment = {**os.environ, forkserver.MISTAKE_VARIABLE: mistake, "PYTEST_ADDOPTS": f"--basetemp={folder / 'tmp'}"}
    command = forkserver.command("tests.test_mutations:run_test", nodeid)
    done = subprocess.run(command, env=environment, cwd=forkserver.ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_test_with_deliberate_mistake_fails(mistake: str, tmp_path: Path) -> None:
    status, output = outcome(MISTAKES[mistake], mistake, tmp_path)
    assert status == FAILED, output
    assert "1 failed" in output


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_test_of_fault_without_fault_fails(fault: str, tmp_path: Path) -> None:
    status, output = outcome(FAULTS[fault], f"without:{fault}", tmp_path)
    assert status == FAILED, output
    assert "1 failed" in output


@pytest.mark.parametrize(("module", "table"), [(mutations, MISTAKES), (fault_injection, FAULTS)])
def test_tables_name_every_mistake_and_fault(module: object, table: dict[str, str]) -> None:
    own = ["page", "first_sentence", "find"]
    made = [name for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__]
    names = {name for name in made if inspect.isfunction(getattr(module, name)) and not name.startswith("_")}
    assert names - set(own) == set(table)


def test_page_of_mistakes_is_up_to_date() -> None:
    """If this fails, run `python -m tests.mutations`, which writes the page."""
    assert PAGE.read_text() == page()
