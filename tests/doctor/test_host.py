"""Threads, limits, shared memory and names of a host: each state is simulated."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from megatron_ettin.doctor import host
from megatron_ettin.platform import inventory


def test_threads_of_all_ranks_beyond_the_cpus_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "usable_cpus", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert host._threads().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert host._threads().state == "warning"
    assert "OMP_NUM_THREADS=2" in host._threads().todo
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert host._threads().state == "warning"


def test_limits_too_low_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 128, resource.RLIMIT_NPROC: 100, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, 0), -1))
    monkeypatch.setattr(inventory, "has_infiniband", lambda: True)
    states = {one.name: one.state for one in host._limits()}
    assert states == {"open files": "problem", "processes": "warning", "locked memory": "warning", "core dumps": "ok"}


def test_names_unresolvable_hosts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[03-07]")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    findings = host._names()
    assert [(one.name, one.state) for one in findings] == [("host name", "warning"), ("first host", "problem")]
    assert "n03" in findings[1].text


def test_shared_memory_missing_is_a_problem(tmp_path: Path) -> None:
    assert host._shared_memory(tmp_path / "none").state == "problem"
