"""Map the names of keys: older ones, those of other systems, and typos to today's."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from typing import Any

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.log import log_warning
from megatron_ettin.config.recipe import PHASES

# older names of keys, which are still read
RENAMED = {
    "optim.max_lr": "optim.weight_decay_reference_lr",
    "parallel.vp": "parallel.vpp",
    "run.device": "runtime.device",
    "run.deterministic": "runtime.deterministic",
    "run.attention": "runtime.attention",
    "run.cuda_graph": "runtime.cuda_graph",
    "run.fuse": "runtime.compile",
}
# keys that older versions had -> their replacement; they are ignored in a stored config.yaml, and else refused
REMOVED = {
    "resilience.stop_on_nonfinite": "resilience.on_nonfinite says what happens",
    "resilience.in_process_restarts": "torchrun --max-restarts and `ettin launch` restart ranks that failed",
}
_noted: set[str] = set()


def current_name(key: str) -> str:
    """Return the current name of a key that may be given by its older name."""
    return RENAMED.get(key, key)


def rename_keys(groups: dict[str, Any]) -> None:
    """Replace older names of keys by the current ones, in place. Rank 0 logs each name once in a process.

    Args:
        groups: group -> key -> value.

    Raises:
        UserError: a key is given by both names.
    """
    notes = []
    for old, new in RENAMED.items():
        (old_group, _, old_name), (new_group, _, new_name) = old.partition("."), new.partition(".")
        keys = groups.get(old_group)
        if not isinstance(keys, dict) or old_name not in keys:
            continue
        target = keys if new_group == old_group else groups.get(new_group) or {}
        if not isinstance(target, dict):
            # read_layers or from_yaml reports that the group is no mapping
            continue
        if new_name in target:
            raise UserError(f"{new}: {old} is its older name, and both are set; remove {old}")
        # not in place: a layer of a YAML file is shared by several phases
        kept = {key: value for key, value in keys.items() if key != old_name}
        groups[old_group] = kept
        groups[new_group] = (kept if new_group == old_group else target) | {new_name: keys[old_name]}
        if old not in _noted:
            notes.append(f"{old} is called {new} now")
            _noted.add(old)
    if notes and int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == 0:
        log_warning(f"note: {', '.join(notes)}; the older name{'s are' if len(notes) > 1 else ' is'} still read")


# names of Megatron-LM, Hugging Face's Trainer and Composer, without dashes
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "optimizer": "optim.name",
    "max_grad_norm": "optim.clip_grad",
    "grad_clip": "optim.clip_grad",
    "gradient_clip_val": "optim.clip_grad",
    "batch_size": "batch.global_batch_rows",
    "global_batch_size": "batch.global_batch_rows",
    "global_train_batch_size": "batch.global_batch_rows",
    "micro_batch_size": "batch.micro_batch_rows",
    "per_device_train_batch_size": "batch.micro_batch_rows",
    "device_train_microbatch_size": "batch.micro_batch_rows",
    "seq_length": "data.seq_len",
    "sequence_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "data_path": "data.mixture",
    "dataset": "data.mixture",
    "train_iters": "run.steps",
    "max_steps": "run.steps",
    "max_duration": "run.tokens",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "bf16": "precision.name",
    "fp8": "precision.name",
    "precision": "precision.name",
    "save_interval": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_interval": "metrics.eval_every_steps",
    "eval_steps": "metrics.eval_every_steps",
    "logging_steps": "metrics.every_steps",
}


def nearest_key(written: str, keys: Collection[str]) -> str:
    """Return a hint for an unknown key, such as ` (did you mean 'optim.lr'?)` for `lr` or `learning-rate`; or empty."""
    known = same_name(written, keys)
    if known is not None:
        return f" (did you mean {known!r}?)"
    name = _bare(written)
    if "." in written:
        return nearest(written, [key for key in keys if _bare(key) == name] or keys)
    return nearest(written, keys) or _by_name(name, keys)


def same_name(written: str, keys: Collection[str]) -> str | None:
    """Return the only key of that name in any group, else the key that another system calls so, else None."""
    name = _bare(written)
    same = [key for key in keys if _bare(key) == name]
    if len(same) == 1:
        return same[0]
    return ELSEWHERE[name] if ELSEWHERE.get(name) in keys else None


def _bare(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_")


def _by_name(name: str, keys: Collection[str]) -> str:
    """Return the hint for a key that is written without its group and with a typo; empty if no name is close."""
    names = {_bare(key): key for key in keys}
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def unknown_group(group: str, keys: Any, types: Collection[str]) -> str:
    """Return the message for an unknown group, with a hint: a key, a phase before a key, or another group.

    Args:
        group: the unknown name.
        keys: the value given for it, a mapping of keys if it is a group.
        types: every known `group.key`.
    """
    groups = {key.partition(".")[0] for key in types}
    only = next(iter(keys)) if isinstance(keys, dict) and len(keys) == 1 else None
    if isinstance(only, str) and "." in only:
        return f"unknown key '{group}.{only}'{nearest(group, PHASES)}"
    hint = nearest(group, groups)
    if isinstance(only, str):
        return f"unknown key '{group}.{only}'{nearest_key(f'{group}.{only}', types) or hint}"
    return f"unknown key {group!r}{hint or nearest_key(group, types)}"
