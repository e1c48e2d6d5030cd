"""Torch's default process group: how ranks meet, part, and meet again after a restart."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ettin.base.errors import RankError, UserError, first_line
from megatron_ettin.base.log import SLOW_SECONDS, log_warning, log_when_slow
from megatron_ettin.parallel.collectives import all_gather_object, broadcast_object
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.platform import flight_recorder
from megatron_ettin.platform.device import Platform

_kept: list[dist.Store] = []  # the store that ranks met at, and a part of it for every time they joined
_anew = [0]  # how often the ranks began again in their processes
TOLD_RANKS = 8
TELL_AGAIN_SECONDS = 60.0


def init_process_group(
    place: DistributedEnv, platform: Platform, timeout_seconds: float = 600.0, arrival_seconds: float | None = None
) -> None:
    """Create torch's default process group over all ranks. Raises RankError when the others do not answer.

    `timeout_seconds` is how long a collective may take; `arrival_seconds`, where given, how long ranks may differ in
    coming here, so that one that copies data first is waited for without making every later hang as long. After
    `leave` the ranks may join again: the store is kept until `forget`, for its port could not be bound anew at once."""
    if dist.is_initialized():
        return
    if platform.is_gpu:
        flight_recorder.enable()
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
        raise RankError(
            f"rank {place.rank}: no rendezvous with {place.world} ranks at {url} ({first_line(error)})"
        ) from None


def _await_all(store: dist.Store, place: DistributedEnv, patience: timedelta) -> None:
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


def _tell_missing(store: dist.Store, place: DistributedEnv, arrived: int) -> None:
    """Print who is waited for: rank 0 does, or where it is the one, the first rank of each machine."""
    if place.rank == 0 or (place.local_rank == 0 and not store.check(["here0"])):
        log_warning(
            f"rank {place.rank} waits for {place.world - arrived} of {place.world} ranks: {_missing(store, place)}"
            f"{_believed(place)}"
        )


def _missing(store: dist.Store, place: DistributedEnv) -> str:
    """Return the numbers of the first few ranks that have not come."""
    missing = [str(rank) for rank in range(place.world) if not store.check([f"here{rank}"])]
    return ", ".join(missing[:TOLD_RANKS]) + (" and more" if len(missing) > TOLD_RANKS else "")


def _believed(place: DistributedEnv) -> str:
    """Return why this process thinks that there are others: variables may be left from another launch."""
    names = "RANK and WORLD_SIZE" if place.source == "torchrun" else "SLURM_PROCID and SLURM_STEP_NUM_TASKS"
    return f" ({names} say that there are {place.world})"


def broadcast_before_groups(place: DistributedEnv, platform: Platform, make: Callable[[], Any]) -> Any:
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
    init_process_group(place, platform)
    try:
        box = broadcast_object(box)
    finally:
        destroy_process_group()
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_gather_before_groups(place: DistributedEnv, platform: Platform, own: Any, arrival_seconds: float) -> list[Any]:
    """Every rank's value, by rank, where there are no groups: they join for it and leave. Raises RankError when one
    does not come within `arrival_seconds`."""
    if place.world == 1:
        return [own]
    destroy_process_group()
    init_process_group(place, platform, arrival_seconds=arrival_seconds)
    try:
        return all_gather_object(own)
    finally:
        destroy_process_group()


def _meeting_point(place: DistributedEnv, patience: timedelta) -> dist.Store:
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


def destroy_process_group() -> None:
    """Destroy every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort_process_group() -> None:
    """Take all groups down without waiting for what is under way in them."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def reinit_after_restart(times: int, port: int) -> None:
    """The ranks begin again, for the `times`-th time, whatever they had been in: they meet at another part of
    torchrun's store, or at another port than `port`, where a library's store is, and than the last time."""
    release_store()
    _anew[0] = times
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        os.environ["MASTER_PORT"] = str(port + 1 + times)


def release_store() -> None:
    """Let go of the store that ranks met at: this process will not join again."""
    _kept.clear()
