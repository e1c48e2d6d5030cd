"""A pytest plugin: the two tiers of the suite, and how its files are spread over processes.

    pytest --tier first     the tests without the mark `full`, which `bash tests/run.sh` runs
    pytest --tier full      the tests marked `full`
    pytest                  both

A test of the first tier that takes more than SECONDS_AT_MOST fails the run by name, because people wait for this tier.
On a machine that needs more than TIER_SECONDS for the whole tier, a test may take longer.

With `-n` (pytest-xdist) each process takes whole groups of files, long ones first. The files of a group share something
that is expensive to make."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import forkserver

SECONDS_AT_MOST = 20.0
# upper bound of the first tier's seconds on two idle cores; a slow machine stretches the tier and each test alike
TIER_SECONDS = 600.0
# prefix of a test's path -> its group, whose tests share a cluster, a server or the emulation
GROUPS = {
    "tests/launch/": "slurm",
    "tests/prepare/test_cluster.py": "slurm",
    "tests/docs/": "docs",
    "tests/emulated_te/": "emulated",
    "tests/report/": "report",
    "tests/chaos/": "chaos",
    "tests/release/": "release",
    "tests/convert/compat/": "compat",
}
# the longest groups start first, so that none of them runs alone at the end
FIRST = ("slurm", "docs", "tests/train/test_invariance.py", "emulated", "tests/optim/test_deepspeed.py", "report")
FIRST += ("chaos", "release", "compat", "tests/test_mutations.py")
WANT_SERVER = {"pool", "corpus"}


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("first", "full", "all")
    parser.addoption("--tier", choices=choices, default="all", help="which tests run (tests/README.md)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs in `tests/run.sh --all`, not in the first tier (tests/README.md)")
    # not in an xdist worker, and not in pytest run by a test
    if forkserver.FOLDER_VARIABLE not in os.environ:
        os.environ[forkserver.FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="ettin-tests-")
        os.environ[forkserver.OWNER_VARIABLE] = str(os.getpid())
    if not is_worker(config):
        config.pluginmanager.register(TimeLimit(config.getoption("tier")), "time limit")


def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ.get(forkserver.OWNER_VARIABLE) == str(os.getpid()):
        forkserver.close_shared()
        shutil.rmtree(os.environ.pop(forkserver.FOLDER_VARIABLE), ignore_errors=True)
        del os.environ[forkserver.OWNER_VARIABLE]


def is_worker(config: pytest.Config) -> bool:
    """Return whether pytest-xdist has started this process."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("tier")
    if tier != "all":
        wanted = [item for item in items if (item.get_closest_marker("full") is None) == (tier == "first")]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
        items[:] = wanted
    # a stable sort keeps the order within each group
    items.sort(key=lambda item: rank_of(group_of(item.nodeid)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the fork server's imports while the first tests run."""
    if any(WANT_SERVER.intersection(getattr(item, "fixturenames", ())) for item in session.items):
        forkserver.shared()


def group_of(nodeid: str) -> str:
    """Return the group of a test: its file, or the group that several files share."""
    for prefix, group in GROUPS.items():
        if nodeid.startswith(prefix):
            return group
    return nodeid.partition("::")[0]


def rank_of(group: str) -> int:
    return FIRST.index(group) if group in FIRST else len(FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole groups, in the order of the items."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def seconds_allowed(session_seconds: float) -> float:
    """Return how many seconds a test may take in a run of `session_seconds`."""
    return SECONDS_AT_MOST * max(1.0, session_seconds / TIER_SECONDS)


class TimeLimit:
    """Fails a run of the first tier whose tests take too long."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.began = time.monotonic()
        self.limit = SECONDS_AT_MOST
        self.late: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # coverage slows every test
        limited = self.tier == "first" and report.when == "call" and "COVERAGE_RUN" not in os.environ
        if limited and report.duration > SECONDS_AT_MOST:
            self.late.append((report.duration, report.nodeid))

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterator[None]:
        self.limit = seconds_allowed(time.monotonic() - self.began)
        self.late = [(seconds, nodeid) for seconds, nodeid in self.late if seconds > self.limit]
        if self.late and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for seconds, nodeid in sorted(self.late, reverse=True):
            line = f"{nodeid} took {seconds:.1f} s; a test of this run may take {self.limit:.0f} s"
            terminalreporter.write_line(f"TOO LONG {line}: make it cheaper or mark it `full`", red=True)
