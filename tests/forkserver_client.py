"""Stand in for a program: have tests/forkserver.py run it in a fork, forward signals to it, and end as it ends.

The fork gets this process's files, variables and folder.

    python -IS forkserver_client.py SOCKET MODULE:FUNCTION WORD...

It imports as little as possible, because its start is what the fork server saves."""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGQUIT", "SIGALRM")


def main(path: str, target: str, arguments: "list[str]") -> None:
    pending: list[int] = []
    pid = 0

    # the fork of a session leader leads a session too, and signals are forwarded to its whole group
    leads = os.getsid(0) == os.getpid()

    def forward(number: int, _: object) -> None:
        if pid:
            (os.killpg if leads else os.kill)(pid, number)
        else:
            pending.append(number)

    ignored = []
    for number in (getattr(signal, name) for name in FORWARDED):
        if signal.getsignal(number) == signal.SIG_IGN:
            ignored.append(int(number))
        else:
            signal.signal(number, forward)
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    request = {
        "target": target,
        "arguments": arguments,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "ignored": ignored,
    }
    request["leads"] = leads
    text = json.dumps(request).encode()
    server.sendmsg(
        [len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    )
    server.sendall(text)
    answers = server.makefile("r")
    first = answers.readline()
    if not first:
        sys.exit("the fork server is gone")
    pid = json.loads(first)["pid"]
    for number in pending:
        forward(number, None)
    last = answers.readline()
    status = json.loads(last)["status"] if last else 1
    pid = 0
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
