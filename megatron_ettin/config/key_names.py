"""What somebody meant who wrote a key that does not exist: a typo, a key without its group, another system's name."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from megatron_ettin.base.errors import nearest

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
# keys whose values name files or folders
KEYS_OF_FILES = ("data.mixture", "data.root", "data.order", "data.validation", "data.local_copy", "data.tokenizer")


def nearest_key(written: str, keys: Collection[str]) -> str:
    """` (did you mean 'optim.lr'?)` for `lr`, `optm.lr`, `optim.learning_rate`, `learning-rate`; else nothing."""
    known = same_name(written, keys)
    if known is not None:
        return f" (did you mean {known!r}?)"
    name = _bare(written)
    if "." in written:
        return nearest(written, [key for key in keys if _bare(key) == name] or keys)
    return nearest(written, keys) or _by_name(name, keys)


def same_name(written: str, keys: Collection[str]) -> str | None:
    """The one key of that name, whatever group was written, or what another system's name is here."""
    name = _bare(written)
    same = [key for key in keys if _bare(key) == name]
    if len(same) == 1:
        return same[0]
    return ELSEWHERE[name] if ELSEWHERE.get(name) in keys else None


def _bare(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_")


def _by_name(name: str, keys: Collection[str]) -> str:
    """Of a key without a group and with a typo."""
    names = {_bare(key): key for key in keys}
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""
