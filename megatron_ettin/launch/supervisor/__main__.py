"""Start the supervisor: `python3 FOLDER ...` or `python -m megatron_ettin.launch.supervisor ...`."""

import os
import sys

if not __package__:
    # started as a folder: make it a package, so that relative imports work
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    __package__ = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
    __import__(__package__)

from .main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
