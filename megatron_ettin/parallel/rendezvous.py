"""Who am I among the ranks: read from torchrun's variables, from SLURM's step variables, or alone.

SLURM is believed only inside a step (srun): a batch script's own shell has SLURM_NTASKS too, but no peers."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ettin.base.errors import RankError, UserError
from megatron_ettin.base.log import SLOW_SECONDS, log_warning, log_when_slow
from megatron_ettin.platform import flight_recorder
from megatron_ettin.platform.device import Platform

_kept: list[dist.Store] = []  # the store that ranks met at, and a part of it for every time they joined
_anew = [0]  # how often the ranks began again in their processes
FIRST_PORT, PORTS = 15_000, 17_000  # below the range that systems hand out by themselves
TOLD_RANKS = 8
TELL_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """This process among `world` ranks; `address` is None for a process that is alone."""

    rank: int
    world: int
    local_rank: int
    address: str | None
    port: int
    source: str  # "torchrun", "slurm" or "alone"


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Rank and rendezvous address. Raises UserError for variables that contradict each other."""
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return _checked(
            Place(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", 0)),
                env.get("MASTER_ADDR", "127.0.0.1"),
                int(env.get("MASTER_PORT", 29_500)),
                "torchrun",
            )
        )
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _checked(
            Place(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env.get("SLURM_LOCALID", 0)),
                env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
                int(env.get("MASTER_PORT") or job_port(env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0"))),
                "slurm",
            )
        )
    return Place(0, 1, 0, None, 0, "alone")


def _checked(place: Place) -> Place:
    if not 0 <= place.rank < place.world:
        raise UserError(f"{place.source}: rank {place.rank} is not among {place.world} ranks")
    return place


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `n[03-07,9],m1` -> `n03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST: {nodelist!r} names no host")
    return match[1] + (match[2] or "") + (match[3] or "")


def job_port(job_id: str, step_id: str) -> int:
    """A port that two jobs on one node do not share: a function of job and step."""
    number = int(re.sub(r"\D", "", job_id) or 0) * 31 + int(re.sub(r"\D", "", step_id) or 0)
    return FIRST_PORT + number % PORTS


def join(
    place: Place, platform: Platform, timeout_seconds: float = 600.0, arrival_seconds: float | None = None
) -> None:
    """Create torch's default process group over all ranks. Raises RankError when the others do not answer.

    `timeout_seconds` is how long a collective may take; `arrival_seconds`, where given, how long ranks may differ in
    coming here, so that one that copies data first is waited for without making every later hang as long. After
    `leave` the ranks may join again: the store is kept until `forget`, for its port could not be bound anew at once."""
    if dist.is_initialized():
        return
    if platform.is_gpu:
        flight_recorder.record()
    timeout = timedelta(seconds=timeout_seconds)
    if place.address is None:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    url = f"tcp://{place.address}:{place.port}"
    patience = timedelta(seconds=arrival_seconds or timeout_seconds)
    try:
        if not _kept:
            waiting = f"rank {place.rank} waits for rank 0 at {url}{_believed(place)}"
            with log_when_slow(waiting) if place.local_rank == 0 else contextlib.nullcontext():
                _kept.append(_meeting_point(place, patience))
        store = dist.PrefixStore(f"join{_anew[0]}.{len(_kept)}", _kept[0])
        _kept.append(store)
        _await_all(store, place, patience)
        _kept[0].set_timeout(timeout)
        dist.init_process_group(
            platform.backend,
            store=dist.PrefixStore("default_pg", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timeout,
            device_id=platform.device if platform.is_gpu else None,
        )
    except (RuntimeError, ValueError) as error:  # torch's store errors are RuntimeErrors
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankError(f"rank {place.rank}: no rendezvous with {place.world} ranks at {url} ({cause})") from None


def _await_all(store: dist.Store, place: Place, patience: timedelta) -> None:
    """Come back when all ranks are here. Raises RuntimeError, naming those that are not, after `patience`."""
    deadline = time.monotonic() + patience.total_seconds()
    tell_at = time.monotonic() + SLOW_SECONDS
    store.set(f"here{place.rank}", "")
    arrived = store.add("arrived", 1)
    while arrived < place.world:
        if time.monotonic() > deadline:
            came = f"{arrived} of {place.world} ranks came within {patience.total_seconds():,.0f} s"
            raise RuntimeError(f"{came}, not {_missing(store, place)}")
        if time.monotonic() > tell_at:
            tell_at += TELL_AGAIN_SECONDS
            _tell_missing(store, place, arrived)
        time.sleep(0.05)
        arrived = store.add("arrived", 0)


def _tell_missing(store: dist.Store, place: Place, arrived: int) -> None:
    """Print who is waited for: rank 0 does, or where it is the one, the first rank of each machine."""
    if place.rank == 0 or (place.local_rank == 0 and not store.check(["here0"])):
        log_warning(
            f"rank {place.rank} waits for {place.world - arrived} of {place.world} ranks: {_missing(store, place)}"
            f"{_believed(place)}"
        )


def _missing(store: dist.Store, place: Place) -> str:
    """Return the numbers of the first few ranks that have not come."""
    missing = [str(rank) for rank in range(place.world) if not store.check([f"here{rank}"])]
    return ", ".join(missing[:TOLD_RANKS]) + (" and more" if len(missing) > TOLD_RANKS else "")


def _believed(place: Place) -> str:
    """Return why this process thinks that there are others: variables may be left from another launch."""
    names = "RANK and WORLD_SIZE" if place.source == "torchrun" else "SLURM_PROCID and SLURM_STEP_NUM_TASKS"
    return f" ({names} say that there are {place.world})"


def from_chief(place: Place, platform: Platform, make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every rank, before there are groups: they join for it and leave. What it
    raises there (a UserError) is raised everywhere."""
    if place.world == 1:
        return make()
    box: list[Any] = [None, None]
    if place.rank == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    join(place, platform)
    try:
        dist.broadcast_object_list(box, src=0)
    finally:
        leave()
    if box[1] is not None:
        raise box[1]
    return box[0]


def from_all(place: Place, platform: Platform, own: Any, arrival_seconds: float) -> list[Any]:
    """Every rank's value, by rank, where there are no groups: they join for it and leave. Raises RankError when one
    does not come within `arrival_seconds`."""
    if place.world == 1:
        return [own]
    leave()
    join(place, platform, arrival_seconds=arrival_seconds)
    try:
        found: list[Any] = [None] * place.world
        dist.all_gather_object(found, own)
        return found
    finally:
        leave()


def _meeting_point(place: Place, patience: timedelta) -> dist.Store:
    """The store that rank 0 holds, or torchrun's agent, which its own environment tells of. It does not wait for all
    ranks itself, since it could not say who did not come."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=patience))
        return store
    assert place.address is not None
    return dist.TCPStore(
        place.address,
        place.port,
        place.world,
        is_master=place.rank == 0,
        timeout=patience,
        wait_for_workers=False,
        multi_tenant=True,
    )


def leave() -> None:
    """Destroy every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort() -> None:
    """Take all groups down without waiting for what is under way in them."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def join_anew(times: int, port: int) -> None:
    """The ranks begin again, for the `times`-th time, whatever they had been in: they meet at another part of
    torchrun's store, or at another port than `port`, where a library's store is, and than the last time."""
    forget()
    _anew[0] = times
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        os.environ["MASTER_PORT"] = str(port + 1 + times)


def forget() -> None:
    """Let go of the store that ranks met at: this process will not join again."""
    _kept.clear()
