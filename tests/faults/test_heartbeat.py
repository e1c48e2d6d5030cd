"""`faults/heartbeat.py`: the phases by which ranks are compared."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_ettin
from megatron_ettin.faults.heartbeat import ORDER


def entered_phases() -> Iterator[str]:
    """Yield the phases that the package's code names where it calls `heartbeat.enter`."""
    for path in Path(megatron_ettin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("heartbeat.enter"):
                named = ast.walk(node.args[0])
                yield from (one.value for one in named if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_phase_order_has_every_phase_that_a_rank_enters() -> None:
    phases = set(entered_phases())
    assert len(phases) > 5
    # a phase without an order counts as behind all others, and its rank would be named as the one that is waited for
    assert phases - set(ORDER) == set()
