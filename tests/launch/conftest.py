"""Fixtures of the tests of jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import forked


@pytest.fixture(scope="session")
def programs() -> Path:
    """Make the programs of jobs before a test begins, so that its time does not include the fork server's imports."""
    return forked.folder()
