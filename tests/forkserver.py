"""Fork processes from one that has imported torch, core and transformers: an import costs seconds, a fork milliseconds.

    server = ForkServer("tests.forkserver:warm_up")     start it; the first request waits until it has imported
    child = server.call("tests.pool:worker", [0])       run a function in a process of its own
    program("ettin", "train", ...)                      a command line that does so for `ettin train ...`, for subprocess

A request and its answers are JSON lines over a Unix socket, with the child's files as SCM_RIGHTS. The answers are the
child's pid, then its exit status. A child is killed when its socket is closed, and the server ends with the process
that owns it.

A forked command is the real command except for what happens before `main`: the interpreter's start, resource limits,
the process group. Tests of those start `python -m megatron_ettin` themselves, as do tests that stop a process
(SIGSTOP)."""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
FOLDER_VARIABLE, OWNER_VARIABLE = "ETTIN_TEST_SERVER_FOLDER", "ETTIN_TEST_SERVER_OWNER"
# a name of tests/mutations.py, applied in every command and rank
MISTAKE_VARIABLE = "ETTIN_TEST_MISTAKE"
CLIENT = Path(__file__).with_name("forkserver_client.py")
WARM = (
    *("torch", "numpy", "transformers", "matplotlib.pyplot", "torch.distributed.run", "megatron_ettin.train.job"),
    *("megatron_ettin.train.trainer", "megatron_ettin.runs.order_export", "megatron_ettin.evaluate.evaluation"),
    *("megatron_ettin.evaluate.inference", "megatron_ettin.convert.to_hf", "megatron_ettin.convert.from_hf"),
    *("megatron_ettin.report.document", "megatron_ettin.plan.search", "megatron_ettin.prepare.run"),
    *("megatron_ettin.bench", "megatron_ettin.doctor", "megatron_ettin.cli.train", "tests.pool"),
    "transformers.models.modernbert.modeling_modernbert",
    "transformers.models.modernbert_decoder.modeling_modernbert_decoder",
)


class Child:
    """A process that the server has forked.

    Attributes:
        pid: its process id.
    """

    def __init__(self, control: socket.socket) -> None:
        self.control, self.received = control, b""
        first = self.answer(START_SECONDS)
        if first is None:
            raise RuntimeError("the fork server is gone")
        self.pid = first["pid"]
        self.exitcode: int | None = None

    def answer(self, timeout_seconds: float | None) -> dict[str, int] | None:
        """Return the server's next answer, or None if the server is gone. Raises TimeoutError."""
        self.control.settimeout(timeout_seconds)
        while b"\n" not in self.received:
            block = self.control.recv(1 << 12)
            if not block:
                return None
            self.received += block
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Return the exit status (negative for a signal), or None if it still runs after `timeout_seconds`."""
        if self.exitcode is None:
            with contextlib.suppress(TimeoutError, BlockingIOError):
                last = self.answer(timeout_seconds)
                self.exitcode = -signal.SIGKILL if last is None else last["status"]
        return self.exitcode

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self.wait(0.0)

    def kill(self) -> None:
        """Kill the child with SIGKILL and wait for its end."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def close(self) -> None:
        """Kill the child if it still runs, and close the connection."""
        self.kill()
        self.control.close()


