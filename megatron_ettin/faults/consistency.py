"""Check before the first step that all ranks run the same code, configuration and data.

A node with an older checkout, another dataset under the same path or a clock that is off would train on silently, and
the run would be lost. The check names the rank that differs and its host.
"""

from __future__ import annotations

import hashlib
import socket
import time
from typing import Any

import torch.distributed as dist

import megatron_ettin
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.versions import clock_warnings, code_hash, first_difference, library_versions
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.parallel.collectives import all_gather_object, barrier, world_size


def comparable_facts(config: Config, corpus: BlendedDataset) -> dict[str, str]:
    """Return the values that must be equal on all ranks, by their names in the message."""
    return {
        "code of megatron_ettin": f"{megatron_ettin.__version__} ({code_hash()})",
        "libraries": library_versions(),
        "configuration (sha256)": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data order": corpus.fingerprint[:12],
        "tokenizer": corpus.tokenizer_fingerprint[:12],
    }


def check_ranks_consistent(config: Config, corpus: BlendedDataset) -> None:
    """Compare all ranks of the default group (collective).

    Raises UserError, the same on each rank, naming the ranks that differ from the majority.
    """
    if world_size() == 1:
        return
    own: dict[str, Any] = {"host": socket.gethostname(), "facts": comparable_facts(config, corpus)}
    ranks = all_gather_object(own)
    disagreement = first_difference([rank["host"] for rank in ranks], [rank["facts"] for rank in ranks])
    if disagreement is not None:
        raise UserError(disagreement)
    barrier()
    now = all_gather_object(time.time())
    if dist.get_rank() == 0:
        for line in clock_warnings([rank["host"] for rank in ranks], now):
            log_warning(line)
