"""Check whether this machine can run the quick start: `python examples/check_machine.py FOLDER`. Exits with 1 if not.

Prints what the run will use: versions, processors, memory, and the free space of the disk that FOLDER is on.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

# two ranks of about 1 GiB each while a model is exported; datasets and checkpoints
MEMORY_GIB, DISK_GIB = 4, 2


def main(folder: Path) -> int:
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(folder).free / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; {packages}")
    print(f"{os.cpu_count()} processors, {memory:.1f} GiB of memory and {disk:.1f} GiB of disk free")
    if memory < MEMORY_GIB or disk < DISK_GIB:
        print(f"check_machine: {MEMORY_GIB} GiB of memory and {DISK_GIB} GiB of disk are needed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
