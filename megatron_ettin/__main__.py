"""`python -m megatron_ettin ...` is the same as `ettin ...`."""

import sys

from megatron_ettin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
