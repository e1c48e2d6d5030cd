"""Asks every node of the job, at once, whether it can take part (check_node.py)."""

import json
import os
import re
import subprocess
import sys
from typing import Dict, List, Sequence

from .options import Options
from .slurm import Job, ask

CHECK_SECONDS = 120.0  # for a cold file system on thousands of nodes


def hosts_of(job: Job) -> List[str]:
    """Names of the job's nodes, in order."""
    return ask(["scontrol", "show", "hostnames", job.node_list]).text.split() if job.node_list else []


def check_nodes(options: Options, job: Job) -> Dict[str, List[str]]:
    """What is wrong, by node; empty where all can take part, and outside of SLURM."""
    hosts = hosts_of(job)
    if not hosts:
        return {}
    folder = os.path.abspath(options.folder)
    seen = os.path.join(folder, ".tmp-seen-by-all-{}-{}".format(job.id, job.restarts))
    is_written = _is_written(seen)
    wanted = {
        "names": hosts[:1],  # where the ranks meet
        "files": [seen] if is_written else [],
        "programs": options.check_programs,
        "paths": options.check_paths + ([] if is_written else [folder]),  # each node tells why it cannot
        "min_free_gib": options.min_free_gib,
    }
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "check_node.py")
    srun = ["srun", "--overlap", "--nodes={}".format(len(hosts)), "--ntasks={}".format(len(hosts))]
    srun += ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus=0", "--export=ALL", "--job-name=check"]
    try:
        return _run(srun + [sys.executable, program, json.dumps(wanted)], hosts)
    finally:
        if os.path.exists(seen):
            os.unlink(seen)


def _is_written(path: str) -> bool:
    """Whether the file could be made."""
    try:
        with open(path, "w") as file:
            file.write("\n")
    except OSError:
        return False
    return True


def _run(command: Sequence[str], hosts: Sequence[str]) -> Dict[str, List[str]]:
    """Problems by node: what the nodes print, and for a node that prints nothing what srun says of it."""
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True
    )
    late = ""
    try:
        output, errors = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
        late = "did not answer within {:.0f} s".format(CHECK_SECONDS)
    found: Dict[str, List[str]] = {}
    answered = set()
    for line in output.splitlines():
        match = re.match(r"(\S+?)(?:: (.+)| ok)$", line)
        if match is None:
            continue
        answered.add(match.group(1))
        if match.group(2):
            found.setdefault(match.group(1), []).append(match.group(2))
    for host in hosts:
        if host not in answered:
            said = [line for line in errors.splitlines() if host in line] or errors.splitlines()[-1:]
            why = said[0].strip() if said else "srun said nothing"
            found[host] = [late or "the check could not run ({})".format(why)]
    return found
