"""Restarts within the ranks' processes, by nvidia-resiliency-ext: a rank whose step raises an error does not end the
launch. All ranks leave what they are in, and begin again from the latest checkpoint with what they have imported.

It wraps the whole of `ettin train`'s work, of any number of phases. A stall is not its matter: the watchdogs, which are
quicker, end the ranks with 75. Restarts that are used up are left to the launcher, and so are ranks that were killed,
where the launcher then ends the others (torchrun, srun --kill-on-bad-exit=1)."""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_exception
from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.skipped_steps import TrainingStopped
from megatron_ettin.faults.watchdog import collective_seconds
from megatron_ettin.parallel.env import DistributedEnv, read_distributed_env
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, reinit_after_restart
from megatron_ettin.platform import detect
from megatron_ettin.train.stop_signal import STOPS

LEFT_TO_THE_RANK = STOPS
AFTER_THE_WATCHDOG = timedelta(seconds=60)


class RestartsUsedUp(RuntimeError):
    """The ranks failed once more than `resilience.in_process_restarts` allows (exit 1, as any error)."""


class RankFailed(RuntimeError):
    """An error of this rank, as the library is told of it."""


def with_restarts(settings: ResilienceConfig, device: str, work: Callable[[], bool]) -> bool:
    """`work()`, again on all ranks where it raises an error on one, up to `in_process_restarts` times; what no restart
    mends (UserError, TrainingStopped) is raised. A process that is alone has its launcher to start it again."""
    place = read_distributed_env()
    if not settings.in_process_restarts or place.world == 1:
        return work()
    inprocess = load()
    tell_environment(place)
    port = int(os.environ["MASTER_PORT"])
    outcome: list[Any] = []

    def attempt(call_wrapper: Any = None) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_RANK)
        destroy_model_parallel()  # where the last attempt was interrupted in doing so
        destroy_process_group()
        reinit_after_restart(call_wrapper.iteration, port)
        failure = None
        try:
            outcome[:] = [work()]
        except (UserError, TrainingStopped) as error:
            outcome[:] = [error]
        except Exception as error:
            failure = clear_traceback(error)
        if failure is not None:  # here, where the error is gone
            raise failure

    attempt.__annotations__["call_wrapper"] = inprocess.CallWrapper  # the wrapper looks for it to fill it in
    wrapped = inprocess.Wrapper(**options(inprocess, settings, detect(device, place.local_rank).is_gpu))(attempt)
    try:
        with blocked(LEFT_TO_THE_RANK):
            wrapped()
    except inprocess.exception.RestartAbort as error:
        raise RestartsUsedUp(f"resilience.in_process_restarts: all {settings.in_process_restarts} used up") from error
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return bool(outcome[0])


def clear_traceback(error: Exception) -> RankFailed:
    """The error, told, without what its frames hold: the model's memory, and groups whose connections would stay open
    and let the other ranks wait."""
    log_exception(error)
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    return RankFailed(f"{type(error).__name__}: {error}")


def load() -> Any:
    """The library's module. Raises UserError where it is not installed."""
    try:
        from nvidia_resiliency_ext import inprocess
    except ImportError as error:
        raise UserError(
            f"resilience.in_process_restarts: needs nvidia-resiliency-ext, which does not import here ({error});"
            " pip install 'megatron_ettin[resilience]', or 0 leaves restarts to the launcher"
        ) from None
    return inprocess


def options(inprocess: Any, settings: ResilienceConfig, is_gpu: bool) -> dict[str, Any]:
    """Of the library's Wrapper. Its own limits of progress come after the watchdog's."""
    from nvidia_resiliency_ext.inprocess.abort import AbortTorchDistributed

    soft = timedelta(seconds=collective_seconds(settings.hang_seconds)) + AFTER_THE_WATCHDOG
    retry = inprocess.initialize.RetryController(max_iterations=settings.in_process_restarts + 1)
    return {
        "initialize": retry,
        # ranks that wait over gloo are let go by the one that failed, when it leaves its groups
        "abort": AbortTorchDistributed() if is_gpu else None,
        "soft_timeout": soft,
        "hard_timeout": soft + AFTER_THE_WATCHDOG,
        "barrier_timeout": soft + 3 * AFTER_THE_WATCHDOG,
        "completion_timeout": soft + 3 * AFTER_THE_WATCHDOG,
    }


def tell_environment(place: DistributedEnv) -> None:
    """The variables that the library reads, where SLURM gave others."""
    assert place.address is not None
    names = {"RANK": place.rank, "WORLD_SIZE": place.world, "LOCAL_RANK": place.local_rank}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))


@contextmanager
def blocked(numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """What is forked within does not end by these signals, which a scheduler sends to every process of a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
