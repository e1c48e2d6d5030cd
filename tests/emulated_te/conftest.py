"""A pool of ranks that have Transformer Engine, emulated; its Python comes from the package registry."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ettin.platform.device import OLDEST_TRANSFORMER_ENGINE
from tests import forkserver
from tests.emulated_te.install import BLACKWELL, HOPPER
from tests.emulated_te.runs import train
from tests.pool import Pool
from tests.train.runs import Trained


@pytest.fixture(scope="session")
def te_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel `transformer-engine` of the oldest supported version: Python alone, 0.7 MB. It is never installed,
    because core would find it in every other test."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    wanted = f"transformer-engine=={OLDEST_TRANSFORMER_ENGINE}"
    overrides = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run([sys.executable, "-m", "pip", *overrides], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{wanted} cannot be downloaded: {(done.stderr.strip().splitlines() or ['no output of pip'])[-1]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def te_pool(te_folder: Path) -> Iterator[Pool]:
    with emulated(te_folder, HOPPER) as shared:
        yield shared


@pytest.fixture(scope="session")
def blackwell_pool(te_folder: Path) -> Iterator[Pool]:
    with emulated(te_folder, BLACKWELL) as shared:
        yield shared


@contextmanager
def emulated(te_folder: Path, capability: tuple[int, int]) -> Iterator[Pool]:
    """Return a pool on an emulated device, once its server has imported everything, so that no test waits for that."""
    shared = Pool((te_folder, capability))
    assert shared.server is not None
    try:
        forkserver.connect(shared.server.path, shared.server.process).close()
        yield shared
    finally:
        shared.close()


@pytest.fixture(scope="session")
def trained(te_pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains one rank in a precision, with more overrides, and caches the run."""
    made: dict[tuple[str, str], Trained] = {}

    def get(precision: str, overrides: str = "") -> Trained:
        if (precision, overrides) not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[precision, overrides] = train(
                te_pool, 1, folder, corpus, "mlm", f"precision.name={precision} {overrides}"
            )
        return made[precision, overrides]

    return get
