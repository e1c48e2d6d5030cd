"""Run public evaluations of an exported folder: lm-evaluation-harness for decoders, mteb for encoders.

Both are extras (`pip install megatron_ettin[harness]`), imported only when they are used. A task is one of the
harness's own, or is read from the user's folder of YAML files with `data_files` (lm) or Python file of AbsTask classes
(mteb).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.log import error_stream
from megatron_ettin.base.parsing import load_json
from megatron_ettin.checkpoint.directory import read_config, resolve
from megatron_ettin.config.tables import OBJECTIVES
from megatron_ettin.convert.from_hf import is_hf_folder
from megatron_ettin.platform.device import device_name

# name of the harness -> (module, objective of the models that it evaluates)
HARNESSES = {"lm": ("lm_eval", "clm"), "mteb": ("mteb", "mlm")}
EXTRA = "pip install megatron_ettin[harness]"


# value of --as -> objective of the export
READINGS = {"encoder": "mlm", "decoder": "clm"}
READING_OF = {objective: reading for reading, objective in READINGS.items()}


def trained_as(path: Path) -> tuple[str, ...]:
    """Return the exports ("mlm", "clm") that a run, a checkpoint or a Hugging Face folder was trained for.

    The result is empty if that cannot be read.
    """
    try:
        if is_hf_folder(path):
            names = load_json((path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
            causal = any("CausalLM" in str(name) or "LMHead" in str(name) for name in names)
            return (("clm",) if causal else ("mlm",)) if names else ()
        return OBJECTIVES[read_config(resolve(path))["run"]["objective"]].exports
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def check_reading(harness: str, path: Path, reading: str | None) -> None:
    """Raise UserError if a model was not trained as what the harness evaluates, and `reading` does not allow that.

    `reading` is the value of --as; it must be what the harness evaluates. None allows only what was trained.
    """
    needed = HARNESSES[harness][1]
    if reading is not None and READINGS[reading] != needed:
        raise UserError(f"--as {reading}: --harness {harness} is for {READING_OF[needed]}s")
    trained = trained_as(path)
    if not trained or needed in trained:
        return
    if is_hf_folder(path) and harness == "lm":
        raise UserError(f"--harness lm: {path} holds an encoder's class, which cannot generate; name a decoder's")
    if reading is None:
        wanted, other = READING_OF[needed], READING_OF[trained[0]]
        raise UserError(
            f"--harness {harness}: is for {wanted}s, and {path} was trained as {'an' if other[0] in 'aeiou' else 'a'}"
            f" {other}; --as {wanted} evaluates it as what it was not trained as"
        )


def check(harness: str, tasks: Sequence[str], task_path: Path | None, path: Path, reading: str | None) -> str:
    """Check an evaluation before it begins, and return the objective that the harness is for.

    Args:
        harness: name of the harness.
        tasks: names of its tasks.
        task_path: folder or file of more tasks.
        path: the run, checkpoint or folder.
        reading: value of --as.

    Raises:
        UserError: the harness, its tasks or the model cannot be used.
    """
    module, objective = HARNESSES[harness]
    if not tasks:
        raise UserError(f"--harness {harness}: name its tasks with --tasks NAME,NAME")
    if task_path is not None and not task_path.exists():
        raise UserError(f"--task-path {task_path}: no such file or folder")
    check_reading(harness, path, reading)
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--harness {harness}: {module} is not installed; {EXTRA}")
    return objective


def evaluate(
    harness: str, folder: Path, tasks: Sequence[str], task_path: Path | None, limit: int | None, batch_rows: int
) -> dict[str, dict[str, float]]:
    """Evaluate a Hugging Face folder, and return the figures by task and measure.

    Args:
        harness: name of the harness.
        folder: the exported model.
        tasks: names of the tasks.
        task_path: folder or file of more tasks.
        limit: number of examples for each task; None: all. Used by lm only.
        batch_rows: rows of a forward pass.

    Raises:
        UserError: a task does not exist.
    """
    run = {"lm": _lm_eval, "mteb": _mteb}[harness]
    # standard output is for the result alone
    with contextlib.redirect_stdout(error_stream()):
        return run(folder, tasks, task_path, limit, batch_rows)


def _lm_eval(
    folder: Path, tasks: Sequence[str], task_path: Path | None, limit: int | None, batch_rows: int
) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        close = nearest(unknown[0], manager.all_tasks)
        raise UserError(
            f"--tasks: lm-evaluation-harness has no {unknown[0]!r}{close}; --task-path names a folder of more"
        )
    results = lm_eval.simple_evaluate(
        model="hf",
        # as the paper's decoders were evaluated; chunks begin with this token in training too
        model_args={"pretrained": str(folder), "add_bos_token": True, "dtype": "float32"},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_rows,
        device=device_name(),
    )
    return {task: _figures(measures) for task, measures in results["results"].items()}


def _mteb(
    folder: Path, tasks: Sequence[str], task_path: Path | None, limit: int | None, batch_rows: int
) -> dict[str, dict[str, float]]:
    import mteb
    from sentence_transformers import SentenceTransformer

    own = _tasks_of(task_path) if task_path else {}
    chosen: list[Any] = []
    for name in tasks:
        try:
            chosen.append(own[name]() if name in own else mteb.get_task(name))
        except KeyError:
            hint = nearest(name, own)
            raise UserError(f"--tasks: mteb has no {name!r}{hint}; --task-path names a Python file of more") from None
    model = SentenceTransformer(str(folder))
    results = mteb.evaluate(model, chosen, encode_kwargs={"batch_size": batch_rows}, cache=None)
    # mteb's mean over all subsets and splits of a task
    return {result.task_name: {"main_score": float(result.get_score())} for result in results.task_results}


def _tasks_of(path: Path) -> dict[str, Any]:
    """Load the AbsTask classes of a Python file by name."""
    from mteb.abstasks import AbsTask

    spec = importlib.util.spec_from_file_location("ettin_tasks", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--task-path {path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes: list[Any] = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, AbsTask)]
    return {task.metadata.name: task for task in classes if getattr(task, "metadata", None) is not None}


def _figures(measures: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a task's measures with short names: `acc,none` becomes `acc`."""
    return {
        key.split(",")[0] if key.endswith(",none") else key: float(value)
        for key, value in measures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
