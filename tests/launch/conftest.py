"""The programs of jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import forked


@pytest.fixture(scope="session")
def programs() -> Path:
    """Make them before a test begins, whose seconds would else be those of the fork server's imports."""
    return forked.folder()
