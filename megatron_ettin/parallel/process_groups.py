"""Create and destroy torch's default process group."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from megatron_ettin.base.errors import RankError, first_line
from megatron_ettin.base.log import SLOW_SECONDS, log_warning, log_when_slow
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.platform.device import Platform
from megatron_ettin.platform.profiler import enable_flight_recorder

# the store of the rendezvous, then a part of it for each default process group that was created
_stores: list[Store] = []
LISTED_RANKS = 8
REPEAT_SECONDS = 60.0


def init_process_group(
    env: DistributedEnv, platform: Platform, timeout_seconds: float = 600.0, arrival_seconds: float | None = None
) -> None:
    """Create torch's default process group over all ranks.

    After `destroy_process_group` it may be created again: the store is kept until `release_store`, because its port
    could not be bound again at once.

    Args:
        env: this process among the ranks.
        platform: gives the backend and the device.
        timeout_seconds: seconds that a collective may take.
        arrival_seconds: seconds to wait for all ranks, by default `timeout_seconds`. A larger value gives a rank time
            to copy data first, without a larger timeout of every later collective.

    Raises:
        RankError: the other ranks do not answer.
    """
    if dist.is_initialized():
        return
    if platform.is_gpu:
        enable_flight_recorder()
    timeout = timedelta(seconds=timeout_seconds)
    if env.address is None:
        dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    url = f"tcp://{env.address}:{env.port}"
    patience = timedelta(seconds=arrival_seconds or timeout_seconds)
    try:
        if not _stores:
            waiting = f"rank {env.rank} waits for rank 0 at {url}{_env_hint(env)}"
            with log_when_slow(waiting) if env.local_rank == 0 else contextlib.nullcontext():
                _stores.append(_meeting_point(env, patience))
        store = PrefixStore(f"join{len(_stores)}", _stores[0])
        _stores.append(store)
        _await_all(store, env, patience)
        _stores[0].set_timeout(timeout)
        dist.init_process_group(
            platform.backend,
            store=PrefixStore("default_pg", store),
            rank=env.rank,
            world_size=env.world,
            timeout=timeout,
            device_id=platform.device if platform.is_gpu else None,
        )
    # torch's store errors are RuntimeErrors
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {env.rank}: no rendezvous with {env.world} ranks at {url} ({first_line(error)})"
        ) from None


def _await_all(store: Store, env: DistributedEnv, patience: timedelta) -> None:
    """Wait for all ranks. Raises RuntimeError, naming those that are missing, after `patience`."""
    deadline = time.monotonic() + patience.total_seconds()
    log_at = time.monotonic() + SLOW_SECONDS
    store.set(f"here{env.rank}", "")
    arrived = store.add("arrived", 1)
    while arrived < env.world:
        if time.monotonic() > deadline:
            came = f"{arrived} of {env.world} ranks came within {patience.total_seconds():,.0f} s"
            raise RuntimeError(f"{came}, not {_missing(store, env)}")
        if time.monotonic() > log_at:
            log_at += REPEAT_SECONDS
            _log_missing(store, env, arrived)
        time.sleep(0.05)
        arrived = store.add("arrived", 0)


def _log_missing(store: Store, env: DistributedEnv, arrived: int) -> None:
    """Log the missing ranks on rank 0 or, if rank 0 is missing, on the first rank of each host."""
    if env.rank == 0 or (env.local_rank == 0 and not store.check(["here0"])):
        log_warning(
            f"rank {env.rank} waits for {env.world - arrived} of {env.world} ranks: {_missing(store, env)}"
            f"{_env_hint(env)}"
        )


def _missing(store: Store, env: DistributedEnv) -> str:
    """Return the numbers of the first few ranks that have not come."""
    missing = [str(rank) for rank in range(env.world) if not store.check([f"here{rank}"])]
    return ", ".join(missing[:LISTED_RANKS]) + (" and more" if len(missing) > LISTED_RANKS else "")


def _env_hint(env: DistributedEnv) -> str:
    """Return a hint that names the variables that set the number of ranks; they may be left from another launch."""
    names = "RANK and WORLD_SIZE" if env.source == "torchrun" else "SLURM_PROCID and SLURM_STEP_NUM_TASKS"
    return f" ({names} say that there are {env.world})"


@contextlib.contextmanager
def temporary_process_group(
    env: DistributedEnv, platform: Platform, arrival_seconds: float | None = None
) -> Iterator[None]:
    """Create the default process group inside the context, in place of an existing one; a single process needs none.

    Args:
        env: this process among the ranks.
        platform: gives the backend and the device.
        arrival_seconds: seconds to wait for all ranks, by default as long as a collective may take.

    Raises:
        RankError: the other ranks do not come.
    """
    if env.world == 1:
        yield
        return
    destroy_process_group()
    init_process_group(env, platform, arrival_seconds=arrival_seconds)
    try:
        yield
    finally:
        destroy_process_group()


def _meeting_point(env: DistributedEnv, patience: timedelta) -> Store:
    """Return the store that rank 0 or torchrun's agent serves.

    It does not wait for all ranks itself, because it could not name those that are missing.
    """
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        store: Store
        store, _, _ = next(rendezvous("env://", env.rank, env.world, timeout=patience))
        return store
    assert env.address is not None
    return TCPStore(
        env.address,
        env.port,
        env.world,
        is_master=env.rank == 0,
        timeout=patience,
        wait_for_workers=False,
        multi_tenant=True,
    )


def destroy_process_group() -> None:
    """Destroy every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def release_store() -> None:
    """Release the store of the rendezvous; call it when this process will create no further process group."""
    _stores.clear()
