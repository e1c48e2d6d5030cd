"""A network for each rank: namespaces on a bridge, so that one rank's link can be cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator

IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
_numbers = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run([str(IP), *arguments], check=True, capture_output=True, text=True)


def unavailable() -> str | None:
    """Return why this host cannot make networks; None if it can."""
    if IP is None:
        return "no iproute2"
    if os.geteuid() != 0:
        return "network namespaces want root"
    name = f"chaos-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made ({str(getattr(error, 'stderr', '') or error).strip()})"
    try:
        ip("link", "add", f"ct{os.getpid()}", "type", "veth", "peer", "name", "eth0", "netns", name)
        return None
    except subprocess.CalledProcessError as error:
        return f"no virtual cables here ({error.stderr.strip()})"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "delete", name)


class Network:
    """`ranks` namespaces on one bridge. `places`: their names and addresses."""

    def __init__(self, ranks: int) -> None:
        number = os.getpid() % 10_000
        # a deleted namespace keeps its name for a short time
        unique = f"ch{number}x{next(_numbers) % 1000}"
        self.bridge = f"{unique}b"
        self.cables = [f"{unique}r{rank}" for rank in range(ranks)]
        self.addresses = [(f"chaos-{unique}-{rank}", f"10.213.{number % 250}.{rank + 1}") for rank in range(ranks)]

    @contextlib.contextmanager
    def up(self) -> Iterator[Network]:
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for cable, (name, address) in zip(self.cables, self.addresses):
                ip("netns", "add", name)
                ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", cable, "master", self.bridge, "up")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
            yield self
        finally:
            for arguments in [("netns", "delete", name) for name, _ in self.addresses] + [
                ("link", "delete", self.bridge)
            ]:
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip(*arguments)

    def set(self, rank: int, state: str) -> None:
        """Set a rank's link `down`, so that nothing arrives any more, or `up` again."""
        ip("link", "set", self.cables[rank], state)
