"""Before the first step: do all ranks run the same thing? A node with an older checkout, another dataset under the same
path or a clock that is off trains on without a word, and the run is lost; here the odd rank is named, with its host."""

from __future__ import annotations

import hashlib
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_ettin
from megatron_ettin.config.errors import UserError
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.data.order import Corpus

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "deepspeed")  # what decides a step's numbers
CLOCK_SECONDS = 5.0  # log lines of two hosts further apart are put in the wrong order
TOLD_RANKS = 3


@cache
def code_hash() -> str:
    """Of every Python file of the package: an edited checkout has the version of the one it was made from."""
    folder = Path(megatron_ettin.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> str:
    """Those of the libraries that are installed, in one line."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def facts_of(config: Config, corpus: Corpus) -> dict[str, str]:
    """What must be equal on all ranks, by its name in the message."""
    return {
        "code of megatron_ettin": f"{megatron_ettin.__version__} ({code_hash()})",
        "libraries": versions(),
        "configuration (sha256)": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data order": corpus.fingerprint[:12],
        "tokenizer": corpus.tokenizer_fingerprint[:12],
    }


def check_agreement(config: Config, corpus: Corpus) -> None:
    """Compare all ranks of the default group. Raises UserError, the same on each, naming who differs from the most."""
    world = dist.get_world_size()
    if world == 1:
        return
    mine = {"host": socket.gethostname(), "facts": facts_of(config, corpus)}
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, mine)
    disagreement = first_difference([rank["host"] for rank in ranks], [rank["facts"] for rank in ranks])
    if disagreement is not None:
        raise UserError(disagreement)
    dist.barrier()
    now = [0.0] * world
    dist.all_gather_object(now, time.time())
    if dist.get_rank() == 0:
        for line in clock_warnings([rank["host"] for rank in ranks], now):
            print(line, file=sys.stderr, flush=True)


def first_difference(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str | None:
    """A line for the first fact that not all ranks have: who differs, what they have, what the most have."""
    for name in facts[0]:
        values = [fact[name] for fact in facts]
        usual, count = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            told = ", ".join(f"rank {rank} on {hosts[rank]}: {values[rank]}" for rank in odd[:TOLD_RANKS])
            more = f" and {len(odd) - TOLD_RANKS} more" if len(odd) > TOLD_RANKS else ""
            return f"the ranks differ in {name}: {told}{more}; the other {count} have {usual}"
    return None


def clock_warnings(hosts: Sequence[str], now: Sequence[float]) -> list[str]:
    """A line for each host whose clock is off. `now`: seconds that the ranks' clocks showed at the same moment."""
    middle = statistics.median(now)
    off = {host: seconds - middle for host, seconds in zip(hosts, now, strict=True)}
    return [
        f"warning: the clock of {host} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the others"
        for host, seconds in off.items()
        if abs(seconds) > CLOCK_SECONDS
    ]
