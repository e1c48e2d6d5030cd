"""Importing DeepSpeed where `parallel.engine=deepspeed` asks for it, and nowhere else: it looks for accelerators, logs
at length and compiles kernels when imported or first used."""

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
    """Refuse an engine that is not installed. Raises UserError."""
    if engine == "deepspeed":
        load_deepspeed()


def load_deepspeed() -> Any:
    """The module `deepspeed`, quiet, on the device that torch has. Raises UserError where it does not import."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import deepspeed
    except Exception as error:  # among others what its search for compilers raises
        raise UserError(
            f"parallel.engine: deepspeed does not import here ({first_line(error)}); pip install"
            " 'megatron-ettin[deepspeed]', or parallel.engine=megatron, whose distributed_optimizer cuts the"
            " optimizer's state too"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU it would compile collectives over shared memory for minutes at the first use on every machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def release_globals() -> None:
    """Let go of what DeepSpeed keeps outside of its engines: torch's process groups, the models that ZeRO-3 went
    through (a cache of a method of its coordinators has them, and with them all groups and their threads), and its
    numbers of modules and parameters, which ranks compare (a process may train several runs)."""
    deepspeed = load_deepspeed()
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator

    for member in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(member, "__closure__", None) or ():  # of the decorator around the cache
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    deepspeed.comm.destroy_process_group()
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
