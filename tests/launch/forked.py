"""Make programs, for the PATH of jobs and shells, that run as forks of the test session's server (tests/forkserver.py).

    write_program(path, "module:function")     an executable that calls the function with its own name and arguments
    folder()                                   the folder of `ettin` and `torchrun` for jobs on the cluster

So a rank of a job is two processes: the client, which SLURM started, and the fork, which does the work in the node's
namespaces. tests/launch/cluster.py finds the fork by its process name, which contains the client's process id."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests import forkserver

CLIENT_VARIABLE = "ETTIN_TEST_CLIENT"
# seconds that a rank sleeps in each step, so that a fault meets it while it trains
PACE_VARIABLE = "ETTIN_TEST_PACE"
# the client's process id follows; Linux keeps 15 characters of a process name
NAMED = "fork of "
NAMESPACES = {"uts": 0x04000000, "mnt": 0x00020000}
PROGRAM = """\
#!{python} -IS
import os, sys
sys.path.insert(0, {folder!r})
from forkserver_client import main
os.environ[{variable!r}] = str(os.getpid())
main({socket!r}, {target!r}, [os.path.basename(sys.argv[0]), *sys.argv[1:]])
"""


def write_program(path: Path, target: str) -> None:
    """Write an executable file that calls `module:function` in a fork of the shared server."""
    folder, socket = str(forkserver.CLIENT.parent), str(forkserver.shared())
    values = {"folder": folder, "socket": socket, "target": target, "variable": CLIENT_VARIABLE}
    path.write_text(PROGRAM.format(python=sys.executable, **values))
    path.chmod(0o755)
    forkserver.connect(forkserver.shared()).close()  # waits for the server's imports, so that no job does


def folder() -> Path:
    """Return the folder of the programs for jobs, made at the first call."""
    made = Path(os.environ[forkserver.FOLDER_VARIABLE]) / "jobs"
    if not made.exists():
        new = made.with_name(f"jobs.{os.getpid()}")
        new.mkdir()
        write_program(new / "ettin", "tests.launch.forked:be_rank")
        write_program(new / "torchrun", "tests.launch.forked:be_torchrun")
        new.rename(made)
    return made


def join_node() -> None:
    """Enter the client's namespaces. A slurmd that was started as root has its own host name and mounts."""
    client = int(os.environ.pop(CLIENT_VARIABLE))
    Path("/proc/self/comm").write_text(f"{NAMED}{client}")
    os.getppid = lambda: parent_of(client)  # a rank exits when its parent has ended: that has to be the client's parent
    if os.geteuid() != 0:
        return
    libc, folder_before = ctypes.CDLL(None, use_errno=True), os.getcwd()
    for name, flag in NAMESPACES.items():
        with open(f"/proc/{client}/ns/{name}") as namespace:
            if libc.setns(namespace.fileno(), flag) != 0:
                raise OSError(ctypes.get_errno(), f"setns {name}")
    os.chdir(folder_before)


def parent_of(pid: int) -> int:
    """Return the id of a process's parent, or 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def be_rank(*command_line: str) -> int | None:
    """Run `ettin ...` in the node's namespaces, at the pace that PACE_VARIABLE sets."""
    join_node()
    with paced(float(os.environ.get(PACE_VARIABLE) or 0)):
        return forkserver.be_program(*command_line)


@contextlib.contextmanager
def paced(seconds: float) -> Iterator[None]:
    """Sleep this long before each training step while the body runs."""
    from megatron_ettin.train import trainer

    step = trainer.train_step

    def slowly(*arguments, **named):
        time.sleep(seconds)
        return step(*arguments, **named)

    with mock.patch.object(trainer, "train_step", slowly):
        yield


def be_torchrun(*command_line: str) -> None:
    """Run `torchrun ...` in the node's namespaces; it starts the forked `ettin` of the PATH."""
    join_node()
    from torch.distributed.run import main

    sys.argv = list(command_line)
    main(list(command_line[1:]))
