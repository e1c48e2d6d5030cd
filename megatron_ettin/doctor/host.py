"""Check threads, memory, limits, shared memory and names of this host."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import psutil

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.doctor.findings import Finding, note, ok, problem, warning
from megatron_ettin.parallel.env import first_host
from megatron_ettin.platform import inventory

GIB = float(1 << 30)
FEWEST_FILES, GOOD_FILES = 256, 4096
FEWEST_PROCESSES = 1024
# with less, InfiniBand's buffers may not fit
LOCKED_BYTES = 1 << 30
# ranks and loader workers of one host exchange data through shared memory
SHARED_GIB = 1.0
LOW_MEMORY_GIB = 2.0


def host_findings() -> list[Finding]:
    """Return all findings about this host."""
    return [_threads(), _memory(), _shared_memory(), *_limits(), *_names()]


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on; a job may have fewer than the host."""
    return len(os.sched_getaffinity(0))


def _threads() -> Finding:
    cpus, threads = usable_cpus(), os.environ.get("OMP_NUM_THREADS", "")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    text = f"{cpus} CPUs" + (f" for {ranks} ranks" if ranks > 1 else "")
    figures = {"cpus": cpus, "local_ranks": ranks, "omp_num_threads": threads or None}
    if not threads.isdigit():
        if ranks > 1:
            todo = f"export OMP_NUM_THREADS={max(cpus // ranks, 1)}"
            return warning("threads", f"{text}, OMP_NUM_THREADS is not set: each rank takes all", todo, **figures)
        return ok("threads", f"{text}; OMP_NUM_THREADS is not set, so torch decides", **figures)
    if int(threads) * ranks > cpus:
        todo = f"OMP_NUM_THREADS={max(cpus // ranks, 1)}, or more CPUs for each task"
        return warning(
            "threads", f"{text}, and OMP_NUM_THREADS={threads}: threads wait for each other", todo, **figures
        )
    return ok("threads", f"{text}, OMP_NUM_THREADS={threads}", **figures)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free, total = memory.available / GIB, memory.total / GIB
    text = f"{free:.1f} of {total:.1f} GiB available"
    figures = {"available_gib": round(free, 2), "total_gib": round(total, 2)}
    if free < LOW_MEMORY_GIB:
        return warning(
            "memory", text, "end the processes that hold it; a process that trains needs 1 to 2 GiB at least", **figures
        )
    return ok("memory", text, **figures)


def _shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    name = str(folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        todo = "mount it (docker and podman: --shm-size=16g or --ipc=host)"
        return problem(name, "missing or not writable: ranks and loader workers of one host need it", todo)
    usage = shutil.disk_usage(folder)
    total, free = usage.total / GIB, usage.free / GIB
    text, figures = f"{free:.2f} of {total:.2f} GiB free", {"free_gib": round(free, 3), "total_gib": round(total, 3)}
    if free < SHARED_GIB:
        todo = "docker and podman: --shm-size=16g or --ipc=host; else remove files from it"
        return warning(name, f"{text}: ranks and loader workers of one host exchange data through it", todo, **figures)
    return ok(name, text, **figures)


def _limits() -> list[Finding]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text, todo = (
        f"{_count(files)} (hard {_count(hard)})",
        f"ulimit -n {_count(hard)}; in SLURM: PropagateResourceLimits",
    )
    if 0 <= files < FEWEST_FILES:
        findings = [problem("open files", text, todo)]
    elif 0 <= files < GOOD_FILES:
        findings = [note("open files", f"{text}: hundreds of ranks, shards or sockets need {GOOD_FILES}", limit=files)]
    else:
        findings = [ok("open files", text, limit=files)]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if 0 <= processes < FEWEST_PROCESSES:
        todo = f"ulimit -u, {FEWEST_PROCESSES} at least: threads count too"
        findings.append(warning("processes", _count(processes), todo, limit=processes))
    else:
        findings.append(ok("processes", _count(processes), limit=processes))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = "unlimited" if locked < 0 else f"{locked / (1 << 20):,.0f} MiB"
    if 0 <= locked < LOCKED_BYTES and inventory.has_infiniband():
        todo = "ulimit -l unlimited; docker: --ulimit memlock=-1; in SLURM: PropagateResourceLimitsExcept=MEMLOCK"
        findings.append(warning("locked memory", f"{limit}: InfiniBand's buffers may not fit", todo, limit=locked))
    else:
        findings.append(ok("locked memory", limit, limit=locked))
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    findings.append(ok("core dumps", "off" if core == 0 else f"on, up to {_count(core)} bytes", limit=core))
    return findings


def _count(limit: int) -> str:
    return "unlimited" if limit < 0 else f"{limit}"


def _names() -> list[Finding]:
    """Check whether the names of this host and of the launch's first host resolve."""
    host = socket.gethostname()
    findings = []
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
        if address.startswith("127.") and _nodes() > 1:
            todo = "correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            findings.append(warning("host name", f"{host} is {address}, where other nodes cannot reach it", todo))
        else:
            findings.append(ok("host name", f"{host} is {address}", address=address))
    except OSError as error:
        todo = f"add it to /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME ({host} is this host)"
        findings.append(warning("host name", f"{host} does not resolve ({first_line(error)})", todo))
    first = os.environ.get("MASTER_ADDR") or _first_of_job()
    if first and first != host:
        try:
            socket.getaddrinfo(first, None)
            findings.append(ok("first host", f"{first} resolves"))
        except OSError as error:
            text = f"{first}, where the ranks meet, does not resolve ({first_line(error)})"
            findings.append(problem("first host", text, "add it to /etc/hosts or DNS, or set MASTER_ADDR"))
    return findings


def _nodes() -> int:
    """Return the number of nodes of this job, by SLURM or torchrun."""
    return int(os.environ.get("SLURM_NNODES") or os.environ.get("GROUP_WORLD_SIZE") or 1)


def _first_of_job() -> str | None:
    try:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        return first_host(nodes) if nodes else None
    except UserError:
        return None
