"""Describe a checkpoint or a run directory as a dictionary, for people and for JSON.

No weights are loaded: shapes come from `.metadata`, sizes from integrity.json, and the run's state from the last
complete line of metrics.jsonl. The run may be training meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import format_count, printable
from megatron_ettin.checkpoint.directory import list_checkpoints, read_config, read_progress, total_bytes
from megatron_ettin.checkpoint.integrity import check_nothing_else, verify as verify_checkpoint
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.config.tables import long_name, short_name
from megatron_ettin.metrics.record import METRICS_FILE
from megatron_ettin.runs.directory import RunDirectory

OPTIMIZER, FP8_SCALES = "optimizer.", "fp8_scales."
_RUN_KEYS = ("size", "objective", "phase")


def describe(path: Path, verify: bool = False) -> dict[str, Any]:
    """Describe a checkpoint or a run.

    Args:
        path: a checkpoint or a run directory.
        verify: compare every checksum.

    Returns:
        Its description, with `kind` "checkpoint" or "run".

    Raises:
        UserError: `path` is neither, or a file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a dataset, a checkpoint or a run directory")
    if (path / "metadata.json").is_file():
        return describe_checkpoint(path, verify)
    if (path / "checkpoints").is_dir() or ((path / "config.yaml").is_file() and (path / METRICS_FILE).is_file()):
        return describe_run(path, verify)
    raise UserError(f"{path}: neither a checkpoint (no metadata.json) nor a run directory (no checkpoints/)")


def describe_checkpoint(path: Path, verify: bool = False) -> dict[str, Any]:
    """Return the description of a checkpoint: step, run, shapes, contents, size. Raises UserError."""
    if verify:
        check_nothing_else(path)
        verify_checkpoint(path)
    groups = read_config(path)
    run = groups.get("run") or {}
    progress = read_progress(path)
    reader = CheckpointReader(path)
    others = (OPTIMIZER, FP8_SCALES)
    weights = {key: reader.shape(key) for key in reader.keys() if not key.startswith(others)}  # noqa: SIM118
    optimizer = [key for key in reader.keys() if key.startswith(OPTIMIZER)]  # noqa: SIM118
    dtypes = sorted({str(reader.dtype(key)).removeprefix("torch.") for key in weights})
    return {
        "kind": "checkpoint",
        "path": str(path),
        "step": progress.get("step"),
        "tokens": progress.get("tokens"),
        **{key: run.get(key) for key in _RUN_KEYS},
        **_names(run, groups.get("model")),
        "parameters": sum(map(math.prod, weights.values())),
        "dtypes": dtypes,
        "tensors": {key: list(shape) for key, shape in weights.items()},
        "optimizer": bool(optimizer),
        "optimizer_tensors": len(optimizer),
        "tokenizer": (path / "tokenizer").is_dir(),
        "bytes": total_bytes(path),
        "verified": verify,
    }


def describe_run(path: Path, verify: bool = False) -> dict[str, Any]:
    """Return the description of a run: configuration, last step, checkpoints. Raises UserError."""
    directory = RunDirectory(path)
    groups = directory.groups
    run, model, batch = (groups.get(name) or {} for name in ("run", "model", "batch"))
    checkpoints = list_checkpoints(path)
    if verify:
        for checkpoint in checkpoints:
            check_nothing_else(checkpoint)
            verify_checkpoint(checkpoint)
    steps = directory.steps if (path / METRICS_FILE).is_file() else {}
    last = next(reversed(steps.values()), dict[str, Any]())
    return {
        "kind": "run",
        "path": str(path),
        **{key: run.get(key) for key in (*_RUN_KEYS, "seed")},
        **_names(run, model),
        "config": {
            **{key: model.get(key) for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
            "seq_len": (groups.get("data") or {}).get("seq_len"),
            "global_batch_rows": batch.get("global_batch_rows"),
            "precision": (groups.get("precision") or {}).get("name"),
            **{axis: (groups.get("parallel") or {}).get(axis) for axis in ("tp", "pp", "vpp", "cp")},
        },
        **{key: last.get(key) for key in ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second")},
        "checkpoints": [checkpoint.name for checkpoint in checkpoints],
        "verified": verify,
    }


def render(description: dict[str, Any]) -> str:
    """Return a description as lines for people."""
    rows = _checkpoint_rows(description) if description["kind"] == "checkpoint" else _run_rows(description)
    return "\n".join(f"{name:<12} {printable(value)}" for name, value in rows)


def _named(description: dict[str, Any]) -> str:
    named = " ".join(str(description[key] or "?") for key in ("name", "objective", "phase"))
    return f"{named}: {description['model']}" if description["model"] else named


def _names(run: dict[str, Any], model: object) -> dict[str, str]:
    """Return the model's short name (`name`) and its long name with parameters and shape (`model`)."""
    return {"name": short_name(run.get("size"), model), "model": long_name(run.get("size"), model)}


def _checkpoint_rows(description: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "checkpoint", description["path"]
    yield "run", _named(description)
    yield "step", f"{description['step'] or 0:,} ({format_count(description['tokens'] or 0)} tokens)"
    count = description["parameters"]
    tensors, dtypes = len(description["tensors"]), ", ".join(description["dtypes"])
    yield "weights", f"{count:,} ({format_count(count)}) in {tensors} tensors, {dtypes}"
    held = f"{description['optimizer_tensors']} tensors" if description["optimizer"] else "none: weights only"
    yield "optimizer", held
    yield "tokenizer", "yes" if description["tokenizer"] else "none"
    yield "bytes", f"{description['bytes']:,}"
    yield "checksums", _verified(description)


def _run_rows(description: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "run", description["path"]
    yield "recipe", f"{_named(description)}, seed {description['seed']}"
    yield "config", ", ".join(f"{key} {value}" for key, value in description["config"].items() if value is not None)
    if description["step"] is None:
        yield "step", "none recorded yet"
    else:
        loss = description["loss"]
        shown = "not finite" if loss is None else f"{loss:.4f}"
        yield "step", f"{description['step']:,} ({format_count(description['tokens'] or 0)} tokens), loss {shown}"
    yield "checkpoints", ", ".join(description["checkpoints"]) or "none yet"
    yield "checksums", _verified(description)


def _verified(description: dict[str, Any]) -> str:
    return "all good" if description["verified"] else "not checked (--verify)"