class ForkServer:
    """Handle of the server process, from which children are forked.

    Args:
        setup: `module:function` that imports what children need, called once before the first fork.
        arguments: arguments of `setup`: strings and numbers.
        path: path of the server's socket, which other processes may use too. Default: in a new temporary folder.
        owner: id of the process with which the server ends. Default: this process.
    """

    def __init__(
        self, setup: str, arguments: Sequence[Any] = (), path: Path | None = None, owner: int | None = None
    ) -> None:
        self.folder = None if path else tempfile.TemporaryDirectory(prefix="forkserver-")
        self.path = path or Path(self.folder.name) / "socket"  # type: ignore[union-attr]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = "1"
        command = [sys.executable, "-m", "tests.forkserver", str(self.path), str(owner or os.getpid()), setup]
        self.process = subprocess.Popen(
            [*command, json.dumps(list(arguments))],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def call(
        self,
        target: str,
        arguments: Sequence[Any] = (),
        files: Sequence[int] = (0, 1, 2),
        environment: dict[str, str] | None = None,
    ) -> Child:
        """Fork a process that calls a function and exits with the status that it returns.

        Args:
            target: the function, as `module:function`.
            arguments: its arguments: strings, numbers, or lists and dicts of them.
            files: descriptors that become the child's 0, 1, 2, and more if given.
            environment: the child's environment variables. Default: those of this process.
        """
        return call(self.path, target, arguments, files, environment, self.process)

    def close(self) -> None:
        """End the server and all its children."""
        self.process.terminate()
        self.process.wait()
        if self.folder:
            self.folder.cleanup()


def call(
    path: Path,
    target: str,
    arguments: Sequence[Any] = (),
    files: Sequence[int] = (0, 1, 2),
    environment: dict[str, str] | None = None,
    process: subprocess.Popen[bytes] | None = None,
) -> Child:
    """Fork a process from the server at `path`, as `ForkServer.call` does."""
    control = connect(path, process)
    request = {
        "target": target,
        "arguments": list(arguments),
        "cwd": os.getcwd(),
        "env": dict(os.environ if environment is None else environment),
        "ignored": [],
        "leads": False,
    }
    text = json.dumps(request).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    control.sendmsg([len(text).to_bytes(8, "big")], rights)
    control.sendall(text)
    return Child(control)


def connect(path: Path, process: subprocess.Popen[bytes] | None = None) -> socket.socket:
    """Connect to a server that may still be importing."""
    end = time.monotonic() + START_SECONDS
    while True:
        control = socket.socket(socket.AF_UNIX)
        try:
            control.connect(str(path))
            return control
        except OSError:
            control.close()
            if time.monotonic() > end or (process is not None and process.poll() is not None):
                raise RuntimeError("the fork server did not start") from None
            time.sleep(0.05)


def shared() -> Path:
    """Return the socket of the server that all workers of a test session share, starting it if needed."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    with open(folder / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "pid").exists():
            owner = int(os.environ[OWNER_VARIABLE])
            server = ForkServer("tests.forkserver:warm_up", path=folder / "socket", owner=owner)
            (folder / "pid").write_text(str(server.process.pid))
    return folder / "socket"


def close_shared() -> None:
    """End the shared server, if a test has started it."""
    pid = Path(os.environ[FOLDER_VARIABLE]) / "pid"
    if pid.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)


def program(*arguments: object) -> list[str]:
    """Return a command line that runs `ettin ...` in a fork of the shared server, for `subprocess`."""
    return command("tests.forkserver:be_program", *arguments)


def command(target: str, *arguments: object) -> list[str]:
    """Return a command line that calls `module:function` with strings in a fork of the shared server.

    It ends with the status that the function returns, or by the signal that ended the fork.
    """
    path = shared()
    # waits for the server's imports, so that no test's time limit counts them
    connect(path).close()
    return [sys.executable, "-IS", str(CLIENT), str(path), target, *map(str, arguments)]


def warm_up(*more: str) -> None:
    """Import what commands import, with one thread."""
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    for name in (*WARM, *more):
        importlib.import_module(name)
    freeze()


def freeze() -> None:
    """Keep the garbage collector from touching memory shared with children, so that it stays shared."""
    gc.collect()
    gc.freeze()


def be_program(*arguments: str) -> int | None:
    """Run `ettin ...` as the console script does."""
    from megatron_ettin.cli.main import main
    from tests.pool import mutated

    sys.argv = list(arguments)
    with mutated(None):
        return main(list(arguments[1:]))


class Server:
    """The process that imports everything and forks a child for each connection."""

    def __init__(self, path: str, owner: int) -> None:
        self.owner = owner
        self.selector = selectors.DefaultSelector()
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(path + ".new")
        self.listening.listen(64)
        self.selector.register(self.listening, selectors.EVENT_READ)
        self.woken, waking = os.pipe()
        for end in (self.woken, waking):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        self.selector.register(self.woken, selectors.EVENT_READ)
        self.children: dict[socket.socket, int] = {}
        os.rename(path + ".new", path)

    def serve(self) -> None:
        """Serve one fork for each connection, until the owner is gone."""
        while os.path.exists(f"/proc/{self.owner}"):
            for key, _ in self.selector.select(1.0):
                if key.fileobj is self.listening:
                    self.accept()
                elif key.fileobj == self.woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.woken, 1 << 12)
                elif isinstance(key.fileobj, socket.socket):
                    self.drop(key.fileobj)
            self.reap()

    def accept(self) -> None:
        connection, _ = self.listening.accept()
        try:
            request, files = receive(connection)
        except (OSError, ValueError, IndexError):
            # the client only checked that the server listens
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (*self.children, connection, self.listening):
                other.close()
            be_child(request, files)
        for file in files:
            os.close(file)
        self.children[connection] = pid
        self.selector.register(connection, selectors.EVENT_READ)
        self.send(connection, pid=pid)

    def drop(self, connection: socket.socket) -> None:
        """Kill the child of a client that has disconnected."""
        kill(self.children[connection])
        self.selector.unregister(connection)

    def reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            for connection in [one for one, its in self.children.items() if its == pid]:
                self.send(connection, status=os.waitstatus_to_exitcode(status))
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                del self.children[connection]
                connection.close()

    def send(self, connection: socket.socket, **values: int) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        for pid in self.children.values():
            kill(pid)


def kill(pid: int) -> None:
    """Kill a child, or its whole process group if it leads one."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 16))
    files = array.array("i", rights[0][2])
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        block = connection.recv(1 << 16)
        if not block:
            raise ValueError("cut off")
        text += block
    return json.loads(text), list(files)


def be_child(request: dict[str, Any], files: list[int]) -> None:
    """Turn this fork into the requested process; it exits with the status that the real process would have."""
    # moves the files away from the descriptors that they will get
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in files]
    for number, file in enumerate(high):
        os.dup2(file, number)
    for file in {*files, *high} - set(range(len(files))):
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(request["env"])
    if request["leads"]:
        os.setsid()
    # the server's own handler would end the server
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # the server ignores these signals if the tests were started in the background or by nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    target, _, name = request["target"].partition(":")

    def run() -> int | None:
        os.chdir(request["cwd"])
        function: Callable[..., int | None] = getattr(importlib.import_module(target), name)
        return function(*request["arguments"])

    os._exit(protected(run) & 255)


def protected(function: Callable[[], int | None]) -> int:
    """Run a function and return the exit status of an interpreter, after exit handlers and flushed output."""
    interrupted = False
    try:
        status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status


def main(path: str, owner: str, setup: str, arguments: str) -> None:
    module, _, name = setup.partition(":")
    getattr(importlib.import_module(module), name)(*json.loads(arguments))
    server = Server(path, int(owner))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve()
    finally:
        server.close()
        # skips the clean-up of imported libraries, which have nothing to clean up
        os._exit(0)


if __name__ == "__main__":
    # runs under the module's import name, under which children look up functions
    from tests.forkserver import main as imported_main

    imported_main(*sys.argv[1:])
