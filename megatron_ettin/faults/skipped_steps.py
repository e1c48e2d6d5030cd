"""Record a step whose figures are anomalous, with its rows and documents, and stop the run if that is configured.

`RUN/bad_steps/step_000000012.parquet` is the table of `ettin order` for step 12. `RUN/bad_steps.jsonl` has a line for
each anomalous step, and another one if the step was trained again after a restart and was anomalous again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.checkpoint.directory import list_checkpoints, step_name, step_of
from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.faults.anomalies import Anomaly
from megatron_ettin.faults.consistency import replay_check
from megatron_ettin.metrics.record import finite
from megatron_ettin.runs.order_export import write_parquet
from megatron_ettin.train.hooks.base import Run
from megatron_ettin.train.progress import Progress, StepResult

FOLDER = "bad_steps"


class TrainingStoppedError(RuntimeError):
    """The run cannot continue, and not because of a mistake in the configuration (exit status 1)."""


class BadNumbersError(TrainingStoppedError):
    """The run ends because of one or more steps with anomalous figures."""


def handle_anomaly(run: Run, info: StepResult, anomaly: Anomaly, after: Progress) -> None:
    """Report an anomalous step, in the log, in RUN/bad_steps and in `info.extra` (collective).

    If `resilience.recheck` is set, a replay check first separates bad data from faulty hardware.

    Args:
        run: the run.
        info: result of the step.
        anomaly: anomaly of the step.
        after: the progress after the step.

    Raises:
        BadNumbersError: the run must end. All ranks raise it, because all have the same figures, and before a
            checkpoint of the step is saved.
        SilentDataCorruptionError: the replay check computed other bits on this rank.
    """
    if run.config.resilience.recheck:
        run.heartbeat.enter("computing a step again")
        finding = replay_check(run.train_state, run.batches, info.step - 1)
        if run.is_main_process:
            log_warning(f"step {info.step}: {finding}")
    result = outcome(run.config.resilience, anomaly, after)
    line = record(run, info, anomaly, after, result) if run.is_main_process else f"step {info.step}: stopped"
    if result == "stopped":
        raise BadNumbersError(line)
    if run.is_main_process:
        # a spike whose update was made is only a note
        log_warning(f"{'note' if result == 'warned' else 'warning'}: {line}")
    info.extra["bad"] = f"{result}: {anomaly.why}"


def outcome(settings: ResilienceConfig, anomaly: Anomaly, after: Progress) -> str:
    """Return the outcome of an anomalous step: "ignored", "warned", "skipped" or "stopped"."""
    too_many = after.skipped_in_row > settings.max_skips_in_row
    known = {"ignore": "ignored", "warn": "warned", "stop": "stopped"}
    return known.get(anomaly.action, "stopped" if too_many else "skipped")


def record(run: Run, info: StepResult, anomaly: Anomaly, after: Progress, result: str) -> str:
    """Write the step to RUN/bad_steps and bad_steps.jsonl (rank 0 only), and return its line for the log."""
    run_dir = run.directory
    rows = f"rows {info.rows[0]} to {info.rows[1] - 1}"
    table = run_dir / FOLDER / f"{step_name(info.step)}.parquet"
    entry: dict[str, Any] = {"step": info.step, "tokens": info.tokens, "outcome": result, "why": anomaly.why}
    entry |= {"loss": finite(info.loss), "grad_norm": finite(info.grad_norm), "lr": info.lr, "rows": list(info.rows)}
    entry |= {"in_row": after.skipped_in_row, "documents": str(table.relative_to(run_dir)), "time": time.time()}
    try:
        table.parent.mkdir(exist_ok=True)
        write_parquet(table, run.config, run.batches.corpus, range(info.step, info.step + 1))
        with open(run_dir / f"{FOLDER}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        named = f"documents in {table}"
    # a full disk must not end the run
    except (OSError, UserError) as error:
        named = f"`ettin order {run_dir} --steps {info.step}` names the documents ({error})"
    return f"step {info.step}: {anomaly.why}; {consequence(anomaly, after, result)}; {rows}, {named}"


def consequence(bad: Anomaly, after: Progress, result: str) -> str:
    """Return the part of the log line that says what happens because of an anomalous step."""
    if result == "skipped":
        return f"the update is left out ({after.skipped_in_row} in a row)"
    if result in ("ignored", "warned"):
        return "trained on all the same"
    in_row = f" after {after.skipped_in_row} in a row" if bad.action == "skip" and after.skipped_in_row else ""
    return f"the run stops{in_row}. Nothing of this step was saved"


def way_back(run_dir: Path, progress: Progress) -> str:
    """Return a message that names the last good checkpoint and how to continue from it.

    Only the next step shows whether an update was good. So a checkpoint of the last update that was made is not good:
    its weights gave the bad figures.
    """
    last_made = progress.step - progress.skipped_in_row
    steps = [step_of(path) for path in list_checkpoints(run_dir)]
    good = [step for step in steps if step < last_made]
    change = "change what led here (a lower optim.lr, data.skip=[[FIRST,END]] of the rows)"
    if last_made in steps:
        cause = f"the weights of {step_name(last_made)} gave these figures"
        if not good:
            return f"{cause}, and no checkpoint is older; {change} in another run directory"
        return f"{cause}; the last good checkpoint is {step_name(good[-1])}: {change} and add --from-step {good[-1]}"
    if not good:
        return f"no checkpoint was saved before; {change} and begin again"
    return (
        f"the last good checkpoint is {step_name(good[-1])}, from which the same command goes on: {change}, or go"
        " further back with --from-step"
    )
