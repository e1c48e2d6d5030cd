"""Kill a process (kill -9) at the entry of its N-th system call that changes a folder, in whichever thread.

`strace --inject` counts the calls of each thread separately, but several threads write a checkpoint: here one count
covers all of them, by ptrace. A write can also be cut in its middle, and data that was not synced can be removed, as in
a power failure. Needs Linux on x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SEIZE, INTERRUPT, SYSCALL = 0x4206, 0x4207, 24
GETREGS, SETREGS, GET_SYSCALL_INFO = 12, 13, 0x420E
# sysgood, fork, vfork, clone, end with the tracer
OPTIONS = 0x01 | 0x02 | 0x04 | 0x08 | 0x100000
ENTRY, EXIT = 1, 2
WALL = 0x40000000
O_CREAT, O_TRUNC = os.O_CREAT, os.O_TRUNC
# call number -> (name, form of the file argument: "fd" or "path" in argument 0, "at" in arguments 0 and 1)
CALLS = {
    **{1: ("write", "fd"), 18: ("pwrite64", "fd"), 20: ("writev", "fd"), 40: ("sendfile", "fd"), 74: ("fsync", "fd")},
    **{75: ("fdatasync", "fd"), 77: ("ftruncate", "fd"), 285: ("fallocate", "fd"), 326: ("copy_file_range", "fd out")},
    **{2: ("open", "path"), 76: ("truncate", "path"), 82: ("rename", "path"), 83: ("mkdir", "path")},
    **{84: ("rmdir", "path"), 85: ("creat", "path"), 86: ("link", "path"), 87: ("unlink", "path")},
    **{257: ("openat", "at"), 258: ("mkdirat", "at"), 263: ("unlinkat", "at"), 264: ("renameat", "at")},
    316: ("renameat2", "at"),
}
# in user_regs_struct
RDX = 12
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, address: int = 0, data: int | ctypes.Array = 0) -> int:
    value = ctypes.cast(data, ctypes.c_void_p) if isinstance(data, ctypes.Array) else data
    result = _libc.ptrace(request, pid, address, value)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def unavailable() -> str | None:
    """Return why this host cannot cut calls (the system's error message), or None."""
    if platform.machine() != "x86_64" or os.uname().sysname != "Linux":
        return "tracing is for Linux on x86-64"
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        ptrace(SEIZE, child, 0, OPTIONS)
    except OSError as error:
        return f"processes may not be traced here ({error.strerror})"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, WALL)
    return None


@dataclass(frozen=True)
class Call:
    """A call that changes the disk. `target`: the new name in a rename."""

    name: str
    path: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.path}" + f" to {Path(self.target).name}" * bool(self.target)


@dataclass
class Cut:
    """Kill `pid` at call `number` under `folder` (0: at none).

    `torn`: half of a write is done first. `calls`: the calls so far, the last of them being the one cut.
    """

    pid: int
    folder: Path
    number: int = 0
    torn: bool = False
    calls: list[Call] = field(default_factory=list)
    killed: bool = False
    # the thread whose write is cut in half
    _half: int | None = None

    def trace(self, go: Callable[[], object]) -> None:
        """Attach, call `go`, and follow until the process has ended."""
        attached: set[int] = set()
        while new := {int(tid) for tid in os.listdir(f"/proc/{self.pid}/task")} - attached:
            for tid in new:
                ptrace(SEIZE, tid, 0, OPTIONS)
                ptrace(INTERRUPT, tid)
            attached |= new
        go()
        while True:
            tid, status = os.waitpid(-1, WALL)
            if os.WIFSTOPPED(status):
                with contextlib.suppress(ProcessLookupError):
                    self._stopped(tid, status)
            elif tid == self.pid:
                return

    def _stopped(self, tid: int, status: int) -> None:
        deliver, number = 0, os.WSTOPSIG(status)
        if number == signal.SIGTRAP | 0x80:
            self._call(tid)
        elif status >> 16 == 0:
            deliver = number
        ptrace(SYSCALL, tid, 0, deliver)

    def _call(self, tid: int) -> None:
        room = ctypes.create_string_buffer(88)
        ptrace(GET_SYSCALL_INFO, tid, len(room), room)
        stop, call, *arguments = struct.unpack_from("<B23xQ6Q", room.raw)
        if stop == EXIT and tid == self._half:
            self._kill()
        if stop != ENTRY or self.killed or call not in CALLS:
            return
        name, file, target = self._file(tid, call, arguments)
        if not file.startswith(str(self.folder)):
            return
        self.calls.append(Call(name, file, target))
        if len(self.calls) == self.number:
            if self.torn and name == "write" and arguments[2] > 1:
                self._shorten(tid, arguments[2] // 2)
            else:
                self._kill()

    def _kill(self) -> None:
        self.killed = True
        os.kill(self.pid, signal.SIGKILL)

    def _shorten(self, tid: int, length: int) -> None:
        registers = (ctypes.c_ulonglong * 27)()
        ptrace(GETREGS, tid, 0, registers)
        registers[RDX] = length
        ptrace(SETREGS, tid, 0, registers)
        self._half = tid

    def _file(self, tid: int, call: int, arguments: list[int]) -> tuple[str, str, str]:
        """Return the call's name, the file that it changes (None if it changes none), and its new name."""
        name, where = CALLS[call]
        if where.startswith("fd"):
            return name, self._link(arguments[2] if where == "fd out" else arguments[0]), ""
        flags = arguments[2] if name == "openat" else arguments[1] if name == "open" else O_CREAT
        if not flags & (O_CREAT | O_TRUNC):
            return name, "", ""
        target = self._text(tid, arguments[1]) if name == "rename" else ""
        path = self._text(tid, arguments[1] if where == "at" else arguments[0])
        if where == "at" and not path.startswith("/"):
            path = f"{self._link(ctypes.c_int(arguments[0]).value)}/{path}"
        return name, path, target

    def _link(self, handle: int) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self.pid}/fd/{handle}")
        return ""

    def _text(self, tid: int, address: int) -> str:
        with contextlib.suppress(OSError), open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(256).split(b"\0")[0].decode(errors="replace")
        return ""


def not_forced(calls: list[Call]) -> set[str]:
    """Return files whose content need not be on the disk after these calls."""
    paths: set[str] = set()
    for call in calls:
        if call.name in ("fsync", "fdatasync"):
            paths.discard(call.path)
        elif call.name == "rename":
            moved = {path for path in paths if path == call.path or path.startswith(f"{call.path}/")}
            paths = (paths - moved) | {call.target + path.removeprefix(call.path) for path in moved}
        elif "dir" not in call.name and "unlink" not in call.name:
            paths.add(call.path)
    return paths


def lose(calls: list[Call]) -> None:
    """Remove the second half of files that were not forced to the disk, as in a power failure."""
    for name in not_forced(calls):
        with contextlib.suppress(OSError):
            os.truncate(name, os.stat(name).st_size // 2)
