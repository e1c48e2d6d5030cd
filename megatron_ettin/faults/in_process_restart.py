"""Restart the ranks within their processes, by nvidia-resiliency-ext, when the step of one raises an error.

The launch does not end: all ranks leave what they are in and begin again from the latest checkpoint, with what they
have imported. The wrapper is around the whole of `ettin train`, of any number of phases. A stall is not handled here:
the watchdogs are quicker and end the ranks with 75. Restarts that are used up and ranks that were killed are left to
the launcher, which ends the others (torchrun, srun --kill-on-bad-exit=1).
"""

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
from megatron_ettin.faults.skipped_steps import TrainingStoppedError
from megatron_ettin.faults.watchdog import collective_seconds
from megatron_ettin.parallel.env import DistributedEnv, read_distributed_env
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, reinit_after_restart
from megatron_ettin.platform import detect
from megatron_ettin.train.stop_signal import STOPS

RANK_SIGNALS = STOPS
GRACE = timedelta(seconds=60)


class RestartsUsedUpError(RuntimeError):
    """The ranks failed once more than `resilience.in_process_restarts` allows (exit 1, as any error)."""


class RankFailedError(RuntimeError):
    """An error of this rank, as it is passed to the library."""


def with_restarts(settings: ResilienceConfig, device: str, work: Callable[[], bool]) -> bool:
    """Call `work`, and again on all ranks when it raises an error on one.

    A single process is not restarted here: its launcher starts it again.

    Args:
        settings: `in_process_restarts` limits the restarts.
        device: `runtime.device`.
        work: the training.

    Returns:
        What `work` returned.

    Raises:
        UserError, TrainingStoppedError: no restart mends it.
        RestartsUsedUpError: one failure more than allowed.
    """
    env = read_distributed_env()
    if not settings.in_process_restarts or env.world == 1:
        return work()
    inprocess = load()
    set_environment(env)
    port = int(os.environ["MASTER_PORT"])
    outcome: list[Any] = []

    def attempt(call_wrapper: Any = None) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, RANK_SIGNALS)
        # the last attempt may have been interrupted in doing so
        destroy_model_parallel()
        destroy_process_group()
        reinit_after_restart(call_wrapper.iteration, port)
        failure = None
        try:
            outcome[:] = [work()]
        except (UserError, TrainingStoppedError) as error:
            outcome[:] = [error]
        except Exception as error:
            failure = clear_traceback(error)
        # raised here, where the error and its frames are gone
        if failure is not None:
            raise failure

    # the wrapper fills in the parameter that has this annotation
    attempt.__annotations__["call_wrapper"] = inprocess.CallWrapper
    wrapped = inprocess.Wrapper(**options(inprocess, settings, detect(device, env.local_rank).is_gpu))(attempt)
    try:
        with blocked(RANK_SIGNALS):
            wrapped()
    except inprocess.exception.RestartAbort as error:
        raise RestartsUsedUpError(
            f"resilience.in_process_restarts: all {settings.in_process_restarts} used up"
        ) from error
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return bool(outcome[0])


def clear_traceback(error: Exception) -> RankFailedError:
    """Log an error and return it without what its frames hold.

    They hold the model's memory, and groups whose open connections would let the other ranks wait.
    """
    log_exception(error)
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    return RankFailedError(f"{type(error).__name__}: {error}")


def load() -> Any:
    """Import the library. Raises UserError where it is not installed."""
    try:
        from nvidia_resiliency_ext import inprocess
    except ImportError as error:
        raise UserError(
            f"resilience.in_process_restarts: needs nvidia-resiliency-ext, which does not import here ({error});"
            " pip install 'megatron_ettin[resilience]', or 0 leaves restarts to the launcher"
        ) from None
    return inprocess


def options(inprocess: Any, settings: ResilienceConfig, is_gpu: bool) -> dict[str, Any]:
    """Return the options of the library's Wrapper. Its own time limits come after the watchdog's."""
    from nvidia_resiliency_ext.inprocess.abort import AbortTorchDistributed

    soft = timedelta(seconds=collective_seconds(settings.hang_seconds)) + GRACE
    retry = inprocess.initialize.RetryController(max_iterations=settings.in_process_restarts + 1)
    return {
        "initialize": retry,
        # ranks that wait over gloo are let go by the one that failed, when it leaves its groups
        "abort": AbortTorchDistributed() if is_gpu else None,
        "soft_timeout": soft,
        "hard_timeout": soft + GRACE,
        "barrier_timeout": soft + 3 * GRACE,
        "completion_timeout": soft + 3 * GRACE,
    }


def set_environment(env: DistributedEnv) -> None:
    """Set the variables that the library reads, where SLURM gave others."""
    assert env.address is not None
    names = {"RANK": env.rank, "WORLD_SIZE": env.world, "LOCAL_RANK": env.local_rank}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR=env.address, MASTER_PORT=str(env.port))


@contextmanager
def blocked(numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Block signals that a scheduler sends to every process of a job, so that what is forked within ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
