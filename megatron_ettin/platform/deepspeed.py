"""Import DeepSpeed, only where `parallel.engine=deepspeed`.

DeepSpeed looks for accelerators, logs at length and compiles kernels when it is imported or first used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch

from megatron_ettin.base.errors import UserError, first_line


def check_engine(engine: str) -> None:
    """Raise UserError for an engine that is not installed."""
    if engine == "deepspeed":
        load_deepspeed()


def load_deepspeed() -> Any:
    """Return the module `deepspeed`, quiet and on torch's device. Raises UserError if it cannot be imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import deepspeed
    # its search for compilers can raise anything
    except Exception as error:
        raise UserError(
            f"parallel.engine: deepspeed cannot be imported ({first_line(error)}); pip install"
            " 'megatron-ettin[deepspeed]', or set parallel.engine=megatron, whose distributed_optimizer shards the"
            " optimizer's state too"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on a CPU its first use would spend minutes compiling collectives over shared memory on every host
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def release_globals() -> None:
    """Release what DeepSpeed keeps outside of its engines, because a process may train several runs.

    That is torch's process groups, the models of ZeRO-3 (a cached method of its coordinators holds them, and with them
    all groups and their threads), and its counters of modules and parameters, which ranks compare.
    """
    deepspeed = load_deepspeed()
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator

    for member in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        # the cache is in the closure of a decorator
        for cell in getattr(member, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    deepspeed.comm.destroy_process_group()
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
