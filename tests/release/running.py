"""Start `ettin release` as a session leader that tests can kill: a fork of the tests' server with forked workers, or
the command as users start it, whose workers import for seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from megatron_ettin.release import revision as revision_module
from megatron_ettin.release.chain import Revision
from megatron_ettin.release.revision import RevisionResult, make_revision
from tests import forkserver
from tests.prepare.small_tasks import wait_for

HELD_VARIABLE = "ETTIN_TEST_HELD_REVISION"


class Running:
    """A running `ettin release`.

    Args:
        arguments: arguments of the command.
        real: whether to start the real command instead of a fork.
        largest_file: limit on the size of a written file in bytes, 0 for none. Forks only.
        held: name of a revision at which a worker blocks forever. Forks only.
    """

    def __init__(self, *arguments: object, real: bool = False, largest_file: int = 0, held: str = "") -> None:
        self.mark = str(uuid.uuid4())
        self.errors = tempfile.NamedTemporaryFile("r", encoding="utf-8")  # noqa: SIM115
        line = ["release", *map(str, arguments)]
        with open(os.devnull, "r+b") as nowhere, open(self.errors.name, "ab") as errors:
            if real:
                self.process: subprocess.Popen[bytes] | forkserver.Child = subprocess.Popen(
                    [sys.executable, "-m", "megatron_ettin", *line],
                    stdin=nowhere,
                    stdout=nowhere,
                    stderr=errors,
                    start_new_session=True,
                    env={**os.environ, "ETTIN_TEST_MARK": self.mark},
                    # the tests may be a shell's background job, which ignores SIGINT
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            else:
                files = (nowhere.fileno(), nowhere.fileno(), errors.fileno())
                target, environment = "tests.release.running:be_leader", {**os.environ, HELD_VARIABLE: held}
                self.process = forkserver.call(forkserver.shared(), target, [largest_file, *line], files, environment)
        self.pid = self.process.pid
        with contextlib.suppress(ProcessLookupError):
            wait_for(lambda: os.getsid(self.pid) == self.pid)

    def output(self) -> str:
        """Return the standard error so far."""
        return Path(self.errors.name).read_text(encoding="utf-8")

    def has_reported(self, revisions: int) -> bool:
        """Return whether progress lines report at least this many revisions, or all of the release."""
        if revisions == 0:
            return True
        reported = [tuple(map(int, pair)) for pair in re.findall(r"^\[(\d+)/(\d+)\]", self.output(), re.MULTILINE)]
        return any(done == min(revisions, total) for done, total in reported)

    def wait_until_reported(self, revisions: int) -> None:
        """Wait until this many revisions are reported, or the command has ended."""
        wait_for(lambda: self.has_reported(revisions) or self.process.poll() is not None, 200)

    def ended(self, seconds: float = 200) -> int:
        """Wait for the end of the command and return its exit status."""
        wait_for(lambda: self.process.poll() is not None, seconds)
        status = self.process.poll()
        assert status is not None
        return status

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.pid).children()
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def left_over(self) -> list[psutil.Process]:
        """Return running processes of the command's session, or with its mark in their environment."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                ours = os.getsid(process.pid) == self.pid or process.environ().get("ETTIN_TEST_MARK") == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    def close(self) -> None:
        """Kill the command and every process that it has left."""
        for process in self.left_over():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if isinstance(self.process, forkserver.Child):
            self.process.close()
        else:
            self.process.wait()
        self.errors.close()


def be_leader(largest_file: int, *line: str) -> int | None:
    """Run `ettin release` in this fork as a shell would start it: as a session leader that SIGINT interrupts."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return be_release(*line)


def be_release(*line: str) -> int | None:
    """Run `ettin release` with forked workers, which is safe, because this process has only one thread."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    forget_hub()
    fork = multiprocessing.get_context("fork")
    with (
        mock.patch.object(multiprocessing, "get_context", lambda method=None: fork),
        mock.patch.object(revision_module, "make_revision", make_unless_held),
    ):
        return forkserver.be_program("ettin", *line)


def make_unless_held(revision: Revision, *others: Any) -> RevisionResult:
    if revision.name == os.environ.get(HELD_VARIABLE):
        threading.Event().wait()
    return make_revision(revision, *others)


def forget_hub() -> None:
    """Let huggingface_hub be imported again, because it reads its environment variables when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def release_program(*arguments: object) -> list[str]:
    """Return a command line, for `subprocess`, that runs `be_release` in a fork."""
    return forkserver.command("tests.release.running:be_release", "release", *arguments)
