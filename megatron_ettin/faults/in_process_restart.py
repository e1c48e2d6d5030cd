"""Restart the ranks within their processes, by nvidia-resiliency-ext, when the step of one raises an error.

The launch does not end: all ranks leave what they are in and begin again from the latest checkpoint, with what they
have imported. A stall is not handled here: the watchdogs are quicker and end the ranks with 75. Restarts that are used
up and ranks that were killed are left to the launcher, which ends the others (torchrun, srun --kill-on-bad-exit=1).
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_exception
from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.skipped_steps import TrainingStoppedError
from megatron_ettin.faults.watchdog import collective_seconds
from megatron_ettin.parallel.env import read_distributed_env
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, reinit_after_restart
from megatron_ettin.platform import detect
from megatron_ettin.train.stop_signal import STOPS

GRACE = timedelta(seconds=60)


def with_restarts(settings: ResilienceConfig, device: str, work: Callable[[], bool]) -> bool:
    """Return what `work` returns; call it again on all ranks when it raises an error on one.

    UserError and TrainingStoppedError are raised at once: no restart mends them. A single process is not restarted
    here. Raises RuntimeError after one failure more than `settings.in_process_restarts`.
    """
    env = read_distributed_env()
    if env.world == 1:
        return work()
    try:
        from nvidia_resiliency_ext import inprocess
        from nvidia_resiliency_ext.inprocess.abort import AbortTorchDistributed
    except ImportError as error:
        raise UserError(
            f"resilience.in_process_restarts: needs nvidia-resiliency-ext, which does not import here ({error});"
            " pip install 'megatron_ettin[resilience]', or 0 leaves restarts to the launcher"
        ) from None
    # the library reads them, where SLURM gave others
    os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world), LOCAL_RANK=str(env.local_rank))
    os.environ.update(MASTER_ADDR=str(env.address), MASTER_PORT=str(env.port))
    outcome: list[Any] = []

    def attempt(call_wrapper: Any = None) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        # the last attempt may have been interrupted in doing so
        destroy_model_parallel()
        destroy_process_group()
        reinit_after_restart(call_wrapper.iteration, env.port)
        failure = None
        try:
            outcome[:] = [work()]
        except (UserError, TrainingStoppedError) as error:
            outcome[:] = [error]
        except Exception as error:
            log_exception(error)
            # they hold the model's memory, and groups whose open connections would let the other ranks wait
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = error.__cause__ = None
            failure = f"{type(error).__name__}: {error}"
        if failure is not None:
            gc.collect()
            raise RuntimeError(failure)

    # the wrapper fills in the parameter that has this annotation
    attempt.__annotations__["call_wrapper"] = inprocess.CallWrapper
    # its own time limits come after the watchdog's
    soft = timedelta(seconds=collective_seconds(settings.hang_seconds)) + GRACE
    wrapped = inprocess.Wrapper(
        initialize=inprocess.initialize.RetryController(max_iterations=settings.in_process_restarts + 1),
        # ranks that wait over gloo are released by the one that failed, when it leaves its groups
        abort=AbortTorchDistributed() if detect(device, env.local_rank).is_gpu else None,
        **{"soft_timeout": soft, "hard_timeout": soft + GRACE},
        **{f"{name}_timeout": soft + 3 * GRACE for name in ("barrier", "completion")},
    )(attempt)
    # a scheduler signals every process of a job: what the library forks ignores it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        wrapped()
    except inprocess.exception.RestartAbort as error:
        raise RuntimeError(f"resilience.in_process_restarts: all {settings.in_process_restarts} used up") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return bool(outcome[0])
