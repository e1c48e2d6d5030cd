"""Whether one node can take part: run on each, alone, before the run. Prints `NODE ok` or `NODE: what is wrong`.

Arguments: a JSON object with "names" (hosts to resolve), "files" (to be seen), "programs", "paths" (to write in) and
"min_free_gib"."""

import json
import os
import shutil
import socket
import sys
from typing import Any, Dict, List

PROBE_BYTES = 1 << 20
GIB = float(1 << 30)


def node_name() -> str:
    """As SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def problems(wanted: Dict[str, Any]) -> List[str]:
    """What is wrong here, a line each."""
    found = []
    for name in wanted["names"]:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            found.append("host name {} does not resolve ({})".format(name, error.strerror or error))
    for path in wanted["files"]:
        if not os.path.exists(path):
            found.append("{} is not there; the run's folder must be shared by all nodes".format(path))
    for program in wanted["programs"]:
        if shutil.which(program) is None:
            found.append("{} is not there or cannot be run; is it on a shared file system?".format(program))
    for path in wanted["paths"]:
        found += disk_problems(path, wanted["min_free_gib"])
    return found


def disk_problems(path: str, min_free_gib: float) -> List[str]:
    """Whether files can be written in `path`, and enough of them."""
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
    found = problems(json.loads(sys.argv[1]))
    print("\n".join("{}: {}".format(node_name(), problem) for problem in found) or node_name() + " ok", flush=True)
