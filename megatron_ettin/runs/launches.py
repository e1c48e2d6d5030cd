"""Check and record a launch in a run directory: configuration, what may not change, lock, history, and rollbacks.

The first launch fixes the science keys. Another value is refused unless `--allow-change KEY` allows it, and then
history.jsonl records the change. The data order is fixed by its fingerprint, not by a path.

A rollback to an earlier step (`--from-step N`) moves later checkpoints aside and deletes none. A requeued job runs the
same command again and must continue instead of going back again: each rollback is recorded, and done once for the same
step and the same `data.skip`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin import __version__
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeldError, try_lock, write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import load_yaml
from megatron_ettin.base.versions import code_hash, recorded_commit
from megatron_ettin.checkpoint.directory import (
    LATEST,
    at_step,
    checkpoints_folder,
    list_checkpoints,
    list_milestones,
    read_config,
    resolve,
    step_of,
)
from megatron_ettin.checkpoint.integrity import verify
from megatron_ettin.config.key_names import current_name, nearest_key
from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import GUARD_KEYS, BatchConfig, Config, key_types, science_keys
from megatron_ettin.config.values import parse_skips, row_ranges
from megatron_ettin.data.blended_dataset import BlendedDataset, order_indices
from megatron_ettin.metrics.record import METRICS_FILE
from megatron_ettin.runs.directory import CONFIG, HISTORY, ORDER, ROLLED_BACK, RunDirectory, fixes_guard

# folder of the checkpoints that a roll-back moves aside
ASIDE = "rolled_back"
# these stand for the data order's fingerprint in --allow-change
DATA_KEY = "data.mixture"
ORDER_KEY = "data.order"


def check_writable(run_dir: Path, what: str = "run directory ") -> None:
    """Create a folder if it does not exist, and raise UserError if no files can be written in it.

    Args:
        run_dir: the folder.
        what: text before the folder's path in messages.
    """
    probe = run_dir / f".tmp-probe-{platform.node()}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{what}{run_dir}: cannot be written ({error.strerror or error})") from None
    for name in (".lock", HISTORY, METRICS_FILE):
        path = run_dir / name
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written, it is another user's (uid {path.stat().st_uid}); chmod g+w it")


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other launches out of `run_dir` during the block. If this process dies, its lock ends.

    Raises UserError if another launch holds the lock. A file system without locks causes a warning.
    """
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        try:
            why = try_lock(file.fileno())
        except LockHeldError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"run directory {run_dir}: {holder} is training in it; wait for it or stop it") from None
        if why is not None:
            log_warning(
                f"warning: {run_dir}: its file system has no locks ({why}); start no second run in it meanwhile"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def check_unchanged(run_dir: Path, config: Config, corpus: BlendedDataset, allow: Sequence[str]) -> list[str]:
    """Return the science keys in `allow` that differ from the run's record. Raises UserError if others differ."""
    allow = [current_name(key) for key in allow]
    for key in allow:
        if key not in key_types():
            raise UserError(f"--allow-change {key}: no such key{nearest_key(key, key_types())}")
    run = RunDirectory(run_dir)
    saved = next(iter([*list_checkpoints(run_dir)[-1:], *list_milestones(run_dir)[-1:]]), None)
    if not run.has_begun:
        if saved is not None:
            raise UserError(
                f"{run_dir / CONFIG}: missing, though the run has checkpoints: nothing says what it may not change; put"
                f" {saved / CONFIG} there"
            )
        return []
    before, now = run.science, science_keys(config)
    changed = [key for key in now if before.get(key) != now[key] and (key in before or key not in GUARD_KEYS)]
    known = run.fingerprint
    if known is None and saved is not None and not {DATA_KEY, ORDER_KEY} & set(allow):
        raise UserError(
            f"{run_dir / ORDER}: missing or damaged, though the run has checkpoints: nothing says what data they"
            f" were trained on; put it back, or if the data are the same go on with --allow-change {DATA_KEY}"
        )
    # rows left out are a key of their own, data.skip
    if known not in (None, corpus.unskipped_fingerprint) and not set(changed) & {"run.seed", "run.phase"}:
        key = DATA_KEY if corpus.row_limit is None else ORDER_KEY
        changed += [key] * (key not in changed)
        other = other_datasets(run.order, corpus)
        before[key], now[key] = str(known)[:12], corpus.unskipped_fingerprint[:12] + other
    for key in changed:
        if key not in allow:
            raise UserError(
                f"{run_dir}: was started with {key}={before.get(key)}, now {key}={now[key]}; start another run"
                f" directory, or go on with --allow-change {key}"
            )
    return changed


def guard_rule_note(run_dir: Path, now: ResilienceConfig) -> str | None:
    """Return a line if the run began under an older version's rule for bad steps; None if not."""
    run = RunDirectory(run_dir)
    if not run.has_begun or fixes_guard(run.stored_groups):
        return None
    before = run.config.resilience
    return (
        f"this run began under an older rule for spikes (resilience.on_spike={before.on_spike}); from here on it is"
        f" on_spike={now.on_spike}, judged by the logarithm of the gradient norm, and fixed for this run"
    )


def check_skips(run_dir: Path, corpus: BlendedDataset, trained_rows: int) -> None:
    """Raise UserError if `data.skip` changed within the rows already trained on, because later rows would move."""
    run = RunDirectory(run_dir)
    before = parse_skips(run.config.data.skip) if run.has_begun else corpus.skips
    reached = int(order_indices(trained_rows - 1, before)) + 1 if trained_rows else 0
    for first, end in sorted(set(before) ^ set(corpus.skips)):
        if first < reached:
            raise UserError(
                f"data.skip: {first}:{end} begins before row {reached}, up to which this run has trained; go back with"
                " --from-step first"
            )


def other_datasets(order: dict[str, Any], corpus: BlendedDataset) -> str:
    """Return a text that names the datasets that order.json (`order`) does not list; empty if there are none."""
    listed = order.get("datasets")
    known = {one for one in listed if isinstance(one, str)} if isinstance(listed, list) else set()
    other = [str(dataset.path) for dataset in corpus.datasets if dataset.fingerprint not in known]
    return f" (dataset {', '.join(other)} holds other tokens than at the latest launch)" if known and other else ""


def check_checkpoint(checkpoint: Path, run_dir: Path, config: Config, allow: Sequence[str]) -> None:
    """Raise UserError if a science key in a checkpoint's config.yaml differs: the checkpoint is then another run's.

    Keys that a launch of this run was allowed to change may differ.
    """
    groups, own = read_config(checkpoint), load_yaml(to_yaml(config))
    allowed = {*map(current_name, allow), *RunDirectory(run_dir).changes}
    if not fixes_guard(groups):
        allowed |= set(GUARD_KEYS)
    for name in science_keys(config):
        group, _, key = name.partition(".")
        theirs = groups.get(group)
        # an order's path may change, its content is compared by its fingerprint; earlier versions had fewer keys
        if name == ORDER_KEY or name in allowed or not isinstance(theirs, dict) or key not in theirs:
            continue
        if theirs[key] != own[group][key]:
            raise UserError(
                f"{checkpoint}: was written with {name}={theirs[key]}, this run has {own[group][key]}: it is another"
                f" run's; take it out of {checkpoint.parent}, or go on with --allow-change {name}"
            )


def origin(
    run_dir: Path, init_from: Path | None, from_step: int | None, inherited_model_keys: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what history.jsonl records of the weights that a new run begins from, for `ettin release`.

    It is empty for a later launch, and for initial weights. The path of `init_from` is recorded absolute and relative
    to the run directory, so that runs moved together still find each other; `from_step` None takes its latest step.
    """
    if init_from is None or RunDirectory(run_dir).first_launch is not None:
        return {}
    source = (resolve(init_from) if from_step is None else at_step(init_from, from_step)).absolute()
    relative = os.path.relpath(source, run_dir.absolute())
    return {"init_from": str(source), "init_from_relative": relative, "model_of_weights": dict(inherited_model_keys)}


def order_record(batch: BatchConfig, corpus: BlendedDataset) -> dict[str, Any]:
    """Return the content of order.json: which rows a run is trained on, in which order."""
    return {
        "fingerprint": corpus.fingerprint,
        "unskipped_fingerprint": corpus.unskipped_fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "datasets": [dataset.fingerprint for dataset in corpus.datasets],
        "rows_per_step": batch.global_batch_rows,
        "mean_tokens_per_row": corpus.mean_tokens_per_row,
    }


def check_reader(config: Config, corpus: BlendedDataset, reader: BlendedDataset) -> None:
    """Raise UserError if batches would be read from other rows than the run records.

    Args:
        config: configuration of the run.
        corpus: the rows that the run records.
        reader: the rows that batches are read from, for instance a copy on this host.
    """
    recorded, read = order_record(config.batch, corpus), order_record(config.batch, reader)
    for key, value in recorded.items():
        if read[key] != value:
            raise UserError(
                f"data: the batches are read in another order than order.json records: {key} is {read[key]!s:.20} and"
                f" not {value!s:.20}; nothing was trained; this is a fault of the package"
                + (", start without data.local_copy" if config.data.local_copy else "")
            )


def write_launch(run_dir: Path, config: Config, corpus: BlendedDataset, launch: dict[str, Any]) -> None:
    """Write config.yaml and order.json, and append `launch` to history.jsonl. Only one rank may call this."""
    write_atomically(run_dir / CONFIG, to_yaml(config))
    write_atomically(run_dir / ORDER, json.dumps(order_record(config.batch, corpus), indent=1) + "\n")
    record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "version": __version__}
    record |= {"code": code_hash(), "commit": recorded_commit(), "host": socket.gethostname(), **launch}
    with open(run_dir / HISTORY, "a", encoding="utf-8") as history:
        history.write(json.dumps(record) + "\n")


def check_roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> None:
    """Raise UserError if `roll_back` was not done with these arguments before and `step` has no checkpoint."""
    if not _was_done(run_dir, step, skip):
        at_step(run_dir, step)


def _was_done(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    # earlier versions recorded the skips as text
    done = [(entry.get("to"), row_ranges(entry.get("skip"), "skip")) for entry in RunDirectory(run_dir).rollbacks]
    return (step, skip) in done


def roll_back(run_dir: Path, step: int, skip: list[list[int]] | None) -> bool:
    """Make `step` the newest checkpoint of the run, and move later ones aside.

    If a call is killed, the next call with the same arguments finishes its work.
    Returns False, without doing anything, if the run went back to `step` with the same `skip` (`data.skip`) before.
    Raises UserError if the step has no checkpoint, a milestone only, or a damaged checkpoint.
    """
    if _was_done(run_dir, step, skip):
        return False
    target = at_step(run_dir, step)
    if target.parent != checkpoints_folder(run_dir):
        raise UserError(f"--from-step {step}: {target} holds weights alone; begin a new run with --init-from {target}")
    verify(target)
    write_atomically(target.parent / LATEST, target.name + "\n")
    aside = run_dir / ASIDE
    for path in (*list_checkpoints(run_dir), *list_milestones(run_dir)):
        if step_of(path) > step:
            target_path = aside / path.parent.name / path.name
            target_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target_path, ignore_errors=True)
            os.rename(path, target_path)
    entry = {"to": step, "skip": skip, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomically(run_dir / ROLLED_BACK, json.dumps([*RunDirectory(run_dir).rollbacks, entry], indent=1) + "\n")
    return True
