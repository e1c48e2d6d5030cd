"""Install the emulated Transformer Engine in every Python that starts with this folder and the checkout on PYTHONPATH:

PYTHONPATH=.:tests/emulated_te/everywhere EMULATED_TE=FOLDER torchrun --no-python --nproc-per-node 2 ettin train ..."""

import os
from pathlib import Path

from tests.emulated_te.install import BLACKWELL, HOPPER, install

install(Path(os.environ["EMULATED_TE"]), BLACKWELL if os.environ.get("EMULATED_BLACKWELL") else HOPPER)
