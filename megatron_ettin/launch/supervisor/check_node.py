"""Check a node before the run; the supervisor runs this script once on each node.

It prints `NODE ok`, or a line `NODE: PROBLEM` for each problem.
The argument is a JSON object with "names" (hosts that must resolve), "files" (that must exist on this node), "programs"
(that must be found), "paths" (folders that must be writable) and "min_free_gib" (GiB that each of them must have free).
"""

import json
import os
import shutil
import socket
import sys
from typing import Any, Dict, List

PROBE_BYTES = 1 << 20
GIB = float(1 << 30)


def node_name() -> str:
    """Return the name that SLURM gives this node, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def find_problems(wanted: Dict[str, Any]) -> List[str]:
    """Return the problems of this node, one line each; empty if there is none. `wanted` is the script's argument."""
    problems = []
    for name in wanted["names"]:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            problems.append("host name {} does not resolve ({})".format(name, error.strerror or error))
    for path in wanted["files"]:
        if not os.path.exists(path):
            problems.append("{} does not exist; the run's folder must be shared by all nodes".format(path))
    for program in wanted["programs"]:
        if shutil.which(program) is None:
            problems.append("{} does not exist or cannot be run; is it on a shared file system?".format(program))
    for path in wanted["paths"]:
        problems += disk_problems(path, wanted["min_free_gib"])
    return problems


def disk_problems(path: str, min_free_gib: float) -> List[str]:
    """Return one line if `path` cannot be written or has less than `min_free_gib` free; else an empty list."""
    probe = os.path.join(path, ".tmp-probe-{}-{}".format(node_name(), os.getpid()))
    try:
        os.makedirs(path, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        finally:
            if os.path.exists(probe):
                os.unlink(probe)
        status = os.statvfs(path)
    except OSError as error:
        return ["{} cannot be written ({})".format(path, error.strerror or error)]
    free_gib = status.f_bavail * status.f_frsize / GIB
    if free_gib < min_free_gib:
        return ["{} has {:.1f} GiB free, {:g} are needed (--min-free-gib)".format(path, free_gib, min_free_gib)]
    return []


if __name__ == "__main__":
    lines = ["{}: {}".format(node_name(), problem) for problem in find_problems(json.loads(sys.argv[1]))]
    sys.stdout.write("\n".join(lines or [node_name() + " ok"]) + "\n")
    sys.stdout.flush()
