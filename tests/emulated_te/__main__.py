"""`python -m tests.emulated_te FOLDER train ...`: the command line of `ettin` over the emulated Transformer Engine."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.emulated_te.install import install

if __name__ == "__main__":
    install(Path(sys.argv[1]))
    from megatron_ettin.cli.main import main

    sys.exit(main(sys.argv[2:]))
