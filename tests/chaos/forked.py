"""Run tools/chaos.py in a fork of a process that has imported everything, and its ranks in forks of a second one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from tests import forkserver


def import_tools() -> None:
    sys.path.insert(0, str(forkserver.ROOT / "tools"))


def run_chaos(*arguments: str) -> int:
    """Run `tools/chaos.py` with these arguments."""
    import_tools()
    import chaos
    from chaos_parts import zygote

    def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[-1] == zygote.__file__
        return subprocess.Popen(forkserver.command("tests.chaos.forked:run_zygote"), **options)

    zygote.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # type: ignore[attr-defined]
    return chaos.main(list(arguments))


def run_zygote() -> None:
    """Run the process that ranks are forked from."""
    import_tools()
    from chaos_parts.zygote import serve

    serve()
