"""Run tools/fuzz.py's readers in forks of a process that has imported what they need."""

from __future__ import annotations

import json
import math
import os
import sys

from tests import forkserver


def fuzz_all(runs: str, seed: str, out: str) -> int:
    """Fuzz every reader in its own fork, and print the results as a JSON list."""
    sys.path.insert(0, str(forkserver.ROOT / "tools"))
    import fuzz

    rows = []
    for name in fuzz.READERS:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with open(writing, "w") as pipe:
                share = math.ceil(int(runs) * fuzz.WEIGHTS.get(name, 1.0))
                json.dump(fuzz.run_reader(name, share, 0, int(seed), out), pipe)
            os._exit(0)
        os.close(writing)
        with open(reading) as pipe:
            rows.append(pipe.read())
        os.waitpid(child, 0)
    print(f"[{', '.join(row or 'null' for row in rows)}]")
    return 0
