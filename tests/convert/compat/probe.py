"""Run every check on every folder: `python -m tests.convert.compat.probe EXPORTS OUT.json`, in an environment with
another transformers. The file has null for each check that passed, else the error."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.convert.compat.cases import Case
from tests.convert.compat.checks import BOTH, ENCODER, sentence_transformers_embed
from tests.convert.compat.generation import DECODER

Check = Callable[[Case], None]
EMBEDDERS = [sentence_transformers_embed]  # the project's own environment does not have it


def checks_of(objective: str) -> list[Check]:
    return [*BOTH, *([*ENCODER, *EMBEDDERS] if objective == "mlm" else DECODER)]


def outcome(check: Check, case: Case) -> str | None:
    try:
        check(case)
    except Exception:
        return traceback.format_exc(limit=-4)
    return None


def main(exports: Path, out: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    actual: dict[str, dict[str, str | None]] = {}
    seconds: dict[str, float] = {}
    for folder in sorted(exports.iterdir()):
        case = Case(folder)
        for check in checks_of(case.objective):
            began = time.perf_counter()
            actual.setdefault(folder.name, {})[check.__name__] = outcome(check, case)
            seconds[check.__name__] = seconds.get(check.__name__, 0.0) + time.perf_counter() - began
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    out.write_text(json.dumps({"versions": versions, "seconds": seconds, "found": actual}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
